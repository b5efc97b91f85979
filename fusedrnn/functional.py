"""Layers × directions × dropout over one recurrence at a time, in the order of arguments of torch's own functionals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import _autograd, _reference

HALF = (torch.bfloat16, torch.float16)


def stack(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    implementation: str,
    num_layers: int = 1,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a stack of layers.

    Args:
        cell: ``rnn_tanh``, ``rnn_relu``, ``lstm`` or ``gru``.
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes [T]`` (a PackedSequence's).
        hx: ``[L*D, B, R]`` initial hidden states; the number of directions D follows from it.
        cx: ``[L*D, B, H]`` initial cell states of an LSTM.
        weights: torch.nn's flat list: per layer, per direction, w_ih, w_hh and what there is of b_ih, b_hh and w_hr.
        implementation: ``cpu`` or ``reference`` (see ``_dispatch``).
        num_layers: L.
        dropout: probability with which an output between layers is zeroed; 0 outside training.

    Returns:
        y ``[T, B, D*R]`` or ``[N, D*R]``, h_n like hx and c_n like cx, of x's dtype.
    """
    dtype = x.dtype
    if dtype in HALF:  # float32 inside: products, cell state and everything kept between steps
        x, hx, weights = x.float(), hx.float(), [w.float() for w in weights]
        cx = None if cx is None else cx.float()
    recurrence = _autograd.recurrence if implementation == "cpu" else _reference.recurrence
    directions, each = hx.size(0) // num_layers, len(weights) // num_layers
    h_n, c_n = [], []
    for layer in range(num_layers):
        states = slice(layer * directions, (layer + 1) * directions)
        x, h, c = recurrence(
            cell, x, hx[states], None if cx is None else cx[states], list(weights[layer * each : (layer + 1) * each]), batch_sizes
        )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    h = h_n[0] if num_layers == 1 else torch.cat(h_n)
    c = None if not c_n else c_n[0] if num_layers == 1 else torch.cat(c_n)
    if dtype in HALF:
        return x.to(dtype), h.to(dtype), None if c is None else c.to(dtype)
    return x, h, c
