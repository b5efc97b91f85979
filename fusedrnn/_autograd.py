"""One layer with its gradients, on the compiled kernels: eager, compiled, exported and under torch.func.

Eager calls go to an ``autograd.Function`` around the operators. Where torch.compile, torch.export or torch.jit.trace
records it, the call is one operator, whose kernel for autograd is that same Function. Under torch.func it is
``_transforms.Recurrence``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _direct, _dispatch, _modes, _ops, _reference, _transforms

Results = tuple[Tensor, Tensor, Tensor | None]


def recurrence(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Results:
    """:func:`fusedrnn._reference.recurrence` on the compiled kernels, on a GPU without projection.

    float32, float64 or bfloat16, on a GPU float16 too. On a CPU x and the states may be float32 beside bfloat16
    weights, each for themselves.
    """
    if _modes.recorded():
        if _modes.forward_mode_in_graph():
            return _reference.wide(cell, x, hx, cx, weights, batch_sizes, lengths, resets)
        results = _ops.recurrence_forward(
            cell, x, hx, cx, weights, batch_sizes, lengths, resets, False, _dispatch.use_tf32(x)
        )
        return results[0], results[1], results[2] if cx is not None else None
    return run(cell, x, hx, cx, weights, batch_sizes, lengths, resets, _dispatch.use_tf32(x))


def step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]) -> list[Tensor]:
    """One step of one layer on a CPU's kernels: x ``[B, I]``, h and c ``[B, H]`` to h' and, for an LSTM, c'."""
    results: list[Tensor]
    if not _modes.recorded():
        results = run_step(cell, x, h, c, weights)
    elif not _modes.forward_mode_in_graph():
        results = _ops.step(cell, x, h, c, weights)
    else:
        x, h, c = _transforms.with_step(x, h, c)
        _, *states = _reference.wide(cell, x, h, c, weights)
        results = [state.squeeze(0) for state in states if state is not None]
    return results


def run_step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]) -> Any:
    if _modes.active():
        x, h, c = _transforms.with_step(x, h, c)
        _, *states = run(cell, x, h, c, weights, None, None, None, False)
        return [state.squeeze(0) for state in states if state is not None]
    if needs_gradient(x, h, c, weights):
        return list(apply(cell, False, None, None, None, x, h, c, *weights))
    found = _direct.infer(cell, x, h, c, weights)
    if found is not None:
        return found[1:]
    with _ops.below_autograd():
        return _ops.step(cell, x, h, c, weights)


def run(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    tf32: bool,
) -> Results:
    if _modes.active():
        if _modes.needs_reference():
            return _reference.wide(cell, x, hx, cx, weights, batch_sizes, lengths, resets)
        y, h_n, *c_n = _transforms.Recurrence.apply(  # type: ignore[no-untyped-call]
            cell, tf32, batch_sizes, lengths, resets, x, hx, cx, *weights
        )
    elif needs_gradient(x, hx, cx, weights):
        y, h_n, *c_n = apply(cell, tf32, batch_sizes, lengths, resets, x, hx, cx, *weights)
    else:
        dense = batch_sizes is None and lengths is None and resets is None
        found = _direct.infer(cell, x, hx, cx, weights) if dense else None
        if found is None:
            with _ops.below_autograd():
                found = _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, False, tf32)
        y, h_n, *c_n = found
    return y, h_n, c_n[0] if cx is not None else None


def needs_gradient(x: Tensor, hx: Tensor, cx: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether a backward pass may follow, so that forward must save what it needs."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or hx.requires_grad
        or (cx is not None and cx.requires_grad)
        or any(w.requires_grad for w in weights)
    )


class Recurrence(torch.autograd.Function):
    """One layer, all directions, with gradients for x, hx, cx and every weight that asks for one.

    Or one step, of x ``[B, I]``, hx and cx ``[B, H]`` to h' and c': a view outside would be a node of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        tf32: bool,
        batch_sizes: Any,
        lengths: Any,
        resets: Any,
        x: Tensor,
        hx: Tensor,
        cx: Any,
        *weights: Tensor,
    ) -> Any:
        sequence, states, step = (batch_sizes, lengths, resets), 1 if cx is None else 2, hx.dim() == 2
        dense = batch_sizes is None and lengths is None and resets is None
        found = _direct.forward(cell, x, hx, cx, weights) if dense else None
        if found is None:
            own = _transforms.with_step(x, hx, cx) if step else (x, hx, cx)
            with _ops.below_autograd():
                found = _ops.recurrence_forward(cell, *own, weights, *sequence, True, tf32)
            if step:  # no views, which could not be written to; nor changes of what a mode may have kept
                watched = torch._C._len_torch_dispatch_stack() > 0
                found[: 1 + states] = [s.squeeze(0).clone() if watched else s.squeeze_(0) for s in found[: 1 + states]]
        y, *results = found
        _transforms.save(ctx, cell, tf32, (*sequence, x, hx, cx, *weights), y, results[states:])
        return tuple(results[:states]) if step else (y, *results[:states])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _transforms.gradients(ctx, *cotangents)


# Recurrence.apply, without what Function.apply does for torch.func first: a tenth of a small layer's call.
apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, Recurrence).apply
