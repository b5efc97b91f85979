"""A layer of an LSTM with the cell states after every step, and gradients of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _autograd, _casts, _dispatch, _modes, _ops, _reference, _transforms


def recurrence(
    kernels: bool,
    x: Tensor,
    hx: Tensor,
    cx: Tensor,
    weights: list[Tensor],
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """A layer of an LSTM over a padded batch, on the kernels or as :func:`fusedrnn._reference.recurrence` has it.

    The fourth result is the cell states ``[D, T, B, H]``, zero past a row's end.
    """
    tf32 = _dispatch.use_tf32(x)
    if not kernels or (torch.compiler.is_compiling() and _modes.forward_mode_in_graph()):
        return _by_reference(x, hx, cx, weights, lengths, resets)
    if torch.compiler.is_compiling():
        y, h_n, c_n, _, cells = _ops.recurrence_forward("lstm", x, hx, cx, weights, None, lengths, resets, True, tf32)
    else:
        y, h_n, c_n, _, cells = with_all(x, hx, cx, weights, lengths, resets, tf32)
    cells = cells.view(len(hx), *x.shape[:2], cx.size(-1))
    if lengths is not None:  # nobody has written what is past a row's end
        past = torch.arange(len(x), device=x.device).unsqueeze(1) >= lengths
        cells = cells.masked_fill(past.unsqueeze(-1), 0)
    return y, h_n, c_n, cells


def _by_reference(
    x: Tensor, hx: Tensor, cx: Tensor, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    every: list[Tensor] = []
    return *_reference.wide("lstm", x, hx, cx, weights, None, lengths, resets, cells=every), every[0]


class AllCells(torch.autograd.Function):
    """An LSTM's layer as ``_autograd.Recurrence`` runs it, with all that ``recurrence_forward`` gives with ``save``."""

    @staticmethod
    def forward(
        ctx: Any, tf32: bool, lengths: Any, resets: Any, x: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor
    ) -> Any:
        with _ops.below_autograd():
            y, h_n, c_n, gates, cells = _ops.recurrence_forward(
                "lstm", x, hx, cx, weights, None, lengths, resets, True, tf32
            )
        ctx.tf32 = tf32
        ctx.set_materialize_grads(False)
        kept, ctx.dtypes = _casts.sources(weights)
        ctx.save_for_backward(lengths, resets, x, hx, cx, y, gates, cells, *kept)
        ctx.mark_non_differentiable(gates)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, _: Any, dcells: Any) -> Any:
        lengths, resets, x, hx, cx, y, gates, cells, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        cotangents = (dy, dh_n, dc_n, dcells)
        # With create_graph=True the gradients will be differentiated themselves.
        differentiable = torch.is_grad_enabled()
        if differentiable or _transforms.batched(cotangents):
            with torch.enable_grad():
                inputs = (x, hx, cx, *_casts.again(kept, ctx.dtypes))
                found = _by_reference_again(inputs, wanted, lengths, resets, cotangents, differentiable)
        else:
            weights = _casts.again(kept, ctx.dtypes)
            with _ops.below_autograd():
                found = iter(
                    _ops.recurrence_backward(
                        *("lstm", dy, dh_n, dc_n, x, y, hx, cx, [gates, cells], weights),
                        *(None, lengths, resets, wanted, ctx.tf32, dcells),
                    )
                )
        return (None,) * 3 + tuple(next(found) if want else None for want in wanted)


def _by_reference_again(
    inputs: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    lengths: Tensor | None,
    resets: Tensor | None,
    cotangents: tuple[Tensor | None, ...],
    differentiable: bool,
) -> Iterator[Tensor]:
    """The gradients that are wanted, by running the reference again."""
    # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
    x, hx, cx, *weights = (t.view_as(t) for t in inputs)
    cells: list[Tensor] = []
    outputs = (
        *_reference.wide("lstm", x, hx, cx, weights, None, lengths, resets, cells=cells),
        cells[0].flatten(1, 2).to(weights[0].dtype),
    )
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o is not None and g is not None]
    sources = [t for t, want in zip((x, hx, cx, *weights), wanted, strict=True) if want]
    found = torch.autograd.grad(
        [o for o, _ in pairs], sources, [g for _, g in pairs], create_graph=differentiable, materialize_grads=True
    )
    return iter(found)


def with_all(
    x: Tensor, hx: Tensor, cx: Tensor, weights: list[Tensor], lengths: Tensor | None, resets: Tensor | None, tf32: bool
) -> Any:
    """``recurrence_forward`` of an LSTM with ``save``, with gradients of all results but the gates."""
    if _modes.active():
        _dispatch.warn_once("all cell states under torch.func come from the PyTorch reference")
        y, h_n, c_n, cells = _by_reference(x, hx, cx, weights, lengths, resets)
        cells = cells.flatten(1, 2).to(weights[0].dtype)
        return [
            y,
            h_n,
            c_n,
            cells.new_zeros(*cells.shape[:2], 4 * cells.size(2)),
            cells,
        ]  # gates are for backward alone
    if not _autograd.needs_gradient(x, hx, cx, weights):
        with _ops.below_autograd():
            return _ops.recurrence_forward("lstm", x, hx, cx, weights, None, lengths, resets, True, tf32)
    return list(AllCells.apply(tf32, lengths, resets, x, hx, cx, *weights))  # type: ignore[no-untyped-call]
