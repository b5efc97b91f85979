// vec<T, N>: N numbers of type T in one register, on the vector extensions that GCC and Clang share. The
// cells' maths is written once against it and compiled for every instruction set; multiplication followed by
// addition becomes one fused instruction where there is one (-ffp-contract=fast).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../inline.h"

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

template <int N>
struct Bits {
  typedef uint16_t Half __attribute__((vector_size(N * 2)));
  typedef short Short __attribute__((vector_size(N * 2)));
  typedef uint32_t Whole __attribute__((vector_size(N * 4)));
};

template <class T, int N>
struct vec {
  using Register = typename Registers<T, N>::Aligned;
  using Unaligned = typename Registers<T, N>::Unaligned;
  using Mask = typename Registers<T, N>::Mask;
  using Scalar = T;
  static constexpr int size = N;

  Register v;

  vec() = default;
  FUSEDRNN_INLINE vec(Register r) : v(r) {}
  FUSEDRNN_INLINE explicit vec(T x) : v(x - Register{}) {}  // x - 0 is x even for -0, which makes this a bare broadcast

  static FUSEDRNN_INLINE vec load(const T* p) { return vec(*reinterpret_cast<const Unaligned*>(p)); }
  FUSEDRNN_INLINE void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  // The first n numbers only, 0 <= n <= N: nothing beyond them is touched, and the rest reads as zero. This runs at the end of
  // every row, hence no memcpy of variable size, which is a call.
  static FUSEDRNN_INLINE vec load(const T* p, int n) {
    if (n == N) return load(p);
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, float> && N == 8) {
      const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7};
      return vec(__builtin_ia32_maskloadps256(reinterpret_cast<const Register*>(p), lane < n));
    }
    if constexpr (std::is_same_v<T, float> && N == 16)
      return vec(__builtin_ia32_loadups512_mask(p, Register{}, static_cast<uint16_t>((1u << n) - 1)));
    if constexpr (std::is_same_v<T, double> && N == 8)
      return vec(__builtin_ia32_loadupd512_mask(p, Register{}, static_cast<uint8_t>((1u << n) - 1)));
#endif
    alignas(sizeof(Register)) T buffer[N] = {};
    copy<N / 2>(buffer, p, n);
    return load(buffer);
  }
  FUSEDRNN_INLINE void store(T* p, int n) const {
    if (n == N) return store(p);
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, float> && N == 16)
      return __builtin_ia32_storeups512_mask(p, v, static_cast<uint16_t>((1u << n) - 1));
    if constexpr (std::is_same_v<T, double> && N == 8)
      return __builtin_ia32_storeupd512_mask(p, v, static_cast<uint8_t>((1u << n) - 1));
#endif
    store<N / 2>(v, p, n, std::make_integer_sequence<int, N / 2>());
  }

 private:
  // N/2, N/4 … 1 numbers, as the bits of n say.
  template <int half>
  static FUSEDRNN_INLINE void copy(T* to, const T* from, int n) {
    const int part = n & half;
    if (part) std::memcpy(to, from, half * sizeof(T));
    if constexpr (half > 1) copy<half / 2>(to + part, from + part, n);
  }
  // The same from a register; a masked store takes some 20 instructions on a Zen 3.
  template <int half, class R, int... lane>
  static FUSEDRNN_INLINE void store(R r, T* p, int n, std::integer_sequence<int, lane...>) {
    const int part = n & half;
    if constexpr (half == 1) {
      if (part) *p = r[0];
    } else {
      const auto lower = __builtin_shufflevector(r, r, lane...),
                 upper = __builtin_shufflevector(r, r, (lane + half)...);
      if (part) std::memcpy(p, &lower, sizeof(lower));
      store<half / 2>(part ? upper : lower, p + part, n, std::make_integer_sequence<int, half / 2>());
    }
  }
};

// A stored bfloat16: the upper half of a float.
struct bfloat16 {
  uint16_t bits;
};
// Two of them, the second in the upper half: a vec of these is two vecs, for an instruction each.
struct bfloat16_pair {
  uint32_t bits;
};

// Numbers of another type in memory, as vecs of T; `n` as in vec::load and store.
template <class V, class T>
FUSEDRNN_INLINE V load(const T* p) {
  return V::load(p);
}
template <class V, class T>
FUSEDRNN_INLINE V load(const T* p, int n) {
  return V::load(p, n);
}
template <class V>
FUSEDRNN_INLINE V load(const bfloat16* p) {
  using Half = typename Bits<V::size>::Half;
  Half half;
  std::memcpy(&half, p, sizeof(half));
#if defined(__x86_64__)
  if constexpr (V::size == 8) {  // GCC 12 makes four instructions of the conversion
    const auto words = (typename Bits<V::size>::Short)half;
    return V((typename V::Register)(__builtin_ia32_pmovzxwd256(words) << 16));
  }
#endif
  return V((typename V::Register)(__builtin_convertvector(half, typename Bits<V::size>::Whole) << 16));
}
template <class V>
FUSEDRNN_INLINE V load(const bfloat16* p, int n) {
  if (n == V::size) return load<V>(p);
  bfloat16 buffer[V::size] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load<V>(buffer);
}
// Of N pairs the first ones (half 0) or the second.
template <class V, int half>
FUSEDRNN_INLINE V load_half(const void* p) {
  typename Bits<V::size>::Whole words;
  std::memcpy(&words, p, sizeof(words));
  return V((typename V::Register)(half ? words & 0xffff0000u : words << 16));
}
// Pairs as they are, from anywhere.
template <class V>
FUSEDRNN_INLINE V as_pairs(const void* p) {
  V pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}
template <class V>
FUSEDRNN_INLINE V load(const bfloat16_pair* p) {
  return as_pairs<V>(p);
}
// The first n numbers, 0 <= n <= 2N, and zeros.
template <class V>
FUSEDRNN_INLINE V as_pairs(const bfloat16* p, int n) {
  if (n % 2 == 0) return V::load(reinterpret_cast<const float*>(p), n / 2);
  bfloat16 buffer[2 * V::size] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return as_pairs<V>(buffer);
}
template <class V, class T>
FUSEDRNN_INLINE V broadcast_of(T x) {
  return V(x);
}
template <class V>
FUSEDRNN_INLINE V broadcast_of(bfloat16_pair x) {
  return V((typename V::Register)(x.bits - typename Bits<V::size>::Whole{}));
}
// 2N numbers at once, the even ones and the odd ones.
template <class V>
struct EvenOdd {
  V even, odd;
};
template <class V>
FUSEDRNN_INLINE EvenOdd<V> load_pairs(const bfloat16* p) {
  return {load_half<V, 0>(p), load_half<V, 1>(p)};
}
// The same of 2N numbers in two vecs.
template <class T, int N, int... lane>
FUSEDRNN_INLINE EvenOdd<vec<T, N>> pairs_of(vec<T, N> low, vec<T, N> high, std::integer_sequence<int, lane...>) {
  return {vec<T, N>(__builtin_shufflevector(low.v, high.v, (2 * lane)...)),
          vec<T, N>(__builtin_shufflevector(low.v, high.v, (2 * lane + 1)...))};
}
// Of numbers that are bfloat16s.
template <class V>
FUSEDRNN_INLINE void store_pairs(V even, V odd, bfloat16_pair* p) {
  using Whole = typename Bits<V::size>::Whole;
  const Whole words = ((Whole)even.v >> 16) | ((Whole)odd.v & 0xffff0000u);
  std::memcpy(p, &words, sizeof(words));
}

// The nearest bfloat16s, each in the upper half of its word.
template <int N>
FUSEDRNN_INLINE typename Bits<N>::Whole to_bfloat16(vec<float, N> x) {
  using Whole = typename Bits<N>::Whole;
  const auto bits = (Whole)x.v, nearest = bits + 0x7fff + (bits >> 16 & 1);
  return (x.v == x.v ? nearest : bits | 0x00400000) & 0xffff0000u;  // a NaN stays one
}
template <class V>
FUSEDRNN_INLINE typename Bits<V::size>::Half upper_halves(typename Bits<V::size>::Whole words) {
  return __builtin_convertvector(words >> 16, typename Bits<V::size>::Half);
}

template <class V, class T>
FUSEDRNN_INLINE void store(V x, T* p, int n) {
  x.store(p, n);
}
template <class V>
FUSEDRNN_INLINE void store(V x, bfloat16* p, int n) {
  const auto half = upper_halves<V>(to_bfloat16(x));
  if (n == V::size) {
    std::memcpy(p, &half, sizeof(half));
    return;
  }
  for (int i = 0; i < n; ++i) p[i].bits = half[i];
}

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

// a > b ? a : b and a < b ? a : b, hence b where either is NaN. GCC 12 makes two instructions of what x86 has as one.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> max(vec<T, N> a, vec<T, N> b) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float> && N == 8) return vec<T, N>(__builtin_ia32_maxps256(a.v, b.v));
#endif
  return vec<T, N>(a.v > b.v ? a.v : b.v);
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> min(vec<T, N> a, vec<T, N> b) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float> && N == 8) return vec<T, N>(__builtin_ia32_minps256(a.v, b.v));
#endif
  return vec<T, N>(a.v < b.v ? a.v : b.v);
}

// Two vecs that take the same instructions in turn. A sigmoid is one long chain, and of two in a row the second's
// instructions must find room in the scheduler beside the first's, which wait there (Zen 3, AVX2: forward of narrow layers
// is 2 to 5 % faster).
template <class V>
struct Twin {
  using Scalar = typename V::Scalar;

  V first, second;

  Twin() = default;
  FUSEDRNN_INLINE Twin(V first, V second) : first(first), second(second) {}
  FUSEDRNN_INLINE explicit Twin(Scalar x) : first(x), second(x) {}

  // The second `next` numbers after the first; at 0 both are one.
  static FUSEDRNN_INLINE Twin load(const Scalar* p, int64_t next) { return {V::load(p), V::load(p + next)}; }
  FUSEDRNN_INLINE void store(Scalar* p, int64_t next) const { first.store(p), second.store(p + next); }
  // The first n numbers of one, and m of the other.
  template <class T>
  FUSEDRNN_INLINE void store(T* p, int64_t next, int n, int m) const {
    fusedrnn::store(first, p, n);
    if (next) fusedrnn::store(second, p + next, m);
  }
};
template <class V, class T>
FUSEDRNN_INLINE void store(Twin<V> x, T* p, int64_t next, int n, int m) {
  x.store(p, next, n, m);
}

// Numbers in memory that are of S or, where `narrow` is set, of W, both of which may be const; none where neither is set. Where S
// and W are one type, they are `wide`.
template <class S, class W>
struct Numbers {
  S* wide = nullptr;
  W* narrow = nullptr;
  static constexpr bool alike = std::is_same_v<S, W>;

  static Numbers at(std::conditional_t<std::is_const_v<S>, const void*, void*> first, bool is_narrow) {
    if (!alike && is_narrow) return {nullptr, static_cast<W*>(first)};
    return {static_cast<S*>(first), nullptr};
  }
  FUSEDRNN_INLINE explicit operator bool() const { return wide || (!alike && narrow); }
  FUSEDRNN_INLINE Numbers operator+(int64_t n) const {
    return {wide ? wide + n : nullptr, narrow ? narrow + n : nullptr};
  }
  template <class V, class Count>
  FUSEDRNN_INLINE V load(int64_t at, Count n) const {
    return !alike && narrow ? fusedrnn::load<V>(narrow + at, n) : V::load(wide + at, n);
  }
  template <class V, class Count>
  FUSEDRNN_INLINE V load_or_zero(int64_t at, Count n) const {
    return *this ? load<V>(at, n) : V(typename V::Scalar(0));
  }
  // Counts are those of a vec or of a Twin.
  template <class V, class... Counts>
  FUSEDRNN_INLINE void store(V x, int64_t at, Counts... n) const {
    if constexpr (!alike)
      if (narrow) return fusedrnn::store(x, narrow + at, n...);
    fusedrnn::store(x, wide + at, n...);
  }
  void clear(int64_t at, int64_t n) const {
    if constexpr (!alike)
      if (narrow) return void(std::fill_n(narrow + at, n, W{}));
    std::fill_n(wide + at, n, S{});
  }
};

#define FUSEDRNN_OPERATOR(op)                                 \
  template <class V>                                          \
  FUSEDRNN_INLINE Twin<V> operator op(Twin<V> a, Twin<V> b) { \
    return {a.first op b.first, a.second op b.second};        \
  }
FUSEDRNN_OPERATOR(+)
FUSEDRNN_OPERATOR(-)
FUSEDRNN_OPERATOR(*)
FUSEDRNN_OPERATOR(/)
#undef FUSEDRNN_OPERATOR

// f(first, count) for each vec of n numbers.
template <int N, class F>
void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + N <= n; i += N) f(i, std::integral_constant<int, N>());
  if (i < n) f(i, static_cast<int>(n - i));
}

// n numbers as S.
template <class V, class S, class W>
void widen(const Numbers<const S, const W>& from, int64_t n, S* to) {
  each_vector<V::size>(n, [&](int64_t i, auto count) { from.template load<V>(i, count).store(to + i, count); });
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

}  // namespace
}  // namespace fusedrnn
