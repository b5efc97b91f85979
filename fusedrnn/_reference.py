"""The specification in plain PyTorch: one step per cell, one loop.

It is also the fallback where the extension is not built, and the double backward everywhere, being differentiable
any number of times. Gate orders are torch's. ``weights`` lists, per direction, ``w_ih [G*H, I]``, ``w_hh [G*H, R]``,
then with bias ``b_ih [G*H]`` and ``b_hh [G*H]``, then with projection ``w_hr [R, H]``; R is the size of the recurrent
output: H, or proj_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, Tensor | None]


def rnn_step(activation: Callable[[Tensor], Tensor], igates: Tensor, hgates: Tensor) -> State:
    """h' = act(igates + hgates) (Elman 1990)."""
    return activation(igates + hgates), None


def lstm_step(igates: Tensor, hgates: Tensor, c: Tensor) -> State:
    """c' = f∘c + i∘g, h' = o∘tanh(c') (Hochreiter & Schmidhuber 1997; Gers et al. 2000)."""
    i, f, g, o = (igates + hgates).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(igates: Tensor, hgates: Tensor, h: Tensor) -> State:
    """h' = (1-z)∘n + z∘h with n = tanh(n_x + r∘n_h) (Cho et al. 2014, reset after the product)."""
    r_x, z_x, n_x = igates.chunk(3, -1)
    r_h, z_h, n_h = hgates.chunk(3, -1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h, None


def step(cell: str, igates: Tensor, hgates: Tensor, h: Tensor, c: Tensor | None) -> State:
    """One step of ``cell``: igates = W_ih x + b_ih and hgates = W_hh h + b_hh, each ``[B, G*H]``, to h' and c'."""
    if cell == "lstm":
        assert c is not None
        return lstm_step(igates, hgates, c)
    if cell == "gru":
        return gru_step(igates, hgates, h)
    return rnn_step(torch.relu if cell == "rnn_relu" else torch.tanh, igates, hgates)


def split_weights(
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One direction's weights as (w_ih, w_hh, b_ih, b_hh, w_hr), with None for what is not there."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
    return w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None


def packed_rows(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Step t and batch row b of every row of a packed sequence, each ``[N]``, from batch_sizes ``[T]``."""
    steps = torch.repeat_interleave(batch_sizes)
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    return steps, torch.arange(len(steps), device=steps.device) - starts[steps]


def packed_lengths(batch_sizes: Tensor) -> Tensor:
    """Length of every row ``[B]``, falling, from batch_sizes ``[T]``."""
    rows = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    return (batch_sizes > rows.unsqueeze(1)).sum(1)


def recurrence(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, all directions.

    Args:
        cell: ``rnn_tanh``, ``rnn_relu``, ``lstm`` or ``gru``.
        x: ``[T, B, I]``, or ``[N, I]`` with ``batch_sizes [T]`` (a PackedSequence's).
        hx: ``[D, B, R]`` initial hidden state; D = 2 adds the direction from each row's last step to its first.
        cx: ``[D, B, H]`` initial cell state of an LSTM.
        weights: D groups, as the module's docstring says.
        batch_sizes: ``[T]`` int64 on the CPU, the rows that each step of a packed x has.
        lengths: ``[B]`` integers from 0 to T. Past its length a row has output zero and keeps its state.
        resets: bool, x's shape without the last dimension. Where set, the state is zeroed before the step.
        cells: given an LSTM's padded x, is given the cell state after every step, ``[D, T, B, H]``, zero past a length.

    Returns:
        y ``[T, B, D*R]`` or ``[N, D*R]``, h_n ``[D, B, R]`` and, for an LSTM, c_n ``[D, B, H]``.
    """
    if x.is_meta:  # there is no autocast for it
        return _recurrence(cell, x, hx, cx, weights, batch_sizes, lengths, resets, cells)
    with torch.autocast(x.device.type, enabled=False):  # whoever calls has done the casts that autocast asks for
        return _recurrence(cell, x, hx, cx, weights, batch_sizes, lengths, resets, cells)


def wide(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    *sequence: Tensor | None,
    cells: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`recurrence`, but in float32 where tensors are of 16 bits, as the kernels compute it; ``cells`` stay so."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, h, c = recurrence(
        cell,
        x.to(dtype),
        hx.to(dtype),
        None if cx is None else cx.to(dtype),
        [w.to(dtype) for w in weights],
        *sequence,
        cells=cells,
    )
    return y.to(x.dtype), h.to(hx.dtype), None if c is None else c.to(hx.dtype)


def _recurrence(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cells: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if batch_sizes is not None:
        steps, rows = (index.to(x.device) for index in packed_rows(batch_sizes))
        T, B = len(batch_sizes), hx.size(1)
        padded = x.new_zeros(T, B, x.size(-1)).index_put((steps, rows), x)
        if resets is not None:
            resets = resets.new_zeros(T, B).index_put((steps, rows), resets)
        lengths = packed_lengths(batch_sizes)
        lengths = F.pad(lengths, (0, B - len(lengths))).to(x.device)  # the last rows may have no step
        y, h_n, c_n = _recurrence(cell, padded, hx, cx, weights, None, lengths, resets, None)
        return y[steps, rows], h_n, c_n

    T, directions = x.size(0), hx.size(0)
    if lengths is not None:  # padding may be NaN, and a gradient of zero times NaN would be NaN
        x = x.masked_fill((torch.arange(T, device=x.device).unsqueeze(1) >= lengths).unsqueeze(-1), 0)
    each = len(weights) // directions
    outputs: list[Tensor] = []
    last_h: list[Tensor] = []
    last_c: list[Tensor] = []
    every_c: list[Tensor] = []
    for direction in range(directions):
        w_ih, w_hh, b_ih, b_hh, w_hr = split_weights(weights[direction * each : (direction + 1) * each])
        igates = F.linear(x, w_ih, b_ih).unbind()
        h, c = hx[direction], None if cx is None else cx[direction]
        output, kept = [], []
        for t in reversed(range(T)) if direction else range(T):
            if resets is not None:
                reset = (resets[t] if lengths is None else resets[t] & (t < lengths)).unsqueeze(-1)
                h = h.masked_fill(reset, 0)
                c = None if c is None else c.masked_fill(reset, 0)
            new_h, new_c = step(cell, igates[t], F.linear(h, w_hh, b_hh), h, c)
            if w_hr is not None:
                new_h = F.linear(new_h, w_hr)
            if lengths is None:
                h, c = new_h, new_c
                output.append(h)
            else:
                inside = (t < lengths).unsqueeze(-1)
                h = torch.where(inside, new_h, h)
                c = None if new_c is None or c is None else torch.where(inside, new_c, c)
                output.append(new_h.masked_fill(~inside, 0))
            if cells is not None and c is not None:
                kept.append(c if lengths is None else c.masked_fill((t >= lengths).unsqueeze(-1), 0))
        outputs.append(torch.stack(output[::-1] if direction else output))
        if kept:
            every_c.append(torch.stack(kept[::-1] if direction else kept))
        last_h.append(h)
        if c is not None:
            last_c.append(c)
    if cells is not None:
        cells.append(torch.stack(every_c))
    return torch.cat(outputs, -1), torch.stack(last_h), torch.stack(last_c) if last_c else None
