"""Swap torch.nn's recurrent modules inside a model for fusedrnn's, and back."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from fusedrnn.modules import FUSED

Model = TypeVar("Model", bound=torch.nn.Module)

_FUSED_OF: dict[type, type] = {getattr(torch.nn, fused.__name__): fused for fused in FUSED}
# What revert makes of a class: torch.nn's own, or the user's subclass of one.
TORCH_OF: dict[type, type] = {fused: plain for plain, fused in _FUSED_OF.items()}

# What a subclass of torch.nn's may define and still mean the same: either forward gets along with any of them.
_FREE = frozenset({"forward", "reset_parameters", "extra_repr", "flatten_parameters"})


def convert(model: Model) -> Model:
    """Make every torch.nn.RNN, LSTM, GRU and cell in ``model`` one of fusedrnn's; returns ``model`` itself.

    Only the class of each module changes. The object stays, and with it its Parameters, hooks, buffers and every
    reference to it, so optimisers, shared modules and data parallel wrappers need not know.

    A module of a subclass keeps its methods; where they call ``super().forward``, fusedrnn's answers. Left alone, with
    a UserWarning that says why, are those whose ``forward`` does not call it, that define what torch.nn's is made of,
    or an attribute of a name that fusedrnn's has. torch makes a subclass of a module that it parametrizes or shards:
    convert before.
    """
    for path, module in model.named_modules():
        theirs: type = type(module)
        plain = next((base for base in theirs.__mro__ if base in _FUSED_OF), None)
        if theirs is plain:
            module.__class__ = _FUSED_OF[theirs]
        elif plain is not None and not isinstance(module, FUSED):
            why = _objection(module, plain, _FUSED_OF[plain])
            if why is None:
                try:
                    module.__class__ = _before_torch(theirs, _FUSED_OF[plain])
                    continue
                except TypeError as error:  # a metaclass that takes no such class
                    why = str(error)
            warnings.warn(f"fusedrnn.convert left {path or 'the model'} alone: {why}", stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: every module in ``model`` has the class that it had; returns ``model`` itself.

    Modules made as fusedrnn's become torch.nn's, too. Subclasses of fusedrnn's are left alone, with a UserWarning that
    names them.
    """
    for path, module in model.named_modules():
        if type(module) in TORCH_OF:
            module.__class__ = TORCH_OF[type(module)]
        elif isinstance(module, FUSED):
            warnings.warn(
                f"fusedrnn.revert left {path or 'the model'} alone: {type(module).__name__} is a subclass", stacklevel=2
            )
    return model


def _objection(module: torch.nn.Module, plain: type, fused: type) -> str | None:
    """Why a module of a subclass of ``plain`` cannot have ``fused`` in between, if so."""
    if parametrize.is_parametrized(module):
        return "it is parametrized (convert first)"
    if hasattr(module, "unshard"):
        return "it is sharded (convert first)"
    theirs, name = type(module), type(module).__name__
    own = theirs.__mro__[: theirs.__mro__.index(plain)]
    for forward in (vars(base)["forward"] for base in own if "forward" in vars(base)):
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is None or "super" not in code.co_names:
            return f"{name}.forward does not call super().forward"
    defined, torchs = _names(own), _names(plain.__mro__) - _names(torch.nn.Module.__mro__)
    ours = _names(fused.__mro__) - _names(plain.__mro__)
    for attribute in sorted((defined & torchs) - _FREE) + sorted(n for n in ours if hasattr(module, n)):
        return f"{name} has a {attribute} of its own"
    return None


def _names(classes: tuple[type, ...]) -> set[str]:
    return {name for base in classes for name in vars(base) if not (name.startswith("__") and name.endswith("__"))}


@functools.cache
def _before_torch(theirs: type, fused: type) -> Any:
    """A user's class with fusedrnn's between it and torch.nn's, so that ``super()`` finds that first."""

    def reduce(self: Any, protocol: int) -> Any:
        # By the user's class, for this one has no place of its own from which pickle could import it.
        made = super(between, self).__reduce_ex__(max(protocol, 2))
        return (_new, (theirs, fused), *made[2:]) if type(self) is between else made

    body = {key: getattr(theirs, key) for key in ("__module__", "__qualname__", "__doc__")} | {"__reduce_ex__": reduce}
    between: Any = type(theirs)(theirs.__name__, (theirs, fused), body)
    TORCH_OF[between] = theirs
    return between


def _new(theirs: type, fused: type) -> Any:
    made = _before_torch(theirs, fused)
    return made.__new__(made)
