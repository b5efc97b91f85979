"""The specification in plain PyTorch: against the oracle, differentiated twice, and as the fallback of every module.

`Call`, `run_recurrence` and `run_oracle` serve any function with the reference's arguments; test_operators.py runs the
kernels through them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import FEATURE, LOW_PRECISION, REGULAR, Case, expected, for_all_cells, leaf, make_data, run_module
from numerics import Scene, assert_all_as_good, assert_scenario, to_numpy
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import _dispatch, _reference

# ---------------------------------------------------------------------------------------------
# One call of a recurrence: what a Case says of one layer, and which rows are there at which steps.


@dataclass(frozen=True)
class Call:
    """`case.lengths` is a packed sequence's; `lengths` is the argument of that name, for a padded one."""

    case: Case
    lengths: tuple[int, ...] | None = None
    resets: bool = False

    def __str__(self) -> str:
        parts = [str(self.case)]
        parts += ["rows" + "_".join(map(str, self.lengths))] if self.lengths is not None else []
        return "-".join(parts + ["resets"] * self.resets)

    def reset_mask(self) -> np.ndarray:
        """Some steps of every row, and all of one row's."""
        mask = np.random.default_rng(5).random((self.case.T, self.case.B)) < 0.3
        mask[:, self.case.B // 2 :][:, :1] = True
        return mask if self.resets else np.zeros_like(mask)


def arguments(call: Call, x: Tensor | None = None) -> dict:
    """What a recurrence takes after the cell's name; with `x` in place of the drawn one, [T, B, I]."""
    case, data = call.case, make_data(call.case)
    x = data.x if x is None else x
    resets = torch.from_numpy(call.reset_mask()) if call.resets else None
    packed = {"batch_sizes": None}
    if case.lengths is not None:
        x, packed["batch_sizes"], *_ = pack_padded_sequence(x, torch.tensor(case.lengths))
        if resets is not None:
            resets = pack_padded_sequence(resets.unsqueeze(-1), torch.tensor(case.lengths)).data.squeeze(-1)
    return {
        "x": x,
        "hx": data.h0,
        "cx": data.c0 if case.cell == "lstm" else None,
        "weights": [w.detach() for w in case.module(torch.nn).parameters()],
        **packed,
        "lengths": None if call.lengths is None else torch.tensor(call.lengths, dtype=torch.int64),
        "resets": resets,
    }


def run_recurrence(recurrence: Callable, call: Call) -> dict[str, Tensor]:
    """Forward and backward; y, h_n, c_n and the gradients dx, dh0, dc0 and d<weight>, padded."""
    case, data = call.case, make_data(call.case)
    x = leaf(data.x)
    given = arguments(call, x)
    states = {"h0": leaf(given["hx"])} | ({} if given["cx"] is None else {"c0": leaf(given["cx"])})
    weights = {name: leaf(w) for name, w in case.module(torch.nn).named_parameters()}
    given |= {"hx": states["h0"], "cx": states.get("c0"), "weights": list(weights.values())}
    y, h_n, c_n = recurrence(case.equations, **given)
    if case.lengths is not None:
        y, _ = pad_packed_sequence(PackedSequence(y, given["batch_sizes"]), total_length=case.T)
    outputs = {"y": y, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})
    cotangents = {"y": data.dy, "h_n": data.dh_n, "c_n": data.dc_n}
    torch.autograd.backward(list(outputs.values()), [cotangents[name] for name in outputs])
    gradients = {f"d{name}": tensor.grad for name, tensor in ({"x": x} | states | weights).items()}
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


@cache
def run_oracle(call: Call) -> dict[str, np.ndarray]:
    """What `run_recurrence` should give."""
    case, data = call.case, make_data(call.case)
    result = oracle.run(
        case.equations,
        {name: to_numpy(w) for name, w in case.module(torch.nn).named_parameters()},
        *map(to_numpy, (data.x, data.h0, data.c0)),
        bidirectional=case.bidirectional,
        lengths=call.lengths if case.lengths is None else case.lengths,
        reset=call.reset_mask(),
    )
    lstm = case.cell == "lstm"
    gradients = result.backward(*map(to_numpy, (data.dy, data.dh_n, data.dc_n if lstm else data.dc_n * 0)))
    outputs = {"y": result.y, "h_n": result.h_n} | ({"c_n": result.c_n} if lstm else {})
    return outputs | {f"d{name}": value for name, value in gradients.items() if lstm or name != "c0"}


# Rows in any order, some of them absent; and a packed batch, whose rows fall.
UNSORTED = {"T": 5, "B": 7}
ROWS = (
    Call(Case(**UNSORTED)),
    Call(Case(**UNSORTED), resets=True),
    Call(Case(**UNSORTED), lengths=(2, 0, 5, 1, 3, 0, 4)),
    Call(Case(**UNSORTED), lengths=(2, 0, 5, 1, 3, 0, 4), resets=True),
    Call(Case(**UNSORTED), lengths=(0,) * 7, resets=True),
    Call(Case(**UNSORTED, lengths=(5, 5, 4, 2, 2, 1, 1))),
    Call(Case(**UNSORTED, lengths=(5, 5, 4, 2, 2, 1, 1)), resets=True),
)


def for_all_rows(case: Case) -> list[Call]:
    """`case` with each of ROWS, which give T and B."""
    kept = ("T", "B", "lengths")
    return [replace(call, case=replace(case, **{k: getattr(call.case, k) for k in kept})) for call in ROWS]


LAYERS = [
    replace(case, bidirectional=bidirectional, bias=bias, dtype="float64")
    for case in (*for_all_cells({}), Case(proj=3))
    for bidirectional in (False, True)
    for bias in (True, False)
]


@pytest.mark.parametrize("call", [call for case in LAYERS for call in for_all_rows(case)], ids=str)
def test_reference_is_the_oracle(call):
    """torch.nn has neither lengths nor resets: its error is taken from the same layer without them."""
    plain = Call(replace(call.case, lengths=None))
    theirs, truth = expected(plain.case)
    wanted = run_oracle(call)
    with_torch_error = {
        name: torch.from_numpy(value + to_numpy(theirs[name]) - truth[name]) for name, value in wanted.items()
    }
    ours = run_recurrence(_reference.recurrence, call)
    assert_all_as_good(ours, with_torch_error, wanted, torch.float64)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])  # relu's second derivative is no function
def test_reference_is_differentiable_twice(cell, bidirectional):
    case = Case(cell=cell.split("_")[0], T=2, B=2, I=1, H=2, bidirectional=bidirectional, dtype="float64")
    given = arguments(Call(case, lengths=(1, 2), resets=False))
    resets = torch.tensor([[False, False], [False, True]])
    tensors = [leaf(t) for t in (given["x"], given["hx"], given["cx"], *given["weights"]) if t is not None]
    states = 1 if given["cx"] is None else 2

    def layer(x, hx, *rest):
        cx, weights = (None, rest) if states == 1 else (rest[0], rest[1:])
        y, h_n, c_n = _reference.recurrence(cell, x, hx, cx, weights, lengths=given["lengths"], resets=resets)
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


# ---------------------------------------------------------------------------------------------
# As the fallback. `without_extension` is what an installation without a compiler sees.

WHY = "the extension is taken away for this test"
MODULES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def forget_choices() -> None:
    _dispatch._warned.clear()


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(_dispatch, "extension", None)
    monkeypatch.setattr(_dispatch, "why_no_extension", WHY)
    # No kernel may run behind the back of the choice.
    monkeypatch.setattr("fusedrnn._autograd.recurrence", None)
    monkeypatch.setattr("fusedrnn._ops.step", None, raising=False)
    forget_choices()
    yield
    forget_choices()


def run_once(name: str) -> None:
    x = torch.zeros(3, 4) if name.endswith("Cell") else torch.zeros(5, 3, 4)
    getattr(fusedrnn, name)(4, 7)(x)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("without_extension")
def test_fallback_is_said_once_and_points_to_the_call(name):
    with pytest.warns(fusedrnn.FallbackWarning, match=WHY) as seen:
        run_once(name)
    assert len(seen) == 1
    assert seen[0].filename == __file__, f"the warning points to {seen[0].filename}, not to the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_once(name)
        for other in MODULES:  # the reason is the same, so nobody repeats it
            run_once(other)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("without_extension")
def test_explain_says_why_without_a_warning(name):
    x = torch.zeros(3, 4) if name.endswith("Cell") else torch.zeros(5, 3, 4)
    explanation = fusedrnn.explain(getattr(fusedrnn, name)(4, 7), x)
    assert explanation == fusedrnn.Explanation("reference", WHY)
    assert str(explanation) == f"reference: {WHY}"


@pytest.mark.parametrize("case", REGULAR[::3] + FEATURE + LOW_PRECISION, ids=str)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.usefixtures("without_extension")
def test_layers_on_the_fallback(case):
    module = case.module(fusedrnn)
    found = fusedrnn.explain(module, make_data(case).x).implementation
    assert found == ("torch" if case.proj else "reference")
    assert_all_as_good(run_module(module, case, make_data(case)), *expected(case), case.torch_dtype)


@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "nobias"])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.usefixtures("without_extension")
def test_cells_on_the_fallback(name, options):
    def scenario(scene: Scene) -> dict[str, Tensor]:
        module, x = scene.module(name, 4, 7, **options), scene.randn(3, 4, requires_grad=True)
        state = [scene.randn(3, 7, requires_grad=True) for _ in range(2 if name == "LSTMCell" else 1)]
        given = tuple(state) if len(state) == 2 else state[0]
        results = module(x, module(x, given))
        outputs = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(outputs, [scene.randn(3, 7) for _ in outputs])
        leaves = {"x": x, **{f"state {i}": s for i, s in enumerate(state)}, **dict(module.named_parameters())}
        named = {f"output {i}": output for i, output in enumerate(outputs)}
        return named | {f"d{key}": tensor.grad for key, tensor in leaves.items()}

    assert_scenario(scenario, fusedrnn)


def test_package_works_where_the_extension_cannot_be_imported():
    """An import of a name that sys.modules holds as None fails as that of a missing file does."""
    script = """
import sys, warnings
sys.modules["fusedrnn._C"] = None
import torch, fusedrnn
from fusedrnn.__main__ import main
module, x = fusedrnn.LSTM(4, 7), torch.zeros(5, 3, 4)
assert fusedrnn.explain(module, x).implementation == "reference", fusedrnn.explain(module, x)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    module(x)[0].sum().backward()
    module(x)
assert [w.category for w in seen] == [fusedrnn.FallbackWarning], seen
assert "is not built or cannot be loaded" in str(seen[0].message), seen[0].message
theirs = fusedrnn.revert(module)(x)[0]
torch.testing.assert_close(fusedrnn.convert(module)(x)[0], theirs)
sys.exit(main(["info"]))
"""
    paths = (str(Path(fusedrnn.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "extension:" in done.stdout, done.stdout
    assert "not available" in done.stdout, done.stdout
