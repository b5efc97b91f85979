"""Forward passes that nobody watches, on the kernels without torch's dispatcher.

An operator call and the checks around it take some 20 µs, which is longer than the kernel of a small layer takes for a
step. Where no gradient, autocast, tracing, transform or mode has an interest in a call, and every tensor is an ordinary
contiguous one of the right shape, the kernels are given addresses. Anything else gets None here: the caller takes the
operators, and is the one who complains.

Most checks are written out, not factored: a Python call costs as much as one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import _dispatch, _ragged

_KINDS = (Tensor, torch.nn.Parameter)
_C = torch._C
_functorch_level = torch._C._functorch.peek_interpreter_stack
_profiling = torch._C._autograd._profiler_enabled
_forward_ad = torch.autograd.forward_ad
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _possible(x: Tensor) -> bool:
    """Whether nothing but the caller will see the call, and x is for the kernels."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and _dispatch.extension is not None
        and type(x) is Tensor
        and x.dtype in _DTYPES
        and x.is_cpu
        and not _C._is_any_autocast_enabled()
        and _functorch_level() is None
        and _forward_ad._current_level < 0
        and _C._len_torch_dispatch_stack() == 0
        and not _C._is_torch_function_mode_enabled()
        and _C._get_tracing_state() is None
        and not _profiling()
    )


def _addresses(
    parameters: dict[str, Any], names: Any, gates: int, inputs: int, hidden: int, dtype: torch.dtype
) -> list[int] | None:
    """Of the weights of one direction of a layer."""
    rows = gates * hidden
    addresses = []
    for i, name in enumerate(names):
        weight: Any = parameters.get(name)  # absent where a parametrization has taken its place
        if (
            type(weight) not in _KINDS
            or weight.dtype is not dtype
            or weight.shape != ((rows, inputs) if i == 0 else (rows, hidden) if i == 1 else (rows,))
            or not weight.is_cpu
            or not weight.is_contiguous()
        ):
            return None
        addresses.append(weight.data_ptr())
    return addresses


def _states(hx: Any, lstm: bool, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The states in what a module was given; a cell without a cell state has its h in both places."""
    if not lstm:
        pair = (hx, hx)
    elif type(hx) in (tuple, list) and len(hx) == 2:
        pair = (hx[0], hx[1])
    else:
        return None
    for tensor in pair if lstm else pair[:1]:
        if (
            type(tensor) not in _KINDS
            or tensor.shape != shape
            or tensor.dtype is not dtype
            or not tensor.is_cpu
            or not tensor.is_contiguous()
        ):
            return None
    return pair


def _contiguous(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if type(tensor) is not Tensor or tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        return None
    return tensor.contiguous()


def _all_within(lengths: Tensor, steps: int) -> bool:
    if not len(lengths):
        return False
    least, most = lengths.aminmax()
    return int(least) >= 0 and int(most) <= steps


def cell(module: torch.nn.RNNCellBase, name: str, x: Tensor, hx: Any) -> Any:
    """A cell's step of x ``[B, I]`` from its state ``[B, H]``, a pair for an LSTM; what forward returns, or None."""
    if hx is None or not _possible(x):
        return None
    lstm = name == "lstm"
    inputs, hidden, dtype, shape = module.input_size, module.hidden_size, x.dtype, x.shape
    if len(shape) != 2 or shape[1] != inputs or not x.is_contiguous():
        return None
    states = _states(hx, lstm, (shape[0], hidden), dtype)
    if states is None:
        return None
    h, c = states
    names = _CELL_NAMES if module.bias else _CELL_NAMES[:2]
    weights = _addresses(module._parameters, names, _GATES[name], inputs, hidden, dtype)
    if weights is None:
        return None
    h_n = torch.empty_like(h)
    c_n = torch.empty_like(c) if lstm else h_n
    at = h_n.data_ptr()
    _dispatch.extension.forward_at(  # type: ignore[union-attr]
        name, _DTYPES[dtype], 1, shape[0], inputs, hidden, 1,
        x.data_ptr(), h.data_ptr(), c.data_ptr(), weights, at, at, c_n.data_ptr(),
    )  # fmt: skip
    return (h_n, c_n) if lstm else h_n


def layer(module: torch.nn.RNNBase, name: str, x: Tensor, hx: Any, lengths: Any = None, resets: Any = None) -> Any:
    """A stack of layers over a padded batch from its states ``[L*D, B, H]``; what forward returns, or None."""
    if not _possible(x) or x.dim() != 3:
        return None
    if module.batch_first:
        x = x.transpose(0, 1)
        resets = resets.transpose(0, 1) if type(resets) is Tensor and resets.dim() == 2 else resets
    steps, batch, inputs = x.shape
    hidden, dtype, layers, lstm = module.hidden_size, x.dtype, module.num_layers, name == "lstm"
    directions = 2 if module.bidirectional else 1
    if layers > 1 and dtype is torch.bfloat16:
        return None  # the operators keep float32 between layers
    if (
        inputs != module.input_size
        or not steps
        or module.proj_size
        or (module.training and module.dropout and layers > 1)
    ):
        return None
    state = (layers * directions, batch, hidden)
    if hx is None:
        h = c = torch.zeros(state, dtype=dtype, device="cpu")
    else:
        states = _states(hx, lstm, state, dtype)
        if states is None:
            return None
        h, c = states
    parameters, names = module._parameters, module._flat_weights_names
    each = 4 if module.bias else 2
    weights = []
    for k in range(layers * directions):
        width = inputs if k < directions else directions * hidden
        found = _addresses(parameters, names[k * each : (k + 1) * each], _GATES[name], width, hidden, dtype)
        if found is None:
            return None
        weights.append(found)
    if lengths is not None:
        lengths = _contiguous(lengths, (batch,), torch.int64)
        if lengths is None or not _all_within(lengths, steps) or _ragged.worth_packing(lengths, steps, hidden):
            return None
    if resets is not None:
        resets = _contiguous(resets, (steps, batch), torch.bool)
        if resets is None:
            return None
    if not x.is_contiguous():
        x = x.contiguous()
    h_n = torch.empty_like(h)
    c_n = torch.empty_like(c) if lstm else h_n
    offset = 0
    for k in range(0, layers * directions, directions):
        y = torch.empty((steps, batch, directions * hidden), dtype=dtype, device="cpu")
        _dispatch.extension.forward_at(  # type: ignore[union-attr]
            name, _DTYPES[dtype], steps, batch, x.shape[2], hidden, directions,
            x.data_ptr(), h.data_ptr() + offset, c.data_ptr() + offset,
            weights[k] if directions == 1 else weights[k] + weights[k + 1],
            y.data_ptr(), h_n.data_ptr() + offset, c_n.data_ptr() + offset,
            0 if lengths is None else lengths.data_ptr(), 0 if resets is None else resets.data_ptr(),
        )  # fmt: skip
        offset += directions * batch * hidden * x.element_size()
        x = y
    return (x.transpose(0, 1) if module.batch_first else x), ((h_n, c_n) if lstm else h_n)
