"""The kernels without torch's dispatcher.

An operator call and the checks around it take some 20 µs, which is longer than the kernel of a small layer takes for a
step. Where no autocast, tracing, transform or mode has an interest in a call, the extension reads the tensors itself
(csrc/binding/direct.h). What it does not take gets None here: the caller takes the operators, who say what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _dispatch

Maybe = Tensor | None

STORED = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}  # what kernels call dtypes

# Looked up once: together they are asked some tenths of a µs faster.
_compiling = torch.compiler.is_compiling
_autocasting = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_tracing = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled
_forward_ad = torch.autograd.forward_ad
kernels: Any = None
if _dispatch.extension is not None and _dispatch.extension.use_tensors(Tensor, torch.nn.Parameter):
    kernels = _dispatch.extension


def possible() -> bool:
    """Whether nothing but the caller will see the call, nor cast its tensors."""
    return unseen() and kernels is not None and not _autocasting()


def unseen() -> bool:
    """Whether nothing but the caller will see the call."""
    return (
        not _compiling()
        and _dispatch.extension is not None
        and _functorch_level() is None
        and _forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and not _function_mode()
        and _tracing() is None
        and not _profiling()
    )


def address(tensor: Tensor) -> int:
    """Where the kernels find the numbers; a tensor may have them elsewhere, as a DTensor, or nowhere, as a fake one."""
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise RuntimeError(f"expected a tensor with memory of its own, got a {type(tensor).__name__}")
    return place


def dense(tensor: Tensor) -> Tensor:
    """The numbers as the kernels read them, one after the other and with their own sign."""
    return tensor.contiguous().resolve_neg()


def forward(cell: str, x: Tensor, hx: Tensor, cx: Maybe, weights: Sequence[Tensor]) -> list[Tensor] | None:
    """``recurrence_forward`` with ``save``, of a padded batch or a step: y, h_n, c_n (lstm) and what is saved.

    A step is x ``[B, I]`` with states ``[B, H]``; its y has h_n's numbers and memory of its own.
    """
    return kernels.forward(cell, x, hx, cx, weights, 1, True) if possible() else None  # type: ignore[no-any-return]


def infer(cell: str, x: Tensor, hx: Tensor, cx: Maybe, weights: Sequence[Tensor]) -> list[Tensor] | None:
    """``recurrence_forward`` without ``save``, of the same: y, h_n, c_n (lstm)."""
    return kernels.forward(cell, x, hx, cx, weights, 1, False) if possible() else None  # type: ignore[no-any-return]


def backward(
    cell: str,
    cotangents: Sequence[Maybe],
    x: Tensor,
    y: Tensor,
    hx: Tensor,
    cx: Maybe,
    saved: Sequence[Tensor],
    weights: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Maybe] | None:
    """``recurrence_backward``: of x, hx, cx and each weight, the gradient or None where it is not wanted."""
    if not possible():
        return None
    dense = (t if t is None or t.is_contiguous() else t.contiguous() for t in cotangents)
    return kernels.backward(cell, *dense, x, y, hx, cx, saved, weights, wanted)  # type: ignore[no-any-return]
