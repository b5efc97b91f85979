// The activations of csrc/cells on vecs, and on two at a time.
#pragma once

#include "../cells/activations.h"
#include "simd.h"

namespace fusedrnn {
namespace {

// A NaN in x passes through, as it does in relu.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return min(vec<T, N>(high), max(vec<T, N>(low), x));
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> relu(vec<T, N> x) {
  const vec<T, N> zero(T(0));
  return vec<T, N>(x.v < zero.v ? zero.v : x.v);
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> zero_unless_positive(vec<T, N> y, vec<T, N> dy) {
  const vec<T, N> zero(T(0));
  return vec<T, N>(y.v <= zero.v ? zero.v : dy.v);
}
template <class V>
FUSEDRNN_INLINE Twin<V> clamp(Twin<V> x, typename V::Scalar low, typename V::Scalar high) {
  return {clamp(x.first, low, high), clamp(x.second, low, high)};
}
template <class V>
FUSEDRNN_INLINE Twin<V> relu(Twin<V> x) {
  return {relu(x.first), relu(x.second)};
}
// As cells/saved.h has them.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> fold(vec<T, N> x) {
  const vec<T, N> one(T(1)), half(T(0.5));
  return vec<T, N>(x.v > half.v ? -(one.v - x.v) : x.v);
}
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> unfold(vec<T, N> x) {
  const vec<T, N> one(T(1));
  return vec<T, N>((typename vec<T, N>::Mask)x.v < 0 ? one.v + x.v : x.v);  // by the sign, which 1 has as -0
}
template <class V>
FUSEDRNN_INLINE Twin<V> fold(Twin<V> x) {
  return {fold(x.first), fold(x.second)};
}

// sigmoid and tanh, by exp(x) = 2^n·exp(r): x = n·ln2 + r with n whole and |r| <= ln2/2. exp(r) is its Taylor polynomial,
// of the degree at which the first term left out is below a quarter of the rounding error of r. Largest error over all
// floats and some 10^7 doubles, in units in the last place (tests/test_simd.py): sigmoid 2.5, tanh 2.6.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float ln2_high = 0.693359375f,
                         ln2_low = -2.12194440e-4f;  // Cody & Waite: n·ln2_high is exact
  static constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest whole number in the low bits
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float lowest = -87.0f, highest = 89.0f;  // n of -126, the last normal number, to 128, infinity
  static constexpr float tanh_is_one = 10.0f;
  static constexpr int degree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5·2^52
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double lowest = -708.0, highest = 710.0;  // n of -1021 to 1024
  static constexpr double tanh_is_one = 20.0;
  static constexpr int degree = 13;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1.0 : inverse_factorial(k - 1) / k; }

// Horner's scheme for sum of r^(j-k)/j! over j = k … degree. V is a vec or a Twin, here and below.
template <int k, class V>
FUSEDRNN_INLINE V taylor_tail(V r) {
  using T = typename V::Scalar;
  const V coefficient{T(inverse_factorial(k))};
  if constexpr (k == ExpConstants<T>::degree) {
    return coefficient;
  } else {
    return taylor_tail<k + 1>(r) * r + coefficient;
  }
}

// 2^n, from n + round, whose low bits are n; the shift drops the others.
template <class T, int N>
FUSEDRNN_INLINE vec<T, N> power_of_two(vec<T, N> shifted) {
  using V = vec<T, N>;
  const auto exponent = ((typename V::Mask)shifted.v + ExpConstants<T>::bias) << ExpConstants<T>::mantissa_bits;
  return V((typename V::Register)exponent);
}
template <class V>
FUSEDRNN_INLINE Twin<V> power_of_two(Twin<V> shifted) {
  return {power_of_two(shifted.first), power_of_two(shifted.second)};
}

template <class V>
struct Reduced {
  V power, r;  // 2^n
};

template <class V>
FUSEDRNN_INLINE Reduced<V> reduce(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  const V round(C::round), shifted = x * V(T(1.44269504088896340736)) + round, n = shifted - round;
  return {power_of_two(shifted), x - n * V(C::ln2_high) - n * V(C::ln2_low)};
}

template <class V, class T = typename V::Scalar>
FUSEDRNN_INLINE V sigmoid(V x) {
  const V zero(T(0)), one(T(1));
  const auto [power, r] = reduce(clamp(zero - x, ExpConstants<T>::lowest, ExpConstants<T>::highest));
  return one / (taylor_tail<0>(r) * power + one);
}

// tanh(x) = e/(e + 2) with e = exp(2x) - 1 = 2^n·(exp(r) - 1) + (2^n - 1), in which nothing cancels: small x
// keep all their digits.
template <class V, class T = typename V::Scalar>
FUSEDRNN_INLINE V tanh(V x) {
  constexpr T limit = 2 * ExpConstants<T>::tanh_is_one;
  const auto [power, r] = reduce(clamp(x + x, -limit, limit));
  const V expm1_r = r * r * taylor_tail<2>(r) + r, e = power * expm1_r + (power - V(T(1)));
  return e / (e + V(T(2)));
}

}  // namespace
}  // namespace fusedrnn
