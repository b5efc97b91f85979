"""Which implementation runs, and why.

``cpu``        the compiled kernels of ``csrc/cpu``
``torch``      torch.nn's own implementation of the same layer, where the kernels do not cover a request yet
``reference``  plain PyTorch (``_reference.py``), where the extension is not built

A fallback is never silent: it warns once per reason, and :func:`explain` tells without running anything.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class FallbackWarning(UserWarning):
    """A layer runs, but not on fusedrnn's kernels; the message says why."""


class Explanation(NamedTuple):
    """The implementation that runs a request (``cpu``, ``torch`` or ``reference``), and why not a faster one."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {self.reason}"


def _load() -> tuple[ModuleType | None, str]:
    try:
        from fusedrnn import _C
    except ImportError as error:
        return None, f"the extension is not built or cannot be loaded ({error})"
    # OpenMP runs the parts of a parallel loop at the same time; a pool with a queue may not (csrc/cpu/team.h).
    _C.use_threads("ATen parallel backend: OpenMP" in torch.__config__.parallel_info())
    try:
        _C.use(os.environ.get("FUSEDRNN_ISA", ""))
    except ValueError as error:
        raise ValueError(f"FUSEDRNN_ISA: {error}") from None
    return _C, ""


extension, why_no_extension = _load()


KERNEL_DTYPES = (torch.float32, torch.float64)
CONVERTED_DTYPES = (torch.bfloat16, torch.float16)

_warned: set[str] = set()


def _explain(device: str, dtype: torch.dtype, projected: bool) -> Explanation:
    name = str(dtype).removeprefix("torch.")
    if extension is None:
        return Explanation("reference", why_no_extension)
    if device != "cpu":
        return Explanation("torch", f"this build has no kernels for {device} devices")
    if projected:
        return Explanation("torch", "the CPU kernels do not cover proj_size yet")
    if dtype in KERNEL_DTYPES:
        return Explanation("cpu", f"fused {name} kernels")
    if dtype in CONVERTED_DTYPES:
        return Explanation("cpu", f"fused float32 kernels; {name} is converted on the way in and out")
    return Explanation("torch", f"there are no kernels for {name}")


def choose(x: Tensor, projected: bool = False) -> str:
    """The implementation for input ``x``; warns, once per reason, when it is a fallback."""
    if x.dtype in KERNEL_DTYPES and not projected and extension is not None and x.device.type == "cpu":
        return "cpu"
    implementation, reason = _explain(x.device.type, x.dtype, projected)
    if implementation != "cpu":
        warn_once(reason, stacklevel=6)  # choose, forward, Module.__call__ (two of its own), the user's line
    return implementation


def warn_once(reason: str, stacklevel: int = 2) -> None:
    """Say that something runs on a fallback, the first time that it does so for this reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fusedrnn runs on a fallback: {reason}", FallbackWarning, stacklevel=stacklevel)


def explain(module: torch.nn.Module, input: Tensor | PackedSequence) -> Explanation:
    """Say which implementation would run ``module(input)``, and why not a faster one; nothing is run.

    Args:
        module: a fusedrnn layer or cell. For one of torch.nn's the answer is ``torch``, with the advice to convert it.
        input: what it would be called with.

    Raises:
        TypeError: ``module`` is no recurrent layer or cell.
    """
    from fusedrnn import modules

    if isinstance(module, modules.FUSED):
        data = input.data if isinstance(input, PackedSequence) else input
        return _explain(data.device.type, data.dtype, bool(getattr(module, "proj_size", 0)))
    if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
        return Explanation(
            "torch",
            f"{type(module).__name__} is not one of fusedrnn's modules; fusedrnn.convert swaps torch.nn's",
        )
    raise TypeError(f"expected a recurrent layer or cell, got {type(module).__name__}")
