"""recompute=True: the same gradients from less memory."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from cases import Case, expected, for_all_cells, make_data, run_module
from numerics import FAST, assert_all_as_good
from test_ragged import flat, loop, rows_of, run, run_oracle
from torch.autograd import gradcheck, gradgradcheck

import fusedrnn
from fusedrnn import _dispatch, _recompute

LAYERS = ("RNN", "LSTM", "GRU")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(_recompute, "CHUNK", 4)


CASES = (
    *for_all_cells(
        {"T": 11},
        {"T": 4, "bias": False},
        {"T": 9, "layers": 2, "bidirectional": True, "batch_first": True, "contiguous": False},
        {"T": 9, "unbatched": True, "B": 1, "hx": False},
        {"T": 9, "B": 5, "lengths": (2, 9, 4, 5, 1)},
        {"T": 6, "B": 5, "lengths": (2, 6, 4, 5, 1), "bidirectional": True},
    ),
    *(replace(Case("lstm", T=11, bidirectional=True), dtype=dtype) for dtype in ("float64", "bfloat16", "float16")),
)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
def test_same_results(case, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(_dispatch, "extension", None)
    module = case.module(fusedrnn)
    module.recompute = True
    assert_all_as_good(run_module(module, case, make_data(case)), *expected(case), case.torch_dtype)


@pytest.mark.parametrize("which", ["lengths", "resets", "lengths and resets"])
@pytest.mark.parametrize(
    "case", for_all_cells({"T": 9, "B": 6}, {"T": 9, "B": 6, "layers": 2, "bidirectional": True}), ids=str
)
def test_lengths_and_resets(case, which):
    lengths, resets = rows_of(case, which)
    theirs, ours = case.module(torch.nn), case.module(fusedrnn)
    ours.recompute = True
    by_steps = run(lambda x, hx: loop(theirs, x, hx, lengths, resets), theirs, case)
    at_once = run(lambda x, hx: ours(x, hx, lengths=lengths, resets=resets), ours, case)
    assert_all_as_good(at_once, by_steps, run_oracle(case, lengths, resets), case.torch_dtype)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name, check):
    layer = getattr(fusedrnn, name)(2, 2, bidirectional=True, dtype=torch.float64, recompute=True)
    x = torch.randn(6, 1, 2, dtype=torch.float64, requires_grad=True)
    options = FAST if check is gradgradcheck else {}
    assert check(lambda *_: tuple(flat(layer(x))), (x, *layer.parameters()), **options)


@pytest.mark.parametrize("name", LAYERS)
def test_many_gradients_at_once(name):
    """is_grads_batched, over several chunks."""
    layer, x = getattr(fusedrnn, name)(4, 7, bidirectional=True, recompute=True), torch.randn(9, 3, 4)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: layer(x)[0][-1, 0], x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("asking", ["x", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_only_for_what_asks(name, asking):
    layer, x = getattr(fusedrnn, name)(4, 7, recompute=True), torch.randn(9, 3, 4, requires_grad=asking == "x")
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(key == asking)
    layer(x)[0].sum().backward()
    for key, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        assert (tensor.grad is not None) == (key == asking)


@pytest.mark.parametrize("which", [0, 1])
def test_some_cotangents_only(which):
    plain, again = fusedrnn.LSTM(4, 7, 2), fusedrnn.LSTM(4, 7, 2, recompute=True)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(9, 3, 4)
    grads = []
    for layer in (plain, again):
        layer(x)[1][which].square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("what", ["weight", "lengths", "resets"])
@pytest.mark.parametrize("name", LAYERS)
def test_changes_in_place_before_backward_are_refused(name, what):
    layer, x = getattr(fusedrnn, name)(4, 7, recompute=True), torch.randn(9, 3, 4)
    lengths, resets = torch.tensor([9, 9, 8]), torch.zeros(9, 3, dtype=torch.bool)
    y, _ = layer(x, **{"weight": {}, "lengths": {"lengths": lengths}, "resets": {"resets": resets}}[what])
    with torch.no_grad():
        {"weight": layer.weight_hh_l0, "lengths": lengths, "resets": resets}[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_an_argument_that_changes_nothing_else(name):
    theirs, ours = getattr(torch.nn, name)(4, 7, 2), getattr(fusedrnn, name)(4, 7, 2, recompute=True)
    assert ours.recompute
    assert not getattr(fusedrnn, name)(4, 7).recompute
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert copy.deepcopy(ours).recompute
    assert pickle.loads(pickle.dumps(ours)).recompute
    converted = fusedrnn.convert(theirs)
    assert not converted.recompute
    x = torch.randn(9, 3, 4)
    with torch.no_grad():
        for one, other in zip(flat(ours(x)), flat(copy.deepcopy(ours)(x)), strict=True):
            assert torch.equal(one, other)
