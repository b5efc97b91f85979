"""The autograd function of one layer, on the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _dispatch, _ops, _reference


def recurrence(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`fusedrnn._reference.recurrence` on the compiled kernels, without projection.

    float32 or float64, on a GPU bfloat16 and float16 too; on a CPU the weights of a float32 x may be bfloat16.
    """
    if in_transform():
        return _reference.recurrence(cell, x, hx, cx, weights, batch_sizes, lengths, resets)
    if needs_gradient(x, hx, cx, weights):
        y, h_n, *c_n = Recurrence.apply(  # type: ignore[no-untyped-call]
            cell, batch_sizes, lengths, resets, x, hx, cx, *weights
        )
    else:
        y, h_n, *c_n = _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, False, _dispatch.use_tf32(x))
    return y, h_n, c_n[0] if c_n else None


def in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which see through the reference only."""
    if torch.compiler.is_compiling():
        return False
    active = torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    if active:
        _dispatch.warn_once("torch.func and forward-mode differentiation see through the PyTorch reference only")
    return active


def needs_gradient(x: Tensor, hx: Tensor, cx: Tensor | None, weights: list[Tensor]) -> bool:
    """Whether a backward pass may follow, so that forward must save what it needs."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or hx.requires_grad
        or (cx is not None and cx.requires_grad)
        or any(w.requires_grad for w in weights)
    )


class Recurrence(torch.autograd.Function):
    """One layer, all directions, with gradients for x, hx, cx and every weight that asks for one."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        batch_sizes: Any,
        lengths: Any,
        resets: Any,
        x: Tensor,
        hx: Tensor,
        cx: Any,
        *weights: Tensor,
    ) -> Any:
        states = 1 if cx is None else 2
        ctx.cell, ctx.tf32 = cell, _dispatch.use_tf32(x)
        y, *results = _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, True, ctx.tf32)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, lengths, resets, x, hx, cx, *weights, y, *results[states:])
        ctx.weights = len(weights)
        return y, *results[:states]

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any = None) -> Any:
        batch_sizes, lengths, resets, x, hx, cx, *rest = ctx.saved_tensors
        weights, y, saved = rest[: ctx.weights], rest[ctx.weights], rest[ctx.weights + 1 :]
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (7 + len(weights))
        wanted = ctx.needs_input_grad[4:]
        sequence = (batch_sizes, lengths, resets)
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated themselves
            return (None,) * 4 + _differentiable_gradients(
                ctx.cell, sequence, (x, hx, cx, *weights), wanted, (dy, dh_n, dc_n)
            )

        # cx is no argument of the operator for cells without a cell state.
        asked = list(wanted) if cx is not None else [*wanted[:2], *wanted[3:]]
        gradients = iter(
            _ops.recurrence_backward(ctx.cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, *sequence, asked, ctx.tf32)
        )
        inputs = (x, hx, cx, *weights)
        return (
            None,
            None,
            None,
            None,
            *(next(gradients).to(like.dtype) if want else None for like, want in zip(inputs, wanted, strict=True)),
        )


def _differentiable_gradients(
    cell: str,
    sequence: tuple[Tensor | None, Tensor | None, Tensor | None],
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs`` by running the reference again; they can be differentiated any number of times."""
    # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
    x, hx, cx, *weights = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None
    assert hx is not None
    # bfloat16 weights go with a float32 x.
    outputs = _reference.recurrence(cell, x, hx, cx, [w.to(x.dtype) for w in weights if w is not None], *sequence)
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o is not None and g is not None]
    sources = [t for t, want in zip((x, hx, cx, *weights), wanted, strict=True) if want and t is not None]
    gradients = iter(
        torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(gradients) if want else None for want in wanted)
