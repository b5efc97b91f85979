"""torch.ops.fusedrnn itself: what torch asks of an operator, and the arguments that no module passes."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import CELLS, Case, expected
from numerics import assert_all_as_good
from test_reference import Call, arguments, run_oracle, run_recurrence
from torch import Tensor

from fusedrnn import _autograd, _reference

pytest.importorskip("fusedrnn._C", exc_type=ImportError)

forward = torch.ops.fusedrnn.recurrence_forward.default
backward = torch.ops.fusedrnn.recurrence_backward.default
step = torch.ops.fusedrnn.step.default
OPERATORS = (forward, backward, step)

for_each_cell = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: Case(**kind).equations)
for_each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
for_each_number_of_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])


def forward_arguments(call: Call, save: bool = True) -> dict:
    return {"cell": call.case.equations, **arguments(call), "save": save}


def backward_arguments(call: Call, **changed) -> dict:
    """After a forward pass, with random gradients of its results and every gradient wanted."""
    given = {"cell": call.case.equations, **arguments(call), **changed}
    y, h_n, *rest = forward(**given, save=True)
    lstm = given["cx"] is not None
    inputs = [given["x"], given["hx"], *([given["cx"]] if lstm else []), *given["weights"]]
    gradients = {"dy": y, "dh_n": h_n, "dc_n": rest[0] if lstm else None}
    gradients = {name: None if t is None else torch.randn_like(t) for name, t in gradients.items()}
    return given | gradients | {"y": y, "saved": rest[lstm:], "wanted": [True] * len(inputs)}


def step_arguments(case: Case) -> dict:
    given = arguments(Call(case))
    first = {name: None if given[name] is None else given[name][0] for name in ("x", "hx", "cx")}
    return {"cell": case.equations, **first, "weights": given["weights"]}


# --- torch's own checks ---------------------------------------------------------------------------
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WITHOUT_GRADIENTS = (CHECKS[0], *CHECKS[2:])


def leaves(given: dict) -> dict:
    """Arguments that ask for the gradients of whatever may have one."""

    def leaf(value):
        if isinstance(value, list):
            return [leaf(v) for v in value]
        return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: leaf(value) for name, value in given.items()}


SMALL = {"T": 4, "B": 3, "I": 2, "H": 5}
FORMS = {
    "padded": Call,
    "packed": lambda case: Call(replace(case, lengths=(4, 2, 1))),
    "lengths": lambda case: Call(case, lengths=(1, 4, 3)),
    "resets": lambda case: Call(case, resets=True),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, from 2.14 on
@for_each_cell
@for_each_number_of_directions
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", ["forward", "forward and save", "backward"])
def test_opcheck(operator, form, bidirectional, kind):
    call = FORMS[form](Case(**kind, **SMALL, bidirectional=bidirectional))
    if operator == "backward":
        given, checks = backward_arguments(call), WITHOUT_GRADIENTS
        if form == "padded":  # the double backward of the others is the same, and its tracing takes seconds
            given, checks = leaves(given), CHECKS
        torch.library.opcheck(backward, (), given, test_utils=checks)
    else:
        save = "save" in operator
        # What is saved past a row's end is never written nor read, so no two runs agree on it.
        checks = CHECKS[:-1] if save and form == "lengths" else CHECKS
        torch.library.opcheck(forward, (), leaves(forward_arguments(call, save)), test_utils=checks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of fake views
@for_each_cell
def test_opcheck_of_step(kind):
    torch.library.opcheck(step, (), leaves(step_arguments(Case(**kind, **SMALL))), test_utils=CHECKS)


# --- lengths and resets ---------------------------------------------------------------------------
# The second shape is too short for weights to be packed; the others have a rest of rows and of units. The first has
# enough work for two threads.
SHAPES = ({"T": 7, "B": 13, "I": 5, "H": 33}, {"T": 3, "B": 2, "I": 4, "H": 17}, {"T": 9, "B": 5, "I": 17, "H": 7})


def calls(case: Case) -> dict[str, Call]:
    unsorted = tuple(5 * b % (case.T + 1) for b in range(case.B))  # begins with 0
    falling = tuple(sorted((max(1, length) for length in unsorted), reverse=True))
    return {
        "lengths": Call(case, lengths=unsorted),
        "no row": Call(case, lengths=(0,) * case.B),
        "resets": Call(case, resets=True),
        "lengths and resets": Call(case, lengths=unsorted, resets=True),
        "no row, resets": Call(case, lengths=(0,) * case.B, resets=True),
        "packed, resets": Call(replace(case, lengths=falling), resets=True),
    }


@cache
def composed(call: Call) -> dict[str, Tensor]:
    """The same layer of torch's elementary operators: torch.nn has neither lengths nor resets."""
    return run_recurrence(_reference.recurrence, call)


def check(call: Call) -> None:
    ours = run_recurrence(_autograd.recurrence, call)
    assert_all_as_good(ours, composed(call), run_oracle(call), call.case.torch_dtype)


@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"H{shape['H']}")
@for_each_cell
@for_each_number_of_directions
@for_each_dtype
@pytest.mark.usefixtures("isa")
def test_lengths_and_resets(dtype, bidirectional, kind, shape, name):
    check(calls(Case(**kind, **shape, bidirectional=bidirectional, dtype=dtype))[name])


@for_each_cell
@for_each_number_of_directions
@pytest.mark.usefixtures("isa")
def test_nothing_past_a_row_is_read(bidirectional, kind):
    """What pads a batch may be anything, as may the gradient of outputs that are zero whatever comes in."""
    case = Case(**kind, **SHAPES[0], bidirectional=bidirectional)
    given = backward_arguments(calls(case)["lengths"])
    past = torch.arange(case.T).unsqueeze(1) >= given["lengths"]
    outputs = forward(**forward_arguments(calls(case)["lengths"], save=False))
    given["wanted"] = [True, True] + [False] * (len(given["wanted"]) - 2)
    gradients = backward(**given)
    for name in ("x", "dy"):
        given[name] = given[name].masked_fill(past.unsqueeze(-1), float("nan"))
    again = forward(**forward_arguments(calls(case)["lengths"], save=False) | {"x": given["x"]})
    pairs = zip(outputs + gradients, again + backward(**given), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.usefixtures("isa")
def test_many_steps(cell):
    case = Case(cell, T=3000, B=2, I=3, H=5, bidirectional=True)
    assert_all_as_good(run_recurrence(_autograd.recurrence, Call(case)), *expected(case), case.torch_dtype)


# --- the same numbers by another way ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 33), (3, 4, 17), (13, 5, 31), (40, 16, 65)], ids=str)
@for_each_cell
@for_each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.usefixtures("isa")
def test_step_is_a_sequence_of_one(bias, dtype, kind, shape):
    case = Case(**kind, T=1, **dict(zip("BIH", shape, strict=True)), bias=bias, dtype=dtype)
    y, *states = forward(**forward_arguments(Call(case), save=False))
    stepped = step(**step_arguments(case))
    assert torch.equal(y, states[0])
    assert all(torch.equal(whole[0], one) for whole, one in zip(states, stepped, strict=True))


@for_each_cell
@for_each_number_of_directions
@pytest.mark.usefixtures("isa")
def test_save_changes_no_result(bidirectional, kind):
    call = calls(Case(**kind, **SHAPES[0], bidirectional=bidirectional))["lengths and resets"]
    plain, saving = (forward(**forward_arguments(call, save)) for save in (False, True))
    assert len(saving) - len(plain) == {"rnn": 0, "gru": 1, "lstm": 2}[call.case.cell]
    assert all(torch.equal(one, other) for one, other in zip(plain, saving, strict=False))


def with_gaps(value):
    """The same numbers, every second element of a larger tensor, so that no dimension is contiguous."""
    if isinstance(value, list):
        return [with_gaps(v) if isinstance(v, Tensor) else v for v in value]
    return torch.stack([value, torch.zeros_like(value)], -1)[..., 0] if isinstance(value, Tensor) else value


@for_each_cell
@pytest.mark.parametrize("form", FORMS)
def test_strides_change_no_result(form, kind):
    call = FORMS[form](Case(**kind, **SMALL, bidirectional=True))
    one_step = step_arguments(replace(call.case, bidirectional=False, lengths=None))
    for operator, given in zip(OPERATORS, (forward_arguments(call), backward_arguments(call), one_step), strict=True):
        dense, strided = operator(**given), operator(**{name: with_gaps(value) for name, value in given.items()})
        for one, other in zip(dense, strided, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # saved values past a row's end


@for_each_cell
@for_each_number_of_directions
@pytest.mark.parametrize("options", [{}, {"lengths": ()}, {"resets": True}], ids=str)
@pytest.mark.usefixtures("isa")
def test_empty_batch(options, bidirectional, kind):
    """Nothing goes in, so every gradient of a weight is a sum of nothing."""
    case = Case(**kind, T=4, B=0, I=2, H=5, bidirectional=bidirectional)
    results = run_recurrence(_autograd.recurrence, Call(case, **options))
    assert results["y"].shape == (4, 0, 5 * case.directions)
    for name, value in results.items():
        assert not value.any(), f"{name}: {value}"
    for state in step(**step_arguments(Case(**kind, B=0))):
        assert state.shape == (0, 7)


# --- misuse ------------------------------------------------------------------------------------------
zeros = torch.zeros
LSTM = Case(T=5, B=3, I=4, H=7)
SHAPE = r"of shape \[{}\], got \[{}\]".format
INPUT_DTYPE = "of dtype float(32, got float64|64, got float32)"


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [zeros(shape) for shape in shapes]


def packed(batch_sizes: list | int, **options) -> dict:
    return {"x": zeros(5, 4), "batch_sizes": torch.tensor(batch_sizes, **options)}


def lengths(*values: int) -> dict:
    return {"lengths": torch.tensor(values)}


# What is changed in a proper call, and what the message says; of sequences first, which two operators take.
SEQUENCE_MISTAKES = {
    "unknown cell": ({"cell": "peephole"}, "expected cell to be rnn_tanh, rnn_relu, lstm or gru, got peephole"),
    "x 2-D": ({"x": zeros(5, 4)}, r"expected x \[T, B, I\], or \[N, I\] with batch_sizes, got \[5, 4\]"),
    "x 3-D, packed": (packed([3, 2]) | {"x": zeros(5, 3, 4)}, r"expected x .*with batch_sizes, got \[5, 3, 4\]"),
    "x of integers": ({"x": zeros(5, 3, 4, dtype=torch.int32)}, "expected (.*dtype|float32, float64 or bfloat16).*"),
    "x batch": ({"x": zeros(5, 2, 4)}, "expected x with a batch of 3, got 2"),
    "x size": ({"x": zeros(5, 3, 6)}, "expected w_ih " + SHAPE("28, 6", "28, 4")),
    "x dtype": ({"x": zeros(5, 3, 4).double()}, "expected hx " + INPUT_DTYPE),
    "hx 2-D": ({"hx": zeros(3, 7)}, r"expected .*hx.*directions, batch, hidden.*got \[3, 7\]"),
    "hx size": ({"hx": zeros(1, 3, 8)}, "expected cx " + SHAPE("1, 3, 8", "1, 3, 7")),
    "hx dtype": ({"hx": zeros(1, 3, 7).double()}, "expected hx " + INPUT_DTYPE),
    "cx missing": ({"cx": None}, "expected cx for lstm and for no other cell"),
    "cx too many": ({"cell": "gru"}, "expected cx for lstm and for no other cell"),
    "cx size": ({"cx": zeros(1, 3, 8)}, "expected cx " + SHAPE("1, 3, 7", "1, 3, 8")),
    "no weights": ({"weights": []}, "expected 2 weights .4 with bias.* for each of 1 directions, got 0"),
    "six weights": ({"weights": weights((28, 4), (28, 7), *[(28,)] * 4)}, "expected 2 weights .*, got 6"),
    "w_hr size": ({"weights": weights((28, 4), (28, 7), (28,))}, "expected w_hr " + SHAPE("7, 7", "28")),
    "projection of a gru": (
        {"cell": "gru", "cx": None, "weights": weights((21, 4), (21, 7), (7, 7))},
        "expected a projection's weights for lstm and for no other cell",
    ),
    "wide projection": (
        {"hx": zeros(1, 3, 8), "weights": weights((28, 4), (28, 8), (8, 7))},
        "expected a projection of 7 units to at most as many, got 8",
    ),
    "projection to nothing": (
        {"hx": zeros(1, 3, 0), "weights": weights((28, 4), (28, 0), (0, 7))},
        "expected 2 weights .4 with bias. without a projection, got 3",
    ),
    "w_ih size": ({"weights": weights((28, 5), (28, 7))}, "expected w_ih " + SHAPE("28, 4", "28, 5")),
    "w_hh size": ({"weights": weights((28, 4), (21, 7))}, "expected w_hh " + SHAPE("28, 7", "21, 7")),
    "w_hh dtype": ({"weights": [zeros(28, 4), zeros(28, 7).double()]}, "expected w_hh " + INPUT_DTYPE),
    "b_hh size": ({"weights": weights((28, 4), (28, 7), (28,), (7,))}, "expected b_hh " + SHAPE("28", "7")),
    "batch_sizes rise": (packed([2, 3]), "expected batch_sizes to fall .*, got 3 at step 1"),
    "batch_sizes above B": (packed([5]), "expected .* at most 3 .*, got 5 at step 0"),
    "batch_sizes of 0": (packed([3, 2, 0]), "expected .* at least 1, got 0 at step 2"),
    "batch_sizes sum": (packed([3, 1]), "expected x of 4 rows, the sum .*, got 5"),
    "batch_sizes int32": (packed([3, 2], dtype=torch.int32), "expected batch_sizes .*int64.*"),
    "batch_sizes 2-D": (packed([[3], [2]]), r"expected batch_sizes .*got \[2, 1\]"),
    "batch_sizes 0-D": (packed(5), r"expected batch_sizes .*got \[\]"),
    "lengths too": (packed([3, 2]) | lengths(2, 2, 1), "expected lengths or batch_sizes, got both"),
    "length above T": (lengths(2, 6, 1), "expected lengths between 0 and 5, got 6"),
    "negative length": (lengths(2, -1, 1), "expected lengths between 0 and 5, got -1"),
    "number of lengths": (lengths(2, 1), "expected lengths " + SHAPE("3", "2")),
    "lengths of floats": ({"lengths": zeros(3)}, "expected lengths .*int64.*"),
    "resets transposed": ({"resets": zeros(3, 5, dtype=torch.bool)}, "expected resets " + SHAPE("5, 3", "3, 5")),
    "resets of floats": ({"resets": zeros(5, 3)}, "expected resets .*bool.*"),
}
BACKWARD_MISTAKES = {
    "y size": ({"y": zeros(5, 3, 8)}, "expected y " + SHAPE("5, 3, 7", "5, 3, 8")),
    "dy size": ({"dy": zeros(5, 3, 8)}, "expected dy " + SHAPE("5, 3, 7", "5, 3, 8")),
    "dh_n size": ({"dh_n": zeros(3, 7)}, "expected dh_n " + SHAPE("1, 3, 7", "3, 7")),
    "dc_n dtype": ({"dc_n": zeros(1, 3, 7).double()}, "expected dc_n " + INPUT_DTYPE),
    "dcells size": ({"dcells": zeros(1, 15, 8)}, "expected dcells " + SHAPE("1, 15, 7", "1, 15, 8")),
    "nothing saved": ({"saved": []}, "expected 2 saved tensors, got 0"),
    "gates size": ({"saved": weights((1, 15, 21), (1, 15, 7))}, "expected gates " + SHAPE("1, 15, 28", "1, 15, 21")),
    "cells size": ({"saved": weights((1, 15, 28), (1, 15, 8))}, "expected cells " + SHAPE("1, 15, 7", "1, 15, 8")),
    "too little wanted": ({"wanted": [True]}, "expected wanted to hold 7 values, got 1"),
}
STEP_MISTAKES = {
    "x 3-D": ({"x": zeros(1, 3, 4)}, r"expected x \[B, I\] and hx \[B, H\], got \[1, 3, 4\] and \[3, 7\]"),
    "hx batch": ({"hx": zeros(2, 7)}, r"expected x \[B, I\] and hx \[B, H\], got \[3, 4\] and \[2, 7\]"),
    **{name: SEQUENCE_MISTAKES[name] for name in ("unknown cell", "cx missing", "cx too many", "no weights")},
    "cx size": ({"cx": zeros(3, 8)}, "expected cx " + SHAPE("3, 7", "3, 8")),
    "a projection": (
        {"weights": weights((28, 4), (28, 7), (7, 7))},
        "expected 2 weights .4 with bias. without a projection, got 3",
    ),
}
MISTAKES = [
    pytest.param(operator, proper, *mistake, id=f"{name}: {about}")
    for name, operator, proper, mistakes in (
        ("forward", forward, lambda: forward_arguments(Call(LSTM)), SEQUENCE_MISTAKES),
        ("backward", backward, lambda: backward_arguments(Call(LSTM)), SEQUENCE_MISTAKES | BACKWARD_MISTAKES),
        ("step", step, lambda: step_arguments(LSTM), STEP_MISTAKES),
    )
    for about, mistake in mistakes.items()
]


@pytest.mark.parametrize(("operator", "proper", "changed", "says"), MISTAKES)
def test_misuse(operator, proper, changed, says):
    with pytest.raises(RuntimeError) as error:
        operator(**proper() | changed)
    assert re.fullmatch(f"fusedrnn: {says}", str(error.value)), str(error.value)


def test_messages_begin_with_the_message():
    """Where the check stands in whose copy of the source is of no use to who made the mistake."""
    with pytest.raises(RuntimeError, match=r"^fusedrnn: expected"):
        step(**step_arguments(LSTM) | {"cell": "peephole"})


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_a_packed_batch_without_a_step(cell):
    """The states come back as they are, and so do their gradients."""
    gates, states = {"lstm": 4, "gru": 3}.get(cell, 1), 2 if cell == "lstm" else 1
    hx = [torch.randn(1, 3, 20, requires_grad=True) for _ in range(states)]
    weights = [torch.randn(gates * 20, size, requires_grad=True) for size in (5, 20)]
    cx = hx[1] if states == 2 else None
    none = torch.empty(0, dtype=torch.int64)
    y, *given = _autograd.recurrence(cell, torch.empty(0, 5), hx[0], cx, weights, none)
    given = [state for state in given if state is not None]
    assert y.shape == (0, 20)
    assert all(torch.equal(mine, state) for mine, state in zip(given, hx, strict=True))
    found = torch.autograd.grad(sum(state.sum() for state in given), [*hx, *weights])
    assert all(torch.equal(g, torch.ones_like(g)) for g in found[:states])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found[states:])
