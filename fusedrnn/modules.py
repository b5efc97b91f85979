"""torch.nn's recurrent modules with another forward; constructor, parameters, init and state_dict are inherited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _autocast, _direct, _dispatch, _dynamo, functional


def _check_like_input(tensor: Tensor, name: str, x: Tensor, any_dtype: bool) -> None:
    if tensor.dtype != x.dtype and not any_dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise RuntimeError(f"expected {name} on the input's device {x.device}, got {tensor.device}")


def _as_pair(hx: Any, name: str) -> list[Tensor]:
    """An LSTM's (h_0, c_0) from what was given for it; fails with the type of error that torch.nn gives."""
    if not isinstance(hx, Tensor) and len(hx) == 2:
        return list(hx)
    given = f"a tensor of shape {list(hx.shape)}" if isinstance(hx, Tensor) else f"a tuple of {len(hx)}"
    error: type[Exception]
    if name == "LSTM":  # torch.nn.LSTM takes the first two rows or elements, whatever they are
        error = IndexError if len(hx) < 2 else RuntimeError
    else:
        error = TypeError if isinstance(hx, Tensor) else RuntimeError
    raise error(f"{name}: expected hx to be a pair of two tensors (h_0, c_0), got {given}")


class _Layer(torch.nn.RNNBase):
    """What the three layers share. ``hx`` is a tensor, or for the LSTM the pair (h_0, c_0)."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        if not packed:
            done = _direct.layer(self, self.mode.lower(), input, hx)
            if done is not None:
                return done
        x = input.data if packed else input
        implementation = _dispatch.choose(x, self.proj_size > 0)
        if implementation == "torch":
            return super().forward(input, hx)
        autocast, weights = _autocast.dtype(x), self._weights()
        if packed:
            _, batch_sizes, sorted_indices, unsorted_indices = input
            states = self._states(x, int(batch_sizes[0]), hx, 3, weights, autocast)
            if hx is not None and sorted_indices is not None:
                states = [s.index_select(1, sorted_indices) for s in states]
            y, states = self._run(x, states, weights, implementation, batch_sizes, autocast)
            if unsorted_indices is not None:
                states = [s.index_select(1, unsorted_indices) for s in states]
            output: Any = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        else:
            rank = x.dim()
            if rank not in (2, 3):
                raise ValueError(f"{self.mode}: expected input of 2 or 3 dimensions (unbatched or batched), got {rank}")
            if rank == 2:
                x = x.unsqueeze(1)
            elif self.batch_first:
                x = x.transpose(0, 1)
            states = self._states(x, x.size(1), hx, rank, weights, autocast)
            y, states = self._run(x, states, weights, implementation, None, autocast)
            if rank == 2:
                y, states = y.squeeze(1), [s.squeeze(1) for s in states]
            elif self.batch_first:
                y = y.transpose(0, 1)
            output = y
        return output, (tuple(states) if self.mode == "LSTM" else states[0])

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
        _check_like_input(weights[0], "the weights", x, any_dtype=True)
        lstm, rows = self.mode == "LSTM", self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if lstm else 1]
        if hx is None:
            return [x.new_zeros(rows, batch, size) for size in sizes]
        states = _as_pair(hx, self.mode) if lstm else [hx]
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
            _check_like_input(state, name, x, any_dtype=autocast is not None)
        return [s.unsqueeze(1) for s in states] if rank == 2 else states

    def _weights(self) -> list[Tensor]:
        """The flat list of weights, whatever hooks, functional_call or a parametrization have put in their place."""
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    def _run(
        self,
        x: Tensor,
        states: list[Tensor],
        weights: list[Tensor],
        implementation: str,
        batch_sizes: Tensor | None,
        autocast: torch.dtype | None,
    ) -> tuple[Tensor, list[Tensor]]:
        if autocast is not None:
            x, states, weights = _autocast.cast(x, states, weights, autocast, implementation, self.mode == "GRU")
        h, c = states if len(states) == 2 else (states[0], None)
        dropout = self.dropout if self.training else 0.0
        y, h, c = functional.stack(
            self.mode.lower(), x, h, c, weights, implementation, self.num_layers, dropout, batch_sizes
        )
        return y, [h] if c is None else [h, c]


class RNN(_Layer, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in place of tanh (Elman 1990).
    """


class LSTM(_Layer, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    i, f, o = σ(·), g = tanh(·) of W_i• x + b_i• + W_h• h + b_h•; c' = f∘c + i∘g; h' = o∘tanh(c')
    (Hochreiter & Schmidhuber 1997; Gers et al. 2000).
    """


class GRU(_Layer, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    r, z = σ(·) of W_i• x + b_i• + W_h• h + b_h•; n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)); h' = (1-z)∘n + z∘h
    (Cho et al. 2014, the reset gate applied after the product).
    """


class _Cell(torch.nn.RNNCellBase):
    """What the three cells share: one step is a sequence of one."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        done = _direct.cell(self, self._mode(), input, hx)
        if done is not None:
            return done
        implementation = _dispatch.choose(input)
        if implementation == "torch":
            return super().forward(input, hx)
        lstm = isinstance(self, torch.nn.LSTMCell)
        autocast = _autocast.dtype(input)
        h, c = (None, None) if hx is None else _as_pair(hx, "LSTMCell") if lstm else (hx, None)
        weights = self._weights()
        self._check(input, [] if hx is None else [h, c] if lstm else [h], weights[0], autocast)
        x = input if input.dim() == 2 else input.unsqueeze(0)
        h = x.new_zeros(x.size(0), self.hidden_size) if h is None else h if h.dim() == 2 else h.unsqueeze(0)
        if lstm:
            c = torch.zeros_like(h) if c is None else c if c.dim() == 2 else c.unsqueeze(0)
        if autocast is not None:
            keeps_state = not isinstance(self, torch.nn.RNNCell)
            states = [h] if c is None else [h, c]
            x, states, weights = _autocast.cast(x, states, weights, autocast, implementation, keeps_state)
            h, c = states if len(states) == 2 else (states[0], None)
        h, c = functional.step(self._mode(), x, h, c, weights, implementation)
        if input.dim() == 1:
            h, c = h.squeeze(0), c if c is None else c.squeeze(0)
        return h if c is None else (h, c)

    def _weights(self) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        try:  # the attribute lookup of a Module takes half a µs a name
            return [self._parameters[name] for name in names]  # type: ignore[misc]
        except KeyError:  # a parametrization or weight norm has made it something else than a Parameter
            return [getattr(self, name) for name in names]

    def _mode(self) -> str:
        raise NotImplementedError

    def _check(self, input: Tensor, states: list[Any], weight: Tensor, autocast: torch.dtype | None) -> None:
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: expected input of 1 or 2 dimensions (unbatched or batched), got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"{name}: expected input of size {self.input_size} in its last dimension, got {input.size(-1)}"
            )
        if autocast is None and input.dtype != weight.dtype:
            raise RuntimeError(f"{name}: expected input of the weights' dtype {weight.dtype}, got {input.dtype}")
        _check_like_input(weight, "the weights", input, any_dtype=True)
        expected = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if state.dim() not in (1, 2):
                raise ValueError(f"{name}: expected hx of 1 or 2 dimensions, got {state.dim()}")
            if state.shape != expected:
                raise RuntimeError(f"{name}: expected hx of shape {list(expected)}, got {list(state.shape)}")
            _check_like_input(state, "hx", input, any_dtype=autocast is not None)


class RNNCell(_Cell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on fused kernels; one step of :class:`RNN`."""

    def _mode(self) -> str:
        return "rnn_" + self.nonlinearity


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; one step of :class:`LSTM`."""

    def _mode(self) -> str:
        return "lstm"


class GRUCell(_Cell, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` on fused kernels; one step of :class:`GRU`."""

    def _mode(self) -> str:
        return "gru"


FUSED = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
_dynamo.allow(FUSED)
