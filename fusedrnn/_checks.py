"""Checks of a module's arguments: one sentence that names what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_like_input(tensor: Tensor, name: str, x: Tensor, any_dtype: bool) -> None:
    if tensor.dtype != x.dtype and not any_dtype:
        raise RuntimeError(f"expected {name} of the input's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise RuntimeError(f"expected {name} on the input's device {x.device}, got {tensor.device}")


def as_pair(hx: Any, name: str) -> list[Tensor]:
    """An LSTM's (h_0, c_0) from what was given for it; fails with the type of error that torch.nn gives."""
    if not isinstance(hx, Tensor) and len(hx) == 2:
        return list(hx)
    given = f"a tensor of shape {list(hx.shape)}" if isinstance(hx, Tensor) else f"a {type(hx).__name__} of {len(hx)}"
    error: type[Exception]
    if name == "LSTM":  # torch.nn.LSTM takes the first two rows or elements, whatever they are
        error = IndexError if len(hx) < 2 else RuntimeError
    else:
        error = TypeError if isinstance(hx, Tensor) else RuntimeError
    raise error(f"{name}: expected hx to be a pair of two tensors (h_0, c_0), got {given}")


def parameters(module: torch.nn.Module, names: Sequence[str]) -> list[Any]:
    """Tensors of a module, whatever hooks, functional_call or a parametrization have put in their place; or None."""
    try:  # the attribute lookup of a Module takes half a µs a name
        return [module._parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the numbers waits for no device and is nothing that a trace or a transform must see."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def row_lengths(name: str, lengths: Any, input: Tensor, steps: int, batch: int) -> Tensor:
    """The ``lengths`` of a layer's call, int64 on the input's device; those on a device are clamped, not looked at."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: expected lengths to be a tensor of integers, got a {type(lengths).__name__}")
    if input.dim() == 2:
        raise RuntimeError(f"{name}: expected a batched 3-D input with lengths, got an unbatched 2-D one")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"{name}: expected lengths of dtype int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise RuntimeError(f"{name}: expected lengths of shape [{batch}], one per row, got {list(lengths.shape)}")
    if not lengths.is_cpu:
        lengths = lengths.clamp(0, steps)
    elif batch and can_be_read(lengths):
        least, most = (int(value) for value in lengths.aminmax())
        if least < 0 or most > steps:
            raise RuntimeError(f"{name}: expected lengths between 0 and {steps}, got {least if least < 0 else most}")
    if input.is_cuda and can_be_read(lengths):
        if torch.cuda.is_current_stream_capturing():  # a replay would read memory that is somebody else's by then
            raise RuntimeError(f"{name}: expected lengths on {input.device} in a CUDA graph, got them on the CPU")
        if lengths.is_pinned():  # copied now: the caller may change it before the GPU has read it
            lengths = lengths.clone()
    moved: Tensor = lengths.to(input.device, torch.int64, non_blocking=input.is_cuda)
    return moved


def reset_mask(name: str, resets: Any, input: Tensor, batch_first: bool) -> Tensor:
    """The ``resets`` of a layer's call, time first ``[T, B]``."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"{name}: expected resets to be a tensor of bool, got a {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise RuntimeError(f"{name}: expected resets of dtype bool, got {resets.dtype}")
    if resets.shape != input.shape[:-1]:
        expected = list(input.shape[:-1])
        raise RuntimeError(f"{name}: expected resets of shape {expected}, one per step, got {list(resets.shape)}")
    check_like_input(resets, "resets", input, any_dtype=True)
    if input.dim() == 2:
        return resets.unsqueeze(1)
    mask: Tensor = resets.transpose(0, 1) if batch_first else resets
    return mask
