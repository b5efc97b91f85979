"""A module's call the short way: no check of its own but whether the kernels take it as it is.

What gets None here takes the long way, whose checks say what is wrong, if anything is.
"""

from __future__ import annotations

from operator import is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _autograd, _direct, _dispatch, _ops, _ragged, _transforms
from fusedrnn._weights import FlatWeights

_two_weights = itemgetter("weight_ih", "weight_hh")
_four_weights = itemgetter("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell(module: torch.nn.RNNCellBase, name: str, x: Tensor, hx: Any) -> Any:
    """A cell's step of x ``[B, I]`` from its state ``[B, H]``, a pair for an LSTM; what forward returns, or None."""
    device = _device(x, 2, module.input_size)
    if device is None:
        return None
    h, c = _states(name, x, hx, module.hidden_size)
    try:
        weights = (_four_weights if module.bias else _two_weights)(module._parameters)
    except KeyError:  # a parametrization has taken its place
        return None
    if device == "cpu":
        found = _run(name, x, h, c, weights)
    else:
        found = _run_on_gpu(name, x, h, c, list(weights), (x.shape[0], module.hidden_size))
    if found is None:
        return None
    return (found[-2], found[-1]) if name == "lstm" else found[-1]


def layer(module: FlatWeights, name: str, x: Tensor, hx: Any, lengths: Any = None, resets: Any = None) -> Any:
    """A stack of layers over a padded batch from its states ``[L*D, B, H]``; what forward returns, or None."""
    device = _device(x, 3, module.input_size)
    if device is None:
        return None
    layers = module.num_layers
    if torch.is_grad_enabled() and (layers > 1 or module.recompute):
        return None  # a stack's layers are a node of the graph each
    if (module.proj_size and device == "cuda") or (layers > 1 and module.training and module.dropout):
        return None
    ragged = lengths is not None or resets is not None
    if ragged and (torch.is_grad_enabled() or device == "cuda"):
        return None
    if layers > 1 and device == "cuda":
        return None  # its operator takes a layer
    if module.batch_first:
        x = x.transpose(0, 1)
        resets = resets.transpose(0, 1) if type(resets) is Tensor and resets.dim() == 2 else resets
    if not x.is_contiguous():
        x = x.contiguous()
    rows = layers * (2 if module.bidirectional else 1)
    h, c = _states(name, x, hx, module.hidden_size, rows, module.proj_size)
    weights: list[Any] = list(map(module._parameters.get, module._flat_weights_names))
    if any(map(is_not, weights, module._flat_weights)):
        return None  # other weights than its parameters, perhaps
    if device == "cuda":
        found = _run_on_gpu(name, x, h, c, weights, (rows, x.shape[1], module.hidden_size))
    else:
        if lengths is not None:
            lengths = _contiguous(lengths, x.shape[1:2], torch.int64)
            if lengths is None or not _all_within(lengths, len(x)):
                return None
            if _ragged.worth_packing(lengths, len(x), module.hidden_size):
                return None
        if resets is not None:
            resets = _contiguous(resets, x.shape[:2], torch.bool)
            if resets is None:
                return None
        found = _run(name, x, h, c, weights, module, lengths, resets)
    if found is None:
        return None
    y, *states = found
    return y.transpose(0, 1) if module.batch_first else y, tuple(states) if name == "lstm" else states[0]


def _device(x: Any, rank: int, inputs: int) -> str | None:
    """Where the kernels are that take an input, ``cpu`` or ``cuda``."""
    if not (_direct.possible() and isinstance(x, Tensor) and x.dim() == rank and x.shape[-1] == inputs):
        return None
    if x.is_cpu:
        return "cpu"
    return "cuda" if type(x) is Tensor and _dispatch.on_gpu_kernels(x) else None


def _states(name: str, x: Tensor, hx: Any, units: int, rows: int | None = None, projection: int = 0) -> tuple[Any, Any]:
    """h and c as given or zero, ``[B, units]`` or ``[rows, B, units]``; None instead of what cannot be a state.

    A projected h has ``projection`` numbers.
    """
    if hx is None:
        shape = (x.shape[0],) if rows is None else (rows, x.shape[1])
        zeros = x.new_zeros((*shape, units))
        h = x.new_zeros((*shape, projection)) if projection else zeros
        return h, zeros if name == "lstm" else None
    if name != "lstm":
        return hx, None
    return hx if type(hx) in (tuple, list) and len(hx) == 2 else (None, None)


def _contiguous(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if type(tensor) is not Tensor or tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        return None
    return tensor.contiguous()


def _all_within(lengths: Tensor, steps: int) -> bool:
    if not len(lengths):
        return False
    least, most = lengths.aminmax()
    return int(least) >= 0 and int(most) <= steps


def _run(
    name: str,
    x: Tensor,
    h: Any,
    c: Any,
    weights: Any,
    module: FlatWeights | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Any:
    """The output and the states of a layer's call, or a cell's; with gradients, of one layer, neither ragged."""
    kernels = _direct.kernels
    if torch.is_grad_enabled():
        if not kernels.fits(name, x, h, c, weights):
            return None
        if _autograd.needs_gradient(x, h, c, weights):
            return _autograd.apply(name, False, None, None, None, x, h, c, *weights)
    if module is None:
        return kernels.forward(name, x, h, c, weights, 1, False)
    prepacked, stack = module._prepacked, None
    if prepacked is None and lengths is None and resets is None:  # what follows would take half a µs
        return kernels.forward(name, x, h, c, weights, module.num_layers, False)
    if prepacked is not None and len(x) > 1 and x.dtype in _direct.STORED:
        stack = prepacked.stack(module, weights, (), x.shape[1], checked=True)
    places = (0 if t is None else t.data_ptr() for t in (lengths, resets))
    return kernels.forward(name, x, h, c, weights, module.num_layers, False, *places, stack)


def _run_on_gpu(name: str, x: Tensor, h: Any, c: Any, weights: list[Any], shape: tuple[int, ...]) -> Any:
    """The same by the operator, which checks the weights' shapes."""
    states = [h] if name != "lstm" else [h, c]
    if x.shape[0] == 0 or not all(type(s) is Tensor and s.shape == shape for s in states):
        return None
    dtype, device = x.dtype, x.device
    if not all(isinstance(t, Tensor) and t.dtype is dtype and t.device == device for t in (*states, *weights)):
        return None
    tf32 = _dispatch.use_tf32(x)
    if _autograd.needs_gradient(x, h, c, weights):
        return _autograd.apply(name, tf32, None, None, None, x, h, c, *weights)
    step = x.dim() == 2
    if step:
        x, h, c = _transforms.with_step(x, h, c)
    with _ops.below_autograd():
        found = _ops.recurrence_forward(name, x, h, c, weights, None, None, None, False, tf32)
    return [t.squeeze(0) for t in found] if step else found
