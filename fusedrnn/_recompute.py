"""A recurrence that keeps for backward its input and a state now and then, and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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

    def part(d: int, whole: bool, reverse: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        size = len(weights) // len(hx)
        own_hx, own_cx, own = hx, cx, weights
        if not whole:
            own_hx, own_cx = hx[d : d + 1], None if cx is None else cx[d : d + 1]
            own = weights[d * size : (d + 1) * size]
        chunks = Chunks(run, cell, batch_sizes, lengths, resets, reverse, CHUNK if reverse or not whole else None)
        y, h, *c = Recomputed.apply(chunks, x, own_hx, own_cx, *own)  # type: ignore[no-untyped-call]
        return y, h, c[0] if c else None

    if len(hx) == 1:
        return part(0, False)
    if batch_sizes is not None or lengths is not None:
        return part(0, True)
    (y, h, c), (y_reverse, h_reverse, c_reverse) = part(0, False), part(1, False, True)
    c_n = None if c is None or c_reverse is None else torch.cat([c, c_reverse])
    return torch.cat([y, y_reverse], -1), torch.cat([h, h_reverse]), c_n


class Chunks:
    """How one layer is run, in chunks of some steps or (None) as a whole."""

    def __init__(
        self,
        run: Recurrence,
        cell: str,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
        steps: int | None,
    ) -> None:
        self.run, self.cell, self.reverse, self.steps = run, cell, reverse, steps
        self.batch_sizes, self.lengths, self.resets = batch_sizes, lengths, resets

    def places(self, x: Tensor) -> list[tuple[slice, slice]]:
        """The steps of each chunk, in the order in which forward takes them, and where their rows are in x."""
        total = len(x) if self.batch_sizes is None else len(self.batch_sizes)
        size = self.steps or total
        steps = [slice(start, min(start + size, total)) for start in range(0, total, size)]
        rows = steps
        if self.batch_sizes is not None:
            ends = [0, *self.batch_sizes.cumsum(0).tolist()]
            rows = [slice(ends[s.start], ends[s.stop]) for s in steps]
        places = list(zip(steps, rows, strict=True))
        return places[::-1] if self.reverse else places

    def one(
        self, place: tuple[slice, slice], x: Tensor, h: Tensor, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One chunk, from its rows of x."""
        steps, rows = place
        batch_sizes = None if self.batch_sizes is None else self.batch_sizes[steps]
        lengths = None if self.lengths is None else (self.lengths - steps.start).clamp(0, steps.stop - steps.start)
        resets = None if self.resets is None else self.resets[rows]
        if not self.reverse:
            return self.run(self.cell, x, h, c, weights, batch_sizes, lengths, resets)
        resets = None if resets is None else resets.flip(0)
        y, h, c = self.run(self.cell, x.flip(0), h, c, weights, batch_sizes, lengths, resets)
        return y.flip(0), h, c


class Recomputed(torch.autograd.Function):
    """A layer in chunks: forward keeps the state before each, backward runs each again."""

    @staticmethod
    def forward(ctx: Any, chunks: Chunks, x: Tensor, h: Tensor, c: Any, *weights: Tensor) -> Any:
        ctx.chunks, ctx.cells = chunks, c is not None
        starts, y = [], None
        for place in chunks.places(x):
            starts += [h] if c is None else [h, c]
            part, h, c = chunks.one(place, x[place[1]], h, c, list(weights))
            y = x.new_empty(*x.shape[:-1], part.size(-1)) if y is None else y
            y[place[1]] = part
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *starts)
        return (y, h) if c is None else (y, h, c)

    @staticmethod
    def backward(ctx: Any, dy: Any, *dstates: Any) -> Any:
        chunks, each = ctx.chunks, 2 if ctx.cells else 1
        x, *rest = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 4
        weights, starts = rest[:count], rest[count:]
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated themselves
            return (None, *_differentiable(ctx, x, starts[:each], weights, (dy, *dstates)))
        wanted = list(ctx.needs_input_grad[1:])
        sums: list[Tensor | None] = [None] * count
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        places = chunks.places(x)
        for i in reversed(range(len(places))):
            rows = places[i][1]
            state = [s.detach().requires_grad_() for s in starts[i * each : (i + 1) * each]]
            own_x = x[rows].detach().requires_grad_(wanted[0])
            own = [w.detach().requires_grad_(want) for w, want in zip(weights, wanted[3:], strict=True)]
            with torch.enable_grad():
                outputs = chunks.one(places[i], own_x, state[0], state[1] if ctx.cells else None, own)
            cotangents = (None if dy is None else dy[rows], *dstates)
            sources = [own_x, *state, *own]
            found = _gradients(outputs, sources, cotangents)
            gradient = next(found)
            if dx is not None:
                dx[rows] = 0 if gradient is None else gradient
            dstates = tuple(next(found) for _ in range(each))
            for k, gradient in enumerate(found):
                if gradient is not None:
                    gradient = gradient.to(x.dtype)  # of bfloat16 weights the sum is float32, as it is without chunks
                    sums[k] = gradient if sums[k] is None else sums[k].add_(gradient)  # type: ignore[union-attr]
        of_weights = [None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)]
        return (None, dx, dstates[0], dstates[1] if ctx.cells else None, *of_weights)


def _gradients(outputs: Any, sources: list[Tensor], cotangents: Any, differentiable: bool = False) -> Iterator[Any]:
    """Of the sources that ask for one; None for the others."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=False) if o is not None and g is not None]
    asking = [s for s in sources if s.requires_grad]
    found: Iterator[Any] = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], asking, [g for _, g in pairs], create_graph=differentiable, allow_unused=True
        )
        if pairs
        else [None] * len(asking)
    )
    return iter([next(found) if s.requires_grad else None for s in sources])


def _differentiable(ctx: Any, x: Tensor, state: list[Tensor], weights: list[Tensor], cotangents: Any) -> list[Any]:
    """The gradients by running the layer as a whole, with what its Function keeps for gradients of its own."""
    whole = Chunks(**{**vars(ctx.chunks), "steps": None})
    # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
    x, *rest = (t.view_as(t) for t in (x, *state, *weights))
    state, weights = rest[: len(state)], rest[len(state) :]
    outputs = whole.one(whole.places(x)[0], x, state[0], state[1] if ctx.cells else None, weights)
    found = list(_gradients(outputs, [x, *state, *weights], cotangents, differentiable=True))
    return found if ctx.cells else [*found[:2], None, *found[2:]]
