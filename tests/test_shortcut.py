"""A module's short way to a GPU's operator (_shortcut.py), with the CPU's in its place: the same numbers and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_direct import CELLS, assert_same, by_operators, flat, make, train

import fusedrnn
from fusedrnn import _shortcut

pytest.importorskip("fusedrnn._C", exc_type=ImportError)

FORMS = ({}, {"bidirectional": True}, {"batch_first": True}, {"bias": False})


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """CPU tensors are sent the way of CUDA tensors; for every call whether it got its results there."""
    device, run, calls = _shortcut._device, _shortcut._run_on_gpu, []

    def watched(*arguments: Any) -> Any:
        found = run(*arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(_shortcut, "_device", lambda *arguments: device(*arguments) and "cuda")
    monkeypatch.setattr(_shortcut, "_run_on_gpu", watched)
    return calls


@pytest.mark.parametrize("name", [*CELLS, *(name + "Cell" for name in CELLS)])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_long_way_s_numbers(name, form, taken):
    if name.endswith("Cell") and not form.keys() <= {"bias"}:
        pytest.skip("an option of layers")
    module, call = make(name, **form)
    assert_same(train(module, call), by_operators(train, module, call))
    with torch.no_grad():
        assert_same(call(), by_operators(call))
    module.requires_grad_(False)
    assert_same(call(), by_operators(call))
    assert taken == [True] * 3


@pytest.mark.parametrize("name", [*CELLS, *(name + "Cell" for name in CELLS)])
def test_without_a_state(name, taken):
    module = getattr(fusedrnn, name)(5, 9)
    x = torch.randn(3, 5) if name.endswith("Cell") else torch.randn(4, 3, 5)
    assert_same(flat(module(x)), by_operators(lambda: flat(module(x))))
    assert taken == [True]


WRONG: dict[str, tuple[Any, Any]] = {
    "no steps": (torch.randn(0, 3, 5), None),
    "state of another batch": (torch.randn(4, 3, 5), torch.randn(1, 2, 9)),
    "state of two directions": (torch.randn(4, 3, 5), torch.randn(2, 3, 9)),
    "state of another dtype": (torch.randn(4, 3, 5), torch.randn(1, 3, 9, dtype=torch.float64)),
    "state that is no tensor": (torch.randn(4, 3, 5), [1.0]),
    "input of another dtype": (torch.randn(4, 3, 5, dtype=torch.float64), None),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_long_way_s_errors(wrong, grad, taken):
    gru, (x, hx) = fusedrnn.GRU(5, 9), WRONG[wrong]

    def error() -> str:
        with torch.set_grad_enabled(grad), pytest.raises(Exception) as caught:  # noqa: PT011
            gru(x, hx)
        return repr(caught.value)

    assert error() == by_operators(error)
    assert not any(taken)


def test_weights_that_are_made_take_the_long_way(taken):
    gru = torch.nn.utils.parametrizations.weight_norm(fusedrnn.GRU(5, 9), "weight_hh_l0")
    x = torch.randn(4, 3, 5)
    assert_same(flat(gru(x)), by_operators(lambda: flat(gru(x))))
    assert not any(taken)
