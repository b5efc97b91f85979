"""The operators' kernels for autograd: what a graph of torch.compile or torch.export calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _autograd, _direct, _modes, _ops, _states, _transforms

Maybe = Tensor | None


def _forward_with_autograd(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    save: bool,
    tf32: bool = False,
) -> Any:
    if save and (_modes.active() or _autograd.needs_gradient(x, hx, cx, weights)):
        if cx is not None and batch_sizes is None:
            return _states.with_all(x, hx, cx, weights, lengths, resets, tf32)
        # Other cells' states are their output: nobody asks for gradients of what is saved.
        sequence = (batch_sizes, lengths, resets)
        return list(_transforms.Recurrence.apply(cell, tf32, *sequence, x, hx, cx, *weights))  # type: ignore[no-untyped-call]
    if save:
        dense = batch_sizes is None and lengths is None and resets is None
        found = _direct.forward(cell, x, hx, cx, weights) if dense else None
        if found is not None:
            return found
        with _ops.below_autograd():
            return _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, save, tf32)
    results = _autograd.run(cell, x, hx, cx, weights, batch_sizes, lengths, resets, tf32)
    return [t for t in results if t is not None]


def _backward_with_autograd(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    y: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    saved: list[Tensor],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    wanted: list[bool],
    tf32: bool = False,
    dcells: Tensor | None = None,
) -> Any:
    followed = any(t is not None and t.requires_grad for t in (dy, dh_n, dc_n, dcells, x, y, hx, cx, *saved, *weights))
    if not _modes.active() and not (torch.is_grad_enabled() and followed):
        if batch_sizes is None and lengths is None and resets is None and dcells is None:
            every = wanted if cx is not None else [*wanted[:2], False, *wanted[2:]]
            found = _direct.backward(cell, (dy, dh_n, dc_n), x, y, hx, cx, saved, weights, every)
            if found is not None:
                return [t for t in found if t is not None]
        with _ops.below_autograd():
            return _ops.recurrence_backward(
                cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted, tf32, dcells
            )
    if dcells is not None:
        raise RuntimeError("fusedrnn: expected no dcells where the gradients will be differentiated themselves")
    found = _transforms.Gradients.apply(  # type: ignore[no-untyped-call]
        cell,
        tf32,
        tuple(wanted),
        len(weights),
        batch_sizes,
        lengths,
        resets,
        dy,
        dh_n,
        dc_n,
        x,
        hx,
        cx,
        *weights,
        y,
        *saved,
    )
    return list(found)


_ops.differentiate("recurrence_forward", _forward_with_autograd)
_ops.differentiate("recurrence_backward", _backward_with_autograd)
_ops.differentiate("step", _autograd.run_step)
