"""Gradients of one layer by plain PyTorch, which may be differentiated in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import _modes, _reference

Pull = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def gradients(
    cell: str,
    sequence: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """recurrence_backward by the reference. ``inputs``: dy, dh_n, dc_n, x, hx, cx and the weights."""
    cotangents, cx = inputs[:3], inputs[5]
    tensors = [t for t in inputs[3:] if t is not None]
    states = len(tensors) - len(inputs[6:])
    asked = [i for i, want in enumerate(wanted) if want]

    def forward(*sources: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        for i, source in zip(asked, sources, strict=True):
            given[i] = source
        outputs = _reference.wide(cell, given[0], given[1], None if cx is None else given[2], given[states:], *sequence)
        return tuple(o for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None)

    _, pull = vjp(forward, *(tensors[i] for i in asked))
    return pull(tuple(c for c in cotangents if c is not None))


def vjp(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[tuple[Tensor, ...], Pull]:
    """torch.func.vjp, but by autograd alone where no transform is at work: a wrapper a tensor takes twice the time."""
    if _modes.active():
        found: Any = torch.func.vjp(function, *inputs)  # type: ignore[misc]
        return found[0], lambda cotangents: tuple(found[1](cotangents))
    # A view of each, so that a tensor that is used twice gets the gradient of each use, not their sum twice.
    sources = [t.view_as(t) if torch.is_grad_enabled() else t.detach() for t in inputs]
    with torch.enable_grad():
        sources = [t if t.requires_grad else t.requires_grad_() for t in sources]
        outputs = function(*sources)

    def pull(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(t) for t in inputs)
        return torch.autograd.grad(
            [o for o, _ in pairs],
            sources,
            [c for _, c in pairs],
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )

    return outputs, pull
