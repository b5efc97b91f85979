"""Weights in another dtype. Backward makes them anew: kept, each call of a loop over steps would keep a copy of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrnn import _modes

Dtypes = tuple[torch.dtype, ...]


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype; one that it is not yet in knows what it was made of."""
    made = weight.to(dtype)
    # An inference tensor cannot be kept, its copy can.
    if made is not weight and not (_modes.recorded() or _modes.active() or weight.is_inference()):
        source, dtypes = _made_of(weight)
        made._made_of = source, (*dtypes, dtype)  # type: ignore[attr-defined]
    return made


def sources(weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], tuple[Dtypes, ...] | None]:
    """What to keep in place of some weights, and the dtypes through which it becomes what they are."""
    if not hasattr(weights[0], "_made_of"):  # all of them have been cast, or none
        return weights, None
    kept, dtypes = zip(*map(_made_of, weights), strict=True)
    return kept, dtypes


def again(kept: Sequence[Tensor], dtypes: tuple[Dtypes, ...] | None) -> list[Tensor]:
    """The weights of which :func:`sources` said this."""
    weights = list(kept)
    for i, through in enumerate(dtypes or ()):
        for dtype in through:
            weights[i] = weights[i].to(dtype)
    return weights


def _made_of(weight: Tensor) -> tuple[Tensor, Dtypes]:
    made_of: tuple[Tensor, Dtypes] = getattr(weight, "_made_of", (weight, ()))
    return made_of
