"""How V instances of a call of an autograd.Function are run, as torch.func.vmap asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def one_by_one(call: Callable[..., Any], info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """V calls."""
    results = [
        call(*(a.select(dim, v) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)))
        for v in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(of_each) for of_each in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def folded(
    call: Callable[..., Any],
    info: Any,
    in_dims: Sequence[Any],
    arguments: Sequence[Any],
    sequence: int,
    rows: Sequence[int],
) -> Any:
    """One call with V times the rows; row b of instance v is row b * V + v, so that a packed batch stays sorted.

    ``sequence`` is where batch_sizes, lengths and resets begin in the arguments; the last dimension but one of those in
    ``rows`` is the batch's or the sequence's.
    """
    V = info.batch_size

    def fold(tensor: Tensor | None, dim: int | None, at: int) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.unsqueeze(at) if dim is None else tensor.movedim(dim, at)
        return tensor.expand(*tensor.shape[:at], V, *tensor.shape[at:][1:]).flatten(at - 1, at)

    given = list(arguments)
    for i in (sequence + 1, sequence + 2):
        given[i] = fold(given[i], in_dims[i], -1)
    if arguments[sequence] is not None:
        given[sequence] = arguments[sequence] * V
    for i in rows:
        given[i] = fold(given[i], in_dims[i], -2)
    results = tuple(t.unflatten(-2, (t.size(-2) // V, V)) for t in call(*given))
    return results, tuple(t.dim() - 2 for t in results)
