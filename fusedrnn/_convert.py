"""Swap torch.nn's recurrent modules inside a model for fusedrnn's, and back."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from fusedrnn.modules import FUSED

Model = TypeVar("Model", bound=torch.nn.Module)

_FUSED_OF: dict[type, type] = {getattr(torch.nn, fused.__name__): fused for fused in FUSED}
TORCH_OF: dict[type, type] = {fused: plain for plain, fused in _FUSED_OF.items()}


def convert(model: Model) -> Model:
    """Make every torch.nn.RNN, LSTM, GRU and cell in ``model`` one of fusedrnn's; returns ``model`` itself.

    Only the class of each module changes. The object stays, and with it its Parameters, hooks, buffers and every
    reference to it, so optimisers, shared modules and data parallel wrappers need not know. Subclasses of torch.nn's
    modules have a behaviour of their own and are left alone, with a UserWarning that names them; torch makes one of a
    module that it parametrizes or shards, so convert before that.
    """
    for path, module in model.named_modules():
        if type(module) in _FUSED_OF:
            module.__class__ = _FUSED_OF[type(module)]
        elif isinstance(module, tuple(_FUSED_OF)) and not isinstance(module, FUSED):
            why = f"{type(module).__name__} is a subclass"
            if parametrize.is_parametrized(module):  # type: ignore[arg-type]
                why = "it is parametrized (convert first)"
            elif hasattr(module, "unshard"):
                why = "it is sharded (convert first)"
            warnings.warn(f"fusedrnn.convert left {path or 'the model'} alone: {why}", stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: every fusedrnn module in ``model`` becomes torch.nn's again; returns ``model`` itself.

    Subclasses of fusedrnn's modules are left alone, with a UserWarning that names them.
    """
    for path, module in model.named_modules():
        if type(module) in TORCH_OF:
            module.__class__ = TORCH_OF[type(module)]
        elif isinstance(module, FUSED):
            warnings.warn(
                f"fusedrnn.revert left {path or 'the model'} alone: {type(module).__name__} is a subclass", stacklevel=2
            )
    return model
