"""return_all_states: the states after every step, and gradients that come through them."""

from __future__ import annotations

import pytest
import torch
from numerics import Scene, assert_scenario
from test_ragged import flat, loop
from torch import Tensor

import fusedrnn
from fusedrnn import _dispatch

LAYERS = ("RNN", "LSTM", "GRU")
LENGTHS = torch.tensor([2, 0, 6, 5])
FORMS = {
    "plain": ({}, (), {}),
    "stack": ({"num_layers": 2}, (), {}),
    "both directions, lengths": ({"num_layers": 2, "bidirectional": True}, ("lengths",), {}),
    "resets": ({"bidirectional": True, "bias": False}, ("resets",), {}),
    "lengths and resets, wide": ({"num_layers": 2}, ("lengths", "resets"), {"hidden": 70}),
    "projected": ({"num_layers": 2, "bidirectional": True, "proj_size": 3}, ("lengths",), {}),
}


def scenario_of(name: str, form: str):
    options, kinds, sizes = FORMS[form]

    def scenario(scene: Scene) -> dict[str, Tensor]:
        module, x = scene.module(name, 4, sizes.get("hidden", 9), **options), scene.randn(6, 4, 4, requires_grad=True)
        rows = module.num_layers * (2 if module.bidirectional else 1)
        hx = [scene.randn(rows, 4, module.proj_size or module.hidden_size, requires_grad=True)]
        hx += [scene.randn(rows, 4, module.hidden_size, requires_grad=True)] if name == "LSTM" else []
        given = tuple(hx) if name == "LSTM" else hx[0]
        resets = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.3
        rest = {"lengths": LENGTHS if "lengths" in kinds else None, "resets": resets if "resets" in kinds else None}
        if scene.library is fusedrnn:
            y, last, states = module(x, given, **rest, return_all_states=True)
        else:
            every: list = []
            y, last = loop(module, x, given, **rest, every=every)
            states = [torch.stack([parts[i] for parts in every]) for i in range(len(hx))]
        states = flat(states)
        outputs = [y, *flat(last), *states]
        torch.autograd.backward(outputs, [scene.randn(*o.shape) for o in outputs])
        named = {f"output {i}": o for i, o in enumerate(outputs)}
        leaves = {"x": x, **{f"state {i}": s for i, s in enumerate(hx)}, **dict(module.named_parameters())}
        return named | {f"d{key}": t.grad for key, t in leaves.items()}

    return scenario


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.usefixtures("isa")
def test_values_and_gradients(name, form):
    if form == "projected" and name != "LSTM":
        pytest.skip("only an LSTM has projections")
    assert_scenario(scenario_of(name, form), fusedrnn)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
def test_on_the_reference(name, monkeypatch):
    monkeypatch.setattr(_dispatch, "extension", None)
    assert_scenario(scenario_of(name, "both directions, lengths"), fusedrnn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_their_last_is_the_last_and_nothing_else_changes(name, dtype):
    layer, x = getattr(fusedrnn, name)(4, 9, 2, dtype=dtype), torch.randn(6, 3, 4, dtype=dtype)
    y, last, states = layer(x, return_all_states=True)
    plain = layer(x)
    for one, other in zip(flat((y, last)), flat(plain), strict=True):
        assert torch.equal(one, other)
    for state, end in zip(flat(states), flat(last), strict=True):
        assert state.dtype == dtype
        assert torch.equal(state[:, -1], end)
    assert torch.equal(flat(states)[0][-1], y)
    with torch.no_grad():
        for one, other in zip(flat(layer(x, return_all_states=True)), flat((y, last, states)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_layouts(name):
    layer, first = (getattr(fusedrnn, name)(4, 9, 2, batch_first=batch_first) for batch_first in (False, True))
    first.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 4)
    states = flat(layer(x, return_all_states=True)[2])
    for one, other in zip(states, flat(first(x.transpose(0, 1), return_all_states=True)[2]), strict=True):
        assert other.shape == (2, 3, 6, 9)
        assert torch.equal(one, other.transpose(1, 2))
    for one, other in zip(states, flat(layer(x[:, 0], return_all_states=True)[2]), strict=True):
        assert other.shape == (2, 6, 9)
        torch.testing.assert_close(one[:, :, 0], other)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name, check):
    layer = getattr(fusedrnn, name)(2, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    given = {"lengths": torch.tensor([2, 3]), "resets": torch.tensor([[False, True], [True, False], [False, False]])}
    call = lambda *_: tuple(flat(layer(x, **given, return_all_states=True)))  # noqa: E731
    assert check(call, (x, *layer.parameters()))


def test_where_cells_come_from_the_reference_it_is_said(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    layer, x = fusedrnn.LSTM(4, 9), torch.randn(2, 6, 3, 4)
    expected = torch.stack([layer(part, return_all_states=True)[2][1] for part in x])
    if _dispatch.extension is None:
        return
    with pytest.warns(fusedrnn.FallbackWarning, match="all cell states under torch.func"):
        mapped = torch.func.vmap(lambda part: layer(part, return_all_states=True)[2][1])(x)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_no_rows(name):
    layer = getattr(fusedrnn, name)(4, 7, 2, bidirectional=True)
    y, _, states = layer(torch.zeros(5, 0, 4, requires_grad=True), return_all_states=True)
    assert y.shape == (5, 0, 14)
    for s in states if name == "LSTM" else (states,):
        assert s.shape == (4, 5, 0, 7)
        s.sum().backward(retain_graph=True)
