"""The specification that every result is held against: recurrent layers in NumPy float64.

Written from the equations and differentiated by hand; it knows neither torch nor fusedrnn, so it
cannot share a mistake with either. Clarity over speed: one loop over time, one step per cell.

    RNN    h' = φ(gi + gh)                              φ = tanh or relu
    LSTM   i, f, o = σ(gi + gh), g = tanh(gi + gh)      gates in the order i f g o
           c' = f·c + i·g,  h' = o·tanh(c')             with a projection: h' = W_hr (o·tanh(c'))
    GRU    r, z = σ(gi + gh), n = tanh(gi_n + r·gh_n)   gates in the order r z n
           h' = (1 − z)·n + z·h                         the reset applies after the product W_hn h

where gi = x W_ihᵀ + b_ih and gh = h W_hhᵀ + b_hh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def sigmoid(a: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * a))


# ---------------------------------------------------------------------------------------------
# The cells: gate pre-activations and state in, new output and state out; and the reverse.
# `out` is the hidden state before any projection. Only the LSTM has a c; the others pass it on.
# A backward returns (dgi, dgh, dh, dc): dh and dc without the part that flows through gh.


def rnn_tanh_forward(gi, gh, h, c):  # noqa: ARG001
    out = np.tanh(gi + gh)
    return out, c, (out,)


def rnn_tanh_backward(saved, h, c, dout, dc):  # noqa: ARG001
    (out,) = saved
    da = dout * (1.0 - out * out)
    return da, da, np.zeros_like(h), dc


def rnn_relu_forward(gi, gh, h, c):  # noqa: ARG001
    out = np.maximum(gi + gh, 0.0)
    return out, c, (out,)


def rnn_relu_backward(saved, h, c, dout, dc):  # noqa: ARG001
    (out,) = saved
    da = np.where(out > 0.0, dout, 0.0)
    return da, da, np.zeros_like(h), dc


def lstm_forward(gi, gh, h, c):  # noqa: ARG001
    ai, af, ag, ao = np.split(gi + gh, 4, axis=-1)
    i, f, g, o = sigmoid(ai), sigmoid(af), np.tanh(ag), sigmoid(ao)
    c_new = f * c + i * g
    tanh_c = np.tanh(c_new)
    return o * tanh_c, c_new, (i, f, g, o, tanh_c)


def lstm_backward(saved, h, c, dout, dc_new):
    i, f, g, o, tanh_c = saved
    dc_new = dc_new + dout * o * (1.0 - tanh_c * tanh_c)
    di, df, dg, do = dc_new * g, dc_new * c, dc_new * i, dout * tanh_c
    da = np.concatenate([di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o)], axis=-1)
    return da, da, np.zeros_like(h), dc_new * f


def gru_forward(gi, gh, h, c):
    gi_r, gi_z, gi_n = np.split(gi, 3, axis=-1)
    gh_r, gh_z, gh_n = np.split(gh, 3, axis=-1)
    r, z = sigmoid(gi_r + gh_r), sigmoid(gi_z + gh_z)
    n = np.tanh(gi_n + r * gh_n)
    return (1.0 - z) * n + z * h, c, (r, z, n, gh_n)


def gru_backward(saved, h, c, dout, dc):  # noqa: ARG001
    r, z, n, gh_n = saved
    da_n = dout * (1.0 - z) * (1.0 - n * n)
    da_z = dout * (h - n) * z * (1.0 - z)
    da_r = da_n * gh_n * r * (1.0 - r)
    dgi = np.concatenate([da_r, da_z, da_n], axis=-1)
    dgh = np.concatenate([da_r, da_z, da_n * r], axis=-1)
    return dgi, dgh, dout * z, dc


CELLS: dict[str, tuple[Callable, Callable]] = {
    "rnn_tanh": (rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": (rnn_relu_forward, rnn_relu_backward),
    "lstm": (lstm_forward, lstm_backward),
    "gru": (gru_forward, gru_backward),
}


# ---------------------------------------------------------------------------------------------
# One step: the cell together with its products.


def step_forward(cell: str, w: Weights, x: Array, h: Array, c: Array):
    """Returns h', c' and what `step_backward` needs.

    `w` holds weight_ih and weight_hh, perhaps bias_ih and bias_hh, perhaps weight_hr."""
    gi = x @ w["weight_ih"].T + w.get("bias_ih", 0.0)
    gh = h @ w["weight_hh"].T + w.get("bias_hh", 0.0)
    out, c_new, activations = CELLS[cell][0](gi, gh, h, c)
    h_new = out @ w["weight_hr"].T if "weight_hr" in w else out
    return h_new, c_new, (x, h, c, out, activations)


def step_backward(cell: str, w: Weights, saved, dh_new: Array, dc_new: Array, dw: Weights):
    """Returns dx, dh, dc and adds this step's share to every weight gradient in `dw`."""
    x, h, c, out, activations = saved
    dout = dh_new
    if "weight_hr" in w:
        dw["weight_hr"] += dh_new.T @ out
        dout = dh_new @ w["weight_hr"]
    dgi, dgh, dh, dc = CELLS[cell][1](activations, h, c, dout, dc_new)
    dw["weight_ih"] += dgi.T @ x
    dw["weight_hh"] += dgh.T @ h
    if "bias_ih" in w:
        dw["bias_ih"] += dgi.sum(axis=0)
        dw["bias_hh"] += dgh.sum(axis=0)
    return dgi @ w["weight_ih"], dh + dgh @ w["weight_hh"], dc


# ---------------------------------------------------------------------------------------------
# One direction of one layer, over a padded batch.


def direction_forward(cell, w, x, h0, c0, lengths, reset, reverse):
    """x [T, B, I]. Row b takes part in steps t < lengths[b] only: elsewhere its state stands still
    and its output is zero, so a reverse pass starts at each row's last valid step. Where
    reset[t, b] holds, the state of row b is zeroed before step t."""
    steps = range(len(x))[::-1] if reverse else range(len(x))
    y = np.zeros((*x.shape[:2], h0.shape[-1]))
    h, c, tape = h0, c0, []
    for t in steps:
        alive = (t < lengths)[:, None]
        cut = alive & reset[t][:, None]
        h_new, c_new, saved = step_forward(
            cell, w, np.where(alive, x[t], 0.0), np.where(cut, 0.0, h), np.where(cut, 0.0, c)
        )
        tape.append((t, alive, cut, saved))
        h, c = np.where(alive, h_new, h), np.where(alive, c_new, c)
        y[t] = np.where(alive, h_new, 0.0)
    return y, h, c, tape


def direction_backward(cell, w, tape, dy, dh, dc, dw):
    """Returns dx, dh0, dc0 and adds to every weight gradient in `dw`."""
    dx = np.zeros((*dy.shape[:2], w["weight_ih"].shape[1]))
    for t, alive, cut, saved in reversed(tape):
        dh_new = np.where(alive, dh + dy[t], 0.0)
        dc_new = np.where(alive, dc, 0.0)
        dx[t], dh_in, dc_in = step_backward(cell, w, saved, dh_new, dc_new, dw)
        dh = np.where(alive, np.where(cut, 0.0, dh_in), dh)
        dc = np.where(alive, np.where(cut, 0.0, dc_in), dc)
    return dx, dh, dc


# ---------------------------------------------------------------------------------------------
# The stack: layers × directions.


@dataclass(frozen=True)
class Result:
    y: Array  # [T, B, directions · output size]
    h_n: Array  # [layers · directions, B, output size]
    c_n: Array  # [layers · directions, B, H]; meaningless unless the cell is an LSTM
    backward: Callable[[Array, Array, Array], Weights]  # (dy, dh_n, dc_n) → gradients by name


def weights_of(weights: Weights, suffix: str) -> Weights:
    """The weights of one direction of one layer; `suffix` as torch writes it, such as "_l0_reverse"."""
    return {name.removesuffix(suffix): value for name, value in weights.items() if name.endswith(suffix)}


def run(cell, weights, x, h0, c0, *, layers=1, bidirectional=False, lengths=None, reset=None) -> Result:
    """A whole module: `weights` by torch's parameter names, x [T, B, I],
    h0 [layers · directions, B, output size] and c0 [layers · directions, B, H].
    The gradients are named "x", "h0", "c0" and as the weights are."""
    lengths = np.full(x.shape[1], len(x)) if lengths is None else np.asarray(lengths)
    reset = np.zeros(x.shape[:2], dtype=bool) if reset is None else np.asarray(reset)
    endings = ("", "_reverse") if bidirectional else ("",)
    h_n, c_n, tapes = [], [], []
    for layer in range(layers):
        outputs = []
        for ending in endings:
            suffix, row = f"_l{layer}{ending}", len(tapes)
            w = weights_of(weights, suffix)
            y, h, c, tape = direction_forward(cell, w, x, h0[row], c0[row], lengths, reset, ending != "")
            outputs.append(y)
            h_n.append(h)
            c_n.append(c)
            tapes.append((suffix, w, tape))
        x = np.concatenate(outputs, axis=-1)

    def backward(dy: Array, dh_n: Array, dc_n: Array) -> Weights:
        grads: Weights = {}
        dh0, dc0 = np.zeros_like(h0), np.zeros_like(c0)
        for layer in reversed(range(layers)):
            dx = 0.0
            for direction, dy_part in enumerate(np.split(dy, len(endings), axis=-1)):
                row = layer * len(endings) + direction
                suffix, w, tape = tapes[row]
                dw = {name: np.zeros_like(value) for name, value in w.items()}
                dx_part, dh0[row], dc0[row] = direction_backward(cell, w, tape, dy_part, dh_n[row], dc_n[row], dw)
                dx = dx + dx_part
                grads |= {name + suffix: value for name, value in dw.items()}
            dy = dx
        return {"x": dy, "h0": dh0, "c0": dc0, **grads}

    return Result(x, np.stack(h_n), np.stack(c_n), backward)
