"""The operators' facts for Python: the layout of a unit's values, and the shapes of results that torch.compile and export ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn import _dispatch

# Per hidden unit, as csrc/cells states them. x·W_ih lands in the first GATES of the SUMS pre-activations (for the GRU in the order
# n r z), h·W_hh in the last GATES of them, in torch's order. SAVED activated values are kept for backward.
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
SUMS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 4}
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 4, "gru": 4}


def _forward_shapes(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],  # noqa: ARG001
    batch_sizes: Tensor | None,  # noqa: ARG001
    lengths: Tensor | None,  # noqa: ARG001
    resets: Tensor | None,  # noqa: ARG001
    save: bool,
) -> tuple[Tensor, ...]:
    directions, _, hidden = hx.shape
    rows = x.numel() // x.size(-1) if save else 0
    return (
        x.new_empty(*x.shape[:-1], directions * hidden),
        x.new_empty(hx.shape),
        x.new_empty(0) if cx is None else x.new_empty(cx.shape),
        x.new_empty(directions, rows, SAVED[cell] * hidden),
        x.new_empty(directions, rows if cx is not None else 0, hidden),
    )


def _backward_shapes(
    cell: str,
    dy: Tensor | None,  # noqa: ARG001
    dh_n: Tensor | None,  # noqa: ARG001
    dc_n: Tensor | None,  # noqa: ARG001
    y: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    gates: Tensor,  # noqa: ARG001
    cells: Tensor,  # noqa: ARG001
    w_hh: list[Tensor],  # noqa: ARG001
    batch_sizes: Tensor | None,  # noqa: ARG001
    lengths: Tensor | None,  # noqa: ARG001
    resets: Tensor | None,  # noqa: ARG001
    state_gradients: bool,
) -> tuple[Tensor, ...]:
    directions, _, hidden = hx.shape
    rows = y.numel() // y.size(-1)
    return (
        y.new_empty(directions, rows, SUMS[cell] * hidden),
        hx.new_empty(hx.shape if state_gradients else 0),
        y.new_empty(0) if cx is None or not state_gradients else y.new_empty(cx.shape),
    )


if _dispatch.extension is not None:
    torch.library.register_fake("fusedrnn::recurrence_forward", _forward_shapes)
    torch.library.register_fake("fusedrnn::recurrence_backward", _backward_shapes)
