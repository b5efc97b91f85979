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
        weights = "bfloat16 weights" if dtype == torch.bfloat16 else "weights converted at every call"
        return Explanation("cpu", f"fused float32 kernels, {weights}; {name} outside")
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
        found = _explain(data.device.type, data.dtype, bool(getattr(module, "proj_size", 0)))
        return Explanation("cpu", f"{found.reason}; {_path(module, input)}") if found.implementation == "cpu" else found
    if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
        return Explanation(
            "torch",
            f"{type(module).__name__} is not one of fusedrnn's modules; fusedrnn.convert swaps torch.nn's",
        )
    raise TypeError(f"expected a recurrent layer or cell, got {type(module).__name__}")


def _path(module: torch.nn.Module, input: Tensor | PackedSequence) -> str:
    """How the kernels would run the first layer forward, in words."""
    assert extension is not None
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, torch.nn.RNNCellBase):
        steps, batch, directions = 1, data.shape[0] if data.dim() == 2 else 1, 1
    else:
        assert isinstance(module, torch.nn.RNNBase)
        directions = 2 if module.bidirectional else 1
        if isinstance(input, PackedSequence):
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        elif data.dim() == 2:
            steps, batch = data.shape[0], 1
        else:
            steps, batch = data.shape[:2] if not module.batch_first else data.shape[1::-1]
    mode = getattr(module, "mode", type(module).__name__.removesuffix("Cell")).lower()
    cell = "rnn_tanh" if mode.startswith("rnn") else mode  # relu's plan is the same
    double = data.dtype == torch.float64
    plan = extension.plan(cell, double, False, steps, batch, module.input_size, module.hidden_size, directions)
    weights = "packed weights" if plan["packed"] else "weights read in place"
    threads = plan["teams"] * plan["members"]
    if threads == 1:
        sharing = "1 thread"
    elif plan["row_blocks"] > 1:
        sharing = f"{threads} threads share the rows"
    elif plan["members"] == 1:
        sharing = f"{threads} threads share the directions"
    else:
        sharing = f"{threads} threads share the units"
    return f"{extension.instruction_set()}, {weights}, {sharing}"
