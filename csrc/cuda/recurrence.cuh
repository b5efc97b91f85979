// The time loop. Per chunk of steps one product for the input of all of them, then the steps in order, then, backward, the
// gradients of input and weights as products over the chunk. The steps of a chunk run in one kernel (chunk_kernel.cuh) or by
// the step schedule, which takes anything: per step one product and one kernel, and the state in memory is all that stands
// between two steps.
#pragma once

#include "chunk_kernel.cuh"
#include "lone_step.cuh"
#include "recurrence.h"

namespace fusedrnn::cuda {

// Whether forward is one kernel (lone_step.cuh), which has all rows of the batch. A part of a packed sequence may have fewer.
template <class Cell, class S>
bool is_lone(const Problem& p) {
  const Sequence& s = p.sequence;
  const int64_t hidden_bytes = p.directions * Cell::gates * p.H * p.H * sizeof(S);
  return is_lone_step(s.T, s.B, hidden_bytes, s.lengths, sizeof(Accumulator<S>)) && s.rows_at(0) == s.B;
}

template <class Cell, class S>
class Recurrence : Layer<Cell, S> {
  using Base = Layer<Cell, S>;
  using Base::multiply, Base::convert, Base::elementwise, Base::vectors_for, Base::for_gate_blocks;
  using Base::same, Base::widest, Base::p_, Base::stream_, Base::D_, Base::B_, Base::H_, Base::N_, Base::chunk_bytes_;
  using typename Base::A, typename Base::Gradients;

 public:
  Recurrence(const Problem& p, const Context& context, bool backward)
      : Base(p, context),
        room_(context.workspace),
        kernel_(p, context.limits, context.tf32, backward),
        exact_(std::is_same_v<S, float> && !context.tf32),
        lone_(is_lone<Cell, S>(p)) {
    this->chunk_bytes_ = kernel_.chunk_bytes(context.chunk_bytes);
    if (std::max(N_, D_ * B_) >= int64_t{1} << 31)  // kernels count rows with 32 bits
      throw std::runtime_error("fusedrnn: expected fewer than 2^31 rows in a sequence, got " + std::to_string(N_));
  }

  int64_t workspace_bytes(bool backward) {
    backward ? void(BackwardRoom(*this)) : void(ForwardRoom(*this));
    return room_.used();
  }

  void forward(const ForwardParams& p) {
    const ForwardRoom room(*this);
    if (room.w_hh) copy_weights(room.w_hh, false);
    if (room.offsets) copy_offsets(room.offsets);
    const int64_t state_bytes = D_ * B_ * H_ * sizeof(S), gates = Cell::gates * H_;
    ForwardStep<S> step{};
    if (starts_together()) {
      step.hx = as<S>(p.hx), step.cx = as<S>(p.cx);
    } else {
      copy(p.h_n, p.hx, state_bytes, stream_);
      if constexpr (Cell::has_cell) {
        copy(p.c_n, p.cx, state_bytes, stream_);
        if constexpr (!same) convert(room.c, as<S>(p.cx), D_ * B_, H_);
      }
    }
    step.B = static_cast<int>(B_), step.H = static_cast<int>(H_), step.directions = D_;
    step.rows = {p.sequence.lengths, reinterpret_cast<const uint8_t*>(p.sequence.resets)};
    for (int d = 0; d < D_; ++d) step.input[d] = room.input[d];
    step.hidden = room.hidden;
    step.y = static_cast<S*>(p.y);
    step.h = static_cast<S*>(p.h_n);
    step.c = same ? static_cast<A*>(p.c_n) : room.c;
    step.c_n = same ? nullptr : static_cast<S*>(p.c_n);
    for (int d = 0; d < D_; ++d) {
      step.b_ih[d] = as<S>(p.weights[d].b_ih);
      step.b_hh[d] = as<S>(p.weights[d].b_hh);
      if (p.gates) step.gates[d] = static_cast<S*>(p.gates) + d * N_ * Cell::saved * H_;
      if (p.cells) step.cells[d] = static_cast<S*>(p.cells) + d * N_ * H_;
    }
    const bool vectors = vectors_for(
        {p.y, p.hx, p.cx, p.h_n, p.c_n, p.gates, p.cells, step.b_ih[0], step.b_ih[1], step.b_hh[0], step.b_hh[1]});

    if (lone_) return lone_forward(p, step, vectors);
    for (Chunk chunk{}; chunk.end < p.sequence.T;) {
      chunk = chunk_from(p.sequence, D_, chunk.end, room.rows);
      for (int d = 0; d < D_; ++d) {
        const Factor x{as<S>(p.x) + chunk.first[d] * p.I, p.I}, w_ih{p.weights[d].w_ih, p.I, 0, true};
        multiply({chunk.rows[d], gates, p.I, 1, x, w_ih, room.input[d], gates, 0, element<S>(), element<A>(), false});
        step.first[d] = static_cast<int>(chunk.first[d]);
      }
      kernel_ ? kernel_.forward(step, chunk, on_device(room.offsets), stream_)
              : forward_steps(step, chunk, room, vectors);
      step.hx = step.cx = nullptr;
    }
  }

  void backward(const BackwardParams& p) {
    const BackwardRoom room(*this);
    if (room.w_hh) copy_weights(room.w_hh, true);
    if (room.offsets) copy_offsets(room.offsets);
    BackwardStep<S> step{};
    step.starts = starts_together();
    if (step.starts) {
      step.dh_n = as<S>(p.dh_n), step.dc_n = as<S>(p.dc_n);
    } else {
      start_gradient(room.dh, p.dh_n);
      if constexpr (Cell::has_cell) start_gradient(room.dc, p.dc_n);
    }
    step.B = static_cast<int>(B_), step.H = static_cast<int>(H_), step.directions = D_;
    step.rows = {p.sequence.lengths, reinterpret_cast<const uint8_t*>(p.sequence.resets)};
    step.y = as<S>(p.y);
    step.hx = as<S>(p.hx);
    step.cx = as<S>(p.cx);
    step.dy = as<S>(p.dy);
    for (int d = 0; d < D_; ++d) {
      step.gates[d] = as<S>(p.gates) + d * N_ * Cell::saved * H_;
      step.cells[d] = as<S>(p.cells) + d * N_ * H_;
      if (p.dcells) step.dcells[d] = as<S>(p.dcells) + d * N_ * H_;
      step.da[d] = room.gradients.da[d];
      step.h_previous[d] = p.gradients[d].w_hh ? room.gradients.h_previous[d] : nullptr;
    }
    step.product = room.product;
    step.dh = room.dh;
    step.dc = room.dc;
    const bool vectors = vectors_for({p.y, p.hx, p.cx, p.gates, p.cells, p.dy, p.dcells, p.dh_n, p.dc_n});
    for (int64_t end = p.sequence.T; end > 0;) {
      const Chunk chunk = chunk_up_to(p.sequence, D_, end, room.gradients.rows);
      for (int d = 0; d < D_; ++d) step.first[d] = static_cast<int>(chunk.first[d]);
      kernel_ ? kernel_.backward(step, chunk, on_device(room.offsets), stream_)
              : backward_steps(step, chunk, room, vectors, p.dhx);
      step.starts = false;
      if (end == p.sequence.T) this->begin_gradients(p, room.gradients);
      this->add_gradients(p, room.gradients, chunk);
      end = chunk.begin;
    }
    if (p.dhx) {
      backward_kernel(step, -1, vectors);  // takes up what the first step sent back
      convert(static_cast<S*>(p.dhx), room.dh, D_ * B_, H_);
    }
    if constexpr (Cell::has_cell)
      if (p.dcx) convert(static_cast<S*>(p.dcx), room.dc, D_ * B_, H_);
    this->finish_gradients(p, room.gradients);
  }

 private:
  struct ForwardRoom {
    int64_t rows;                // of the sequence in a chunk
    A* input[2] = {};            // [rows, gates*H]
    A* hidden = nullptr;         // [D, B, gates*H], for steps
    A* c = nullptr;              // [D, B, H] where c_n is not of the accumulators' type
    S* w_hh = nullptr;           // [D, gates*H, H] where steps want the weights in another place
    int64_t* offsets = nullptr;  // [T + 1] of a packed batch, for blocks

    explicit ForwardRoom(Recurrence& s) {
      const int64_t gates = Cell::gates * s.H_;
      rows = chunk_rows(s.N_, s.B_, s.D_ * gates * sizeof(A), s.chunk_bytes_);
      if (s.lone_) return;  // its sums and states stay in registers
      for (int d = 0; d < s.D_; ++d) input[d] = s.room_.template take<A>(rows * gates);
      if (!s.kernel_) hidden = s.room_.template take<A>(s.D_ * s.B_ * gates);
      if (Cell::has_cell && !same) c = s.room_.template take<A>(s.D_ * s.B_ * s.H_);
      if (s.needs_offsets()) offsets = s.room_.template take<int64_t>(s.p_.sequence.T + 1);
      s.kernel_.take(s.room_);
      if (s.copies_weights(false)) w_hh = s.room_.template take<S>(s.D_ * gates * s.H_);
    }
  };

  struct BackwardRoom {
    Gradients gradients;
    A *product, *dh;             // [D, B, H]
    A* dc = nullptr;             // [D, B, H]
    S* w_hh = nullptr;           // [D, gates*H, H] where steps want the weights in another place
    int64_t* offsets = nullptr;  // [T + 1] of a packed batch, for blocks

    explicit BackwardRoom(Recurrence& s) : gradients(s, s.room_) {
      const int64_t states = s.D_ * s.B_ * s.H_;
      product = s.room_.template take<A>(states);
      dh = s.room_.template take<A>(states);
      if (Cell::has_cell) dc = s.room_.template take<A>(states);
      if (s.needs_offsets()) offsets = s.room_.template take<int64_t>(s.p_.sequence.T + 1);
      s.kernel_.take(s.room_);
      if (s.copies_weights(true)) w_hh = s.room_.template take<S>(s.D_ * Cell::gates * s.H_ * s.H_);
    }
  };

  Sequence on_device(const int64_t* offsets) const {
    Sequence sequence = p_.sequence;
    sequence.offsets = offsets;
    return sequence;
  }

  bool needs_offsets() const { return kernel_ && p_.sequence.offsets; }

  void copy_offsets(int64_t* to) {
    const int64_t count = p_.sequence.T + 1;
    for (int64_t done = 0; done < count; done += Offsets::most) {
      Offsets part{to + done, static_cast<int>(std::min<int64_t>(count - done, Offsets::most)), {}};
      std::copy_n(p_.sequence.offsets + done, part.count, part.value);
      elementwise(write_offsets<1>, write_offsets<1>, false, part.count, 1, part);
    }
  }

  bool copies_weights(bool in_order_of_sums) const {
    return !kernel_ && (D_ == 2 || (in_order_of_sums && Cell::hidden_gate(0) != 0));
  }

  // W_hh of all directions one behind the other, the gates in the order of the sums on request.
  void copy_weights(S* to, bool in_order_of_sums) {
    const int64_t block = H_ * H_;
    for (int d = 0; d < D_; ++d, to += Cell::gates * block) {
      const S* const from = as<S>(p_.weights[d].w_hh);
      if (in_order_of_sums)
        for_gate_blocks([&](int sum, int gate, int count) {
          copy(to + sum * block, from + gate * block, count * block * sizeof(S), stream_);
        });
      else
        copy(to, from, Cell::gates * block * sizeof(S), stream_);
    }
  }

  // Whether the first kernel takes all rows from the state (backward: the gradients) that is given. A row that a step does not
  // have must find it where later steps look.
  bool starts_together() const {
    const Sequence& s = p_.sequence;
    return s.T > 0 && (kernel_ || lone_ || !(s.offsets || s.lengths));
  }

  void lone_forward(const ForwardParams& p, ForwardStep<S>& step, bool vectors) {
    if constexpr (sizeof(A) == 4) {
      LoneStep<S> lone{step, as<S>(p.x), static_cast<int>(p.I), {}, {}};
      vectors = vectors && vectors_for({p.x}) && p.I % widest == 0;
      for (int d = 0; d < D_; ++d) {
        lone.step.here[d] = place(p_.sequence, d, 0);
        lone.w_ih[d] = as<S>(p.weights[d].w_ih), lone.w_hh[d] = as<S>(p.weights[d].w_hh);
        vectors = vectors && vectors_for({lone.w_ih[d], lone.w_hh[d]});
      }
      const auto of_rows = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        launch(vectors ? lone_step<Cell, S, R, widest> : lone_step<Cell, S, R, 1>, lone_step_geometry(B_, H_, R, D_),
               stream_, lone);
      };
      B_ == 1 ? of_rows(std::integral_constant<int, 1>()) : of_rows(std::integral_constant<int, lone_rows>());
    }
  }

  // Direction d's, from the copy where there is one.
  Factor hidden_weights(const S* copied, int d, bool transposed) const {
    const int64_t stride = Cell::gates * H_ * H_;
    return {copied ? copied + d * stride : as<S>(p_.weights[d].w_hh), H_, stride, transposed};
  }

  void forward_steps(ForwardStep<S>& step, const Chunk& chunk, const ForwardRoom& room, bool vectors) {
    const int64_t gates = Cell::gates * H_;
    for (int64_t s = chunk.begin; s < chunk.end; ++s) {
      for (int d = 0; d < D_; ++d) step.here[d] = place(p_.sequence, d, s);
      for_directions(step.here, [&](int d, int count, int64_t rows) {
        const Factor h{(step.hx ? step.hx : step.h) + d * B_ * H_, H_, B_ * H_},
            w_hh = hidden_weights(room.w_hh, d, true);
        A* const hidden = room.hidden + d * B_ * gates;
        multiply({rows, gates, H_, count, h, w_hh, hidden, gates, B_ * gates, element<S>(), element<A>(), false});
      });
      elementwise(forward_step<Cell, S, widest>, forward_step<Cell, S, 1>, vectors, most_rows(step.here), H_, step, D_);
      step.hx = step.cx = nullptr;
    }
  }

  void backward_steps(BackwardStep<S>& step, const Chunk& chunk, const BackwardRoom& room, bool vectors,
                      bool to_start) {
    const int64_t sums = Cell::sums * H_;
    for (int64_t s = chunk.end - 1; s >= chunk.begin; --s) {
      backward_kernel(step, s, vectors);
      step.starts = false;
      if (s == 0 && !to_start) break;
      const S* da[2] = {};
      for (int d = 0; d < D_; ++d) da[d] = step.da[d] + (step.here[d].start - step.first[d]) * sums;
      for_directions(step.here, [&](int d, int count, int64_t rows) {
        const Factor da_h{da[d], sums, D_ == 2 ? da[1] - da[0] : 0}, w_hh = hidden_weights(room.w_hh, d, false);
        A* const product = room.product + d * B_ * H_;
        multiply(
            {rows, H_, Cell::gates * H_, count, da_h, w_hh, product, H_, B_ * H_, element<S>(), element<A>(), false});
      });
    }
  }

  void backward_kernel(BackwardStep<S>& step, int64_t number, bool vectors) {
    for (int d = 0; d < D_; ++d) {
      step.previous[d] = place(p_.sequence, d, number - 1);
      step.here[d] = place(p_.sequence, d, number);
      step.later[d] = place(p_.sequence, d, number + 1);
    }
    elementwise(backward_step<Cell, S, widest>, backward_step<Cell, S, 1>, vectors,
                std::max(most_rows(step.here), most_rows(step.later)), H_, step, D_);
  }

  // Both directions at once where they have as many rows; f(first direction, how many, rows). Not where float32 is to be
  // exact: of two products at once cuBLAS adds up 2048 terms and more one after the other, with three times torch's error.
  template <class F>
  void for_directions(const Place (&here)[2], const F& f) {
    if (D_ == 2 && here[0].rows == here[1].rows && !exact_) return f(0, 2, here[0].rows);
    for (int d = 0; d < D_; ++d) f(d, 1, here[d].rows);
  }

  int64_t most_rows(const Place (&places)[2]) const {
    return D_ == 2 ? std::max(places[0].rows, places[1].rows) : places[0].rows;
  }

  void start_gradient(A* gradient, const void* given) {
    given ? convert(gradient, as<S>(given), D_ * B_, H_) : zero(gradient, D_ * B_ * H_ * sizeof(A), stream_);
  }

  Room room_;
  ChunkKernel<Cell, S> kernel_;
  const bool exact_;  // float32 that may not be rounded to TF32
  const bool lone_;   // is_lone
};

// f(a scalar) with the type that the params name.
template <class F>
void with_scalar(ScalarKind scalar, const F& f) {
  switch (scalar) {
    case ScalarKind::float16:
      return f(float16());
    case ScalarKind::bfloat16:
      return f(bfloat16());
    case ScalarKind::float32:
      return f(float());
    case ScalarKind::float64:
      return f(double());
    case ScalarKind::float32_of_bfloat16:
      throw std::logic_error("fusedrnn: expected weights of the input's type on a GPU");
  }
}

template <class Cell>
const char* RecurrenceOf<Cell>::schedule(const Problem& p, const Limits& limits, bool tf32, bool backward) {
  const char* name = "step";
  if (p.H)
    with_scalar(p.scalar, [&](auto s) {
      using S = decltype(s);
      name = is_lone<Cell, S>(p) && !backward ? "lone" : ChunkKernel<Cell, S>(p, limits, tf32, backward).name();
    });
  return name;
}

template <class Cell>
int64_t RecurrenceOf<Cell>::workspace_bytes(const Problem& p, bool backward, const Context& context) {
  if (p.H == 0) return 0;
  Context counting = context;
  counting.workspace = nullptr;
  int64_t bytes = 0;
  with_scalar(p.scalar,
              [&](auto s) { bytes = Recurrence<Cell, decltype(s)>(p, counting, backward).workspace_bytes(backward); });
  return bytes;
}

template <class Cell>
void RecurrenceOf<Cell>::forward(const ForwardParams& p, const Context& context) {
  if (p.H == 0) return;  // as torch's cells may have it: results without a number
  with_scalar(p.scalar, [&](auto s) { Recurrence<Cell, decltype(s)>(p, context, false).forward(p); });
}

template <class Cell>
void RecurrenceOf<Cell>::backward(const BackwardParams& p, const Context& context) {
  with_scalar(p.scalar, [&](auto s) {
    using S = decltype(s);
    if (p.H)
      Recurrence<Cell, S>(p, context, true).backward(p);
    else if (p.dx)  // sums of nothing
      zero(p.dx, p.sequence.start(p.sequence.T) * p.I * sizeof(S), static_cast<cudaStream_t>(context.stream));
  });
}

}  // namespace fusedrnn::cuda
