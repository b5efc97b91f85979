"""A recurrence that keeps for backward its input and a state now and then, and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Steps whose gates are there at a time: enough that packing the weights once more for each chunk is little beside them.
CHUNK = 256

Recurrence = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def recurrence(
    run: Recurrence,
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``run``, which is a recurrence with these arguments, chunk by chunk of ``CHUNK`` steps.

    Both directions of a batch with lengths are one chunk: the reverse one starts at another step in each row.
    """
    if hx.size(0) == 1:
        return _direction(run, cell, x, hx, cx, weights, batch_sizes, lengths, resets, False)
    if batch_sizes is not None or lengths is not None:
        return _again(run, cell, x, hx, cx, weights, batch_sizes, lengths, resets)
    ys, hs, cs = [], [], []
    for d in range(2):
        own = weights[d * len(weights) // 2 : (d + 1) * len(weights) // 2]
        own_cx = None if cx is None else cx[d : d + 1]
        y, h, c = _direction(run, cell, x, hx[d : d + 1], own_cx, own, None, None, resets, d == 1)
        ys.append(y)
        hs.append(h)
        cs.append(c)
    return torch.cat(ys, -1), torch.cat(hs), None if cx is None else torch.cat([c for c in cs if c is not None])


def _direction(
    run: Recurrence,
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    steps = x.size(0) if batch_sizes is None else len(batch_sizes)
    sizes = [min(CHUNK, steps - start) for start in range(0, steps, CHUNK)]
    parts = [None] * len(sizes) if batch_sizes is None else list(torch.split(batch_sizes, sizes))
    rows = [size if part is None else int(part.sum()) for size, part in zip(sizes, parts, strict=True)]
    xs, masks = torch.split(x, rows), [None] * len(sizes) if resets is None else torch.split(resets, rows)
    ys: list[Tensor] = [x] * len(sizes)
    for i in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        left = None if lengths is None else (lengths - i * CHUNK).clamp(0, sizes[i])
        own = partial(_reversed, run) if reverse else run
        ys[i], h, c = _again(own, cell, xs[i], h, c, weights, parts[i], left, masks[i])
    return torch.cat(ys), h, c


def _reversed(
    run: Recurrence,
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: list[Tensor],
    batch_sizes: None,
    lengths: None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    y, h, c = run(cell, x.flip(0), h, c, weights, batch_sizes, lengths, None if resets is None else resets.flip(0))
    return y.flip(0), h, c


def _again(
    run: Recurrence, cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor], *sequence: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``run``, once more in backward."""
    needed = [t for t in (x, h, c, *weights) if t is not None]
    versions = None if torch.compiler.is_compiling() else [t._version for t in needed]

    def forward() -> tuple[Tensor, Tensor, Tensor | None]:
        if versions is not None and versions != [t._version for t in needed]:
            raise RuntimeError(
                "an input, state or weight that recompute=True needs again has been modified by an inplace operation"
            )
        return run(cell, x, h, c, weights, *sequence)

    return checkpoint(forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
