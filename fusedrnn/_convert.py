"""Swap torch.nn's recurrent modules inside a model for fusedrnn's, and back."""

from __future__ import annotations

import abc
import dis
import functools
import inspect
import types
import warnings
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from fusedrnn.modules import FUSED

Model = TypeVar("Model", bound=torch.nn.Module)

_FUSED_OF: dict[type, type] = {getattr(torch.nn, fused.__name__): fused for fused in FUSED}
# What revert makes of a class: torch.nn's own, or the user's subclass of one.
TORCH_OF: dict[type, type] = {fused: plain for plain, fused in _FUSED_OF.items()}

# What a subclass of torch.nn's may define of what those define: either forward gets along with it.
_FREE = frozenset({"forward", "reset_parameters", "extra_repr", "flatten_parameters"})
# What it may not: how objects are made and copied, and what is told of a class between it and torch.nn's.
_BARRED = {"__new__", "__init_subclass__", "__getattribute__", "__copy__", "__deepcopy__"}
_BARRED |= {"__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"}


def convert(model: Model) -> Model:
    """Make every torch.nn.RNN, LSTM, GRU and cell in ``model`` one of fusedrnn's; returns ``model`` itself.

    Only the class of each module changes. The object stays, and with it its Parameters, hooks, buffers and every
    reference to it, so optimisers, shared modules and data parallel wrappers need not know.

    A module of a subclass keeps its methods; where they call ``super().forward``, fusedrnn's answers. Left alone, with
    a UserWarning that says why, are those whose ``forward`` does not call it, that define what torch.nn's is made of or
    how they are copied, or that have an attribute of a name that fusedrnn's has. torch makes a subclass of a module
    that it parametrizes or shards: convert before.
    """
    for path, module in model.named_modules():
        theirs: type = type(module)
        plain = next((base for base in theirs.__mro__ if base in _FUSED_OF), None)
        if theirs is plain:
            module.__class__ = _FUSED_OF[theirs]
        elif plain is not None and not isinstance(module, FUSED):
            why = _objection(module, plain, _FUSED_OF[plain])
            if why is None:
                object.__setattr__(module, "__class__", _before_torch(theirs, _FUSED_OF[plain]))
                continue
            warnings.warn(f"fusedrnn.convert left {path or 'the model'} alone: {why}", stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: every module in ``model`` has the class that it had; returns ``model`` itself.

    Modules made as fusedrnn's become torch.nn's, too. Subclasses of fusedrnn's are left alone, with a UserWarning that
    names them.
    """
    for path, module in model.named_modules():
        if type(module) in TORCH_OF:
            module.__dict__.pop("_prepacked", None)
            object.__setattr__(module, "__class__", TORCH_OF[type(module)])
        elif isinstance(module, FUSED):
            warnings.warn(
                f"fusedrnn.revert left {path or 'the model'} alone: {type(module).__name__} is a subclass", stacklevel=2
            )
    return model


def _objection(module: torch.nn.Module, plain: type, fused: type) -> str | None:
    """Why a module of a subclass of ``plain`` cannot have ``fused`` in between, if so."""
    if parametrize.is_parametrized(module):
        return "it is parametrized (convert first)"
    if hasattr(type(module), "unshard"):
        return "it is sharded (convert first)"
    theirs = type(module)
    if type(theirs) not in (type, abc.ABCMeta):
        return f"{theirs.__name__} has a metaclass"
    torchs = _public(plain.__mro__) - _public(torch.nn.Module.__mro__) - _FREE
    ours = _public(fused.__mro__) - _public(plain.__mro__)
    state = ours & {*vars(module), *module._parameters, *module._buffers, *module._modules}
    for base in theirs.__mro__[: theirs.__mro__.index(plain)]:
        codes = {name: _codes(value) for name, value in vars(base).items()}
        if "forward" in codes and not any("super" in code.co_names for code in codes["forward"]):
            return f"{base.__name__}.forward does not call super().forward"
        every = [code for found in codes.values() for code in found]
        clashes = (codes.keys() & (torchs | ours | _BARRED)) | (state.union(*(code.co_names for code in every)) & ours)
        if clashes:
            return f"{base.__name__} has a {min(clashes)} of its own"
        if any(map(_super_of_itself, every)):
            return f"{base.__name__} calls super() by its object's class"
    return None


def _public(classes: tuple[type, ...]) -> set[str]:
    """The names that classes define, without those of the language."""
    return {name for base in classes for name in vars(base) if not (name.startswith("__") and name.endswith("__"))}


def _codes(attribute: Any) -> list[types.CodeType]:
    """What a method or property runs."""
    functions = (attribute, *(getattr(attribute, name, None) for name in ("__func__", "fget", "fset")))
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in functions if callable(f))
    return [code for code in codes if code is not None]


def _super_of_itself(code: types.CodeType) -> bool:
    """Whether it calls super(type(self), self) or super(self.__class__, self), which would come back for ever."""
    loaded = [i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")]
    following = zip(loaded, loaded[1:], loaded[2:], strict=False)
    return any(name == "super" and (first == "type" or second == "__class__") for name, first, second in following)


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
