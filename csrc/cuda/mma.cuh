// Products of the resident schedules by a warp: 16 rows of weights, which its threads keep in their registers, times up to 8
// columns, of which each is a row of the batch. On tensor cores, or, for true float32, with FMAs.
//
// Operands are 32-bit words, each two neighbours of 16 bits or one float along the inner dimension, in groups of 16 words. Of
// a group, thread 4g + q of a warp has words 4q to 4q + 3 of rows g and g + 8 of the weights.
#pragma once

#include <type_traits>

#include "values.cuh"

namespace fusedrnn::cuda {

struct alignas(16) Words {
  uint32_t value[4];

  FUSEDRNN_DEVICE uint32_t& operator[](int i) { return value[i]; }
  FUSEDRNN_DEVICE const uint32_t& operator[](int i) const { return value[i]; }
};

#if defined(FUSEDRNN_HOSTCUDA)
FUSEDRNN_DEVICE Words load_words(const uint32_t* from) { return shim::load<Words>(from); }
FUSEDRNN_DEVICE void store_words(uint32_t* to, const Words& words) { shim::store(to, words); }
FUSEDRNN_DEVICE float round_to_tf32(float x) { return shim::to_tf32(x); }
FUSEDRNN_DEVICE uint32_t bits_of(float x) { return shim::bits_of(x); }
FUSEDRNN_DEVICE float float_of(uint32_t bits) { return shim::float_of(bits); }
FUSEDRNN_DEVICE float from_lane_xor(float x, int mask) { return shim::from_lane_xor(x, mask); }
FUSEDRNN_DEVICE int same_in_warp(int x) { return x; }
template <class S>
FUSEDRNN_DEVICE void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr auto operand = std::is_same_v<S, bfloat16>  ? shim::Operand::bfloat16
                           : std::is_same_v<S, float16> ? shim::Operand::float16
                                                        : shim::Operand::tf32;
  shim::multiply_tile(operand, sum, a, b0, b1);
}
#else
FUSEDRNN_DEVICE Words load_words(const uint32_t* from) { return *reinterpret_cast<const Words*>(from); }
FUSEDRNN_DEVICE void store_words(uint32_t* to, const Words& words) { *reinterpret_cast<Words*>(to) = words; }
FUSEDRNN_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}
FUSEDRNN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FUSEDRNN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FUSEDRNN_DEVICE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
// Tells the compiler that it is, so that a branch on it needs no care for threads that go elsewhere.
FUSEDRNN_DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffff, x, 0); }

#define FUSEDRNN_MMA(shape_and_types)                                                                        \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// sum [16 rows, 8 columns] += a [16 rows, 8 words] · b [8 words, 8 columns]. With words for scalars, m16n8k16 and m16n8k8 are
// the same instruction: thread 4g + q has, of a, rows g and g + 8, of b column g, both at words q and q + 4, and of the sum
// rows g and g + 8, columns 2q and 2q + 1 (PTX ISA, "Matrix fragments for mma.m16n8k16" and "m16n8k8").
template <class S>
FUSEDRNN_DEVICE void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<S, bfloat16>)
    FUSEDRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else if constexpr (std::is_same_v<S, float16>)
    FUSEDRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else
    FUSEDRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FUSEDRNN_MMA
#endif

// What a thread has of a group of 16 rows of weights.
struct Fragment {
  Words upper, lower;
};

// Columns of what comes in, a group of one after that of the other; beyond the last the last is taken, for a product that
// nobody looks at.
struct Columns {
  const uint32_t* first;
  int count;

  FUSEDRNN_DEVICE const uint32_t* operator[](int c) const { return first + (c < count ? c : count - 1) * group_words; }
};

// float is rounded to TF32.
template <class S>
struct TensorCores {
  using Scalar = S;
  static constexpr int columns = tile_columns;  // at once
  struct Sum {
    float value[2][4];  // so that an instruction need not wait for the one before
  };

  static FUSEDRNN_DEVICE float rounded(float x) {
    if constexpr (std::is_same_v<S, float>) return round_to_tf32(x);
    return x;  // when it is stored
  }
  static FUSEDRNN_DEVICE uint32_t bits(S x) {
    if constexpr (std::is_same_v<S, float>)
      return bits_of(round_to_tf32(x));
    else
      return x.bits;
  }

  // Of both slots of a warp; slot i's group begins group[i] words after the first.
  static FUSEDRNN_DEVICE void add(Sum (&sums)[2], const Fragment& a0, const Fragment& a1, const int (&group)[2],
                                  const Columns& columns, int lane) {
    const uint32_t* const own = columns[lane / 4] + lane % 4 * 4;
    const Words b0 = load_words(own + group[0]), b1 = group[1] == group[0] ? b0 : load_words(own + group[1]);
    add(sums[0], a0, b0);
    add(sums[1], a1, b1);
  }
  // Which word of a group comes at which place of the inner dimension is free, as long as a and b agree: a thread's four,
  // which are one access, make the two words each of two instructions.
  static FUSEDRNN_DEVICE void add(Sum& sum, const Fragment& a, const Words& b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t registers[4] = {a.upper[2 * i], a.lower[2 * i], a.upper[2 * i + 1], a.lower[2 * i + 1]};
      multiply_tile<S>(sum.value[i], registers, b[2 * i], b[2 * i + 1]);
    }
  }
  // To `to`, the place of the first row and column; the columns are `ld` apart.
  static FUSEDRNN_DEVICE void store(const Sum& sum, float* to, int ld, int lane) {
    to += lane % 4 * 2 * ld + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i % 2 * ld + i / 2 * 8] = sum.value[0][i] + sum.value[1][i];
  }
};

// A thread adds up its own words of all columns; the four threads of a row of weights are added at the end.
struct Fma {
  using Scalar = float;
  static constexpr int columns = 4;  // 8 at once would need more registers than there are
  struct Sum {
    float value[2][columns];
  };

  static FUSEDRNN_DEVICE float rounded(float x) { return x; }
  static FUSEDRNN_DEVICE uint32_t bits(float x) { return bits_of(x); }

  static FUSEDRNN_DEVICE void add(Sum (&sums)[2], const Fragment& a0, const Fragment& a1, const int (&group)[2],
                                  const Columns& incoming, int lane) {
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      const uint32_t* const own = incoming[column] + lane % 4 * 4;
      const Words b0 = load_words(own + group[0]), b1 = group[1] == group[0] ? b0 : load_words(own + group[1]);
      add(sums[0], column, a0, b0);
      add(sums[1], column, a1, b1);
    }
  }
  static FUSEDRNN_DEVICE void add(Sum& sum, int column, const Fragment& a, const Words& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum.value[0][column] += float_of(a.upper[i]) * float_of(b[i]);
      sum.value[1][column] += float_of(a.lower[i]) * float_of(b[i]);
    }
  }
  // Each of the four threads ends with one column: it gives away half of what it has, twice.
  static FUSEDRNN_DEVICE void store(const Sum& sum, float* to, int ld, int lane) {
    const bool upper = lane & 2, odd = lane & 1;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const auto& all = sum.value[row];
      const float first = (upper ? all[2] : all[0]) + from_lane_xor(upper ? all[0] : all[2], 2);
      const float second = (upper ? all[3] : all[1]) + from_lane_xor(upper ? all[1] : all[3], 2);
      const float own = (odd ? second : first) + from_lane_xor(odd ? first : second, 1);
      to[lane % 4 * ld + row * 8 + lane / 4] = own;
    }
  }
};

}  // namespace fusedrnn::cuda
