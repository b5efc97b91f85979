"""The cluster and grid schedules, executed on the host: blocks that run at the same time and hand each other data."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

import hostcuda
import pytest
import torch
from cases import Case, for_all_cells, make_data
from hostcuda import Schedules
from numerics import assert_all_as_good
from test_hostcuda import calls, check, on_the_host, wanted  # noqa: F401
from test_reference import Call, run_recurrence

from fusedrnn import _autograd, _dispatch

pytest.importorskip("pybind11")
pytestmark = pytest.mark.skipif(not (hostcuda.ROOT / "csrc").is_dir(), reason="needs the sources")


class Team(IntEnum):
    """As csrc/cuda/tuning.h numbers them."""

    CLUSTER = 0
    SPLIT_GRID = 1
    GRID = 2


SCHEDULES = pytest.mark.parametrize("schedule", [Schedules.CLUSTER, Schedules.GRID], ids=["cluster", "grid"])


@pytest.fixture
def small(monkeypatch):
    """A GPU of so few multiprocessors that teams are small and have several tiles of the batch."""
    monkeypatch.setattr(hostcuda, "multiprocessors", 4)


def expect(schedule: Schedules, case: Case, tf32: bool = False) -> None:
    assert hostcuda.schedule_of(case, tf32) == schedule.name.lower()


# The last block has few units or all, of a number that words and groups divide or do not; tiles are full or not.
SHAPES = (
    {"T": 8, "B": 9, "I": 3, "H": 40, "bidirectional": True},
    {"T": 9, "B": 5, "I": 2, "H": 9},
    {"T": 8, "B": 16, "I": 1, "H": 30},
)


# Not relu in low precision: what is rounded to the other side of zero has another derivative.
CASES = [
    replace(case, dtype=dtype)
    for case in for_all_cells(*SHAPES)
    for dtype in ("float32", "bfloat16", "float16")
    if dtype == "float32" or case.nonlinearity != "relu"
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["padded", "lengths and resets", "packed, resets"])
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype != "float16"], ids=str)
@SCHEDULES
def test_rows(monkeypatch, schedule, case, name):
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    monkeypatch.setattr(hostcuda, "chunk_bytes", 5000 if case.dtype == "bfloat16" else 32 << 20)
    check(calls(case)[name])
    expect(schedule, case)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float16"], ids=str)
@SCHEDULES
def test_float16(monkeypatch, schedule, case):
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    check(Call(case))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float16"], ids=str)
@SCHEDULES
def test_tf32(monkeypatch, schedule, case):
    """As accurate as float16, whose mantissa TF32 has; and not more so, or nothing was rounded."""
    case = replace(case, dtype="float32")
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    monkeypatch.setattr(_dispatch, "use_tf32", lambda x: x.dtype == torch.float32)
    call = Call(case)
    expect(schedule, case, tf32=True)
    ours = run_recurrence(_autograd.recurrence, call)
    assert_all_as_good(ours, *wanted(call), torch.float16)
    with pytest.raises(AssertionError, match="above the bound"):
        assert_all_as_good(ours, *wanted(call), torch.float32)


def test_slots_that_are_left_over(monkeypatch):
    """Of 10 row tiles in 16 slots, 6 have two, each of more groups than registers. The last block has no units."""
    monkeypatch.setattr(hostcuda, "schedules", Schedules.CLUSTER)
    monkeypatch.setattr(hostcuda, "largest_cluster", 8)
    monkeypatch.setattr(hostcuda, "multiprocessors", 8)
    case = Case("lstm", T=8, B=1, I=1, H=280)
    made = hostcuda.library().resident_plan(8, Team.CLUSTER, 1, 280, 1, 4, False, True, 4, 8)
    assert (made["blocks"], made["units"], made["halved_tiles"], made["half_groups"]) == (8, 40, 6, 10)
    data, weights = make_data(case), list(case.module(torch.nn).parameters())
    results = hostcuda.forward("lstm", data.x, data.h0, data.c0, weights, None, None, None, False, True)
    of_forward = ("y", "h_n", "c_n")
    references = ({name: of[name] for name in of_forward} for of in wanted(Call(case)))
    assert_all_as_good(dict(zip(of_forward, results, strict=True)), *references, torch.float16)


# Teams with one tile and all weights in registers, forward and backward or one of them: row tiles that fill the slots
# or not, one or two to a slot, an odd number in one part; some groups of weights or all, of the last part fewer; blocks
# without units.
LARGE = Case("lstm", T=8, B=5, H=272, dtype="bfloat16")
BOTH, FORWARD, BACKWARD = (False, True), (False,), (True,)
COMPACT = [
    (Schedules.CLUSTER, LARGE, BOTH),
    (Schedules.CLUSTER, Case("lstm", T=9, B=7, H=24, bidirectional=True, dtype="float16"), BOTH),
    (Schedules.CLUSTER, Case("gru", T=8, B=6, H=50, dtype="bfloat16"), BOTH),
    (Schedules.CLUSTER, Case("gru", T=8, B=2, H=96, dtype="bfloat16"), FORWARD),
    (Schedules.CLUSTER, Case("rnn", T=8, B=4, H=72, dtype="bfloat16"), BOTH),
    (Schedules.GRID, LARGE, BOTH),
    (Schedules.GRID, Case("lstm", T=8, B=7, H=64, bidirectional=True, dtype="float16"), BOTH),
    (Schedules.GRID, Case("gru", T=9, B=6, H=64, dtype="bfloat16"), BOTH),
    (Schedules.GRID, Case("rnn", T=8, B=4, H=72, dtype="bfloat16"), BOTH),
    (Schedules.SPLIT_GRID, LARGE, BACKWARD),
    (Schedules.SPLIT_GRID, Case("gru", T=8, B=3, H=100, dtype="float16"), BACKWARD),
    (Schedules.SPLIT_GRID, Case("rnn", T=9, B=6, H=64, dtype="bfloat16"), BACKWARD),
]


@pytest.mark.parametrize(("schedule", "case", "passes"), COMPACT, ids=str)
def test_compact_teams(monkeypatch, schedule, case, passes):
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    monkeypatch.setattr(hostcuda, "multiprocessors", 16)
    monkeypatch.setattr(hostcuda, "largest_cluster", 2 if case.H == 96 else 16)
    for backward in (False, True):
        sizes = (case.B, case.H, case.directions, hostcuda.GATES[case.equations], backward, case.cell == "lstm", 2)
        made = hostcuda.library().resident_plan(16, Team[schedule.name], *sizes, hostcuda.largest_cluster)
        assert made.get("compact", False) == (backward in passes)
    for seed in range(1 if case is LARGE else 3):
        monkeypatch.setattr(hostcuda, "seed", seed)
        check(Call(case, resets=True))


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
@pytest.mark.parametrize(
    "schedule", [Schedules.CLUSTER, Schedules.GRID, Schedules.SPLIT_GRID], ids=lambda s: s.name.lower()
)
def test_weights_beyond_the_registers(monkeypatch, schedule, tf32):
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    monkeypatch.setattr(hostcuda, "largest_cluster", 4)
    monkeypatch.setattr(hostcuda, "multiprocessors", 4)
    monkeypatch.setattr(_dispatch, "use_tf32", lambda x: tf32 and x.dtype == torch.float32)
    case = Case("lstm", T=8, B=3, I=2, H=160)
    for backward in (False, True):
        made = hostcuda.library().resident_plan(4, Team[schedule.name], 3, 160, 1, 4, backward, True, 4, 4)
        assert made["slot_groups"] > 8 if made else (schedule == Schedules.SPLIT_GRID and not backward)
    call = Call(case)
    dtype = torch.float16 if tf32 else torch.float32
    assert_all_as_good(run_recurrence(_autograd.recurrence, call), *wanted(call), dtype)


@pytest.mark.usefixtures("small")
@SCHEDULES
def test_order_of_blocks_makes_no_difference(monkeypatch, schedule):
    monkeypatch.setattr(hostcuda, "schedules", schedule)
    call = Call(Case("lstm", T=8, B=9, H=40, bidirectional=True, dtype="bfloat16"), resets=True)
    first = run_recurrence(_autograd.recurrence, call)
    for seed in range(1, 9):
        monkeypatch.setattr(hostcuda, "seed", seed)
        again = run_recurrence(_autograd.recurrence, call)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.usefixtures("small")
def test_a_gpu_without_clusters(monkeypatch):
    monkeypatch.setattr(hostcuda, "schedules", Schedules.ALL - Schedules.BLOCK)
    monkeypatch.setattr(hostcuda, "largest_cluster", 0)
    case = Case("gru", T=8, B=9, H=40, dtype="bfloat16")
    shape = (case.T, case.B, case.I, case.H, case.directions)
    for backward in (False, True):
        assert hostcuda.schedule("gru", torch.bfloat16, shape, False, backward) == "grid"
    check(Call(case, resets=True))


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
@pytest.mark.parametrize("directions", [1, 2])
def test_split_products(monkeypatch, directions, tf32):
    """Backward in a grid, each four blocks of which share the inner dimension as a cluster."""
    monkeypatch.setattr(hostcuda, "schedules", Schedules.SPLIT_GRID)
    monkeypatch.setattr(hostcuda, "multiprocessors", 8)
    monkeypatch.setattr(_dispatch, "use_tf32", lambda x: tf32 and x.dtype == torch.float32)
    case = Case("lstm", T=8, B=19, I=2, H=27, bidirectional=directions == 2)
    made = hostcuda.library().resident_plan(8, int(Team.SPLIT_GRID), 19, 27, directions, 4, True, True, 4)
    assert (made["split"], made["teams"] * directions) == (4, 2)
    call = Call(case, resets=True)
    dtype = torch.float16 if tf32 else torch.float32
    for seed in range(3):
        monkeypatch.setattr(hostcuda, "seed", seed)
        assert_all_as_good(run_recurrence(_autograd.recurrence, call), *wanted(call), dtype)


@pytest.mark.parametrize(
    ("allowed", "room", "schedule"),
    [
        ("GRID", 0, "step"),
        ("GRID", 2, "step"),
        ("GRID", 4, "grid"),
        ("CLUSTER", 0, "step"),
        ("CLUSTER", 16, "cluster"),
        ("CLUSTER", 8, "cluster"),
        ("CLUSTER", 1, "step"),
    ],
)
def test_device_says_how_many_blocks_there_is_room_for(monkeypatch, allowed, room, schedule):
    monkeypatch.setattr(hostcuda, "schedules", Schedules[allowed])
    monkeypatch.setattr(hostcuda, "active_blocks", room)
    assert hostcuda.schedule("lstm", torch.float32, (100, 3, 8, 240, 1)) == schedule


def plan(team: Team, B: int, H: int, gates: int = 4, scalar: int = 2, backward: bool = False, directions: int = 1):
    return hostcuda.library().resident_plan(132, int(team), B, H, directions, gates, backward, gates == 4, scalar)


@pytest.mark.parametrize(
    ("schedule", "cell", "dtype", "B", "H", "directions"),
    [
        ("block", "lstm", torch.bfloat16, 64, 90, 1),
        ("cluster", "lstm", torch.bfloat16, 64, 96, 1),  # more weights than a step should read from shared memory
        ("block", "lstm", torch.float32, 64, 64, 1),
        ("cluster", "lstm", torch.float32, 64, 65, 1),
        ("block", "gru", torch.bfloat16, 1, 104, 1),
        ("cluster", "gru", torch.bfloat16, 1, 105, 1),
        ("step", "gru", torch.bfloat16, 0, 104, 1),
        ("cluster", "lstm", torch.bfloat16, 32, 512, 1),
        ("cluster", "gru", torch.float16, 16, 512, 1),
        ("cluster", "lstm", torch.bfloat16, 32, 512, 2),
        ("grid", "gru", torch.float16, 16, 768, 1),
        ("grid", "lstm", torch.bfloat16, 64, 1024, 1),
        ("grid", "lstm", torch.bfloat16, 32, 2048, 1),
        ("grid", "gru", torch.bfloat16, 32, 2048, 1),
        ("grid", "lstm", torch.float32, 16, 1024, 1),
        ("step", "lstm", torch.bfloat16, 64, 3072, 1),  # 75 MB of weights
        ("step", "lstm", torch.bfloat16, 64, 2048, 1),  # 8 tiles, which take longer than launches do
        ("step", "lstm", torch.bfloat16, 1024, 512, 1),  # 16 tiles for each of 8 clusters: cuBLAS is as fast
        ("step", "lstm", torch.float64, 16, 512, 1),
    ],
)
def test_schedule_on_an_h100(monkeypatch, schedule, cell, dtype, B, H, directions):
    monkeypatch.setattr(hostcuda, "schedules", Schedules.ALL)
    assert hostcuda.schedule(cell, dtype, (100, B, 8, H, directions)) == schedule
    assert hostcuda.schedule(cell, dtype, (7, B, 8, H, directions)) == "step"  # few steps


@pytest.mark.parametrize(
    ("forward", "backward", "cell", "B", "H"),
    [("cluster", "grid", "lstm", 128, 512), ("cluster", "cluster", "lstm", 32, 512), ("grid", "grid", "gru", 32, 2048)],
)
def test_backward_may_need_another_schedule(monkeypatch, forward, backward, cell, B, H):
    monkeypatch.setattr(hostcuda, "schedules", Schedules.ALL)
    call = (cell, torch.bfloat16, (100, B, 8, H, 1), False)
    assert [hostcuda.schedule(*call, is_backward) for is_backward in (False, True)] == [forward, backward]


def test_plans():
    # 128 KB of weights a block, all of it in registers, and a tile of 4 rows for each of 8 clusters.
    cluster = plan(Team.CLUSTER, B=32, H=512)
    assert (cluster["blocks"], cluster["units"], cluster["rows"], cluster["tiles"]) == (16, 32, 4, 1)
    assert cluster["part_groups"] == 8
    # Backward a block has what its own gates make of all 512 units: 32 row tiles of 4 groups, two to a slot.
    shares = plan(Team.CLUSTER, B=32, H=512, backward=True)
    assert (shares["blocks"], shares["split"], shares["part_groups"], shares["slot_groups"]) == (16, 16, 4, 8)
    # A step's code knows these, but neither more tiles nor more weights than registers hold.
    assert cluster["compact"]
    assert shares["compact"]
    assert not plan(Team.CLUSTER, B=128, H=512)["compact"]
    assert not plan(Team.CLUSTER, B=32, H=640)["compact"]
    assert not plan(Team.CLUSTER, B=32, H=320, gates=3, scalar=4, backward=True)["compact"]
    # Slots that 9 and 11 row tiles leave over hold weights too.
    assert [plan(Team.CLUSTER, B=64, H=H, gates=3)["halved_tiles"] for H in (768, 896)] == [7, 5]
    # Four teams of 32 blocks, half of whose weights are in shared memory, not two of 64: a tile costs more than that.
    grid = plan(Team.GRID, B=64, H=1024)
    assert (grid["blocks"], grid["teams"], grid["rows"] * grid["tiles"], grid["part_groups"]) == (32, 4, 16, 16)
    # Backward too, each four of them as a cluster.
    assert not plan(Team.SPLIT_GRID, B=64, H=1024)
    split = plan(Team.SPLIT_GRID, B=64, H=1024, backward=True)
    assert (split["blocks"], split["teams"], split["split"], split["part_groups"]) == (32, 4, 4, 16)
    # With 8 tiles of 2048 units a step takes longer than the launches of the step schedule.
    assert not plan(Team.SPLIT_GRID, B=64, H=2048, backward=True)
    assert plan(Team.GRID, B=32, H=2048)["tiles"] == 4
    # What comes in, sums, states of two kinds; then shares, barriers and weights beyond the registers.
    assert cluster["shared_bytes"] == 2 * 17 * 4 * 64 + 2 * 2 * 8 * 132 * 4 + 2 * 4 * 32 * 4 + 2 * 8
    assert shares["shared_bytes"] == 2 * 5 * 4 * 64 + 2 * 4 * 32 * 4 + 2 * 16 * 32 * 6 * 4 + 2 * 8
    states, in_shared = 2 * 2 * 8 * 32 * 4, 16 * 8 * 1024
    assert grid["shared_bytes"] == 33 * 8 * 64 + 2 * 2 * 8 * 132 * 4 + states + in_shared
    operands, of_shares = 33 * 8 * 64, 2 * 4 * 8 * 32 * 4
    assert split["shared_bytes"] == operands + 2 * 2 * 8 * 132 * 4 + states + of_shares + 2 * 8 + in_shared
    # 8 clusters at once; where a team's 3 tiles of the batch do not fit, three teams take turns.
    turns = plan(Team.CLUSTER, B=96, H=896, gates=3)
    assert (turns["blocks"], turns["rows"], turns["tiles"], turns["teams"]) == (16, 4, 1, 24)
    for sizes in [(b, h, g, s, back, d) for b in (1, 7, 64, 200) for h in range(16, 2100, 61) for g in (1, 3, 4)
                  for s in (2, 4) for back in (False, True) for d in (1, 2)]:  # fmt: skip
        for team in Team:
            p = plan(team, *sizes)
            if not p:
                continue
            B, H, _, _, _, directions = sizes
            without = p["blocks"] // 2 if team == Team.CLUSTER else p["split"]
            fewer = 0 if team == Team.CLUSTER and p["blocks"] == 2 else p["blocks"] - without
            assert fewer * p["units"] < H <= p["blocks"] * p["units"], sizes
            assert (p["teams"] - 1) * p["rows"] * p["tiles"] < B <= p["teams"] * p["rows"] * p["tiles"], sizes
            assert p["rows"] <= 8, sizes
            assert p["shared_bytes"] <= 227 << 10, sizes
            assert p["blocks"] % p["split"] == 0
            if team != Team.CLUSTER:
                assert p["blocks"] * p["teams"] * directions <= 132, sizes


# What is broken, in which schedule, where and how, and the words in which that shows. A test that cannot fail is none.
RACE = "one thread (reads|writes) what another|two threads write"
EARLY = "more arrivals at a barrier|nobody has written|never comes"
BYTES = "gates * plan.rows * layout.gate_words * 4)"
OF_SHARES = "((plan.rows + 1) / 2) * 8)"
ARMED = "expect_bytes(barrier(tile, round), bytes);  // of"
WAITED = "while (!phase_is_over("
COUNTED = "while (static_cast<int32_t>("
ODD = " + (round & 1)"
BUFFER = "+ tile) * 2 + (round & 1);"
PLACE = "operands + (tile * 2 + (round & 1)) * operand_words"
SHARES = "own_share + (tile * 2 + (round & 1)) * kept_parts.buffer"
EXISTS = "has_unit(in_tile && unit < H)"
TO = "destination_of(to, unit - to * plan.units, layout)"
ZERO = "zero(counters_, counter_bytes_, stream);"
PLANTED = {
    "nobody waits for bytes": (1, "exchange.cuh", WAITED, WAITED.replace("(", "(false && ", 1), f"{RACE}|{EARLY}"),
    "wrong phase": (1, "exchange.cuh", "(round - 1) >> 1 & 1", "round >> 1 & 1", f"{RACE}|never comes"),
    "too few bytes expected": (1, "exchange.cuh", BYTES, BYTES.replace("4", "2"), f"{RACE}|never comes"),
    "too few bytes of shares": (1, "exchange.cuh", OF_SHARES, OF_SHARES.replace("8", "4"), f"{RACE}|{EARLY}"),
    "no barriers yet": (
        1,
        "exchange.cuh",
        "    wait_for_cluster();",
        "    __syncthreads();",
        "nobody has set|while another thread sets",
    ),
    "bytes not expected": (1, "exchange.cuh", ARMED, ";  //", "never comes"),
    "one buffer": (1, "exchange.cuh", PLACE, PLACE.replace(ODD, ""), f"{RACE}|above the bound"),
    "one place for shares": (1, "team.cuh", SHARES, SHARES.replace(ODD, ""), f"{RACE}|{EARLY}"),
    "shares beside their place": (1, "team.cuh", TO, TO.replace(" - to * plan.units", ""), "in no block"),
    "another group": (
        1,
        "product.cuh",
        "place_of_group(slots[0], i)",
        "place_of_group(slots[0], 0)",
        "above the bound",
    ),
    "nobody counts": (2, "exchange.cuh", COUNTED, COUNTED.replace("(", "(false && ", 1), RACE),
    "one buffer in the L2": (2, "exchange.cuh", BUFFER, BUFFER.replace(ODD, ""), RACE),
    "counters not reset": (2, "chunk_kernel.cuh", ZERO, "", "nobody has set"),
    "units beyond the layer": (2, "team.cuh", EXISTS, EXISTS.replace(" && unit < H", ""), f"out of bounds|{RACE}"),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_found(tmp_path, monkeypatch, name):
    schedule, file, old, new, words = PLANTED[name]
    lines = (hostcuda.ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if old in line)
    broken = hostcuda.library(hostcuda.changed(tmp_path, file, number, lines[number].replace(old, new)))
    monkeypatch.setattr(hostcuda, "library", lambda: broken)
    monkeypatch.setattr(hostcuda, "schedules", (Schedules.CLUSTER, Schedules.GRID)[schedule - 1])

    def check_in_some_orders() -> None:
        for rows in (17, 3):  # two tiles; one, and a compact team
            for seed in range(4):
                monkeypatch.setattr(hostcuda, "seed", seed)
                check(Call(Case("gru", T=8, B=rows, H=26, dtype="bfloat16")))

    with pytest.raises(AssertionError, match=words):
        check_in_some_orders()
