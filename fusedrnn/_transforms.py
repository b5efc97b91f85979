"""Derivatives of one layer, of any order, and its rules for torch.func."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _casts, _derivatives, _direct, _dispatch, _modes, _ops, _vmap

Maybe = Tensor | None
_is_old_batch = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched=True


def batched(cotangents: Sequence[Maybe]) -> bool:
    """Whether some are many at once, by is_grads_batched, which sees through plain PyTorch only."""
    return not torch.compiler.is_compiling() and any(c is not None and _is_old_batch(c) for c in cotangents)


def _followed(tensors: Sequence[Maybe]) -> tuple[bool, ...] | None:
    """Which of them torch.func.grad differentiates by, where it is at work: there a Function is asked for all."""
    if not _modes.transformed():
        return None
    return tuple(t is not None and t.requires_grad for t in tensors)


def save(ctx: Any, cell: str, tf32: bool, inputs: Sequence[Maybe], y: Tensor, saved: Sequence[Tensor]) -> None:
    """Keeps for :func:`gradients` what forward was given, from batch_sizes on, and what it gave."""
    ctx.cell, ctx.tf32, ctx.weights, ctx.followed = cell, tf32, len(inputs) - 6, None
    ctx.set_materialize_grads(False)
    weights, ctx.dtypes = _casts.sources(inputs[6:])  # type: ignore[arg-type]
    ctx.save_for_backward(*inputs[:6], *weights, y, *saved)


def with_step(*tensors: Maybe) -> Any:
    """Tensors of one step, with their dimension of steps or directions."""
    return tuple(None if t is None else t.unsqueeze(0) for t in tensors)


def gradients(ctx: Any, dy: Maybe, dh_n: Maybe = None, dc_n: Maybe = None, *_: Maybe) -> tuple[Maybe, ...]:
    """The backward pass of both Functions of a layer: what they return for each argument."""
    batch_sizes, lengths, resets, x, hx, cx, *rest = ctx.saved_tensors
    y, saved = rest[ctx.weights], rest[ctx.weights + 1 :]
    step = hx.dim() == 2
    if step:
        dy, dh_n, dc_n = None, dy, dh_n
    cotangents = (dy, dh_n, None if cx is None else dc_n)  # without cx, what stands there is of something saved
    if all(c is None for c in cotangents):
        return (None,) * len(ctx.needs_input_grad)
    weights = _casts.again(rest[: ctx.weights], ctx.dtypes)
    wanted = ctx.needs_input_grad[5:] if ctx.followed is None else ctx.followed
    compiling = torch.compiler.is_compiling()  # by compiled autograd, in a graph that knows the operators
    seen = batched(cotangents) or (not compiling and _modes.active() and _modes.needs_reference())
    # The gradients will be so themselves, or are batched.
    differentiable = not compiling and (torch.is_grad_enabled() or _modes.active())
    sequence = (batch_sizes, lengths, resets)
    if not (seen or differentiable) and batch_sizes is None and lengths is None and resets is None:
        direct = _direct.backward(ctx.cell, cotangents, x, y, hx, cx, saved, weights, wanted)
        if direct is not None:
            return (*(None,) * 5, *direct)
    if step:
        cotangents, (x, y, hx, cx) = with_step(*cotangents), with_step(x, y, hx, cx)
    # cx is no argument of the operator for cells without a cell state.
    asked = wanted if cx is not None else (*wanted[:2], *wanted[3:])
    if seen:  # by something that sees through plain PyTorch only
        found = _derivatives.gradients(ctx.cell, sequence, (*cotangents, x, hx, cx, *weights), asked)
    elif differentiable:
        found = Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.cell, ctx.tf32, asked, len(weights), *sequence, *cotangents, x, hx, cx, *weights, y, *saved
        )
    else:
        with contextlib.nullcontext() if compiling else _ops.below_autograd():
            found = _ops.recurrence_backward(
                ctx.cell, *cotangents, x, y, hx, cx, saved, weights, *sequence, asked, ctx.tf32
            )
    left = iter(found)
    results = [next(left) if want else None for want in wanted]
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
        if all(c is None for c in cotangents):
            return (None,) * ctx.arguments
        given = iter(cotangents)
        used = [want and next(given) is not None for want in ctx.wanted]  # the other gradients went nowhere

        def first(*sources: Tensor) -> tuple[Tensor, ...]:
            replaced = list(inputs)
            for i, source in zip(asked, sources, strict=True):
                replaced[i] = source
            return _derivatives.gradients(ctx.cell, sequence, replaced, used)

        _, pull = _derivatives.vjp(first, *(inputs[i] for i in asked))
        own = tuple(c for c in cotangents if c is not None)
        results: list[Maybe] = [None] * (ctx.arguments - 7)
        for i, gradient in zip(asked, pull(own), strict=True):
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
