// What a recurrence kernel is given: plain pointers and sizes, no framework.
//
// Letters: T steps, B rows of the batch, N rows of the sequence (T*B when padded, the sum of all lengths when
// packed), I inputs, H hidden units, R numbers in a hidden state (H, or fewer where it is projected), D directions (1 or 2). All
// arrays are dense, row-major, of the scalar type that the params name, and owned by the caller. Weights, their gradients, and what is
// saved for backward may be of another type (ScalarKind), and then so may be x, y, the states and their gradients (narrow_sequence, narrow_states). For a GPU they lie
// there, but for offsets. Nothing may alias anything else, but y and h_n may be one array when there is a single step and direction,
// being the same numbers then.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fusedrnn {

enum class CellKind { rnn_tanh, rnn_relu, lstm, gru };
// float32_of_bfloat16: weights and biases, their gradients, gates and cells are bfloat16, what a Problem says may be, all else is
// float32; on CPUs only, as the next two are on GPUs only.
enum class ScalarKind { float32, float64, float32_of_bfloat16, float16, bfloat16 };

// Where the rows of each step are, and which of them are there. Row b of step t is row start(t) + b of the
// sequence, for b < rows_at(t). A padded batch has B rows at every step; a packed one (rows sorted by falling
// length) has no padding.
struct Sequence {
  int64_t T, B;
  const int64_t* offsets;  // [T + 1] first row of each step of a packed batch, or nullptr for a padded one
  const int64_t* lengths;  // [B] or nullptr for T; steps t >= length(b) are no part of row b: y is zero
                           // there, the state is kept
  const bool* resets;      // [N] by sequence row, or nullptr; where set, the state is zeroed before the step

  FUSEDRNN_INLINE int64_t start(int64_t t) const { return offsets ? offsets[t] : t * B; }
  FUSEDRNN_INLINE int64_t rows_at(int64_t t) const { return start(t + 1) - start(t); }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
};

// Weights of one direction, as torch.nn stores them. Gates are blocks of H rows in torch's order (see
// cells/).
struct Weights {
  const void* w_ih;  // [gates*H, I]
  const void* w_hh;  // [gates*H, R]
  const void* b_ih;  // [gates*H], or nullptr
  const void* b_hh;  // [gates*H], or nullptr
  const void* w_hr;  // [R, H] of a projection, or nullptr
};

// How the processor multiplies bfloat16s that are packed in pairs (cpu/tiles.h): not at all, in tiles, or by dot products.
enum class Pairs { none, tiles, dots };

struct Problem {
  CellKind cell;
  ScalarKind scalar;
  Sequence sequence;
  int64_t I, H;
  int64_t projection;  // R of an LSTM with h = W_hr·(o∘tanh(c)), on CPUs only; else 0
  int directions;
  Weights weights[2];
  bool narrow_sequence = false;  // of float32_of_bfloat16: whether x, y and their gradients are bfloat16, too
  bool narrow_states = false;    // likewise the states before the first step and after the last, and their gradients
  // Of the processor; whoever runs a pass on a CPU sets them.
  Pairs pairs = Pairs::none;
  bool slow_cache = false;  // see has_slow_cache

  int64_t R() const { return projection ? projection : H; }
  bool converts_weights() const { return scalar == ScalarKind::float32_of_bfloat16; }
};

struct ForwardParams : Problem {
  const void* x;   // [N, I]
  const void* hx;  // [D, B, R]
  const void* cx;  // [D, B, H], cells with a cell state only
  void* y;         // [N, D*R]
  void* h_n;       // [D, B, R]
  void* c_n;       // [D, B, H], cells with a cell state only
  void* gates;     // [D, N, saved*H] activated gates for backward, or nullptr when no backward will follow
  void* cells;     // [D, N, H] cell state after every step, or nullptr likewise
  void* prepared;  // what PrepareParams filled for this layer, or nullptr; CPU only. hx may be h_n then, and cx c_n
  int64_t prepared_rows;  // B of those PrepareParams
};

// Asks for all weights of a layer in the form that forward reads them in, of whatever T, and best for about so many rows B.
struct PrepareParams : Problem {
  void* memory;    // at the start of a cache line, or nullptr to ask how much is needed
  int64_t* bytes;  // is given the size, or nullptr
};

// Gradients of one direction's weights, shaped like them; nullptr where nobody asks.
struct WeightGradients {
  void* w_ih;
  void* w_hh;
  void* b_ih;
  void* b_hh;
  void* w_hr;
};

struct BackwardParams : Problem {
  const void* x;  // what forward was given and gave
  const void* y;
  const void* hx;
  const void* cx;
  const void* gates;
  const void* cells;
  const void* dy;      // [N, D*R], or nullptr for zero
  const void* dh_n;    // [D, B, R], or nullptr for zero
  const void* dc_n;    // [D, B, H], or nullptr for zero
  const void* dcells;  // [D, N, H] of the cell states themselves, of their type, or nullptr for zero
  void* dx;            // [N, I], or nullptr when nobody asks
  void* dhx;           // [D, B, R], or nullptr when nobody asks
  void* dcx;           // [D, B, H], cells with a cell state only, or nullptr likewise
  WeightGradients gradients[2];
};

}  // namespace fusedrnn
