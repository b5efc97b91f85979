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
FUSEDRNN_DEVICE uint32_t from_lane(uint32_t x, int lane) { return shim::from_lane(x, lane); }
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
FUSEDRNN_DEVICE uint32_t from_lane(uint32_t x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
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

// float is rounded to TF32.
template <class S>
struct TensorCores {
  using Scalar = S;
  static constexpr int columns = tile_columns;  // at once
  static constexpr int groups_at_once = 4;      // without a branch between them: loads need not wait for products
  struct Sum {
    float value[2][4];  // so that an instruction need not wait for the one before
  };
  using Operand = Words;  // of a group, what a thread takes of all columns

  // As bits, the lower of a word.
  static FUSEDRNN_DEVICE uint32_t bits(float x) {
    if constexpr (std::is_same_v<S, float>) {
      return bits_of(round_to_tf32(x));
    } else {
      S narrowed;
      narrow(x, narrowed);
      return narrowed.bits;
    }
  }
  static FUSEDRNN_DEVICE uint32_t bits_of_weight(S x) {
    if constexpr (std::is_same_v<S, float>)
      return bits_of(round_to_tf32(x));
    else
      return x.bits;
  }

  // Where a thread's part of a group is, which lies [column][word]; beyond the last column the last is taken, for a product that
  // nobody looks at.
  static FUSEDRNN_DEVICE int place(int count, int lane) {
    const int own = lane / 4;
    return (own < count ? own : count - 1) * group_words + lane % 4 * 4;
  }
  static FUSEDRNN_DEVICE Operand load(const uint32_t* at, int) { return load_words(at); }

  // Which word of a group comes at which place of the inner dimension is free, as long as a and b agree: a thread's four,
  // which are one access, make the two words each of two instructions.
  static FUSEDRNN_DEVICE void add(Sum& sum, const Fragment& a, const Operand& b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t registers[4] = {a.upper[2 * i], a.lower[2 * i], a.upper[2 * i + 1], a.lower[2 * i + 1]};
      multiply_tile<S>(sum.value[i], registers, b[2 * i], b[2 * i + 1]);
    }
  }
  // Calls f(pair, value, value of the next column) for the pairs of the 16 x 8 that are this thread's: of which half of 8 rows each
  // is, and of which row of that and which column they are.
  template <class F>
  static FUSEDRNN_DEVICE void for_pairs(const Sum& sum, int lane, const F& f) {
    const auto& [first, second] = sum.value;
#pragma unroll
    for (int i = 0; i < pairs; ++i) f(i, first[2 * i] + second[2 * i], first[2 * i + 1] + second[2 * i + 1]);
  }
  static constexpr int pairs = 2;
  static FUSEDRNN_DEVICE int half(int pair, int) { return pair; }
  static FUSEDRNN_DEVICE int row(int lane) { return lane / 4; }
  static FUSEDRNN_DEVICE int column(int lane) { return lane % 4 * 2; }
};

// A thread adds up its own words of all columns; the four threads of a row of weights are added at the end.
struct Fma {
  using Scalar = float;
  static constexpr int columns = 4;  // 8 at once would need more registers than there are
  static constexpr int groups_at_once = 1;
  struct Sum {
    float value[2][columns];
  };
  struct Operand {
    Words column[columns];
  };

  static FUSEDRNN_DEVICE uint32_t bits(float x) { return bits_of(x); }
  static FUSEDRNN_DEVICE uint32_t bits_of_weight(float x) { return bits_of(x); }

  static FUSEDRNN_DEVICE int place(int, int lane) { return lane % 4 * 4; }
  static FUSEDRNN_DEVICE Operand load(const uint32_t* at, int count) {
    Operand b;
#pragma unroll
    for (int i = 0; i < columns; ++i) b.column[i] = load_words(at + (i < count ? i : count - 1) * group_words);
    return b;
  }

  static FUSEDRNN_DEVICE void add(Sum& sum, const Fragment& a, const Operand& b) {
#pragma unroll
    for (int column = 0; column < columns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum.value[0][column] += float_of(a.upper[i]) * float_of(b.column[column][i]);
        sum.value[1][column] += float_of(a.lower[i]) * float_of(b.column[column][i]);
      }
  }
  // The four threads of a row end with a pair of columns each: one of each pair has that of row `lane / 4`, the other that
  // of the row 8 below. A thread gives away half of what it has, twice.
  template <class F>
  static FUSEDRNN_DEVICE void for_pairs(const Sum& sum, int lane, const F& f) {
    const bool lower = half(0, lane), second = lane & 1;
    const auto exchange = [&](float mine, float other, int mask) {
      return mine + float_of(from_lane(bits_of(other), lane ^ mask));
    };
    float own[columns];
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      const float above = sum.value[0][i], below = sum.value[1][i];
      own[i] = exchange(lower ? below : above, lower ? above : below, 2);
    }
    const float x = exchange(second ? own[2] : own[0], second ? own[0] : own[2], 1);
    const float y = exchange(second ? own[3] : own[1], second ? own[1] : own[3], 1);
    f(0, x, y);
  }
  static constexpr int pairs = 1;
  static FUSEDRNN_DEVICE int half(int, int lane) { return lane / 2 % 2; }
  static FUSEDRNN_DEVICE int row(int lane) { return lane / 4; }
  static FUSEDRNN_DEVICE int column(int lane) { return lane % 2 * 2; }
};

}  // namespace fusedrnn::cuda
