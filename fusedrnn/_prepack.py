"""Weights packed once for inference, where the user says so: no call can see every change of a weight.

What is packed are copies in the kernels' order and dtype.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from operator import is_not
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fusedrnn import _autograd, _direct, _dispatch
from fusedrnn._weights import FlatWeights

Model = TypeVar("Model", bound=torch.nn.Module)
Dtypes = tuple[torch.dtype, ...]

_STORED = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def prepack(model: Model, enabled: bool = True) -> Model:
    """Make inference on a CPU pack the weights of ``model``'s layers once, not at every call; returns ``model`` itself.

    For a model whose weights are at rest. The first call that needs no gradient packs, into as much memory again as the
    weights take; those after it, of any batch and length and in any number of threads, use that. When a weight has
    changed, the next call packs again: after a step of one of torch's optimisers, ``load_state_dict``, an operation in
    place, another Parameter, another dtype.

    **Not noticed are writes that torch does not count**: through ``parameter.data`` or NumPy, by a collective or by
    another process. After those, call ``prepack`` again.

    It is for fusedrnn's layers. Cells and single steps (but in float16) read weights where they are. Training, what is
    compiled, exported or transformed, and layers whose weights are made for every call (parametrized or pruned ones) or
    in inference mode run as they do without. ``enabled=False`` undoes it and frees the memory. A copy of the model packs
    for itself.
    """
    _watch_optimisers()
    layers = [module for module in model.modules() if isinstance(module, FlatWeights)]
    for layer in layers:
        layer._prepacked = Prepacked() if enabled else None
    if not layers:
        warnings.warn("fusedrnn.prepack found no layer of fusedrnn's; fusedrnn.convert makes them", stacklevel=2)
    return model


# Steps of torch's optimisers so far: fused ones write to weights and torch does not count that.
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch_optimisers() -> None:
    register_optimizer_step_post_hook(_count_step)


class _Kept(NamedTuple):
    """What the kernels have packed, and of what."""

    stack: Any
    weights: list[Tensor]
    aliases: list[Tensor]  # while they hold its memory, no other tensor can be in its place
    versions: list[int]
    places: list[int]
    steps: int


class Prepacked:
    """What a layer has packed, by the dtypes through which its weights went. A copy has nothing yet."""

    def __init__(self) -> None:
        self._kept: dict[Dtypes, _Kept] = {}

    def __reduce__(self) -> Any:
        return Prepacked, ()

    def stack(self, module: FlatWeights, weights: list[Tensor], through: Dtypes, batch: int) -> Any:
        """The kernels' stack of these weights as they are now; None where a change of one could not be seen."""
        kept = self._kept.get(through)
        if kept is None or any(map(is_not, weights, kept.weights)):
            kept = None
            if not all(map(_is_countable, weights)):
                return None
        versions, places, steps = [w._version for w in weights], [w.data_ptr() for w in weights], _steps
        if kept and (versions, places, steps) == (kept.versions, kept.places, kept.steps) and kept.stack.suits(batch):
            return kept.stack
        aliases = [w.detach() for w in weights]
        made = _pack(module, aliases, through, batch)
        if made is not None:
            self._kept[through] = _Kept(made, list(weights), aliases, versions, places, steps)
        return made


def _pack(module: FlatWeights, weights: list[Tensor], through: Dtypes, batch: int) -> Any:
    for dtype in through:
        weights = [w.to(dtype) for w in weights]
    dtypes = {w.dtype for w in weights}
    if len(dtypes) > 1 or not dtypes <= _STORED.keys() or [w.shape for w in weights] != module._shapes():
        return None
    assert _dispatch.extension is not None
    directions = 2 if module.bidirectional else 1
    stack = _dispatch.extension.Stack(
        module.mode.lower(), _STORED[dtypes.pop()], batch, module.input_size, module.hidden_size, module.proj_size,
        module.num_layers, directions,
    )  # fmt: skip
    weights = [w.contiguous() for w in weights]
    stack.prepare([w.data_ptr() for w in weights])
    return stack


def _is_countable(weight: Any) -> bool:
    """Whether torch counts the changes of a weight that the kernels can read."""
    return type(weight) is torch.nn.Parameter and weight.is_cpu and not weight.is_inference()


def serves(module: torch.nn.Module, one_step: bool) -> bool:
    """Whether a layer's inference, of one step or several, uses what it has packed."""
    if getattr(module, "_prepacked", None) is None or torch.is_grad_enabled():
        return False
    weights = list(module.parameters())
    return all(map(_is_countable, weights)) and (not one_step or weights[0].dtype == torch.float16)


def find(
    module: FlatWeights,
    x: Tensor,
    states: Sequence[Tensor],
    weights: list[Tensor],
    autocast: torch.dtype | None,
    one_step: bool,
) -> Any:
    """The kernels' stack for a checked call, of x ``[T, B, I]`` or ``[N, I]``; None where there is none."""
    prepacked = module._prepacked
    if prepacked is None or not _direct.unseen() or not x.numel() or not states[0].numel():
        return None
    if one_step and weights[0].dtype != torch.float16:
        return None
    if module.training and module.dropout and module.num_layers > 1:
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, *states)):
        return None
    if _autograd.needs_gradient(x, states[0], states[-1], weights):
        return None
    through: Dtypes = () if autocast is None else (autocast,)
    if (autocast or weights[0].dtype) == torch.float16:
        through += (torch.float32,)
    return prepacked.stack(module, weights, through, states[0].size(1))


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
    x, h, c = _dense(x), _dense(h), None if c is None else _dense(c)
    sequence = [None if t is None else t.contiguous() for t in (resets, lengths, batch_sizes)]
    y = x.new_empty(*x.shape[:-1], stack.outputs)
    h_n, c_n = torch.empty_like(h), None if c is None else torch.empty_like(c)
    stack.forward(
        x.size(0) if batch_sizes is None else len(batch_sizes),
        h.size(1),
        *map(_place, (x, y, h, c, h_n, c_n)),
        *(t.dtype == torch.bfloat16 for t in (x, h)),
        *map(_place, sequence),
        rows=x.size(0),
    )
    return y, h_n, c_n


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous().resolve_neg()


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
