"""Weights packed once for inference, where the user says so: no call can see every change of a weight.

What is packed are copies in the kernels' order and dtype.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from operator import is_not
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fusedrnn import _autograd, _direct, _dispatch
from fusedrnn._weights import FlatWeights

Model = TypeVar("Model", bound=torch.nn.Module)
Dtypes = tuple[torch.dtype, ...]


def prepack(model: Model, enabled: bool = True) -> Model:
    """Make inference on a CPU pack the weights of ``model``'s layers once, not at every call; returns ``model`` itself.

    For a model whose weights are at rest. The first call that needs no gradient packs; those after it, of any batch and
    length and in any number of threads, use that. When a weight has changed, the next call packs again: after a step of
    one of torch's optimisers, ``load_state_dict``, an operation in place, another Parameter, another dtype.

    **Not noticed are writes that torch does not count**: through ``parameter.data``, a tensor made of it or set as it,
    NumPy, torch's fused functions without their optimiser, a collective or another process. After those, call
    ``prepack`` again.

    It is for fusedrnn's layers. Cells and single steps (but in float16) read weights where they are. Training, what is
    compiled, exported, transformed or profiled, and layers whose weights are made for every call (parametrized or
    pruned ones) or in inference mode run as they do without.

    What is packed takes as much memory again as the weights, up to three times as much where they have 16 bits and the
    kernels want float32, and that for each dtype in which they are used (autocast). ``enabled=False`` undoes it. A copy
    of the model packs for itself.
    """
    _open_steps.clear()
    layers = [module for module in model.modules() if isinstance(module, FlatWeights)]
    for layer in layers:
        layer._prepacked = Prepacked() if enabled else None
    if not layers:
        warnings.warn("fusedrnn.prepack found no layer of fusedrnn's; fusedrnn.convert makes them", stacklevel=2)
    return model


# Fused optimisers write to weights, and torch does not count that: another object after every step of any optimiser.
# None while there are open ones, or some that raised an error and are still there.
_step: object | None = object()
_open_steps: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()  # by id


def _begin_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    global _step
    _open_steps[id(optimiser)] = optimiser
    _step = None


def _end_step(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    global _step
    _open_steps.pop(id(optimiser), None)
    _step = None if _open_steps else object()


def _is_in_step() -> bool:
    global _step
    if _step is None and not _open_steps:
        _step = object()
    return _step is None


@functools.cache
def _watch_optimisers() -> None:
    register_optimizer_step_pre_hook(_begin_step)
    register_optimizer_step_post_hook(_end_step)


class _Packed:
    """A layer's weights as they were, and what the kernels packed of them, by the dtypes that they went through."""

    def __init__(self, module: FlatWeights, weights: list[Tensor]) -> None:
        self._step, self._sizes, self._weights = _step, _sizes(module), list(weights)
        self._versions = [w._version for w in weights]
        # While they hold its memory, no other tensor can be where a weight was.
        self._aliases = [w.detach() for w in weights]
        self._places, self._marks = [w.data_ptr() for w in self._aliases], list(map(_mark, self._aliases))
        self._dense = all(w.is_contiguous() and not w.is_neg() for w in self._aliases)
        self._can_pack = _can_pack(module, self._aliases) and self._places == [w.data_ptr() for w in weights]
        self._stacks: dict[Dtypes, list[Any]] = {}

    def is_of(self, module: FlatWeights, weights: list[Tensor], checked: bool) -> bool:
        """Whether these are they, unchanged; what is ``checked`` will be dense and of the sizes that were packed."""
        return (
            not any(map(is_not, weights, self._weights))
            and [w._version for w in weights] == self._versions
            and [w.data_ptr() for w in weights] == self._places
            and self._step is _step
            and (
                (checked and self._dense)
                or (_sizes(module) == self._sizes and list(map(_mark, weights)) == self._marks)
            )
        )

    def stack(self, through: Dtypes, batch: int) -> Any:
        if not self._can_pack:
            return None
        made = self._stacks.get(through, [])
        for stack in made:
            if stack.suits(batch):
                return stack
        stack = _pack(self._sizes, self._aliases, through, batch)
        if stack is not None:
            self._stacks[through] = [stack, *(other for other in made if other.is_current())]
        return stack


class Prepacked:
    """What a layer has packed. A copy has nothing yet."""

    def __init__(self) -> None:
        self._packed: _Packed | None = None
        _watch_optimisers()

    def __reduce__(self) -> Any:
        return Prepacked, ()

    def stack(
        self, module: FlatWeights, weights: list[Tensor], through: Dtypes, batch: int, checked: bool = False
    ) -> Any:
        """The kernels' stack of these weights as they are now; None where a change of one could not be seen."""
        packed = self._packed
        if _step is None and _is_in_step():
            return None
        if packed is None or not packed.is_of(module, weights, checked):
            self._packed = packed = None  # whose memory comes back first
            if not all(map(_is_counted, weights)):
                return None
            self._packed = packed = _Packed(module, weights)
        return packed.stack(through, batch)


def _sizes(module: FlatWeights) -> tuple[Any, ...]:
    return module.mode, module.input_size, module.hidden_size, module.proj_size, module.num_layers, module.bidirectional


def _mark(weight: Tensor) -> tuple[Any, ...]:
    return weight.dtype, weight.shape, weight.stride(), weight.is_neg()


def _is_counted(weight: Tensor) -> bool:
    """Whether torch counts the changes of a weight."""
    return type(weight) is torch.nn.Parameter and weight.is_cpu and not weight.is_inference()


def _can_pack(module: FlatWeights, weights: list[Tensor]) -> bool:
    """Whether the kernels can read these weights."""
    return (
        [w.shape for w in weights] == module._shapes()
        and len({w.dtype for w in weights}) == 1
        and all(w.data_ptr() or not w.numel() for w in weights)
    )


def _pack(sizes: tuple[Any, ...], weights: list[Tensor], through: Dtypes, batch: int) -> Any:
    for dtype in through:
        weights = [w.to(dtype) for w in weights]
    name = _direct.STORED.get(weights[0].dtype)
    if name is None:
        return None
    assert _dispatch.extension is not None
    mode, inputs, hidden, projection, layers, bidirectional = sizes
    stack = _dispatch.extension.Stack(
        mode.lower(), name, batch, inputs, hidden, projection, layers, 2 if bidirectional else 1
    )
    weights = [_direct.dense(w) for w in weights]
    stack.prepare([_direct.address(w) for w in weights])
    return stack


def serves(module: torch.nn.Module, one_step: bool) -> bool:
    """Whether a layer's call as things are, of one step or several, uses what it has packed."""
    if not isinstance(module, FlatWeights) or module._prepacked is None:
        return False
    weights = module._weights()
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return False
    return _may_serve(module, weights, one_step) and all(map(_is_counted, weights)) and _can_pack(module, weights)


def _may_serve(module: FlatWeights, weights: list[Tensor], one_step: bool) -> bool:
    dropout = module.training and module.dropout and module.num_layers > 1
    return not dropout and (not one_step or weights[0].dtype == torch.float16)


def find(
    module: FlatWeights,
    tensors: list[Tensor],
    sequence: list[Tensor | None],
    weights: list[Tensor],
    autocast: torch.dtype | None,
    one_step: bool,
) -> Any:
    """The kernels' stack for a checked call, or None.

    ``tensors`` are x ``[T, B, I]`` or ``[N, I]``, h and an LSTM's c, ``sequence`` what there is of batch_sizes, lengths
    and resets.
    """
    prepacked, (x, h, *_) = module._prepacked, tensors
    if prepacked is None or not _direct.unseen() or not _may_serve(module, weights, one_step):
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.data_ptr() for t in tensors):  # nothing to compute, or
        return None  # somebody else's
    if not all(t is None or (type(t) is Tensor and t.is_cpu) for t in sequence):
        return None
    batch_sizes = sequence[0]
    if batch_sizes is not None and (batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1):
        return None
    if _autograd.needs_gradient(x, h, tensors[-1], weights):
        return None
    through: Dtypes = () if autocast is None else (autocast,)
    if (autocast or weights[0].dtype) == torch.float16:
        through += (torch.float32,)
    return prepacked.stack(module, weights, through, h.size(1))


def run(
    stack: Any,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`fusedrnn.functional.stack` of the kernels' stack that has its weights."""
    x, h, c = _direct.dense(x), _direct.dense(h), None if c is None else _direct.dense(c)
    sequence = [None if t is None else t.contiguous() for t in (resets, lengths, batch_sizes)]
    y = x.new_empty(*x.shape[:-1], stack.outputs)
    h_n, c_n = torch.empty_like(h), None if c is None else torch.empty_like(c)
    stack.forward(
        x.size(0) if batch_sizes is None else len(batch_sizes),
        h.size(1),
        *(0 if t is None else _direct.address(t) for t in (x, y, h, c, h_n, c_n)),
        *(t.dtype == torch.bfloat16 for t in (x, h)),
        *(0 if t is None else _direct.address(t) for t in sequence),
        rows=x.size(0),
    )
    return y, h_n, c_n
