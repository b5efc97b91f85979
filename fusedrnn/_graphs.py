"""The operators' kernels for autograd: what a graph of torch.compile or torch.export calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _autograd, _derivatives, _modes, _ops, _states, _transforms

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
    if save and cell == "lstm" and batch_sizes is None and cx is not None:
        return _states.with_all(x, hx, cx, weights, lengths, resets, tf32)
    if save:  # other cells' states are their output: nobody asks for this
        with _ops.below_autograd():
            return _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, save, tf32)
    if _modes.has_tangent(x, hx, cx, *weights):
        results = _autograd.by_reference(cell, x, hx, cx, weights, batch_sizes, lengths, resets)
    else:
        results = _autograd.run(cell, x, hx, cx, weights, batch_sizes, lengths, resets, tf32)
    return [t for t in results if t is not None]


def _step_with_autograd(cell: str, x: Tensor, h: Tensor, c: Maybe, weights: list[Tensor]) -> Any:
    if not _modes.has_tangent(x, h, c, *weights):
        return _autograd.run_step(cell, x, h, c, weights)
    x, h, c = _transforms.with_step(x, h, c)
    _, *states = _autograd.by_reference(cell, x, h, c, weights)
    return [state.squeeze(0) for state in states if state is not None]


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
    tensors = (dy, dh_n, dc_n, dcells, x, y, hx, cx, *saved, *weights)
    followed, dual = any(t is not None and t.requires_grad for t in tensors), _modes.has_tangent(*tensors)
    if not dual and not _modes.active() and not (torch.is_grad_enabled() and followed):
        with _ops.below_autograd():
            return _ops.recurrence_backward(
                cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted, tf32, dcells
            )
    if dcells is not None:
        raise RuntimeError("fusedrnn: expected no dcells where the gradients will be differentiated themselves")
    if dual:
        inputs = (dy, dh_n, dc_n, x, hx, cx, *weights)
        return list(_derivatives.gradients(cell, (batch_sizes, lengths, resets), inputs, wanted))
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
_ops.differentiate("step", _step_with_autograd)
