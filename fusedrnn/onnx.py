"""ONNX's own RNN, LSTM and GRU nodes for this package's layers and cells; needs onnxscript.

torch.onnx.export(model, inputs, "model.onnx", custom_translation_table=fusedrnn.onnx.TRANSLATIONS)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from onnxscript import opset18

from fusedrnn import _dispatch

Value = Any  # a tensor of the ONNX graph
op: Any = opset18  # its types know constants as tensors only

_BFLOAT16 = onnxscript.BFLOAT16.dtype
# Of torch's gates, in the order of ONNX's: LSTM i, o, f, c; GRU z, r, h (the operators' specification, opset 14).
_GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def _in_order(cell: str, hidden: int, weight: Value) -> Value:
    """A weight or bias with its blocks of rows in ONNX's order."""
    gates = _GATES[cell]
    if len(gates) == 1:
        return weight
    blocks = [op.Slice(weight, [g * hidden], [(g + 1) * hidden], [0]) for g in gates]
    return op.Concat(*blocks, axis=0)


def _wide(tensor: Value) -> Value:
    """A bfloat16 as float32: a node has one type, and onnxruntime has none for the other."""
    return op.Cast(tensor, to=onnxscript.FLOAT.dtype) if tensor is not None and tensor.dtype == _BFLOAT16 else tensor


def _joined(tensors: Sequence[Value]) -> Value:
    """One tensor per direction, as one tensor."""
    rows = [op.Unsqueeze(t, [0]) for t in tensors]
    return rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)


def _node(
    cell: str,
    x: Value,
    hx: Value,
    cx: Value,
    weights: Sequence[Value],
    lengths: Value,
    directions: int,
    hidden: int,
) -> list[Value]:
    """y ``[T, D, B, H]``, h_n and, for an LSTM, c_n ``[D, B, H]``."""
    each = len(weights) // directions
    dtypes = [t.dtype for t in (x, hx, cx) if t is not None]
    x, hx, cx, *weights = (_wide(t) for t in (x, hx, cx, *weights))
    of_direction = [[_in_order(cell, hidden, w) for w in weights[d * each : (d + 1) * each]] for d in range(directions)]
    w_ih, w_hh = (_joined([w[i] for w in of_direction]) for i in range(2))
    bias = _joined([op.Concat(w[2], w[3], axis=0) for w in of_direction]) if each == 4 else None
    lengths = None if lengths is None else op.Cast(lengths, to=onnxscript.INT32.dtype)
    options: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if cell == "lstm":
        made = op.LSTM(x, w_ih, w_hh, bias, lengths, hx, cx, **options)
    elif cell == "gru":
        made = op.GRU(x, w_ih, w_hh, bias, lengths, hx, linear_before_reset=1, **options)
    else:
        activations = ["Relu" if cell == "rnn_relu" else "Tanh"] * directions
        made = op.RNN(x, w_ih, w_hh, bias, lengths, hx, activations=activations, **options)
    return [op.Cast(t, to=dtype) if dtype == _BFLOAT16 else t for t, dtype in zip(made, dtypes, strict=True)]


def _recurrence(
    cell: str,
    x: Value,
    hx: Value,
    cx: Value,
    weights: Sequence[Value],
    batch_sizes: Value = None,
    lengths: Value = None,
    resets: Value = None,
    save: bool = False,
    tf32: bool = False,  # noqa: ARG001
) -> list[Value]:
    if batch_sizes is not None:
        raise NotImplementedError("ONNX has no packed sequences: expected a padded batch and its lengths")
    if resets is not None:
        raise NotImplementedError("ONNX's recurrent nodes cannot reset their state inside a sequence")
    if save:
        raise NotImplementedError("ONNX's recurrent nodes give no cell states but the last: return_all_states=True")
    directions, hidden = hx.shape[0], hx.shape[2]
    if len(weights) // directions % 2:
        raise NotImplementedError("ONNX's LSTM has no projection: expected a layer without proj_size")
    y, *states = _node(cell, x, hx, cx, weights, lengths, directions, hidden)
    if lengths is not None:  # onnxruntime gives zero for rows without a step
        without = op.Unsqueeze(op.Equal(lengths, op.Constant(value_ints=[0])), [0, 2])
        states = [op.Where(without, before, state) for before, state in zip((hx, cx), states, strict=False)]
    return [op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, directions * hidden]), *states]


def _step(cell: str, x: Value, hx: Value, cx: Value, weights: Sequence[Value]) -> list[Value]:
    x, h, c = (None if t is None else op.Unsqueeze(t, [0]) for t in (x, hx, cx))
    return [op.Squeeze(state, [0]) for state in _node(cell, x, h, c, weights, None, 1, hx.shape[1])[1:]]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
if _dispatch.extension is not None:  # or there are no operators: layers are exported as loops over their steps
    operators = torch.ops.fusedrnn
    TRANSLATIONS |= {operators.recurrence_forward.default: _recurrence, operators.step.default: _step}
