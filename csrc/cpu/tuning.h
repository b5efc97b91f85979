// The numbers of the CPU schedule, each with its reason. Measured with AVX-512 on 2 cores of a Zen 4, with AVX2 on 2 of a Zen 3,
// or with AVX-512 and AMX on 2 of an Emerald Rapids.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace fusedrnn::cpu {
namespace {

// Rows in one register tile of `vectors` output vectors. An AVX-512 core has 32 registers: 24 accumulators,
// the weights' vectors and a broadcast. The others have 16: 12 accumulators, one weight at a time.
constexpr int tile_rows(int vectors, int vector_bytes) {
  const int accumulators = vector_bytes == 64 ? 24 : 12;
  return accumulators / std::max(vectors, 2);
}

// How many output vectors to take together. With 32 registers 4 reuse each broadcast most, but where all rows fit one
// tile of 2 vectors and not one of 4, going over the weights once beats it (AVX-512, B = 8: 172 against 132 GFLOP/s).
// With 16 registers 3, unless tiles of 2 are fuller (AVX2, weights from the second-level cache, 8 rows: 83 against 77 GFLOP/s, 7: 77
// against 69, 16 to 128 rows: 2 to 5 % more; but 5 rows: 60 against 77).
constexpr int tile_vectors(int64_t rows, int vector_bytes) {
  if (vector_bytes == 64) return rows > tile_rows(4, 64) && rows <= tile_rows(2, 64) ? 2 : 4;
  const auto padded = [&](int vectors) {
    const int64_t most = tile_rows(vectors, vector_bytes);
    return (rows + most - 1) / most * most;
  };
  return rows <= tile_rows(4, vector_bytes) ? 4 : padded(3) <= padded(2) ? 3 : 2;
}

// Products summed in one go. At 128 the additions to the total are 1 % of the work, and a sum of 400 products
// is twice as exact. In pairs they are twice as many.
constexpr int64_t summation_block = 128;

// Numbers from which on the weights that a member multiplies with in a step are far: tiles ask for those of the next tile, some before
// each loop over so many k (AVX2, inference, 2 threads, LSTM of 640 to 1024, GRU of 1024, RNN of 1760: 1.01 to 1.06 times as fast;
// weights that a second- or third-level cache gives anyway, LSTM, GRU and RNN of 128 to 256: 0.91 to 0.98; of 512: 0.95 to 1.03).
constexpr int64_t far_weights = 1 << 20, asking_loop = 16;

// Most rows and panels of a step that are taken together. Panels are a multiple of those that a tile of any cell needs (four vectors of
// a GRU's gates span panels), and of the two that gates take at a time; rows of most tiles' heights.
struct Together {
  int64_t rows, panels;
};

// Tiles of three vectors, with 16 registers: 24 vectors of weights for up to 144 rows, 48 for up to 36. Times as fast as with four
// panels and up to 144/sums rows (AVX2, inference, 2 threads, medians on a shared machine): RNN of 256, 16 rows: 1.31; of 128, 256
// rows: 1.16; LSTM and GRU of 64, 256 rows: 1.12 and 1.13; of 128, 32 to 256 rows: 0.99 to 1.06; of 256 to 1024: 1.00 to 1.05.
// AVX-512: four panels, whose pre-activations, `sums` vectors each, stay near the core. Emerald Rapids, inference, times as
// fast as with one panel and 64 rows: LSTM of 128, B = 128: 1.05; of 64, B = 256: 1.04; of 18, B = 16: 1.2 to 1.3; GRU of 128 and 64:
// 1.13 and 1.21. With 18, 24, 36 and 48 rows, LSTM of 64: 1, 1.03, 1.05, 1.07; GRU of 64: 1, 1.15, 1.19, 1.19. Tiles (tiles.h) take
// 32 rows: bfloat16, LSTM of 200, with 36, 32, 64 and 96 rows: 1, 1.15, 1.18, 1.19; of 128: 1, 1.10, 1.14, 1.11; GRU of 128: 1,
// 1.10, 1.09, 1.04; dot products of pairs, which take 6, with 64 against 36 rows: 0.97 to 1.02.
constexpr Together together(int64_t rows, int64_t gates, int64_t sums, int64_t vector_bytes, bool tiles) {
  if (vector_bytes == 64) return {std::min<int64_t>(rows, tiles ? 64 : 144 / sums), 4};
  return {std::min<int64_t>(rows, 144), (rows > 36 ? 24 : 48) / gates};
}

// Rows of x·W_ih computed at a time when a step has fewer: one row alone reads all weights for one product
// each. Where W_ih and W_hh are more than a last-level cache has, each pushes the other out: the more rows, the less often
// (AVX2, 32 MB of cache, LSTM of 1024, B = 1 to 32: 2 to 7 % faster with 192 or 384 than with 48; smaller layers: 0 to 2 %
// slower; RNN of 1760, B = 16 and 32: 1.01 and 1.05 times as fast).
// On an Emerald Rapids, whose last-level cache gives 27 GB/s to a core, from an LSTM of 362 units on: while others used that cache
// LSTM and GRU of 384 and 512, B = 32, were 7 to 13 % faster, else level. On a Zen 4, LSTM of 512 to 768, B = 8 to 64, would take 1.01
// to 1.10 times as long (B = 4: 0.96 to 1.02), GRU of 512 1.00 to 1.03 times.
constexpr int64_t projection_rows = 48, projection_rows_of_large = 256;
constexpr int64_t large_weights(bool slow_cache) { return slow_cache ? 1 << 19 : 3'000'000; }
// Rows in a block of the batch from which on x·W_ih is computed step by step: fewer are copied side by side from several steps, so that
// W_ih is read once for 48 (AVX-512, LSTM and GRU of 64 to 256, 4 to 12 rows: 1.01 to 1.1 times as fast; with 16 and more, and RNNs: 0.97
// to 1.02, of 256 units up to 1.05).
constexpr int64_t gathered_rows = 16;
// Packed, bfloat16 weights take twice the room: so many of W_ih are rather copied by blocks (see input_rows), where all rows are one
// chunk (AVX2, training, T = 50, B = 4: LSTM of 512 13 to 14 MB at its peak instead of 16, GRU 10.5 instead of 11.4, both 1.03 times as
// fast; inference 0.97 and 0.98).
constexpr int64_t large_if_converted = 1 << 19;

enum class Pass { forward, backward };

// Below this many operations a team and step, meeting costs more than a second thread brings (B = 1: an LSTM of 50; with cores
// close to each other 32 would do, with cores far apart it would double the time). A projected step meets twice.
constexpr int64_t shared_flops = 20'000;

// What a plan depends on.
struct Call {
  Pass pass;
  int64_t T, B, rows;  // those of the sequence: a packed batch has fewer than T·B
  int64_t I, H, projection;
  int directions;
  bool converted;  // whether weights are of another type than their products
  int64_t gates, vector, threads;
  Pairs pairs;
  bool slow_cache;

  constexpr int64_t mean() const { return rows / std::max<int64_t>(T, 1); }
  constexpr int64_t panels() const { return std::max<int64_t>((H + vector - 1) / vector, 1); }  // torch.nn allows H = 0
  // The recurrent weights of a direction, and what a step does with them.
  constexpr int64_t recurrent() const { return H * (projection ? (gates + 1) * projection : gates * H); }
  constexpr int64_t step_flops() const { return 2 * recurrent() * B; }
  // Whether a step of one of `teams` is enough for several members.
  constexpr bool shares(int64_t teams) const { return step_flops() >= teams * (projection ? 2 : 1) * shared_flops; }
};

// Most numbers of W_ih and W_hh in all copies (64 MiB of float32), where teams that share out rows pack them each for itself; more teams
// share one copy, and share out no rows backward, where each adds up gradients of its own (two threads, cores near, training, LSTM and GRU of
// 64 to 256, 12,000 to 30,000 inputs: 1.00 to 1.05 times as fast as with rows shared out). What another core has just written comes slowly:
// for LSTM, GRU and RNN of 64 to 256 whose rows were shared out anyway, 8 to 32 rows, 4 to 128 steps, own copies made forward 1.0 to 1.12
// times as fast with cores near to each other (50 ns), 1.05 to 1.65 with cores far apart (200 ns), of 64 with 4 and 8 steps 1.13 to 1.6;
// backward, of W_hh, 1.0 to 1.03 and 1.0 to 1.14.
constexpr int64_t most_copies = 1 << 24;
constexpr bool copies_fit(const Call& call, int64_t teams) {
  return teams * call.directions * call.gates * call.H * (call.I + call.H) <= most_copies;
}

// Fewest rows for a team, where teams share out the batch of a layer of at most 256 units, whose weights stay in a core's own
// cache. Gained over sharing units, 128 steps, 2 threads (rows a thread; AVX-512, and much the same with AVX2). Forward: RNN of 64
// (2): 2.2, of 100 (2): 1.3, of 128 (4): 1.7, (2): 1.04, of 256 (4): 1.2, (2): 0.82; LSTM of 24 (2): 1.4, of 40 (2): 1.3; with
// AVX-512 and 50 steps of 48 (4): 1.5, of 64 (4): 1.07 to 1.19, (3): 0.78, GRU of 64 (4): 1.2. On the Zen 3, W_ih read at every step,
// LSTM of 256 (8): 0.85 to 0.94, (16): 1.0; what follows has not been timed there.
// LSTMs and GRUs, x·W_ih there for several steps (see gathered_rows), times as fast as sharing units; first with cores near, then far
// apart. AVX-512, from 64 rows of the sequence a team on, each with its own weights: 8 to 32 rows, 4 to 32 steps, of 64: 1.04 to 1.14, 1.2
// to 1.4; of 128: 1.0 to 1.1, 1.06 to 1.65; of 160 to 256: 1.02 to 1.05, 1.06 to 1.54; of 128 and 256 with I = 512 and 640: 0.99 to
// 1.01, 1.04 to 1.07; AVX2 0.98 to 1.04 near, bfloat16 by dot products 0.97 to 1.09. With 32 rows a team: of 128: 0.98 to 1.02, 1.02 to
// 1.18, in bfloat16 0.91. With one copy of the weights it takes some hundred rows a team to pay: with 8 or 16 rows and 16 or 32 steps
// 0.75 to 1.0. 2 rows: of 20 to 48, I <= 80: 1.0 to 1.2, 1.0 to 1.3; of 20, whose units are not shared out, I = 320: 1.4 to 1.75; of 40,
// whose five panels make uneven shares, I = 320: 1.0 to 1.28, of 32 and 48 with AVX2: 0.83 to 0.98; of 64 to 256: 0.9 to 0.99.
// Backward: LSTM of 64 (2): 1.1, (4): 1.2; of 128 (4): 1.2, (3): 0.95; of 256 (4): 1.2, RNN of 256 (4): 1.1, (3): 0.91.
// AVX2 on a Zen 4, training, LSTM and GRU of 160 to 256 (4 to 12): 1.01 to 1.02, with cores far apart 1.1 to 1.25.
// `mean` rows are in a step; of a packed batch the longest may be one alone.
constexpr int64_t team_rows(const Call& call, int64_t threads, int64_t teams) {
  const int64_t H = call.H, gates = call.gates;
  if (call.pass == Pass::backward) return H <= 64 ? 2 : 4;
  const bool even = call.shares(1) && call.panels() % threads == 0, own_weights = copies_fit(call, teams);
  const bool by_rows = gates > 1 && call.pairs != Pairs::tiles;  // a tile's product takes as long for one row as for 16
  const bool small = gates * H * H * call.B < 50'000 || (by_rows && H <= 48 && call.mean() >= 2 * teams),
             few_inputs = gates * H * call.I < 20'000 || (by_rows && !even),
             many_rows =
                 by_rows && call.mean() >= 4 * teams && call.T * call.mean() >= (own_weights ? 64 : 384) * teams;
  if (small && few_inputs) return 2;
  return H < 48 || gates == 1 || (call.vector >= 16 && H <= 64 && call.I <= 96) || many_rows ? 4 : 16;
}

// Hidden units from which on the products of packed bfloat16 weights are made in tiles (tiles.h), for any number of rows: 16
// take as long as one. Emerald Rapids, LSTM, inference, times faster than the best without: of 16 and 32 rows, H = 16: 0.94,
// 32: 1.15, 64: 1.5, 512: 3.9; of one row, H = 256: 1.35, 512: 1.5. By dot products of pairs, Zen 4, H = 16 to 24: 0.75 to 1.09.
constexpr int64_t tile_width = 32;

// Rows from which on a single step packs weights (see packs); bfloat16 ones, which a dot product converts at every use. Where it
// multiplies them in pairs, with bfloat16 outside, too, it takes most_step_rows (Zen 4, LSTM and GRU of 128 to 1024, RNN of 512, 16 to 120
// rows: 1.0 to 1.9 times as fast as packed).
constexpr int64_t most_step_rows = 128, most_converted_step_rows = 64, most_step_rows_beside_tiles = 16;

// Whether weights are packed. Packing moves every weight twice; a dot product reads it once per few rows from a near cache.
// For a single step dot products are as fast up to 128 rows (AVX2, LSTM of 256, B = 16: 120 µs unpacked, 142 packed; B = 128:
// 865 and 882; AVX-512, LSTM and GRU of 128 to 1024, B = 64 to 120: 0.75 to 0.95 of packing's time), but those of narrow layers
// are mostly tails. Several steps read W_hh again and again, every other one backwards, W_ih only once for some of them. Two to four
// steps of fewer than 20 rows together: LSTM of 256, T = 2, B = 8: 1.09 times as fast in place, of 512, T = B = 4: 1.28 (AVX2: 1.11,
// 1.12), GRU of 128, T = B = 4: 1.03 (0.90); but six steps of 2 rows, LSTM of 256: 0.98.
// More steps of float32, times as fast in place (Zen 4, cores near to each other, AVX-512 | AVX2). W_hh of one row, T = 16: of 64 0.7 |
// 0.8, of 128 1.0 | 1.0, of 256 1.1 | 1.1, of 384 to 768 1.14 to 1.2, of 1024 1.15 | 1.2; T = 32: of 256 1.04 | 1.04, of 384 to 768 1.11
// to 1.14 | 1.1, GRU of 1024 1.01; T = 64: of 128 0.98, of 256 to 512 1.0 to 1.05, of 768 1.06, GRU of 1024 0.93. Two to eight rows, 32 rows
// of the sequence or 8 steps at most, of 512 to 768, GRU of 1024: 1.03 to 1.2 | 0.97 to 1.1, with more 0.87 to 1.0. One thread gains as
// much. LSTM of 1024 and 1536, whose W_hh is half of a last-level cache of 32 MiB and more: 0.8 to 1.2, one thread 0.77 to 1.04. W_ih
// beside that, rows of the sequence 16: of 192 0.95 to 1.02, of 256 0.98 to 1.07, of 384 1.15; 24: of 192 to 320 1.02 to 1.1; 32: of 384
// 1.03 to 1.1; 48: of 256 0.96; 64: of 384 1.01 to 1.03. Nothing of this has been timed on the other processors.
// bfloat16 W_ih are better packed, and widened, from 16 rows on: LSTM of 512, B = 4, T = 25: 4.4 ms in place, 3.0 packed.
// Tiles (tiles.h) pay for packing sooner: a step of an LSTM of 512 in bfloat16, B = 8: 0.84 times as fast packed; of 256, B = 16: 1.24;
// of 512, B = 48: 2.3.
constexpr bool packs_for_step(int64_t B, int64_t H, bool converted, bool tiled) {
  if (H < 64) return B >= 8;
  return B >= (tiled ? most_step_rows_beside_tiles : converted ? most_converted_step_rows : most_step_rows);
}
constexpr bool packs(int64_t T, int64_t B, int64_t H, int64_t recurrent, bool converted, bool tiled) {
  const int64_t rows = T * B;
  if (T == 1) return packs_for_step(B, H, converted, tiled);
  if (H < 64) return rows >= 8;
  const bool in_place = !converted && H >= 192 && recurrent < 1 << 22;
  if (B == 1) return T >= (!in_place ? 16 : H < 1024 ? 64 : 24);
  return in_place && H >= 512 ? T > 8 || rows > 32 : rows >= (T <= 4 && !tiled ? 20 : 10);
}
constexpr bool packs_input(int64_t T, int64_t B, int64_t H, bool converted) {
  const int64_t rows = T * B;
  if (H < 64) return rows >= 8;
  if (converted || (T > 1 && H < 192)) return rows >= 16;
  return rows >= (T == 1 || H >= 512 ? most_step_rows : H >= 320 ? 64 : 32);
}
// Backward reads unpacked weights across their rows: with AVX-512 a tile takes four vectors of each, 256 bytes, with AVX2 three, 96. Of
// W_hh a thread reads `share` numbers in a step. Backward, times as fast in place (Zen 4, 2 threads, LSTM, GRU and RNN, B = 1 to 8, cores
// near; far apart), rows of the sequence: AVX-512, of 64 to 256, 16: 1.1 to 1.3; 1.5, 32: 1.1 to 1.15; 1.3, 64: 1.02 to 1.15, 128: 0.98 to
// 1.1; of 512, 16: 1.04 to 1.2, 32: 0.97 to 1.18, 64: 1.02 to 1.1, 128: 0.95 to 1.08; one thread, 48 and 64: 0.95, 0.76; of 1024, 16: 1.0 to
// 1.1, 32: 0.85 to 1.0; of 16 to 32: 0.9 to 1.1. AVX2, of 64 and 128, 16: 1.1 to 1.2, 32 and 48: 1.03; of 256 0.95 to 1.08, of 512 0.81
// to 1.0, of 1024 0.6 to 0.7. One step, AVX-512, 40 to 128 rows: 1.04 to 1.2. In tiles, training a step of an LSTM of 512 in bfloat16,
// times as fast packed, B = 8: 0.94, 16: 1.06, 32: 1.19.
constexpr bool packs_backward(int64_t T, int64_t B, int64_t H, int64_t share, int64_t vector, bool converted,
                              bool tiled) {
  const int64_t rows = T * B;
  if (H < 64) return rows >= 8;
  if (!converted && vector >= 16) return rows >= (share <= 600'000 ? 96 : T == 1 ? 40 : 24);
  return rows >= ((T == 1 && !tiled) || (!converted && H < 256) ? 40 : 16);
}

// Rows whose gradients are taken in one go: the more, the less often the weights' gradients are fetched and stored (1/256
// of the multiplications), the fewer, the nearer their pre-activations' gradients still are.
constexpr int64_t gradient_rows = 256;
// Pairs of output vectors of a weight's gradient for which rows of x or h are copied side by side: with AVX2 256 KiB, half a
// second-level cache.
constexpr int64_t gradient_pairs = 16;
// Rows of a gradient that are summed up at a time where they are then rounded to bfloat16: a multiple of every tile's height, with AVX2
// 48 KiB.
constexpr int64_t rounded_rows = 48;
// A block of W_ih that is copied for dX, or for x·W_ih where a call has one chunk of so many rows that a copy is worth it: products
// over so many k, for so many vectors of outputs; with AVX2 128 KiB. In tiles over all k, for they add up all products in their
// registers (AMX). Against packing all of W_ih once (AVX2): training, LSTM and GRU of 128, B = 16, RNN of 256, LSTM of 512, B = 4: 1.03 to
// 1.07 times as fast, eight others 0.96 to 1.03; inference, LSTM of 1024, B = 8, T = 32: 1.03 to 1.05, with four or more chunks 0.98
// to 0.99. An RNN, of which the weights are most of the memory, copies for any number of chunks (training, 1760 units, B = 16: 57 MB
// at its peak instead of 69).
constexpr int64_t input_rows = 2 * summation_block, input_columns = 16, tiled_columns = 4;
// Vectors from which on a tile of what they are multiplied with is copied (multiply_transposed; Emerald Rapids, AVX-512, dW_hh of
// an LSTM of 1024, 256 rows: 134 GFLOP/s a core in place, 158 copied; of 256: 132 and 151; of 128, 8 vectors: 148 and 149; of 64,
// 4 vectors: 165 and 139).
constexpr int64_t vectors_worth_a_copy = 8;

// Most rows of a step for which packed bfloat16 weights stay bfloat16: so few wait for weights to come from a cache, more
// for the arithmetic, to which unpacking would add (AVX2, B = 1: 1.13 to 1.18 times as fast as one by one; B = 3 and 4 are
// 3 to 5 % faster when widened).
constexpr int64_t narrow_rows = 2;

// Weights, times half the rows, from which on a team takes a single step: waking a thread takes as long as reading so many.
constexpr int64_t step_for_team = 130'000;

// Most rows in a block, where rows are cut into blocks.
constexpr int64_t row_block = 256;

struct Plan {
  int64_t groups = 1;         // teams that work on their own, each on some of the jobs
  int64_t slices = 1;         // threads of a team
  bool share_units = false;   // whether they share out the hidden units and meet in every step
  int64_t row_blocks = 1;     // blocks of rows into which the batch is cut: jobs are directions × row blocks
  int64_t chunk = 1;          // steps of x·W_ih, or of gradients, computed at a time
  bool packed_input = false;  // whether forward packs W_ih, or else reads it in place
  bool packed = false;        // whether W_hh is packed; backward then copies W_ih, too, a block at a time
  bool tiled = false;         // whether what is packed is tiles
  bool copied_input = false;  // whether forward does so where it would pack it
  bool own_weights = true;    // whether members pack what they read, and not all threads what several teams share
};

// How the threads of a direction are shared out: rows of the batch among teams, hidden units among the members of each.
struct Split {
  int64_t teams, members;
  int64_t panels;  // of the member that has most
};

// Rows are independent: cutting the batch needs no meeting at all, but each team then reads all the weights, has fewer rows
// for each, and sums up gradients of its own, which pays from about half as many of its rows on as there are units (AVX-512, training,
// cores near and far apart, so many: LSTM of 128, T = 16, B = 8: 1.01 to 1.02, 1.17; of 256, T = 32, B = 8: 0.98 to 1.0, 1.07; T =
// B = 16: 0.97 to 0.99, 1.14; GRU of 256: 0.94 to 1.01, 1.09; of 256, T = 1, B = 32: 0.86).
// Wider layers, whose weights a core's own cache does not hold, gain nothing (0.91 to 1.05). All that was timed on two threads: that more
// share rows and units, where that leaves less to each, is inferred.
constexpr Split split(const Call& call, int64_t threads) {
  const auto with = [&](int64_t teams) {
    const int64_t members = call.shares(teams) ? std::min(threads / teams, call.panels()) : 1;
    return Split{teams, members, (call.panels() + members - 1) / members};
  };
  Split best = with(1);
  for (int64_t teams = 2; call.H <= 256 && teams <= std::min(threads, call.B / 2); ++teams) {
    const Split other = with(teams);
    if (other.panels * best.teams <= best.panels * teams &&  // no more work for a member
        call.B >= teams * team_rows(call, threads, teams) &&
        (call.pass == Pass::forward || (2 * call.T * call.B >= call.H * teams && copies_fit(call, teams))))
      best = other;
  }
  return best;
}

constexpr Plan make_plan(const Call& call) {
  const int64_t T = call.T, B = call.B, H = call.H, gates = call.gates;
  const bool forward = call.pass == Pass::forward, tiles = call.pairs != Pairs::none;
  // A thread is only woken (a few µs) for work that lasts longer.
  const int64_t threads = T * call.step_flops() * call.directions < 200'000 ? 1 : call.threads;
  const int64_t groups = call.directions == 2 && threads >= 2 ? 2 : 1, own = threads / groups;
  const Split shared = split(call, own);
  Plan plan{};
  plan.groups = groups * shared.teams;
  plan.share_units = shared.members > 1;
  if (forward)
    plan.slices = (call.panels() + shared.panels - 1) / shared.panels;  // one more would only keep the others waiting
  else
    plan.slices = plan.share_units ? shared.members : own / shared.teams;
  plan.packed_input = packs_input(T, B, H, call.converted);
  plan.packed = forward
                    ? packs(T, B, H, call.recurrent(), call.converted, tiles)
                    : packs_backward(T, B, H, call.recurrent() / shared.members, call.vector, call.converted, tiles);
  if (shared.teams > 1) {
    // A block's states and what belongs to them should stay near, too (LSTM of 256, 4096 rows, training: 1228 ms in
    // blocks of 256, 1386 in two).
    plan.row_blocks = shared.teams * ((B + shared.teams * row_block - 1) / (shared.teams * row_block));
    plan.own_weights = copies_fit(call, shared.teams);
  }
  const int64_t block_rows = std::max<int64_t>((B + plan.row_blocks - 1) / plan.row_blocks, 1);
  if (!forward) {
    const int64_t most = std::clamp<int64_t>(gradient_rows / block_rows, 1, std::max<int64_t>(T, 1)),
                  chunks = (T + most - 1) / most;
    plan.chunk = chunks ? (T + chunks - 1) / chunks : 1;  // even, for each copies W_ih
  } else if (plan.row_blocks == 1 || (gates > 1 && block_rows < gathered_rows)) {
    const bool large =
        call.recurrent() >= large_weights(call.slow_cache) ||
        (call.converted && gates * call.I * H >= large_if_converted && T * B <= projection_rows_of_large);
    const int64_t most = large ? projection_rows_of_large : projection_rows;
    plan.chunk = std::clamp<int64_t>(most / block_rows, 1, std::max<int64_t>(T, 1));
    plan.copied_input = plan.packed_input && !tiles && large && plan.chunk > 1 && (T <= plan.chunk || gates == 1);
  }
  plan.tiled = tiles && plan.packed;
  return plan;
}

}  // namespace
}  // namespace fusedrnn::cpu
