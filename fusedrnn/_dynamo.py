"""Lets torch.compile trace this package's layers, as it traces any module.

torch.compile breaks its graph at every module that is a torch.nn.RNN, LSTM or GRU, unless
``torch._dynamo.config.allow_rnn`` is set, which unrolls torch.nn's own over time. The switch is set here for fusedrnn's
layers alone, while one of them is looked at. torch.compile's own modules take seconds to import: this waits for them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

_BUILDER = "torch._dynamo.variables.builder"


def allow(classes: tuple[type, ...]) -> None:
    """No graph breaks at modules of these classes."""
    if _BUILDER in sys.modules:
        _extend(sys.modules[_BUILDER], classes)
    else:
        sys.meta_path.insert(0, _Finder(classes))


def _extend(builder: Any, classes: tuple[type, ...]) -> None:
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap_fused_module(self: Any, value: torch.nn.Module) -> Any:
        if not isinstance(value, classes):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_fused_module


class _Finder(importlib.abc.MetaPathFinder):
    """Extends dynamo's module when it is imported, the only import that it has an interest in."""

    def __init__(self, classes: tuple[type, ...]) -> None:
        self.classes = classes

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                _extend(module, self.classes)

            spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec
