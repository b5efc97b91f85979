"""torch.nn's modules for whoever compiles a module's code, and not what it calls: TorchScript."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fusedrnn._dispatch import FallbackWarning


class Scriptable:
    """A layer or cell that torch.jit.script takes: it compiles torch.nn's, which shares the Parameters."""

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """What torch.jit.script compiles, and leaves in the place of this one in the model that it was given."""
        from fusedrnn._convert import TORCH_OF  # which needs the classes that are made of this one

        plain: Any = TORCH_OF.get(type(self))
        if plain is None:
            return self  # type: ignore[return-value]  # a user's class, whose forward may be its own
        warnings.warn(
            f"torch.jit.script compiles {plain.__module__}.{plain.__qualname__} in place of fusedrnn's and leaves it "
            "in the model; fusedrnn.convert(model) undoes that",
            FallbackWarning,
            stacklevel=2,
        )
        module: torch.nn.Module = plain.__new__(plain)
        module.__dict__.update(self.__dict__)
        module.__dict__.pop("_prepacked", None)
        return module
