"""The casts that autocast asks for, the same as torch.nn's modules get."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn import _casts


def dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for recurrent layers on x's device; None outside autocast and for float64."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # there is none for meta
        return None
    return torch.get_autocast_dtype(device)


def keeps_state(module: torch.nn.Module, packed: bool) -> bool:
    """Whether torch composes this module of operations on a CPU.

    Those with weights are rounded then, and those with the state are not.
    """
    if isinstance(module, torch.nn.RNNCellBase):
        return not isinstance(module, torch.nn.RNNCell)
    return module.mode == "GRU" or (module.mode == "LSTM" and packed)


def cast(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    dtype: torch.dtype,
    implementation: str,
    state_kept: bool,
    one_step: bool,
    projected: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], tuple[torch.dtype, torch.dtype]]:
    """x, states and weights as autocast makes them, and the dtypes of what they give: output and h, and c.

    ``one_step``: weights that a CPU reads once stay as they are, for a copy in another dtype would take longer than
    the step. ``projected``: an LSTM with a projection, which torch composes of operations on a CPU; its cell state goes
    through none that is cast.
    """
    given = dtype, dtype
    projected = projected and x.is_cpu
    state_kept = not projected and state_kept and implementation != "cuda"
    x = x.to(dtype)
    if projected:
        given = dtype, torch.promote_types(states[1].dtype, dtype)
        states = [s.float() for s in states]
    elif state_kept and all(s.dtype == torch.float32 for s in states):
        given = torch.float32, torch.float32
    else:
        state_kept = False
        states = [s.to(dtype) for s in states]
    if one_step and implementation == "cpu" and all(w.dtype == torch.float32 for w in weights):
        return x.float(), [s.float() for s in states], weights, given
    weights = [_casts.cast(w, dtype) for w in weights]
    if not (state_kept or projected):
        return x, states, weights, given
    if dtype != torch.bfloat16 or implementation != "cpu":
        weights = [_casts.cast(w, torch.float32) for w in weights]  # the kernels take bfloat16 weights as they are
    return x.float(), states, weights, given
