"""What a call on a GPU consists of, executed on the host: launches, lone steps, biases, rows without a step."""

from __future__ import annotations

from dataclasses import replace

import hostcuda
import pytest
import torch
from cases import CELLS, Case
from hostcuda import Schedules
from test_hostcuda import DTYPES, check, on_the_host  # noqa: F401
from test_reference import Call, arguments

from fusedrnn import _autograd, _recompute

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(not (hostcuda.ROOT / "csrc").is_dir(), reason="needs the sources")
KINDS = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: Case(**kind).equations)
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])


@pytest.mark.parametrize("dtype", DTYPES)
@DIRECTIONS
@KINDS
def test_lone_step(kind, bidirectional, dtype):
    for B, I, H in (1, 40, 36), (3, 5, 9), (6, 132, 4), (16, 4, 12), (17, 4, 12):  # noqa: E741
        case = Case(**kind, T=1, B=B, I=I, H=H, bidirectional=bidirectional, dtype=dtype)
        assert hostcuda.schedule_of(case) == ("step" if B > 16 or dtype == "float64" else "lone")
        for call in Call(case), Call(replace(case, lengths=(1,) * B), resets=True):
            check(call)


@pytest.mark.parametrize(("B", "H", "expected"), [(4, 4096, "lone"), (5, 1448, "lone"), (5, 1449, "step")])
def test_a_lone_step_reads_large_weights_once(B, H, expected):
    """LSTM, bfloat16: 16 MB of W_hh."""
    assert hostcuda.schedule_of(Case("lstm", T=1, B=B, H=H, dtype="bfloat16")) == expected


@pytest.mark.parametrize("T", [1, 9])
@KINDS
def test_no_hidden_units(kind, T):
    """As torch's cells may have them: there is nothing to make but dx, a sum of nothing."""
    equations = Case(**kind).equations
    x, state = torch.randn(T, 2, 3, requires_grad=True), torch.zeros(1, 2, 0)
    weights = [torch.zeros(0, 3), torch.zeros(0, 0)]
    y, h_n, _ = _autograd.recurrence(equations, x, state, state if equations == "lstm" else None, weights)
    assert y.shape == (T, 2, 0)
    assert h_n.shape == state.shape
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("batch_sizes", "schedules"),
    [
        ([1], Schedules.ALL),
        ([2, 1, 1], Schedules.ALL),
        ([3], Schedules.ALL),
        *(([2] * 5 + [1] * 4, s) for s in Schedules),
    ],
    ids=str,
)
@KINDS
def test_rows_without_a_step(kind, batch_sizes, schedules, monkeypatch):
    """As the last part of a packed sequence has them: their state is kept, and so is its gradient."""
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    test_operators = pytest.importorskip("test_operators")
    call = Call(Case(**kind, T=len(batch_sizes), B=3, H=8))
    given = test_operators.backward_arguments(call)
    names = ("cell", "x", "hx", "cx", "weights", "batch_sizes", "lengths", "resets")
    given |= {"x": given["x"].flatten(0, 1)[: sum(batch_sizes)], "batch_sizes": torch.tensor(batch_sizes)}
    of_forward = {name: given[name] for name in names} | {"save": True}
    results = [test_operators.forward(**of_forward), hostcuda.forward(**of_forward, tf32=False)]
    states = 2 if given["cx"] is None else 3
    given |= {"y": results[0][0], "saved": results[0][states:]}
    given["dy"] = given["dy"].flatten(0, 1)[: sum(batch_sizes)]
    gradients = [test_operators.backward(**given), hostcuda.backward(**given, tf32=False)]
    for one, other in (results, gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_how_much_is_enqueued(monkeypatch):
    """A launch takes some µs, which is what a small layer's call consists of."""
    test_operators = pytest.importorskip("test_operators")

    def counted(kind, schedules, T, **more):
        monkeypatch.setattr(hostcuda, "schedules", schedules)
        call = Call(Case(**kind, T=T, B=2, H=32, dtype="bfloat16", **more))
        given = test_operators.backward_arguments(call) | {"tf32": False}
        states = 2 if given["cx"] is not None else 1
        given["wanted"] = [True, *[False] * states, *[True] * len(given["weights"])]
        names = ("cell", "x", "hx", "cx", "weights", "batch_sizes", "lengths", "resets", "tf32")
        before = hostcuda.library().enqueued()
        hostcuda.forward(**{name: given[name] for name in names}, save=True)
        between = hostcuda.library().enqueued()
        hostcuda.backward(**given)
        return between - before, hostcuda.library().enqueued() - between

    for kind in CELLS:
        # x·W_ih and the steps; the steps, dx, dW_ih, dW_hh, and the biases.
        hidden = 2 if kind["cell"] == "gru" else 1
        for schedules in (Schedules.BLOCK, Schedules.CLUSTER):
            assert counted(kind, schedules, T=8) == (2, 4 + hidden), (kind, schedules)
        # Two a step; backward none to go back to a state that is not asked for, but a GRU's W_hh in another order.
        for bidirectional in False, True:
            assert counted(kind, Schedules.STEP, T=1, bidirectional=bidirectional)[0] == 1, kind
        assert counted(kind, Schedules.STEP, T=3) == (7, 5 + 3 + hidden + 2 * (hidden - 1)), kind


@pytest.mark.parametrize("chunk_bytes", [1, 32 << 20])
@DIRECTIONS
def test_biases_of_many_rows(monkeypatch, bidirectional, chunk_bytes):
    """Several blocks share a column."""
    monkeypatch.setattr(hostcuda, "chunk_bytes", chunk_bytes)
    for cell, dtype in ("gru", "bfloat16"), ("lstm", "float32"):
        check(Call(Case(cell, T=2, B=2100, I=1, H=11, bidirectional=bidirectional, dtype=dtype)))


@KINDS
def test_each_gradient_alone(kind):
    test_operators = pytest.importorskip("test_operators")
    given = test_operators.backward_arguments(Call(Case(**kind, T=3, H=6, bidirectional=True))) | {"tf32": False}
    together = hostcuda.backward(**given)
    for i, gradient in enumerate(together):
        (alone,) = hostcuda.backward(**given | {"wanted": [k == i for k in range(len(together))]})
        assert torch.equal(alone, gradient)


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
@DIRECTIONS
@KINDS
def test_padding_may_be_nan(kind, bidirectional, schedules, monkeypatch):
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    for dtype, I, chunk_bytes in ("bfloat16", 8, 32 << 20), ("float32", 5, 500):  # noqa: E741
        monkeypatch.setattr(hostcuda, "chunk_bytes", chunk_bytes)
        case = Case(**kind, T=9, B=3, I=I, H=8, bidirectional=bidirectional, dtype=dtype)
        given = arguments(Call(case, lengths=(9, 2, 0)))
        past = torch.arange(9).unsqueeze(1) >= given["lengths"]
        weights = given["weights"] = [w.requires_grad_() for w in given["weights"]]
        gradients = []
        for padding in 0.0, float("nan"):
            x = given["x"].masked_fill(past.unsqueeze(-1), padding).requires_grad_()
            y, _, _ = _autograd.recurrence(case.equations, **given | {"x": x})
            gradients.append(torch.autograd.grad(y.sum(), [x, *weights]))
        assert all(torch.equal(clean, dirty) for clean, dirty in zip(*gradients, strict=True))


def test_recomputed_gradients_are_summed_in_float32(monkeypatch):
    """Of ones: in bfloat16, whose neighbours are 2 apart at 256, a sum of ones ends there."""
    monkeypatch.setattr(_recompute, "CHUNK", 1)
    x, hx = torch.ones(400, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    weights = [w.requires_grad_() for w in (torch.ones_like(x[0]), torch.zeros_like(x[0]))]
    y, *_ = _recompute.recurrence(_autograd.recurrence, "rnn_relu", x, hx, None, weights)
    y.sum().backward()
    assert weights[0].grad == 400
