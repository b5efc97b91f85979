// What is compiled into its caller, be that for a CPU or for a GPU.
#pragma once

#if defined(__CUDACC__)
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif
