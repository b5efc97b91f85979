// vec<T, N>: N numbers of type T in one register, on the vector extensions that GCC and Clang share. The
// cells' maths is written once against it and compiled for every instruction set; multiplication followed by
// addition becomes one fused instruction where there is one (-ffp-contract=fast).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../cells/activations.h"

namespace fusedrnn {
namespace {

// GCC drops the attribute where such a type is a dependent name of the class that uses it, hence a class of
// their own.
template <class T, int N>
struct Registers {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Aligned __attribute__((vector_size(N * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef Integer Mask __attribute__((vector_size(N * sizeof(T))));
};

template <class T, int N>
struct vec {
  using Register = typename Registers<T, N>::Aligned;
  using Unaligned = typename Registers<T, N>::Unaligned;
  using Mask = typename Registers<T, N>::Mask;
  static constexpr int size = N;

  Register v;

  vec() = default;
  FUSEDRNN_INLINE vec(Register r) : v(r) {}
  FUSEDRNN_INLINE explicit vec(T x) : v(x - Register{}) {}  // x - 0 is x even for -0, which makes this a bare broadcast

  static FUSEDRNN_INLINE vec load(const T* p) { return vec(*reinterpret_cast<const Unaligned*>(p)); }
  FUSEDRNN_INLINE void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  // The first n numbers only, 0 <= n <= N: nothing beyond them is touched, and the rest reads as zero.
  static FUSEDRNN_INLINE vec load(const T* p, int n) {
    if (n == N) return load(p);
    alignas(sizeof(Register)) T buffer[N] = {};
    move(buffer, p, n);
    return load(buffer);
  }
  FUSEDRNN_INLINE void store(T* p, int n) const {
    if (n == N) return store(p);
    alignas(sizeof(Register)) T buffer[N];
    store(buffer);
    move(p, buffer, n);
  }

 private:
  // Moves of N/2, N/4 … 1 numbers: a memcpy of variable size is a call, and this runs at the end of every
  // row.
  template <int half = N / 2>
  static FUSEDRNN_INLINE void move(T* to, const T* from, int n) {
    if constexpr (half > 0) {
      const int part = n & half;
      if (part) std::memcpy(to, from, half * sizeof(T));
      move<half / 2>(to + part, from + part, n);
    }
  }
};

#define FUSEDRNN_OPERATOR(op)                                       \
  template <class T, int N>                                         \
  FUSEDRNN_INLINE vec<T, N> operator op(vec<T, N> a, vec<T, N> b) { \
    return vec<T, N>(a.v op b.v);                                   \
  }
FUSEDRNN_OPERATOR(+)
FUSEDRNN_OPERATOR(-)
FUSEDRNN_OPERATOR(*)
FUSEDRNN_OPERATOR(/)
#undef FUSEDRNN_OPERATOR

// Comparisons with NaN are false, so min and max pass a NaN in x through; so does relu.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> clamp(vec<T, N> x, T low, T high) {
  const vec<T, N> lo(low), hi(high);
  x.v = x.v < lo.v ? lo.v : x.v;
  x.v = x.v > hi.v ? hi.v : x.v;
  return x;
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> relu(vec<T, N> x) {
  const vec<T, N> zero(T(0));
  return vec<T, N>(x.v < zero.v ? zero.v : x.v);
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> positive(vec<T, N> y) {
  const vec<T, N> zero(T(0)), one(T(1));
  return vec<T, N>(y.v > zero.v ? one.v : zero.v);
}

// Transposes an N×N square held in N registers: log2(N) rounds, each exchanging off-diagonal blocks.
template <int half, class T, int N, int... lane>
FUSEDRNN_INLINE void exchange_blocks(vec<T, N>& upper, vec<T, N>& lower, std::integer_sequence<int, lane...>) {
  const auto a = upper.v, b = lower.v;
  upper.v = __builtin_shufflevector(a, b, (lane & half ? N + lane - half : lane)...);
  lower.v = __builtin_shufflevector(a, b, (lane & half ? N + lane : lane + half)...);
}
template <int half, class T, int N>
FUSEDRNN_INLINE void transpose(vec<T, N> (&rows)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (!(i & half)) exchange_blocks<half>(rows[i], rows[i + half], std::make_integer_sequence<int, N>());
  if constexpr (half > 1) transpose<half / 2>(rows);
}

// The lower half of x plus the upper one, as a vec of half the size.
template <class T, int N, int... lane>
FUSEDRNN_INLINE vec<T, N / 2> add_halves(vec<T, N> x, std::integer_sequence<int, lane...>) {
  return vec<T, N / 2>(__builtin_shufflevector(x.v, x.v, lane...)) +
         vec<T, N / 2>(__builtin_shufflevector(x.v, x.v, (lane + N / 2)...));
}

// exp, sigmoid and tanh. x = n·ln2 + r with n whole and |r| <= ln2/2. exp(r) - 1 is its Taylor polynomial, of the
// degree at which the first term left out is below a quarter of the rounding error of r. Largest error over all floats
// and some 10^7 doubles, in units in the last place (tests/test_simd.py): exp 1.1, sigmoid 2.5, tanh 2.6.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float ln2_high = 0.693359375f,
                         ln2_low = -2.12194440e-4f;  // Cody & Waite: n·ln2_high is exact
  static constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest whole number in the low bits
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float lowest = -105.0f, highest = 90.0f;  // exp is 0 below, inf above
  static constexpr float tanh_is_one = 10.0f;
  static constexpr int degree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5·2^52
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double lowest = -746.0, highest = 711.0;
  static constexpr double tanh_is_one = 20.0;
  static constexpr int degree = 13;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// Horner's scheme for sum of r^(j-k)/j! over j = k … degree.
template <int k, class T, int N>
FUSEDRNN_INLINE vec<T, N> taylor_tail(vec<T, N> r) {
  const vec<T, N> coefficient{T(inverse_factorial(k))};
  if constexpr (k == ExpConstants<T>::degree) {
    return coefficient;
  } else {
    return taylor_tail<k + 1>(r) * r + coefficient;
  }
}

template <class T, int N>
struct Reduced {
  typename vec<T, N>::Mask n;
  vec<T, N> expm1_r;
};

template <class T, int N>
FUSEDRNN_INLINE Reduced<T, N> reduce(vec<T, N> x) {
  using C = ExpConstants<T>;
  using V = vec<T, N>;
  const V round(C::round), shifted = x * V(T(1.44269504088896340736)) + round, n = shifted - round;
  const V r = x - n * V(C::ln2_high) - n * V(C::ln2_low);
  return {(typename V::Mask)shifted.v - (typename V::Mask)round.v, r * r * taylor_tail<2>(r) + r};
}

template <class T, int N>
FUSEDRNN_INLINE vec<T, N> power_of_two(typename vec<T, N>::Mask n) {
  using C = ExpConstants<T>;
  return vec<T, N>((typename vec<T, N>::Register)((n + C::bias) << C::mantissa_bits));
}

template <class T, int N>
FUSEDRNN_INLINE vec<T, N> exp(vec<T, N> x) {
  const auto [n, expm1_r] = reduce(clamp(x, ExpConstants<T>::lowest, ExpConstants<T>::highest));
  const auto half = n >> 1;  // 2^n in two factors, or it would overflow before exp does
  return (expm1_r + vec<T, N>(T(1))) * power_of_two<T, N>(half) * power_of_two<T, N>(n - half);
}

template <class T, int N>
FUSEDRNN_INLINE vec<T, N> sigmoid(vec<T, N> x) {
  const vec<T, N> zero(T(0)), one(T(1));
  return one / (one + exp(zero - x));
}

// tanh(x) = e/(e + 2) with e = exp(2x) - 1 = 2^n·(exp(r) - 1) + (2^n - 1), in which nothing cancels: small x
// keep all their digits.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> tanh(vec<T, N> x) {
  using V = vec<T, N>;
  constexpr T limit = 2 * ExpConstants<T>::tanh_is_one;
  const auto [n, expm1_r] = reduce(clamp(x + x, -limit, limit));
  const V scale = power_of_two<T, N>(n), e = scale * expm1_r + (scale - V(T(1)));
  return e / (e + V(T(2)));
}

}  // namespace
}  // namespace fusedrnn
