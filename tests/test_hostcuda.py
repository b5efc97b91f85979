"""The GPU schedules, executed on the host (tests/hostcuda): every kernel against the oracle, every access watched."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import hostcuda
import pytest
import torch
from cases import CELLS, FEATURE, LOW_PRECISION, Case, expected, for_all_cells, leaf, make_data, run_module, sizes
from hostcuda import Schedules
from numerics import assert_all_as_good, assert_long_memory, assert_scenario
from test_reference import Call, arguments, run_oracle, run_recurrence
from test_states import scenario_of

import fusedrnn
from fusedrnn import _autograd, _direct, _dispatch, _ops, _reference

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(not (hostcuda.ROOT / "csrc").is_dir(), reason="needs the sources")

DTYPES = ("float32", "float64", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    monkeypatch.setattr(_ops, "recurrence_forward", hostcuda.forward)
    monkeypatch.setattr(_ops, "recurrence_backward", hostcuda.backward)
    monkeypatch.setattr(_direct, "kernels", None)


# Without an input of 50: σ near 1 leaves 1-σ a few bits, and whose rounding of σ is the luckier one is chance.
OPTIONS = [case for case in FEATURE + LOW_PRECISION if case.magnitude != 50]


@cache
def wanted(call: Call) -> tuple[dict, dict]:
    return run_recurrence(_reference.recurrence, call), run_oracle(call)


def check(call: Call) -> None:
    assert_all_as_good(run_recurrence(_autograd.recurrence, call), *wanted(call), call.case.torch_dtype)


@pytest.mark.parametrize("schedules", [Schedules.STEP, Schedules.ALL], ids=["step", "best"])
@pytest.mark.parametrize("case", [case for case in OPTIONS if not case.proj], ids=str)
def test_modules(monkeypatch, case, schedules):
    """Whole modules: layers, directions, layouts, packed input, half precision that is not converted on the way."""
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "cuda")
    ours = run_module(case.module(fusedrnn), case, make_data(case))
    assert_all_as_good(ours, *expected(case), case.torch_dtype)


@pytest.mark.parametrize("multiprocessors", [0, 100], ids=["step", "best"])
@pytest.mark.parametrize("form", ["stack", "both directions, lengths", "resets"])
def test_cell_states(monkeypatch, form, multiprocessors):
    """Gradients that come in through the cell states themselves."""
    monkeypatch.setattr(hostcuda, "multiprocessors", multiprocessors)
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "cuda")
    assert_scenario(scenario_of("LSTM", form), fusedrnn)


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_long_memory(monkeypatch, name, dtype, schedules):
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "cuda")
    assert_long_memory(fusedrnn, name, dtype, 8, 60)


# Odd and even sizes, and multiples of what a thread takes at once (4 units, 2 of float64); more units than a block has
# threads, more rows than it has.
SIZES = sizes((5, 3, 4, 7), (4, 2, 3, 16), (1, 1, 1, 1), (3, 37, 2, 4), (2, 1, 5, 130), (2, 3, 8, 520), (6, 5, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, dtype):
    check(Call(replace(case, dtype=dtype)))


SHAPES = ({"T": 7, "B": 5, "I": 3, "H": 9}, {"T": 4, "B": 3, "I": 2, "H": 8})


def calls(case: Case) -> dict[str, Call]:
    unsorted = tuple(5 * b % (case.T + 1) for b in range(case.B))  # begins with 0
    falling = (case.T, *sorted((max(1, length) for length in unsorted), reverse=True)[1:])
    return {
        "padded": Call(case),
        "packed": Call(replace(case, lengths=falling)),
        "lengths": Call(case, lengths=unsorted),
        "no row": Call(case, lengths=(0,) * case.B),
        "resets": Call(case, resets=True),
        "lengths and resets": Call(case, lengths=unsorted, resets=True),
        "packed, resets": Call(replace(case, lengths=falling), resets=True),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"H{shape['H']}")
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: Case(**kind).equations)
def test_rows(kind, shape, name, bidirectional, dtype):
    check(calls(Case(**kind, **shape, bidirectional=bidirectional, dtype=dtype))[name])


@pytest.mark.parametrize(
    "case", for_all_cells({"bias": False, "bidirectional": True}, {"bias": False}, {"B": 0}), ids=str
)
def test_options(case):
    check(Call(case))


@pytest.mark.parametrize("chunk_bytes", [1, 2000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [None, (7, 7, 4, 2, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "case",
    for_all_cells({"T": 7, "B": 5, "I": 3, "H": 8}, {"T": 7, "B": 5, "I": 3, "H": 9, "bidirectional": True}),
    ids=str,
)
def test_chunks(monkeypatch, case, lengths, dtype, chunk_bytes):
    """Chunks of one step, and of a few."""
    monkeypatch.setattr(hostcuda, "chunk_bytes", chunk_bytes)
    check(Call(replace(case, lengths=lengths, dtype=dtype)))


# Odd and even sizes; rows that fill blocks and that do not; steps enough to make blocks worth it.
BLOCK_SHAPES = ({"T": 9, "B": 5, "I": 3, "H": 9}, {"T": 8, "B": 4, "I": 2, "H": 8}, {"T": 8, "B": 9, "I": 2, "H": 6})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", ["padded", "lengths and resets", "packed, resets"])
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=lambda shape: f"H{shape['H']}")
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: Case(**kind).equations)
def test_blocks(monkeypatch, kind, shape, name, rows, bidirectional, dtype):
    case = Case(**kind, **shape, bidirectional=bidirectional, dtype=dtype)
    monkeypatch.setattr(hostcuda, "schedules", Schedules.BLOCK)
    monkeypatch.setattr(hostcuda, "multiprocessors", -(-case.B // rows) * case.directions)
    monkeypatch.setattr(hostcuda, "chunk_bytes", 2000 if rows > 1 else 32 << 20)
    check(calls(case)[name])
    assert hostcuda.schedule_of(case) == "block"


def test_geometry():
    """A thread takes 16 bytes at most; all rows and units have one, a row's in one block if it has room; no row or
    column of blocks or threads is idle."""
    assert all(hostcuda.library().vector_width(size) * size == 16 for size in (4, 8))
    sizes = product((1, 2, 7, 64, 1000), (1, 3, 4, 31, 130, 520), (1, 2, 4), (1, 2))
    for rows, units, width, directions in sizes:
        grid_x, grid_y, grid_z, x, y = hostcuda.library().geometry(rows, units, width, directions)
        assert (grid_z, x * y) == (directions, 128)
        assert (grid_x - 1) * y < rows <= grid_x * y
        assert (grid_y - 1) * x * width < units <= grid_y * x * width
        assert x // 2 * width < units
        assert x == 128 or x * width >= units


def test_chunks_are_as_long_as_there_is_room_for():
    """And never shorter than a step."""
    ends, begins = zip(
        *(hostcuda.library().chunks_at(10, 3, 5, capacity) for capacity in (1, 3, 5, 6, 100)), strict=True
    )
    assert ends == (6, 6, 6, 7, 10)
    assert begins == (4, 4, 4, 3, 0)


def test_block_plans():
    """As few rows a block as multiprocessors allow; a thread for every product and every unit, and no warp more."""
    assert hostcuda.library().block_plan(132, 64, 90, 1, 4, True, 2) == [1, 192, 4 * 92 * 94 * 2 + 10 * 92 * 4]
    assert hostcuda.library().block_plan(132, 300, 10, 1, 3, False, 4) == [4, 64, 3 * 12 * 13 * 4 + 4 * 7 * 12 * 4]
    kinds, sizes = product((1, 3, 4), (2, 4)), ((1, 5, 132, 200, 264, 265, 400, 528, 529), (1, 8, 17, 33, 90), (1, 2))
    for (gates, scalar), B, H, directions in product(kinds, *sizes):
        rows, threads, _ = hostcuda.library().block_plan(132, B, H, directions, gates, gates == 4, scalar)
        fewest = [r for r in (1, 2, 4) if -(-B // r) * directions <= 132]
        assert rows == (fewest[0] if fewest else 0), (B, H, directions)
        if rows:
            products, states = -(-H // 4) * 4 * gates * scalar // 4, -(-rows * H // max(1, rows // 2))
            assert threads == -(-max(products, states) // 32) * 32, (rows, H, gates, scalar)
    for B, H in ((0, 8), (1, 10_000)):
        assert hostcuda.library().block_plan(132, B, H, 1, 4, True, 2)[0] == 0


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
@pytest.mark.parametrize("case", for_all_cells({"T": 8, "B": 3, "H": 8}), ids=str)
def test_gradients_that_nobody_gives_are_zero(monkeypatch, case, schedules):
    """Of an output that no loss has seen."""
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    given = arguments(Call(case))
    given |= {name: leaf(given[name]) for name in ("x", "hx", "cx") if given[name] is not None}
    outputs = [t for t in _autograd.recurrence(case.equations, **given) if t is not None]
    wanted = [given["x"], given["hx"], *([] if given["cx"] is None else [given["cx"]])]
    for output in outputs:
        cotangents = [torch.ones_like(t) * (t is output) for t in outputs]
        alone = torch.autograd.grad(output, wanted, torch.ones_like(output), retain_graph=True)
        assert all(map(torch.equal, alone, torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)))


class OnADevice(torch.Tensor):
    """Numbers at which nobody may look, for all that one can tell."""

    is_cpu = False


BEYOND, WITHIN = (-3, 15, 9, 2**40, -(2**40), 4), (0, 9, 9, 9, 0, 4)


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
@pytest.mark.parametrize("case", for_all_cells({"T": 9, "B": 6, "H": 8, "bidirectional": True}), ids=str)
def test_lengths_on_a_device_are_clamped(monkeypatch, case, schedules):
    """By a module, and by the kernels where they are given others than a module's."""
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    beyond, within = (run_recurrence(_autograd.recurrence, Call(case, lengths=rows)) for rows in (BEYOND, WITHIN))
    assert all(torch.equal(beyond[name], within[name]) for name in within)

    seen = []
    recurrence = _autograd.recurrence
    monkeypatch.setattr(_dispatch, "choose", lambda *_: "cuda")
    monkeypatch.setattr(_autograd, "recurrence", lambda *given: (seen.append(given[-2]), recurrence(*given))[1])
    y, _ = case.module(fusedrnn)(make_data(case).x, lengths=torch.tensor(BEYOND).as_subclass(OnADevice))
    assert torch.equal(seen[0], torch.tensor(WITHIN))
    assert not y[9:].any()
    assert not y[:, 0].any()


def test_offsets_of_many_steps(monkeypatch):
    """More than one kernel's arguments hold."""
    monkeypatch.setattr(hostcuda, "schedules", Schedules.BLOCK)
    check(Call(Case("gru", T=1100, B=2, H=4, I=1, lengths=(1100, 600))))


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", for_all_cells({"T": 8, "H": 8, "bidirectional": True}), ids=str)
def test_arrays_at_any_address(monkeypatch, case, dtype, schedules):
    monkeypatch.setattr(hostcuda, "shifted", True)
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    check(Call(replace(case, dtype=dtype)))


@pytest.mark.parametrize("schedules", Schedules, ids=lambda schedules: schedules.name.lower())
def test_order_of_threads_makes_no_difference(monkeypatch, schedules):
    monkeypatch.setattr(hostcuda, "schedules", schedules)
    call = Call(Case(T=8, B=3, H=12, bidirectional=True), resets=True)
    first = run_recurrence(_autograd.recurrence, call)
    for seed in range(1, 5):
        monkeypatch.setattr(hostcuda, "seed", seed)
        again = run_recurrence(_autograd.recurrence, call)
        assert all(torch.equal(first[name], again[name]) for name in first)


# What is broken, where and how, and the words in which that shows. A test that cannot fail is none.
MASK = "if (at.b >= here.rows || at.j >= p.H) return;"
HIDDEN = "if (!s.kernel_) hidden = s.room_.template take<A>(s.D_ * s.B_ * gates);"
FIRST = "step.hx = as<S>(p.hx), step.cx = as<S>(p.cx);"
BEGIN = "this->begin_gradients(p, room.gradients);"
PLANTED = {
    "rows unmasked": ("elementwise.cuh", MASK, "if (at.j >= p.H) return;", "out of bounds"),
    "units unmasked": (
        "elementwise.cuh",
        MASK,
        "if (at.b >= here.rows) return;",
        "reads what another writes|two threads write|read out of bounds",
    ),
    "no first state": ("recurrence.cuh", FIRST, FIRST.replace("(p.hx)", "(p.h_n)"), "nobody has written: h_n"),
    "wide at any address": ("layer.cuh", "if (H_ % widest) return false;", "", "misaligned|read out of bounds"),
    "host in device memory": ("recurrence.cuh", BEGIN, f"{BEGIN} room.dh[0] = 0;", "host code"),
    "array too small": ("recurrence.cuh", HIDDEN, HIDDEN.replace("s.D_ * ", ""), "write out of bounds: workspace"),
    "result not written": ("biases.cuh", "if (to.b_ih && k >= Cell::input_sum)", "if (false)", "db_ih0"),
    "gates confused": (
        "units.cuh",
        "hidden[Cell::hidden_gate(k)]",
        "hidden[k]",
        "^y .* above the bound",
    ),
    "state crosses a reset": ("units.cuh", "if (v.reset) v.h = v.c = {};", "", "^dx .* above the bound"),
    "gradient crosses a reset": ("units.cuh", "if (v.reset) dh = dc = {};", "", "^dx .* above the bound"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_found(tmp_path, monkeypatch, name):
    file, old, new, words = PLANTED[name]
    lines = (hostcuda.ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if old in line]
    broken = hostcuda.library(hostcuda.changed(tmp_path, file, number, lines[number].replace(old, new)))
    monkeypatch.setattr(hostcuda, "library", lambda: broken)
    with pytest.raises(AssertionError, match=words):
        check(Call(Case("gru", T=3, B=3, H=6, bidirectional=True, dtype="bfloat16"), resets=True))
