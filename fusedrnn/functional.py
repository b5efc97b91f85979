"""Layers × directions × dropout over one recurrence at a time, in the order of arguments of torch's own functionals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import _autograd, _reference
from fusedrnn._dispatch import CONVERTED_DTYPES, KERNEL_DTYPES


def step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], implementation: str
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: x ``[B, I]``, h ``[B, H]`` and an LSTM's c ``[B, H]`` to h' and c'.

    ``cell``, ``weights`` and ``implementation`` are those of :func:`stack`.
    """
    if implementation == "cpu" and x.dtype in KERNEL_DTYPES:
        h, *rest = _autograd.step(cell, x, h, c, weights)
        return h, rest[0] if rest else None
    _, h, c = stack(
        cell, x.unsqueeze(0), h.unsqueeze(0), None if c is None else c.unsqueeze(0), weights, implementation
    )
    return h.squeeze(0), None if c is None else c.squeeze(0)


def stack(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
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
        implementation: ``cpu``, ``cuda`` or ``reference`` (see ``_dispatch``).
        num_layers: L.
        dropout: probability with which an output between layers is zeroed; 0 outside training.

    Returns:
        y ``[T, B, D*R]`` or ``[N, D*R]``, h_n like hx and c_n like cx, of x's dtype.
    """
    dtype = x.dtype
    converted = implementation != "cuda" and dtype in CONVERTED_DTYPES
    if converted:  # float32 inside: products, cell state and everything kept between steps
        x, hx, cx = x.float(), hx.float(), None if cx is None else cx.float()
        if dtype != torch.bfloat16 or implementation != "cpu":
            weights = [w.float() for w in weights]  # the kernels take bfloat16 weights as they are
    recurrence = _reference.recurrence if implementation == "reference" else _autograd.recurrence
    if num_layers == 1:
        x, h, c = recurrence(cell, x, hx, cx, weights, batch_sizes)
    else:
        layers = []
        for layer, (layer_hx, layer_weights) in enumerate(
            zip(hx.chunk(num_layers), _chunks(weights, num_layers), strict=True)
        ):
            layer_cx = None if cx is None else cx.chunk(num_layers)[layer]
            x, h, c = recurrence(
                cell,
                F.dropout(x, dropout) if dropout and layer else x,
                layer_hx,
                layer_cx,
                layer_weights,
                batch_sizes,
            )
            layers.append((h, c))
        h = torch.cat([h for h, _ in layers])
        c = None if cx is None else torch.cat([c for _, c in layers if c is not None])
    if converted:
        return x.to(dtype), h.to(dtype), None if c is None else c.to(dtype)
    return x, h, c


def _chunks(weights: list[Tensor], count: int) -> list[list[Tensor]]:
    size = len(weights) // count
    return [weights[i * size : (i + 1) * size] for i in range(count)]
