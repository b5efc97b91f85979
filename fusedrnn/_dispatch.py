"""Which implementation runs, and why.

``cpu``        the compiled kernels of ``csrc/cpu``
``cuda``       the compiled kernels of ``csrc/cuda``
``torch``      torch.nn's own implementation of the same layer, where the kernels do not cover a request yet
``reference``  plain PyTorch (``_reference.py``), where the extension is not built

A fallback is never silent: it warns once per reason, and ``fusedrnn.explain`` tells without running anything.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class FallbackWarning(UserWarning):
    """A layer runs, but not on fusedrnn's kernels; the message says why."""


class Explanation(NamedTuple):
    """What runs a request (``cpu``, ``cuda``, ``torch`` or ``reference``), and why not something faster."""

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


WITHOUT_GRID = 1 | 2  # the schedules of a block and of a cluster, as csrc/cuda/tuning.h numbers them


def _load_cuda() -> tuple[ModuleType | None, str]:
    if extension is None:
        return None, why_no_extension
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    try:
        from fusedrnn import _cuda
    except ModuleNotFoundError:
        return None, "this build of fusedrnn has no CUDA kernels"
    except ImportError as error:
        return None, f"the CUDA kernels cannot be loaded ({error})"
    grid = os.environ.get("FUSEDRNN_GRID", "")
    if grid not in ("", "0", "1"):
        raise ValueError(f"FUSEDRNN_GRID: expected 0, 1 or nothing, got {grid!r}")
    if grid == "0":
        _cuda.use_schedules(WITHOUT_GRID)
    return _cuda, ""


extension, why_no_extension = _load()
cuda_extension, why_no_cuda = _load_cuda()


HALF_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # on CPUs
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_warned: set[str] = set()


def built_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``architectures`` (as TORCH_CUDA_ARCH_LIST names them) runs on such a GPU."""
    for name in re.split(r"[;\s]+", architectures):
        number = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", name)
        if number is None:
            continue
        major, minor, exact, ptx = int(number[1]), int(number[2]), number[3], number[4]
        binary = (major, minor) == capability if exact else major == capability[0] and minor <= capability[1]
        if binary or (ptx and not exact and (major, minor) <= capability):
            return True
    return False


def constant_in_graphs(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def _why_no_kernels(device: int) -> str:
    """Why the CUDA kernels cannot run on this GPU, or nothing."""
    return _find_why_no_kernels(device)


@cache
def _find_why_no_kernels(device: int) -> str:
    assert cuda_extension is not None
    capability = torch.cuda.get_device_capability(device)
    if built_for(cuda_extension.architectures(), capability):
        return ""
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    return f"the CUDA kernels were built for {cuda_extension.architectures()}, not for {name}"


def implementation_for(device: torch.device, dtype: torch.dtype, projected: bool) -> Explanation:
    name = str(dtype).removeprefix("torch.")
    if device.type not in ("cpu", "cuda"):
        return Explanation("torch", f"there are no kernels for {device.type} devices")
    if device.type == "cuda":
        missing = why_no_cuda if cuda_extension is None else _why_no_kernels(index_of(device))
        if missing:
            return Explanation("torch", missing)
    if projected and device.type == "cuda":
        return Explanation("torch", "the CUDA kernels do not cover proj_size yet")
    if extension is None:  # torch.nn has projections itself
        return Explanation("torch" if projected else "reference", why_no_extension)
    if device.type == "cuda":
        if dtype in CUDA_DTYPES:
            return Explanation("cuda", f"fused {name} kernels")
    elif dtype in HALF_DTYPES:
        weights = "bfloat16 weights" if dtype == torch.bfloat16 else "converted weights"
        return Explanation("cpu", f"fused float32 kernels, {weights}; {name} outside")
    elif dtype in KERNEL_DTYPES:
        return Explanation("cpu", f"fused {name} kernels")
    return Explanation("torch", f"there are no kernels for {name}")


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def instead_of_torch(found: Explanation) -> Explanation:
    """What runs a request that torch.nn's own implementation does not know."""
    if found.implementation != "torch":
        return found
    return Explanation("reference", f"{found.reason}, and torch.nn has no lengths, resets, all states or streams")


def on_gpu_kernels(x: Tensor) -> bool:
    """Whether the GPU's kernels take x."""
    return x.is_cuda and cuda_extension is not None and x.dtype in CUDA_DTYPES and not _why_no_kernels(x.get_device())


def choose(x: Tensor, projected: bool = False, more: bool = False, stacklevel: int = 6) -> str:
    """The implementation for input ``x``, with ``more`` than torch.nn has; warns, once per reason, of a fallback."""
    # torch.onnx.export(dynamo=False) makes nodes of the operators that it sees, and knows torch's only: no fallback.
    if torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export():
        return "reference" if more else "torch"
    if x.is_cpu:
        if extension is not None and x.dtype in KERNEL_DTYPES:
            return "cpu"
    elif not projected and on_gpu_kernels(x):
        return "cuda"
    found = implementation_for(x.device, x.dtype, projected)
    implementation, reason = instead_of_torch(found) if more else found
    if implementation not in ("cpu", "cuda") and not x.is_meta:  # of a meta tensor nothing is computed
        warn_once(reason, stacklevel)  # 6: choose, forward, Module.__call__ (two of its own), the user's line
    return implementation


def use_tf32(x: Tensor) -> bool:
    """Whether torch's switches let recurrent layers round float32 factors to TF32 where x is."""
    return x.is_cuda and x.dtype == torch.float32 and _tf32_allowed()


@constant_in_graphs
def _tf32_allowed() -> bool:
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined,no-any-return]


def warn_once(reason: str, stacklevel: int = 2) -> None:
    """Say that something runs on a fallback, the first time that it does so for this reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fusedrnn runs on a fallback: {reason}", FallbackWarning, stacklevel=stacklevel)
