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
    directions, _, hidden = hx.shape
    rows = math.prod(x.shape[:-1])
    results = [x.new_empty(*x.shape[:-1], directions * hidden), hx.new_empty(hx.shape)]
    if cx is not None:
        results.append(hx.new_empty(hx.shape))
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


def _products(x: Sequence[int], weights: Sequence[Sequence[int]]) -> list[int]:
    """Operations of x·W_ih and h·W_hh for all rows, from shapes."""
    rows, matrices = math.prod(x[:-1]), [math.prod(w) for w in weights if len(w) == 2]
    return [2 * rows * sum(matrices[::2]), 2 * rows * sum(matrices[1::2])]


def _forward_flops(_: str, x: Any, hx: Any, cx: Any, weights: Any, *__: Any, **___: Any) -> int:  # noqa: ARG001
    return sum(_products(x, weights))


def _backward_flops(
    _: str, dy: Any, dh_n: Any, dc_n: Any, x: Any, y: Any, hx: Any, cx: Any, saved: Any, weights: Any,  # noqa: ARG001
    batch_sizes: Any, lengths: Any, resets: Any, wanted: Sequence[bool], *__: Any, **___: Any,  # noqa: ARG001
) -> int:  # fmt: skip
    """dX, dW_ih and dW_hh where they are wanted, and what goes back through W_hh, to hx where that is wanted."""
    of_input, of_state = _products(x, weights)
    to_hx = _products(hx[1:], weights)[1]
    of_weights = zip(weights, wanted[2 if cx is None else 3 :], strict=True)
    matrices = [want for weight, want in of_weights if len(weight) == 2]
    back = of_state - (0 if wanted[1] else to_hx)
    return of_input * (wanted[0] + any(matrices[::2])) + of_state * any(matrices[1::2]) + back


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
