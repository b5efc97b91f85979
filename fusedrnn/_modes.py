"""What of torch may be at work around a call: torch.func, forward-mode differentiation."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn import _dispatch

_Kind = torch._C._functorch.TransformType
_innermost = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad


def transformed() -> bool:
    """Whether torch.func is at work."""
    return _innermost() is not None


def active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return _innermost() is not None or _forward_ad._current_level >= 0


def needs_reference() -> bool:
    """Whether something is at work that sees through plain PyTorch only: anything but vmap and reverse mode."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    needed = _forward_ad._current_level >= 0 or any(i.key() not in (_Kind.Vmap, _Kind.Grad) for i in stack)
    if needed:
        _warn()
    return needed


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward mode follows one of them; in torch.compile's graphs it is at work without ``active`` knowing."""
    found = any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)  # type: ignore[attr-defined]
    if found:
        _warn()
    return found


def _warn() -> None:
    _dispatch.warn_once("forward-mode differentiation sees through the PyTorch reference only")
