"""torch.nn's recurrent layers with another forward; constructor, parameters, init and state_dict are inherited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _autocast, _dispatch, _dynamo, _modes, _prepack, _shortcut, functional
from fusedrnn._checks import as_pair, can_be_read, check_like_input, reset_mask, row_lengths
from fusedrnn._script import Scriptable
from fusedrnn._stream import Stream
from fusedrnn._weights import FlatWeights
from fusedrnn.cells import GRUCell, LSTMCell, RNNCell


class _Layer(Scriptable, FlatWeights):
    """What the three layers share. ``hx`` is a tensor, or for the LSTM the pair (h_0, c_0).

    ``recompute``, an argument of the constructor and an attribute, makes a training step keep each layer's input and
    output and a state every 256 steps instead of all gates, and run forward a second time in backward.
    """

    recompute: bool = False  # also of a module that fusedrnn.convert has made

    if TYPE_CHECKING:  # what torch.nn's classes take, who say *args and **kwargs themselves

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: Any = None,
            dtype: Any = None,
            *,
            recompute: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, **kwargs):
            recompute = kwargs.pop("recompute", False)
            super().__init__(*args, **kwargs)
            self.recompute = recompute

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Any = None, resets: Any = None, return_all_states: bool = False
    ) -> Any:
        """torch.nn's forward, and three arguments that it lacks.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]``, or a PackedSequence.
            hx: the initial state ``[L*D, B, R]`` (``[L*D, R]`` without a batch), zero by default; an LSTM's pair.
            lengths: ``[B]`` int32 or int64 on any device, in any order: row b has ``lengths[b]`` steps, 0 to T, and
                the rest is padding of any value. There the output is zero; h_n and c_n are those of each row's last
                step (hx itself where there is none), and the reverse direction begins at that step. Values outside
                0 to T are refused on the CPU, and clamped on a device, which nobody waits for.
            resets: bool, the input's shape without its last dimension, on its device: where set, the state of every
                layer and direction is zeroed before that step, and no gradient crosses. The reverse direction comes
                to it from the step after.
            return_all_states: whether to return, third, the states after every step.

        Returns:
            As torch.nn's: the output, and h_n or an LSTM's (h_n, c_n). With ``return_all_states`` then all hidden
            states, or an LSTM's pair of all hidden and all cell states: of the input's layout, R or H wide, behind a
            first dimension L*D in the order of h_n's, ``[L*D, T, B, R]``. They have gradients as the output has.

        Raises:
            RuntimeError: ``lengths`` or ``resets`` of another dtype, shape, range or device, or any of the three with
                a PackedSequence.
        """
        packed = isinstance(input, PackedSequence)
        more = lengths is not None or resets is not None or return_all_states
        if not packed and not return_all_states:
            done = _shortcut.layer(self, self.mode.lower(), input, hx, lengths, resets)
            if done is not None:
                return done
        options = {"lengths": lengths, "resets": resets, "return_all_states": return_all_states} if more else {}
        if (done := _modes.symbolic(self, input, hx, **options)) is not None:
            return done
        x = input.data if packed else input
        implementation = _dispatch.choose(x, self.proj_size > 0, more)
        if implementation == "torch":
            return super().forward(input, hx)
        autocast, weights = _autocast.dtype(x), self._weights()
        if packed:
            if more:
                raise RuntimeError(
                    f"{self.mode}: expected a padded input with lengths, resets or all states, got a PackedSequence"
                )
            _, batch_sizes, sorted_indices, unsorted_indices = input
            if can_be_read(batch_sizes) and len(batch_sizes) and not batch_sizes[-1]:
                batch_sizes = batch_sizes[batch_sizes > 0]  # torch.nn takes last steps without a row, too
            states = self._states(x, int(batch_sizes[0]), hx, 3, weights, autocast)
            if hx is not None and sorted_indices is not None:
                states = [s.index_select(1, sorted_indices) for s in states]
            y, states = self._run(x, states, weights, implementation, batch_sizes, autocast)
            if unsorted_indices is not None:
                states = [s.index_select(1, unsorted_indices) for s in states]
            output: Any = PackedSequence(y, input.batch_sizes, sorted_indices, unsorted_indices)
        else:
            rank = x.dim()
            if rank not in (2, 3):
                raise ValueError(f"{self.mode}: expected input of 2 or 3 dimensions (unbatched or batched), got {rank}")
            if rank == 2:
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1)
            states = self._states(x, x.size(1), hx, rank, weights, autocast)
            if lengths is not None:
                lengths = row_lengths(self.mode, lengths, input, x.size(0), x.size(1))
            if resets is not None:
                resets = reset_mask(self.mode, resets, input, self.batch_first)
            every: list[tuple[Tensor, Tensor | None]] | None = [] if return_all_states else None
            y, states = self._run(x, states, weights, implementation, None, autocast, lengths, resets, every)
            if rank == 2:
                y, states = y.squeeze(1), [s.squeeze(1) for s in states]
            elif self.batch_first:
                y = y.transpose(0, 1)
            if every is not None:
                return y, (tuple(states) if self.mode == "LSTM" else states[0]), self._all_states(every, rank)
            output = y
        return output, (tuple(states) if self.mode == "LSTM" else states[0])

    def stream(self, batch_size: SupportsIndex, hx: Any = None) -> Stream:
        """A :class:`fusedrnn.Stream` of this layer for ``batch_size`` rows, from the state ``hx``, zero by default.

        Raises:
            ValueError: the layer is bidirectional, or ``batch_size`` is no number of rows.
        """
        return Stream(self, batch_size, hx)  # type: ignore[arg-type]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._prepacked is not None:  # it goes elsewhere, or becomes another dtype
            self._prepacked = _prepack.Prepacked()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _all_states(self, every: list[tuple[Tensor, Tensor | None]], rank: int) -> Any:
        """The states of all layers in the input's layout."""

        def whole(states: list[Tensor]) -> Tensor:
            joined = torch.cat(states)
            return joined.squeeze(2) if rank == 2 else joined.transpose(1, 2) if self.batch_first else joined

        h = whole([h for h, _ in every])
        return (h, whole([c for _, c in every if c is not None])) if self.mode == "LSTM" else h

    def _states(
        self, x: Tensor, batch: int, hx: Any, rank: int, weights: list[Tensor], autocast: torch.dtype | None
    ) -> list[Tensor]:
        """Checks the input, time first, and the state; returns h_0 (and c_0), given or zero, with a batch dimension."""
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"{self.mode}: expected input of size {self.input_size} in its last dimension, got {x.size(-1)}"
            )
        if x.size(0) == 0:
            raise RuntimeError(f"{self.mode}: expected a sequence of at least 1 step, got 0")
        if x.dtype != weights[0].dtype and autocast is None:
            # torch.nn.LSTM leaves a packed input to its kernels, which say RuntimeError
            error = RuntimeError if self.mode == "LSTM" and x.dim() == 2 else ValueError
            raise error(f"{self.mode}: expected input of the weights' dtype {weights[0].dtype}, got {x.dtype}")
        check_like_input(weights[0], "the weights", x, any_dtype=True)
        lstm, rows = self.mode == "LSTM", self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if lstm else 1]
        if hx is None:
            # Of one size they are the same tensor, to which nobody writes: on a GPU one launch less.
            zeros = {size: x.new_zeros(rows, batch, size) for size in sizes}
            return [zeros[size] for size in sizes]
        states = as_pair(hx, self.mode) if lstm else [hx]
        for i, (state, size) in enumerate(zip(states, sizes, strict=True)):
            name = ("h_0", "c_0")[i] if lstm else "hx"
            if state.dim() != rank:
                kind = "a batched 3-D" if rank == 3 else "an unbatched 2-D"
                raise RuntimeError(
                    f"{self.mode}: expected a {rank}-D {name} for {kind} input, got a {state.dim()}-D one"
                )
            expected = (rows, batch, size) if rank == 3 else (rows, size)
            if state.shape != expected:
                raise RuntimeError(f"{self.mode}: expected {name} of shape {list(expected)}, got {list(state.shape)}")
            check_like_input(state, name, x, any_dtype=autocast is not None)
        return [s.unsqueeze(1) for s in states] if rank == 2 else states

    def _run(
        self,
        x: Tensor,
        states: list[Tensor],
        weights: list[Tensor],
        implementation: str,
        batch_sizes: Tensor | None,
        autocast: torch.dtype | None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        every: list[tuple[Tensor, Tensor | None]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        one_step = batch_sizes is None and x.size(0) == 1 and every is None
        stack = None
        if self._prepacked is not None and implementation == "cpu" and every is None:
            sequence = [batch_sizes, lengths, resets]
            stack = _prepack.find(self, [x, *states], sequence, weights, autocast, one_step)
        if stack is not None:
            weights = []  # which it has
        if autocast is not None:
            kept = _autocast.keeps_state(self, packed=batch_sizes is not None)
            x, states, weights, given = _autocast.cast(
                x, states, weights, autocast, implementation, kept, one_step, self.proj_size > 0
            )
        h, c = states if len(states) == 2 else (states[0], None)
        dropout = self.dropout if self.training else 0.0
        y, h, c = functional.stack(
            self.mode.lower(), x, h, c, weights, implementation, self.num_layers, dropout,
            batch_sizes, lengths, resets, self.recompute, every, stack,
        )  # fmt: skip
        if autocast is not None:
            y, h, c = y.to(given[0]), h.to(given[0]), c if c is None else c.to(given[1])
            if every is not None:
                every[:] = [(h.to(given[0]), c if c is None else c.to(given[1])) for h, c in every]
        return y, [h] if c is None else [h, c]


class RNN(_Layer, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in place of tanh (Elman 1990).
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Any = None,
            dtype: Any = None,
            *,
            recompute: bool = False,
        ) -> None: ...


class LSTM(_Layer, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    i, f, o = σ(·), g = tanh(·) of W_i• x + b_i• + W_h• h + b_h•; c' = f∘c + i∘g; h' = o∘tanh(c')
    (Hochreiter & Schmidhuber 1997; Gers et al. 2000), with ``proj_size`` h' = W_hr (o∘tanh(c')) (Sak et al. 2014).
    """


class GRU(_Layer, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    r, z = σ(·) of W_i• x + b_i• + W_h• h + b_h•; n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)); h' = (1-z)∘n + z∘h
    (Cho et al. 2014, the reset gate applied after the product).
    """


FUSED = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
_dynamo.allow(FUSED)
