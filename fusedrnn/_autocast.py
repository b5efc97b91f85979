"""The casts that autocast asks for, the same as torch.nn's modules get."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for recurrent layers on x's device; None outside autocast and for float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def cast(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    dtype: torch.dtype,
    implementation: str,
    keeps_state: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, states and weights as autocast makes them.

    ``keeps_state``: on a CPU torch composes this module of operations, of which those with weights are rounded and
    those with the state are not.
    """
    x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    if not keeps_state or implementation == "cuda" or any(s.dtype != torch.float32 for s in states):
        return x, [s.to(dtype) for s in states], weights
    if dtype != torch.bfloat16 or implementation != "cpu":
        weights = [w.float() for w in weights]  # the kernels take bfloat16 weights as they are
    return x.float(), states, weights
