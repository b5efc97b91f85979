"""The operators as Python sees them, and the shapes of their results for torch.compile and export."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _dispatch

# Activated values kept for backward, per hidden unit, as csrc/cells states them.
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 4, "gru": 4}


def _forward_shapes(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,  # noqa: ARG001
    lengths: Tensor | None,  # noqa: ARG001
    resets: Tensor | None,  # noqa: ARG001
    save: bool,
    tf32: bool = False,  # noqa: ARG001
) -> list[Tensor]:
    directions, _, width = hx.shape  # of a projected state less than there are hidden units
    hidden = width if cx is None else cx.size(-1)
    rows = math.prod(x.shape[:-1])
    results = [x.new_empty(*x.shape[:-1], directions * width), hx.new_empty(hx.shape)]
    if cx is not None:
        results.append(hx.new_empty(cx.shape))
    if save and SAVED[cell]:
        results.append(weights[0].new_empty(directions, rows, SAVED[cell] * hidden))
    if save and cx is not None:
        results.append(weights[0].new_empty(directions, rows, hidden))
    return results


def _backward_shapes(
    cell: str,  # noqa: ARG001
    dy: Tensor | None,  # noqa: ARG001
    dh_n: Tensor | None,  # noqa: ARG001
    dc_n: Tensor | None,  # noqa: ARG001
    x: Tensor,
    y: Tensor,  # noqa: ARG001
    hx: Tensor,
    cx: Tensor | None,
    saved: list[Tensor],  # noqa: ARG001
    weights: list[Tensor],
    batch_sizes: Tensor | None,  # noqa: ARG001
    lengths: Tensor | None,  # noqa: ARG001
    resets: Tensor | None,  # noqa: ARG001
    wanted: list[bool],
    tf32: bool = False,  # noqa: ARG001
    dcells: Tensor | None = None,  # noqa: ARG001
) -> list[Tensor]:
    inputs = [x, hx, *([] if cx is None else [cx]), *weights]
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want]


def _step_shapes(cell: str, x: Tensor, hx: Tensor, cx: Tensor | None, weights: list[Tensor]) -> list[Tensor]:  # noqa: ARG001
    return [x.new_empty(hx.shape) for _ in range(1 if cx is None else 2)]


def _by_matrix(hx: Sequence[int], weights: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """What belongs to W_ih, W_hh and W_hr of a projection, of each direction, in a list like that of the weights."""
    each = len(weights) // (hx[0] if len(hx) == 3 else 1)
    return weights[::each], weights[1::each], weights[each - 1 :: each] if each % 2 else []


def _products(rows: int, hx: Sequence[int], weights: Sequence[Sequence[int]]) -> list[int]:
    """Operations of the products with W_ih, W_hh and W_hr for so many rows, from shapes."""
    return [2 * rows * sum(map(math.prod, shapes)) for shapes in _by_matrix(hx, weights)]


def _forward_flops(_: str, x: Any, hx: Any, cx: Any, weights: Any, *__: Any, **___: Any) -> int:  # noqa: ARG001
    return sum(_products(math.prod(x[:-1]), hx, weights))


def _backward_flops(
    _: str, dy: Any, dh_n: Any, dc_n: Any, x: Any, y: Any, hx: Any, cx: Any, saved: Any, weights: Any,  # noqa: ARG001
    batch_sizes: Any, lengths: Any, resets: Any, wanted: Sequence[bool], *__: Any, **___: Any,  # noqa: ARG001
) -> int:  # fmt: skip
    """dX and the matrices' gradients where they are wanted; what goes back through W_hr and W_hh, to hx on request."""
    products = _products(math.prod(x[:-1]), hx, weights)
    asked = map(any, _by_matrix(hx, wanted[2 if cx is None else 3 :]))
    to_hx = _products(hx[1], hx, weights)[1]
    back = [products[0] * wanted[0], products[1] - (0 if wanted[1] else to_hx), products[2]]
    return sum(back) + sum(product for product, want in zip(products, asked, strict=True) if want)


def differentiate(name: str, kernel: Callable[..., Any]) -> None:
    """Makes ``kernel`` what torch calls for an operator where autograd may have an interest in the call."""
    if _dispatch.extension is not None:
        _library.impl(name, kernel, "Autograd")  # type: ignore[no-untyped-call]


_library = torch.library.Library("fusedrnn", "IMPL")  # type: ignore[no-untyped-call]
# Inside, the operators have no gradients of their own: a call goes to the kernels.
below_autograd = torch._C._AutoDispatchBelowAutograd
if _dispatch.extension is not None:
    torch.library.register_fake("fusedrnn::recurrence_forward", _forward_shapes)
    torch.library.register_fake("fusedrnn::recurrence_backward", _backward_shapes)
    torch.library.register_fake("fusedrnn::step", _step_shapes)
    # An operator's one overload, looked up once: by its name the lookup would cost every call a µs.
    recurrence_forward = torch.ops.fusedrnn.recurrence_forward.default
    recurrence_backward = torch.ops.fusedrnn.recurrence_backward.default
    step = torch.ops.fusedrnn.step.default
    _log = logging.getLogger("torch.utils.flop_counter")
    # Where there is no triton its import warns, of nothing that is used here.
    _was_disabled, _log.disabled = _log.disabled, True
    from torch.utils.flop_counter import register_flop_formula

    _log.disabled = _was_disabled
    register_flop_formula([torch.ops.fusedrnn.recurrence_forward, torch.ops.fusedrnn.step])(_forward_flops)  # type: ignore[no-untyped-call]
    register_flop_formula(torch.ops.fusedrnn.recurrence_backward)(_backward_flops)  # type: ignore[no-untyped-call]
