"""What of torch may be at work around a call: torch.func, forward-mode differentiation."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

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


def recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace makes a graph of the operators that are called."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def symbolic(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
    """The node of a graph that torch.fx makes for a call of a layer or cell, as of one of torch.nn's; or None."""
    if not isinstance(arguments[0], torch.fx.Proxy):
        return None
    if not type(module).forward.__module__.startswith("fusedrnn."):  # the node would call what is being traced
        name = type(module).__name__
        raise torch.fx.proxy.TraceError(f"torch.fx cannot trace {name}.forward, a subclass's: make {name} a leaf")
    tracer: Any = arguments[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, options)


def needs_reference() -> bool:
    """Whether something is at work that sees through plain PyTorch only: anything but vmap and reverse mode."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    needed = _forward_ad._current_level >= 0 or any(i.key() not in (_Kind.Vmap, _Kind.Grad) for i in stack)
    if needed:
        _warn()
    return needed


@_dispatch.constant_in_graphs
def forward_mode_in_graph() -> bool:
    """Whether the code that torch.compile traces is inside forward mode, which the graph's own calls will not know."""
    needed = _forward_ad._current_level >= 0
    if needed:
        _warn()
    return needed


def _warn() -> None:
    _dispatch.warn_once("forward-mode differentiation sees through the PyTorch reference only")
