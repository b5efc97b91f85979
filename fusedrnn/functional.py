"""Layers × directions × dropout over one recurrence at a time, in the order of arguments of torch's own functionals."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import _autograd, _casts, _modes, _prepack, _ragged, _recompute, _reference, _states
from fusedrnn._dispatch import HALF_DTYPES, KERNEL_DTYPES


def step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], implementation: str
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: x ``[B, I]``, h ``[B, H]`` and an LSTM's c ``[B, H]`` to h' and c'.

    ``cell``, ``weights`` and ``implementation`` are those of :func:`stack`.
    """
    if implementation == "cpu":
        dtype = x.dtype
        if dtype not in KERNEL_DTYPES:
            x, h, c, weights = _as_float32(x, h, c, weights)
        h, *rest = (state.to(dtype) for state in _autograd.step(cell, x, h, c, weights))
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
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    states: list[tuple[Tensor, Tensor | None]] | None = None,
    prepacked: Any = None,
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
        lengths: ``[B]`` int64 from 0 to T. Past its length a row has output zero and keeps its state.
        resets: ``[T, B]`` or ``[N]`` bool. Where set, the states of all layers are zeroed before the step.
        recompute: keep for backward little more than each layer's output, and compute the rest again. All of an LSTM's
            states and recompute do not go together: then everything is kept.
        states: given a padded x, is given each layer's hidden and cell states ``[D, T, B, R]`` and ``[D, T, B, H]``.
        prepacked: the kernels' stack that has these weights (``_prepack``), where no gradient is needed on a CPU.

    Returns:
        y ``[T, B, D*R]`` or ``[N, D*R]``, h_n like hx and c_n like cx.
    """
    if (
        lengths is not None
        and implementation == "cpu"
        and states is None
        and _ragged.worth_packing(lengths, x.size(0), (hx if cx is None else cx).size(-1))
    ):
        rows = _ragged.Rows(lengths, x.size(0))
        x, resets = rows.pack(x), None if resets is None else rows.pack(resets)
        hx, cx = hx.index_select(1, rows.order), None if cx is None else cx.index_select(1, rows.order)
        y, h, c = stack(
            cell, x, hx, cx, weights, implementation, num_layers, dropout, rows.batch_sizes, None, resets, recompute,
            prepacked=prepacked,
        )  # fmt: skip
        return rows.pad(y), h.index_select(1, rows.back), None if c is None else c.index_select(1, rows.back)
    dtype = x.dtype
    converted = implementation == "cpu" and dtype not in KERNEL_DTYPES
    if converted:  # float32 inside: sums, cell state and everything kept between steps
        x, hx, cx, weights = _as_float32(x, hx, cx, weights)
    recurrence = _reference.wide if implementation == "reference" else _autograd.recurrence
    has_gates = cell in ("lstm", "gru")  # an RNN keeps its output only, as it is
    if recompute and has_gates and _autograd.needs_gradient(x, hx, cx, weights) and not _traced():
        wide = implementation != "cuda" and dtype in HALF_DTYPES
        recurrence = partial(_recompute.with_float32_states if wide else _recompute.recurrence, recurrence)
    sequence = (batch_sizes, lengths, resets)
    if states is not None:
        recurrence = partial(_with_states, recurrence, implementation != "reference", dtype, states)
    if prepacked is not None:
        x, h, c = _prepack.run(prepacked, x, hx, cx, *sequence)
    elif num_layers == 1:
        x, h, c = recurrence(cell, x, hx, cx, weights, *sequence)
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
                *sequence,
            )
            layers.append((h, c))
        h = torch.cat([h for h, _ in layers])
        c = None if cx is None else torch.cat([c for _, c in layers if c is not None])
    if converted:
        return x.to(dtype), h.to(dtype), None if c is None else c.to(dtype)
    return x, h, c


def _as_float32(
    x: Tensor, hx: Tensor, cx: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    weights = [_casts.cast(w, torch.float32) for w in weights]
    return x.float(), hx.float(), None if cx is None else cx.float(), weights


def _with_states(
    run: _recompute.Recurrence,
    kernels: bool,
    dtype: torch.dtype,
    states: list[tuple[Tensor, Tensor | None]],
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, whose states are added to ``states``."""
    if cx is None:  # the output is the states
        y, h, c = run(cell, x, hx, cx, weights, batch_sizes, lengths, resets)
        cells = None
    else:
        y, h, c, cells = _states.recurrence(kernels, x, hx, cx, weights, lengths, resets)
        cells = cells.to(dtype)
    states.append((torch.stack(y.to(dtype).chunk(len(hx), -1)), cells))
    return y, h, c


def _traced() -> bool:
    """Whether torch.func or a trace sees the call, which decide themselves what is kept for backward."""
    return _modes.recorded() or _modes.active()


def _chunks(weights: list[Tensor], count: int) -> list[list[Tensor]]:
    size = len(weights) // count
    return [weights[i * size : (i + 1) * size] for i in range(count)]
