"""A recurrence that keeps for backward its input and a state now and then, and computes the rest again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _casts, _transforms

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


def with_float32_states(
    run: Recurrence,
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    *sequence: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`recurrence` of an x of 16 bits with states that are float32 between chunks, as ``run`` must take them."""
    y, h, c = recurrence(run, cell, x, hx.float(), None if cx is None else cx.float(), weights, *sequence)
    return y, h.to(hx.dtype), None if c is None else c.to(hx.dtype)


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
    """A layer in chunks: forward keeps the state before each, backward runs each again.

    What outlives a chunk is copied to memory made before the first one, and all else is let go before the next: a small
    block between large ones would keep the C library from using their memory again.
    """

    @staticmethod
    def forward(ctx: Any, chunks: Chunks, x: Tensor, h: Tensor, c: Any, *weights: Tensor) -> Any:
        ctx.chunks, ctx.states = chunks, 1 if c is None else 2
        places = chunks.places(x)
        starts = [[s, *(torch.empty_like(s) for _ in places)] for s in ((h,) if c is None else (h, c))]
        y = None
        for i, place in enumerate(places):
            part, *states = chunks.one(
                place, x[place[1]], starts[0][i], None if c is None else starts[1][i], list(weights)
            )
            y = x.new_empty(*x.shape[:-1], part.size(-1)) if y is None else y
            y[place[1]] = part
            for kept, state in zip(starts, states, strict=False):
                assert state is not None
                kept[i + 1].copy_(state)
            del part, states, state
        ctx.set_materialize_grads(False)
        # What says where rows begin and end, too: so a change in place before backward is seen.
        sequence = (chunks.batch_sizes, chunks.lengths, chunks.resets)
        own, ctx.dtypes = _casts.sources(weights)
        ctx.save_for_backward(*sequence, x, *own, *(s for kept in starts for s in kept[:-1]))
        return y, *(kept[-1] for kept in starts)

    @staticmethod
    def backward(ctx: Any, dy: Any, *cotangents: Any) -> Any:
        chunks, wanted = ctx.chunks, ctx.needs_input_grad[1:]
        _, _, _, x, *rest = ctx.saved_tensors
        count = len(wanted) - 3
        kept, starts = rest[:count], rest[count:]
        places = chunks.places(x)
        starts = [starts[k * len(places) : (k + 1) * len(places)] for k in range(ctx.states)]
        # With create_graph=True the gradients will be differentiated themselves; by is_grads_batched they are many.
        if torch.is_grad_enabled() or _transforms.batched((dy, *cotangents)):
            return (None, *_by_one_graph(ctx, x, [states[0] for states in starts], kept, (dy, *cotangents)))
        weights = _casts.again(kept, ctx.dtypes)
        dstates = [torch.zeros_like(s[0]) if g is None else g.clone() for s, g in zip(starts, cotangents, strict=True)]

        def gradients(i: int) -> list[Any]:
            rows = places[i][1]
            states = [kept[i].detach().requires_grad_() for kept in starts]
            own_x = x[rows].detach().requires_grad_(wanted[0])
            own = [w.detach().requires_grad_(want) for w, want in zip(weights, wanted[3:], strict=True)]
            with torch.enable_grad():
                outputs = chunks.one(places[i], own_x, states[0], states[1] if len(states) == 2 else None, own)
            return _gradients(outputs, [own_x, *states, *own], (None if dy is None else dy[rows], *dstates))

        if len(places) == 1:
            dx, *found = gradients(0)
            return (None, dx, *found) if ctx.states == 2 else (None, dx, found[0], None, *found[1:])
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
        # The sum of halves is float32, as it is without chunks.
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = [torch.zeros_like(w, dtype=wide) if want else None for w, want in zip(weights, wanted[3:], strict=True)]
        for i in reversed(range(len(places))):
            of_x, *found = gradients(i)
            if dx is not None:
                dx[places[i][1]] = of_x
            for total, gradient in zip(dstates, found, strict=False):
                total.copy_(gradient)
            for total, gradient in zip(sums, found[ctx.states :], strict=True):
                if total is not None:
                    total.add_(gradient)
            del of_x, found, gradient
        of_weights = [None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)]
        return (None, dx, dstates[0], dstates[1] if len(dstates) == 2 else None, *of_weights)


class Seed(torch.autograd.Function):
    """A number with given gradients by some outputs. Given to torch.autograd.grad, they would load SymPy, 40 MB."""

    @staticmethod
    def forward(ctx: Any, cotangents: Any, *outputs: Any) -> Tensor:
        ctx.cotangents = cotangents
        zero: Tensor = outputs[0].new_zeros(())
        return zero

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.cotangents


def _gradients(outputs: Any, sources: list[Tensor], cotangents: Any, differentiable: bool = False) -> list[Any]:
    """Of the sources that ask for one, zero where nothing depends on them; None for the others."""
    with torch.enable_grad():
        seed = Seed.apply(cotangents, *(o for o in outputs if o is not None))  # type: ignore[no-untyped-call]
    asking = [s for s in sources if s.requires_grad]
    found = iter(torch.autograd.grad(seed, asking, create_graph=differentiable, materialize_grads=True))
    return [next(found) if s.requires_grad else None for s in sources]


def _by_one_graph(ctx: Any, x: Tensor, states: list[Tensor], kept: list[Tensor], cotangents: Any) -> list[Any]:
    """The gradients by running the layer as a whole, with what its Function keeps for gradients of its own."""
    whole, differentiable = Chunks(**{**vars(ctx.chunks), "steps": None}), torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
        x, *rest = (t.view_as(t) for t in (x, *states, *_casts.again(kept, ctx.dtypes)))
        states, weights = rest[: len(states)], rest[len(states) :]
        outputs = whole.one(whole.places(x)[0], x, states[0], states[1] if len(states) == 2 else None, weights)
    if all(g is None for g in cotangents):
        return [None] * (3 + len(weights))
    found = _gradients(outputs, [x, *states, *weights], cotangents, differentiable)
    return found if len(states) == 2 else [*found[:2], None, *found[2:]]
