"""RNNCell, LSTMCell and GRUCell: one step against the oracle's step and torch.nn's cell."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import CELLS, leaf
from numerics import assert_all_as_good

import fusedrnn
from fusedrnn import _dispatch

SHAPES = ((1, 1, 1), (3, 4, 7), (2, 3, 16), (5, 16, 17), (13, 33, 65), (33, 3, 100), (4, 64, 256))  # B, I, H
EMPTY = ((0, 4, 7), (3, 0, 7), (3, 4, 0), (64, 20, 0))  # torch.nn's cells take them all
DTYPES = ("float32", "float64")
NAMES = ["-".join(cell.values()) for cell in CELLS]


def make_cell(library, kind: dict, I: int, H: int, bias: bool, dtype: torch.dtype):  # noqa: E741
    options = {key: value for key, value in kind.items() if key != "cell"}
    torch.manual_seed(0)
    return getattr(library, kind["cell"].upper() + "Cell")(I, H, bias=bias, dtype=dtype, **options)


def run_cell(cell, is_lstm: bool, data: dict, unbatched: bool, hx: bool) -> dict[str, torch.Tensor]:
    x, h, c = (leaf(data[name][0] if unbatched else data[name]) for name in ("x", "h", "c"))
    state = ((h, c) if is_lstm else h) if hx else None
    new = cell(x, state)
    outputs = dict(zip(("h_new", "c_new"), new, strict=True)) if is_lstm else {"h_new": new}
    cotangents = [data[f"d{name}"][0] if unbatched else data[f"d{name}"] for name in outputs]
    torch.autograd.backward(list(outputs.values()), cotangents)
    results = outputs | {"dx": x.grad}
    if hx:
        results |= {"dh": h.grad, "dc": c.grad} if is_lstm else {"dh": h.grad}
    if unbatched:
        results = {name: value.unsqueeze(0) for name, value in results.items()}
    return results | {f"d{name}": parameter.grad for name, parameter in cell.named_parameters()}


def run_oracle_step(kind: dict, weights: dict, data: dict, hx: bool) -> dict[str, np.ndarray]:
    is_lstm = kind["cell"] == "lstm"
    equations = kind["cell"] if kind["cell"] != "rnn" else f"rnn_{kind.get('nonlinearity', 'tanh')}"
    w = {name: value.detach().double().numpy() for name, value in weights.items()}
    d = {name: value.double().numpy() for name, value in data.items()}
    h, c, saved = oracle.step_forward(equations, w, d["x"], d["h"], d["c"])
    dw = {name: np.zeros_like(value) for name, value in w.items()}
    dc_new = d["dc_new"] if is_lstm else np.zeros_like(c)
    dx, dh, dc = oracle.step_backward(equations, w, saved, d["dh_new"], dc_new, dw)
    results = {"h_new": h, "c_new": c} if is_lstm else {"h_new": h}
    results |= {"dx": dx}
    if hx:
        results |= {"dh": dh, "dc": dc} if is_lstm else {"dh": dh}
    return results | {f"d{name}": value for name, value in dw.items()}


def check(kind, shape, dtype, *, bias=True, unbatched=False, hx=True) -> None:
    B, I, H = shape  # noqa: E741
    dtype, is_lstm = getattr(torch, dtype), kind["cell"] == "lstm"
    random = np.random.default_rng(5)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(sizes)).to(dtype)

    data = {"x": draw(B, I)} | {name: draw(B, H) for name in ("h", "c", "dh_new", "dc_new")}
    if not hx:
        data |= {"h": torch.zeros(B, H, dtype=dtype), "c": torch.zeros(B, H, dtype=dtype)}
    ours, theirs = (make_cell(library, kind, I, H, bias, dtype) for library in (fusedrnn, torch.nn))
    assert_all_as_good(
        run_cell(ours, is_lstm, data, unbatched, hx),
        run_cell(theirs, is_lstm, data, unbatched, hx),
        run_oracle_step(kind, dict(theirs.named_parameters()), data, hx),
        dtype,
    )


every_cell = pytest.mark.parametrize("kind", CELLS, ids=NAMES)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_sizes(kind, shape, dtype):
    check(kind, shape, dtype)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"hx": False},
        {"bias": False},
        {"unbatched": True},
        {"unbatched": True, "hx": False},
        {"unbatched": True, "bias": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(kind, dtype, options):
    shape = (1, 4, 7) if options.get("unbatched") else (3, 4, 7)
    check(kind, shape, dtype, **options)


@every_cell
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty(kind, shape):
    check(kind, shape, "float32")


@every_cell
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(kind, dtype):
    check(kind, (3, 4, 7), dtype)


@every_cell
def test_a_cell_repeated_is_the_layer(kind):
    """The same weights, step by step, give the layer's output."""
    cell = make_cell(fusedrnn, kind, 4, 7, True, torch.float64)
    layer = make_layer_from(cell, kind)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if kind["cell"] == "lstm" else state)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])


def make_layer_from(cell, kind: dict):
    options = {key: value for key, value in kind.items() if key != "cell"}
    layer = getattr(fusedrnn, kind["cell"].upper())(4, 7, dtype=torch.float64, **options)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return layer


@every_cell
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(kind, check):
    cell = make_cell(fusedrnn, kind, 3, 2, True, torch.float64)
    x, h, c = (torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 2, 2))
    state = (h, c) if kind["cell"] == "lstm" else (h,)
    # The check perturbs its inputs in place, so the function may read them where they live.
    assert check(lambda *_: cell(x, state if len(state) > 1 else h), (x, *state, *cell.parameters()))


@pytest.mark.parametrize("missing", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")], ids=str)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_bias_may_be_none(name, missing):
    theirs, ours = (getattr(library, name)(4, 7) for library in (torch.nn, fusedrnn))
    ours.load_state_dict(theirs.state_dict())
    for cell in theirs, ours:
        for bias in missing:
            setattr(cell, bias, None)
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_an_infinite_gradient_stays_away_from_a_dead_unit():
    """Zero times infinity would be NaN, for its weights as well."""
    layer = fusedrnn.RNN(1, 9, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(-1)
    x = torch.ones(4, 2, 1, requires_grad=True)
    y, _ = layer(x)
    y[-1].backward(torch.full_like(y[-1], torch.inf))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(layer.weight_ih_l0.grad, torch.zeros(9, 1))


@pytest.mark.skipif(_dispatch.extension is None, reason="the reference's state is a view")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_state_can_be_detached_in_place(dtype):
    cell, x = fusedrnn.GRUCell(4, 7, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    assert cell(x).detach_().is_leaf
