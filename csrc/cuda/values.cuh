// Scalars as memory has them and as arithmetic takes them, and a few neighbours at once.
#pragma once

#include "device.cuh"

namespace fusedrnn::cuda {

// Storage only: arithmetic is in float.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// What a scalar type is computed and accumulated in.
template <class S>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

#if defined(FUSEDRNN_HOSTCUDA)
FUSEDRNN_DEVICE float widen(float16 x) { return shim::from_float16(x.bits); }
FUSEDRNN_DEVICE float widen(bfloat16 x) { return shim::from_bfloat16(x.bits); }
FUSEDRNN_DEVICE void narrow(float x, float16& to) { to.bits = shim::to_float16(x); }
FUSEDRNN_DEVICE void narrow(float x, bfloat16& to) { to.bits = shim::to_bfloat16(x); }
#else
FUSEDRNN_DEVICE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
FUSEDRNN_DEVICE float widen(bfloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
// By the instruction for two at once: that for one goes to the special function units, and is waited for.
FUSEDRNN_DEVICE void narrow(float x, float16& to) {
  to.bits = __half_as_ushort(__low2half(__floats2half2_rn(x, 0.0f)));
}
FUSEDRNN_DEVICE void narrow(float x, bfloat16& to) {
  to.bits = __bfloat16_as_ushort(__low2bfloat16(__floats2bfloat162_rn(x, 0.0f)));
}
#endif
FUSEDRNN_DEVICE float widen(float x) { return x; }
FUSEDRNN_DEVICE double widen(double x) { return x; }
FUSEDRNN_DEVICE void narrow(float x, float& to) { to = x; }
FUSEDRNN_DEVICE void narrow(double x, double& to) { to = x; }

// x, which the compiler shall keep in a register: what it can read or work out again, it does at every step of a loop, and
// the step waits for that. To be called by all threads of a warp.
#if defined(FUSEDRNN_HOSTCUDA)
template <class T>
FUSEDRNN_DEVICE T kept(T x) {
  return x;
}
template <class T>
FUSEDRNN_DEVICE T* kept_shared(T* x) {
  return x;
}
template <class T>
FUSEDRNN_DEVICE T* in_global(T* x) {
  return x;
}
template <class T>
FUSEDRNN_DEVICE T* in_shared(T* x) {
  return x;
}
#else
// Tell the compiler in which memory x lies, where it does not see it.
template <class T>
FUSEDRNN_DEVICE T* in_global(T* x) {
  __builtin_assume(__isGlobal(x));
  return x;
}
template <class T>
FUSEDRNN_DEVICE T* in_shared(T* x) {
  __builtin_assume(__isShared(x));
  return x;
}
// Handed to itself by every thread, which the compiler does not see; of what is the same for all it does, but for the lane.
template <class T>
FUSEDRNN_DEVICE T kept_bits(T x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return __shfl_sync(0xffffffff, x + lane, lane) - lane;
}
FUSEDRNN_DEVICE int kept(int x) { return kept_bits(x); }
FUSEDRNN_DEVICE bool kept(bool x) { return kept_bits<int>(x); }
template <class T>
FUSEDRNN_DEVICE T* kept(T* x) {
  return in_global(reinterpret_cast<T*>(kept_bits(reinterpret_cast<uint64_t>(x))));
}
// Likewise, of shared memory.
template <class T>
FUSEDRNN_DEVICE T* kept_shared(T* x) {
  return static_cast<T*>(__cvta_shared_to_generic(kept_bits(static_cast<uint32_t>(__cvta_generic_to_shared(x)))));
}
#endif

// Where there are registers for it. A pointer is one into shared memory.
template <bool keeps>
FUSEDRNN_DEVICE int kept_if(int x) {
  return keeps ? kept(x) : x;
}
template <bool keeps, class T>
FUSEDRNN_DEVICE T* kept_if(T* x) {
  return keeps ? kept_shared(x) : x;
}

// width neighbours in memory, loaded and stored in one access; the address is a multiple of their size.
template <class S, int width>
struct alignas(sizeof(S) * width) Pack {
  S value[width];
};

// width neighbours in registers.
template <class A, int width>
struct Values {
  A value[width];

  FUSEDRNN_DEVICE A& operator[](int i) { return value[i]; }
  FUSEDRNN_DEVICE const A& operator[](int i) const { return value[i]; }
  FUSEDRNN_DEVICE Values& operator+=(const Values& other) {
#pragma unroll
    for (int i = 0; i < width; ++i) value[i] += other[i];
    return *this;
  }
};

template <int width, class S>
FUSEDRNN_DEVICE Pack<S, width> load_pack(const S* from) {
#if defined(FUSEDRNN_HOSTCUDA)
  return shim::load<Pack<S, width>>(from);
#else
  return *reinterpret_cast<const Pack<S, width>*>(from);
#endif
}

template <class S, int width>
FUSEDRNN_DEVICE void store_pack(S* to, const Pack<S, width>& pack) {
#if defined(FUSEDRNN_HOSTCUDA)
  shim::store(to, pack);
#else
  *reinterpret_cast<Pack<S, width>*>(to) = pack;
#endif
}

template <class S, int width>
FUSEDRNN_DEVICE Values<Accumulator<S>, width> widen(const Pack<S, width>& pack) {
  Values<Accumulator<S>, width> values;
#pragma unroll
  for (int i = 0; i < width; ++i) values[i] = widen(pack.value[i]);
  return values;
}

template <int width, class S>
FUSEDRNN_DEVICE Values<Accumulator<S>, width> load(const S* from) {
  return widen(load_pack<width>(from));
}

template <int width, class S>
FUSEDRNN_DEVICE void store(S* to, const Values<Accumulator<S>, width>& values) {
  Pack<S, width> pack;
#pragma unroll
  for (int i = 0; i < width; ++i) narrow(values[i], pack.value[i]);
  store_pack(to, pack);
}

}  // namespace fusedrnn::cuda
