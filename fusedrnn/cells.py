"""torch.nn's recurrent cells with another forward; constructor, parameters, init and state_dict are inherited."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _autocast, _dispatch, _modes, _shortcut, functional
from fusedrnn._checks import as_pair, check_like_input, parameters
from fusedrnn._script import Scriptable


class _Cell(Scriptable, torch.nn.RNNCellBase):
    """What the three cells share: one step is a sequence of one."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        done = _shortcut.cell(self, self._mode(), input, hx)
        if done is not None or (done := _modes.symbolic(self, input, hx)) is not None:
            return done
        implementation = _dispatch.choose(input)
        if implementation == "torch":
            return super().forward(input, hx)
        lstm = isinstance(self, torch.nn.LSTMCell)
        autocast = _autocast.dtype(input)
        h, c = (None, None) if hx is None else as_pair(hx, "LSTMCell") if lstm else (hx, None)
        weights = self._weights()
        self._check(input, [] if hx is None else [h, c] if lstm else [h], weights[0], autocast)
        x = input if input.dim() == 2 else input.unsqueeze(0)
        h = x.new_zeros(x.size(0), self.hidden_size) if h is None else h if h.dim() == 2 else h.unsqueeze(0)
        if lstm:
            c = torch.zeros_like(h) if c is None else c if c.dim() == 2 else c.unsqueeze(0)
        if autocast is not None:
            kept = _autocast.keeps_state(self, packed=False)
            states = [h] if c is None else [h, c]
            x, states, weights, given = _autocast.cast(x, states, weights, autocast, implementation, kept, True)
            h, c = states if len(states) == 2 else (states[0], None)
        h, c = functional.step(self._mode(), x, h, c, weights, implementation)
        if autocast is not None:
            h, c = h.to(given[0]), c if c is None else c.to(given[1])
        if input.dim() == 1:
            h, c = h.squeeze(0), c if c is None else c.squeeze(0)
        return h if c is None else (h, c)

    def _weights(self) -> list[Tensor]:
        weights = parameters(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2])
        given = [w for w in weights if w is not None]
        if len(given) == 3:  # torch.nn's cells do without one bias, or both
            return [torch.zeros_like(given[2]) if w is None else w for w in weights]
        return given

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
        check_like_input(weight, "the weights", input, any_dtype=True)
        expected = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if state.dim() not in (1, 2):
                raise ValueError(f"{name}: expected hx of 1 or 2 dimensions, got {state.dim()}")
            if state.shape != expected:
                raise RuntimeError(f"{name}: expected hx of shape {list(expected)}, got {list(state.shape)}")
            check_like_input(state, "hx", input, any_dtype=autocast is not None)


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
