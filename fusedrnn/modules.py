"""torch.nn's recurrent modules with another forward: constructor, parameters, names, init and state_dict are inherited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _dispatch, functional


def _in_autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for recurrent layers on x's device, or None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_state(state: Tensor, name: str, x: Tensor) -> None:
    if state.dtype != x.dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {state.dtype}")
    if state.device != x.device:
        raise RuntimeError(f"expected {name} on the input's device {x.device}, got {state.device}")


class _Layer(torch.nn.RNNBase):
    """What the three layers share. ``hx`` is a tensor, or for the LSTM the pair (h_0, c_0)."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        implementation = _dispatch.choose(data, self.proj_size > 0)
        if implementation == "torch":
            return super().forward(input, hx)
        self._update_flat_weights()
        return self._forward_packed(input, hx, implementation) if packed else self._forward_padded(input, hx, implementation)

    def _forward_packed(self, input: PackedSequence, hx: Any, implementation: str) -> Any:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        states = self._states(x, int(batch_sizes[0]), hx)
        self._check(x, states, batch_sizes)
        if hx is not None and sorted_indices is not None:
            states = [s.index_select(1, sorted_indices) for s in states]
        y, *states = self._run(x, states, implementation, batch_sizes)
        if unsorted_indices is not None:
            states = [s.index_select(1, unsorted_indices) for s in states]
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), self._result(states)

    def _forward_padded(self, x: Tensor, hx: Any, implementation: str) -> Any:
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected input of 2 or 3 dimensions (unbatched or batched), got {x.dim()}")
        batched = x.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            x = x.unsqueeze(batch_dim)
        states = self._states(x, x.size(batch_dim), hx, x.dim() if batched else 2)
        self._check(x, states, None)
        y, *states = self._run(x.transpose(0, 1) if self.batch_first else x, states, implementation, None)
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            y, states = y.squeeze(batch_dim), [s.squeeze(1) for s in states]
        return y, self._result(states)

    def _states(self, x: Tensor, batch: int, hx: Any, rank: int = 3) -> list[Tensor]:
        """h_0 (and c_0) as given, with a batch dimension, or zeros."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        lstm = self.mode == "LSTM"
        if hx is None:
            sizes = [self.proj_size or self.hidden_size, self.hidden_size] if lstm else [self.hidden_size]
            return [x.new_zeros(rows, batch, size) for size in sizes]
        states = list(hx) if lstm else [hx]
        if lstm and (isinstance(hx, Tensor) or len(states) != 2):
            given = f"a tensor of shape {list(hx.shape)}" if isinstance(hx, Tensor) else f"{len(states)} elements"
            # torch.nn takes the first two rows of a tensor, which fails with one of these.
            raise (IndexError if len(states) < 2 else RuntimeError)(f"LSTM: expected hx to be a pair (h_0, c_0), got {given}")
        if any(s.dim() != rank for s in states):
            kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
            names = "h_0 and c_0" if lstm else "hx"
            got = ", ".join(f"{s.dim()}-D" for s in states)
            raise RuntimeError(f"{self.mode}: expected {names} of {rank} dimensions for {kind} input, got {got}")
        return [s.unsqueeze(1) for s in states] if rank == 2 else states

    def _check(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> None:
        self.check_forward_args(x, self._result(states), batch_sizes)
        if x.size(1 if self.batch_first and batch_sizes is None else 0) == 0:
            raise RuntimeError(f"{self.mode}: expected a sequence of at least 1 step, got 0")
        if _in_autocast(x) is None:
            for state, name in zip(states, ("h_0", "c_0"), strict=False):
                _check_state(state, name, x)

    def _run(self, x: Tensor, states: list[Tensor], implementation: str, batch_sizes: Tensor | None) -> list[Tensor]:
        weights: Any = self._flat_weights
        if (dtype := _in_autocast(x)) is not None:
            x, states, weights = x.to(dtype), [s.to(dtype) for s in states], [w.to(dtype) for w in weights]
        y, h_n, c_n = functional.stack(
            self.mode.lower(),
            x,
            states[0],
            states[1] if len(states) == 2 else None,
            weights,
            implementation,
            self.num_layers,
            self.dropout if self.training else 0.0,
            batch_sizes,
        )
        return [y, h_n] if c_n is None else [y, h_n, c_n]

    def _result(self, states: list[Tensor]) -> Any:
        return tuple(states) if self.mode == "LSTM" else states[0]


class RNN(_Layer, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in place of tanh (Elman 1990).
    """


class LSTM(_Layer, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    i, f, o = σ(·), g = tanh(·) of W_i• x + b_i• + W_h• h + b_h•; c' = f∘c + i∘g; h' = o∘tanh(c') (Hochreiter & Schmidhuber 1997).
    """


class GRU(_Layer, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels: same constructor, parameters, ``state_dict``, inputs and outputs.

    r, z = σ(·) of W_i• x + b_i• + W_h• h + b_h•; n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)); h' = (1-z)∘n + z∘h (Cho et al. 2014).
    """


class _Cell(torch.nn.RNNCellBase):
    """What the three cells share: one step is a sequence of one."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        implementation = _dispatch.choose(input)
        if implementation == "torch":
            return super().forward(input, hx)
        name, lstm = type(self).__name__, isinstance(self, torch.nn.LSTMCell)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: expected input of 1 or 2 dimensions (unbatched or batched), got {input.dim()}")
        x = input if input.dim() == 2 else input.unsqueeze(0)
        if x.size(1) != self.input_size:
            raise RuntimeError(f"{name}: expected input of size {self.input_size} in its last dimension, got {x.size(1)}")
        states = [x.new_zeros(x.size(0), self.hidden_size)] * (2 if lstm else 1) if hx is None else list(hx) if lstm else [hx]
        for state in states if hx is not None else []:
            self._check(state, input, name)
        states = [s.reshape(1, x.size(0), self.hidden_size) for s in states]
        weights = [self.weight_ih, self.weight_hh] + ([self.bias_ih, self.bias_hh] if self.bias else [])
        if (dtype := _in_autocast(x)) is not None:
            x, states, weights = x.to(dtype), [s.to(dtype) for s in states], [w.to(dtype) for w in weights]
        elif x.dtype != self.weight_ih.dtype:
            raise RuntimeError(f"{name}: expected input of the weights' dtype {self.weight_ih.dtype}, got {x.dtype}")
        nonlinearity = getattr(self, "nonlinearity", None)
        cell = "lstm" if lstm else "gru" if nonlinearity is None else f"rnn_{nonlinearity}"
        _, h, c = functional.stack(cell, x.unsqueeze(0), states[0], states[1] if lstm else None, weights, implementation)
        shape = (*input.shape[:-1], self.hidden_size)
        return h.view(shape) if c is None else (h.view(shape), c.view(shape))

    def _check(self, state: Tensor, input: Tensor, name: str) -> None:
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: expected hx of 1 or 2 dimensions, got {state.dim()}")
        expected = (*input.shape[:-1], self.hidden_size)
        if state.shape != expected:
            raise RuntimeError(f"{name}: expected hx of shape {list(expected)}, got {list(state.shape)}")
        if _in_autocast(input) is None:
            _check_state(state, "hx", input)


class RNNCell(_Cell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on fused kernels; one step of :class:`RNN`."""


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; one step of :class:`LSTM`."""


class GRUCell(_Cell, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` on fused kernels; one step of :class:`GRU`."""


FUSED = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
