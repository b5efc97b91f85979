"""The autograd function of one layer: the kernels for the recurrence, one large GEMM each for the gradients of x and the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _ops, _reference
from fusedrnn._ops import GATES, SUMS

def recurrence(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`fusedrnn._reference.recurrence` on the compiled kernels; float32 and float64, without projection."""
    if needs_gradient(x, hx, cx, weights):
        y, h_n, *c_n = Recurrence.apply(cell, batch_sizes, lengths, resets, x, hx, cx, *weights)
    else:
        y, h_n, *c_n = _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, False)
    return y, h_n, c_n[0] if c_n else None


def needs_gradient(x: Tensor, hx: Tensor, cx: Tensor | None, weights: list[Tensor]) -> bool:
    """Whether a backward pass may follow, so that forward must save what it needs."""
    return torch.is_grad_enabled() and (
        x.requires_grad or hx.requires_grad or (cx is not None and cx.requires_grad) or any(w.requires_grad for w in weights)
    )


class Recurrence(torch.autograd.Function):
    """One layer, all directions, with gradients for x, hx, cx and every weight that asks for one."""

    @staticmethod
    def forward(ctx: Any, cell: str, batch_sizes: Any, lengths: Any, resets: Any, x: Tensor, hx: Tensor, cx: Any, *weights: Tensor) -> Any:
        states = 1 if cx is None else 2
        y, *results = _ops.recurrence_forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, True)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, lengths, resets, x, hx, cx, *weights, y, *results[states:])
        ctx.weights = len(weights)
        return y, *results[:states]

    @staticmethod
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any = None) -> Any:
        batch_sizes, lengths, resets, x, hx, cx, *rest = ctx.saved_tensors
        weights, y, saved = rest[: ctx.weights], rest[ctx.weights], rest[ctx.weights + 1 :]
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (7 + len(weights))
        wanted = ctx.needs_input_grad[4:]
        sequence = (batch_sizes, lengths, resets)
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated themselves
            return (None,) * 4 + _differentiable_gradients(ctx.cell, sequence, (x, hx, cx, *weights), wanted, (dy, dh_n, dc_n))

        each = len(weights) // hx.size(0)
        dsums, *dstates = _ops.recurrence_backward(
            ctx.cell, dy, dh_n, dc_n, y, hx, cx, saved, weights[1::each], *sequence, wanted[1] or wanted[2]
        )
        dhx, dcx = (*dstates, None, None)[:2]
        dx = None
        if wanted[0]:
            dx = _input_gradient(dsums, weights[::each]).view(x.shape)
        dweights: list[Tensor | None] = []
        for direction in range(hx.size(0)):
            needed = wanted[3 + direction * each : 3 + (direction + 1) * each]
            dweights += _weight_gradients(ctx.cell, dsums[direction], x, y, hx, direction, sequence, needed)
        return None, None, None, None, dx, dhx, dcx, *dweights


def _input_gradient(dsums: Tensor, w_ih: list[Tensor]) -> Tensor:
    """dX = Σ over directions of dgates · W_ih, ``[N, I]``."""
    dx = None
    for direction, w in enumerate(w_ih):
        dgates = dsums[direction, :, dsums.size(-1) - w.size(0) :]
        dx = dgates @ w if dx is None else dx.addmm_(dgates, w)
    assert dx is not None
    return dx


def _weight_gradients(
    cell: str,
    dsums: Tensor,
    x: Tensor,
    y: Tensor,
    hx: Tensor,
    direction: int,
    sequence: tuple[Tensor | None, Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """dW_ih, dW_hh and, with bias, db_ih and db_hh of one direction, None where not needed."""
    hidden = hx.size(-1)
    digates, dhgates = dsums[:, (SUMS[cell] - GATES[cell]) * hidden :], dsums[:, : GATES[cell] * hidden]

    def torch_order(gradient: Tensor) -> Tensor:
        return torch.roll(gradient, -hidden, 0) if cell == "gru" else gradient

    dw_ih = digates.t() @ x.reshape(len(dsums), x.size(-1)) if needed[0] else None
    dw_hh = torch_order(_recurrent_weight_gradient(dhgates, y, hx, direction, sequence)) if needed[1] else None
    if len(needed) == 2:
        return [dw_ih, dw_hh]
    total = dsums.sum(0)
    db_ih = total[len(total) - digates.size(1) :] if needed[2] else None
    # A copy, or the two biases' gradients would share their memory and clipping one would clip the other.
    db_hh = torch_order(total[: dhgates.size(1)].clone()) if needed[3] else None
    return [dw_ih, dw_hh, db_ih, db_hh]


def _recurrent_weight_gradient(
    dhgates: Tensor, y: Tensor, hx: Tensor, direction: int, sequence: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> Tensor:
    """dW_hh = dgatesᵀ · (the hidden state before every step)."""
    hidden = hx.size(-1)
    batch = hx.size(1)
    outputs = y.view(len(dhgates), y.size(-1))[:, direction * hidden : (direction + 1) * hidden]
    batch_sizes, lengths, resets = sequence
    if batch_sizes is not None or lengths is not None or resets is not None:
        before = torch.cat([outputs, hx[direction], hx.new_zeros(1, hidden)])
        steps = y.size(0) if batch_sizes is None else len(batch_sizes)
        return dhgates.t() @ before[_rows_before(steps, batch, batch_sizes, lengths, resets, reverse=direction == 1)]
    # Every row's predecessor is one batch further on in y: no copy is needed.
    if direction == 0:
        first, rest, before = dhgates[:batch], dhgates[batch:], outputs[: len(outputs) - batch]
    else:
        first, rest, before = dhgates[len(dhgates) - batch :], dhgates[: len(dhgates) - batch], outputs[batch:]
    return (rest.t() @ before).addmm_(first.t(), hx[direction])


def _rows_before(
    steps: int, batch: int, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, reverse: bool
) -> Tensor:
    """For every row of the sequence, where the state before it is in [the N outputs, the B initial states, one row of zeros]."""
    if batch_sizes is None:
        batch_sizes = torch.full((steps,), batch)
    elif lengths is None:
        lengths = _reference.packed_lengths(batch_sizes)
    t, b = _reference.packed_rows(batch_sizes)
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    initial = len(t) + b
    if reverse:
        last = t + 1 == (steps if lengths is None else lengths[b])
        before = torch.where(last, initial, starts[(t + 1).clamp(max=steps - 1)] + b)
    else:
        before = torch.where(t == 0, initial, starts[(t - 1).clamp(min=0)] + b)
    if resets is not None:
        before = before.masked_fill(resets.reshape(-1), len(t) + batch)
    # Past a row's end the gradient is zero and any row will do.
    return before.clamp(max=len(t) + batch)


def _differentiable_gradients(
    cell: str,
    sequence: tuple[Tensor | None, Tensor | None, Tensor | None],
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    cotangents: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs`` by running the reference again; they can be differentiated any number of times."""
    # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
    x, hx, cx, *weights = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None and hx is not None
    outputs = _reference.recurrence(cell, x, hx, cx, [w for w in weights if w is not None], *sequence)
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o is not None and g is not None]
    sources = [t for t, want in zip((x, hx, cx, *weights), wanted, strict=True) if want and t is not None]
    gradients = iter(
        torch.autograd.grad([o for o, _ in pairs], sources, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(gradients) if want else None for want in wanted)
