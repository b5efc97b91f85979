"""Derivatives of one layer, of any order, and its rules for torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _dispatch, _ops, _reference, _vmap

Maybe = Tensor | None
_Kind = torch._C._functorch.TransformType
_innermost = torch._C._functorch.peek_interpreter_stack
_is_old_batch = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched=True
_forward_ad = torch.autograd.forward_ad


def active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return _innermost() is not None or _forward_ad._current_level >= 0


def needs_reference() -> bool:
    """Whether something is at work that sees through plain PyTorch only: anything but vmap and reverse mode."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    needed = _forward_ad._current_level >= 0 or any(i.key() not in (_Kind.Vmap, _Kind.Grad) for i in stack)
    if needed:
        _dispatch.warn_once("forward-mode differentiation sees through the PyTorch reference only")
    return needed


def _followed(tensors: Sequence[Maybe]) -> tuple[bool, ...] | None:
    """Which of them torch.func.grad differentiates by, where it is at work: there a Function is asked for all."""
    if _innermost() is None:
        return None
    return tuple(t is not None and t.requires_grad for t in tensors)


def save(ctx: Any, cell: str, tf32: bool, inputs: Sequence[Maybe], y: Tensor, saved: Sequence[Tensor]) -> None:
    """Keeps for :func:`gradients` what forward was given, from batch_sizes on, and what it gave."""
    ctx.cell, ctx.tf32, ctx.weights, ctx.followed = cell, tf32, len(inputs) - 6, None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, y, *saved)


def with_step(*tensors: Maybe) -> Any:
    """Tensors of one step, with their dimension of steps or directions."""
    return tuple(None if t is None else t.unsqueeze(0) for t in tensors)


def gradients(ctx: Any, dy: Maybe, dh_n: Maybe = None, dc_n: Maybe = None, *_: Maybe) -> tuple[Maybe, ...]:
    """The backward pass of both Functions of a layer: what they return for each argument."""
    batch_sizes, lengths, resets, x, hx, cx, *rest = ctx.saved_tensors
    weights, y, saved = rest[: ctx.weights], rest[ctx.weights], rest[ctx.weights + 1 :]
    step = hx.dim() == 2
    if step:
        dh_n, dc_n, x, hx, cx = with_step(dy, dh_n, x, hx, cx)
        dy = None
    if cx is None:
        dc_n = None  # what stands there is of something saved
    if dy is None and dh_n is None and dc_n is None:
        return (None,) * (8 + len(weights))
    wanted = ctx.needs_input_grad[5:] if ctx.followed is None else ctx.followed
    # cx is no argument of the operator for cells without a cell state.
    asked = wanted if cx is not None else (*wanted[:2], *wanted[3:])
    cotangents = (dy, dh_n, dc_n)
    if any(c is not None and _is_old_batch(c) for c in cotangents):
        inputs = (*cotangents, x, hx, cx, *weights)
        found = _reference_gradients(ctx.cell, (batch_sizes, lengths, resets), inputs, asked)
    elif torch.is_grad_enabled() or active():  # the gradients will be differentiated themselves, or are batched
        found = Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.cell, ctx.tf32, asked, len(weights), batch_sizes, lengths, resets,
            dy, dh_n, dc_n, x, hx, cx, *weights, y, *saved,
        )  # fmt: skip
    else:
        with _ops.below_autograd():
            found = _ops.recurrence_backward(
                ctx.cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, asked, ctx.tf32
            )
    left = list(reversed(found))
    del found  # of bfloat16 weights, each float32 gradient goes before the next is converted
    results = [
        left.pop().to(like.dtype) if want else None for like, want in zip((x, hx, cx, *weights), wanted, strict=True)
    ]
    if step:
        results[:3] = [None if t is None else t.squeeze(0) for t in results[:3]]
    return (None,) * 5 + tuple(results)


class Recurrence(torch.autograd.Function):
    """``_autograd.Recurrence`` in the form that torch.func asks for, which costs an eager call more."""

    @staticmethod
    def forward(
        cell: str,
        tf32: bool,
        batch_sizes: Any,
        lengths: Any,
        resets: Any,
        x: Tensor,
        hx: Tensor,
        cx: Any,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        with _ops.below_autograd():
            return tuple(_ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, True, tf32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cell, tf32, *tensors = inputs
        results = 2 if tensors[5] is None else 3
        ctx.mark_non_differentiable(*output[results:])
        save(ctx, cell, tf32, tensors, output[0], output[results:])
        ctx.followed = _followed(tensors[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return gradients(ctx, *cotangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _vmap_forward(Recurrence.apply, info, in_dims, arguments)


def _vmap_forward(call: Callable[..., Any], info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """V instances of ``call``, which takes what ``Recurrence.forward`` does."""
    if any(dim is not None for dim in (in_dims[2], *in_dims[8:])):  # each has weights or batch_sizes of its own
        return _vmap.one_by_one(call, info, in_dims, arguments)
    return _vmap.folded(call, info, in_dims, arguments, 2, (5, 6, 7))


def _vmap_operator(
    info: Any,
    in_dims: Sequence[Any],
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Maybe,
    weights: list[Tensor],
    batch_sizes: Maybe,
    lengths: Maybe,
    resets: Maybe,
    save: bool,
    tf32: bool = False,
) -> Any:
    """vmap as torch.compile traces it, without gradients."""

    def call(cell: str, tf32: bool, *given: Any) -> tuple[Tensor, ...]:
        return tuple(_ops.recurrence_forward(cell, *given[3:6], given[6:], *given[:3], save, tf32))

    dims = (None, None, *in_dims[5:8], *in_dims[1:4], *in_dims[4])
    return _vmap_forward(call, info, dims, (cell, tf32, batch_sizes, lengths, resets, x, hx, cx, *weights))


if _dispatch.extension is not None:
    torch.library.register_vmap("fusedrnn::recurrence_forward", _vmap_operator)


class Gradients(torch.autograd.Function):
    """``recurrence_backward``, differentiable any number of times.

    The kernels give the gradients; gradients of theirs come from running the reference again.
    """

    @staticmethod
    def forward(
        cell: str,
        tf32: bool,
        wanted: tuple[bool, ...],
        count: int,
        batch_sizes: Any,
        lengths: Any,
        resets: Any,
        dy: Any,
        dh_n: Any,
        dc_n: Any,
        x: Tensor,
        hx: Tensor,
        cx: Any,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, y, saved = rest[:count], rest[count], rest[count + 1 :]
        with _ops.below_autograd():
            found = _ops.recurrence_backward(
                cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted, tf32
            )
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.cell, _, ctx.wanted, ctx.count, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*tensors[: 9 + ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        sequence, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        asked = [i for i, want in enumerate(ctx.needs_input_grad[7 : 7 + len(inputs)]) if want]

        def first(*sources: Tensor) -> tuple[Tensor, ...]:
            given = list(inputs)
            for i, source in zip(asked, sources, strict=True):
                given[i] = source
            return _reference_gradients(ctx.cell, sequence, given, ctx.wanted)

        found, pull = torch.func.vjp(first, *(inputs[i] for i in asked))  # type: ignore[misc]
        own = [torch.zeros_like(g) if c is None else c for g, c in zip(found, cotangents, strict=True)]
        results: list[Maybe] = [None] * (ctx.arguments - 7)
        for i, gradient in zip(asked, pull(tuple(own)), strict=True):
            results[i] = gradient
        return (None,) * 7 + tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        wanted, count = arguments[2:4]
        own_weights = any(dim is not None for dim in (in_dims[4], *in_dims[13 : 13 + count]))
        if own_weights or any(wanted[len(wanted) - count :]):  # of each a gradient of its own for the weights
            return _vmap.one_by_one(Gradients.apply, info, in_dims, arguments)
        rows = (*range(7, 13), *range(13 + count, len(arguments)))
        return _vmap.folded(Gradients.apply, info, in_dims, arguments, 4, rows)


def _reference_gradients(
    cell: str, sequence: Sequence[Maybe], inputs: Sequence[Maybe], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """recurrence_backward by the reference. ``inputs``: dy, dh_n, dc_n, x, hx, cx and the weights."""
    cotangents, cx = inputs[:3], inputs[5]
    tensors = [t for t in inputs[3:] if t is not None]
    states = len(tensors) - len(inputs[6:])
    # bfloat16 weights go with a float32 x.
    tensors[states:] = [w.to(tensors[0].dtype) for w in tensors[states:]]
    asked = [i for i, want in enumerate(wanted) if want]

    def forward(*sources: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        for i, source in zip(asked, sources, strict=True):
            given[i] = source
        outputs = _reference.recurrence(
            cell, given[0], given[1], None if cx is None else given[2], given[states:], *sequence
        )
        return tuple(o for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None)

    _, pull = torch.func.vjp(forward, *(tensors[i] for i in asked))  # type: ignore[misc]
    return tuple(pull(tuple(c for c in cotangents if c is not None)))
