"""The plan for a size (csrc/cpu/tuning.h), as the extension and explain report it."""

from __future__ import annotations

import math

import pytest
import torch

import fusedrnn
from fusedrnn import _dispatch, _explain

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)

WITH_TILES = ("amx", "avx512_bf16")  # instruction sets that multiply bfloat16s


def plan(cell: str = "lstm", backward: bool = False, directions: int = 1, dtype: str = "float32", **sizes: int) -> dict:
    return extension.plan(cell, dtype, backward, sizes["T"], sizes["B"], sizes["I"], sizes["H"], directions)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("directions", [1, 2])
def test_no_plan_asks_for_more_threads_than_have_work(count, backward, directions, isa, threads):
    threads(count)
    panel = {"baseline": 4, "avx2": 8}.get(isa, 16)
    for B in (1, 2, 7, 12, 31, 32, 100, 5000):
        for H in (1, 16, 33, 48, 64, 256, 257, 1024):
            for T in (1, 2, 50):
                made = plan("gru", backward, directions, T=T, B=B, I=10, H=H)
                assert 1 <= made["teams"] * made["members"] <= count
                assert made["row_blocks"] <= max(1, B)
                assert made["row_blocks"] * directions >= made["teams"]
                panels = math.ceil(H / panel) * (directions if made["step"] else 1)
                assert backward or made["members"] <= panels


def test_one_thread_for_little_work(threads):
    threads(4)
    made = plan(T=10, B=1, I=8, H=8)
    assert made["teams"] * made["members"] == 1


def test_a_single_step_packs_nothing(threads):
    threads(2)
    for B in (1, 16, 100):
        made = plan(T=1, B=B, I=256, H=256)
        assert made["step"]
        assert not made["packed"]
    assert plan(T=1, B=1000, I=256, H=256)["packed"]


def test_a_few_steps_of_wide_layers_pack_nothing(threads):
    threads(2)
    for T, B, H in ((63, 1, 256), (63, 1, 1023), (8, 4, 512)):
        assert not plan(T=T, B=B, I=256, H=H)["packed"]
    for T, B, H in ((64, 1, 256), (63, 1, 128), (16, 1, 1024), (8, 5, 512), (9, 2, 512), (8, 4, 1024)):
        assert plan(T=T, B=B, I=256, H=H)["packed"]
    for T, B, H in ((15, 1, 64), (3, 5, 512)):
        assert not plan(backward=True, T=T, B=B, I=256, H=H)["packed"]
    for T, B, H in ((96, 1, 64), (12, 8, 512), (24, 1, 1024)):
        assert plan(backward=True, T=T, B=B, I=256, H=H)["packed"]
    assert not plan("gru", T=23, B=1, I=256, H=1024)["packed"]
    assert plan("gru", T=24, B=1, I=256, H=1024)["packed"]


def test_rows_are_shared_where_there_are_enough(threads):
    threads(2)
    assert plan(T=20, B=256, I=64, H=128)["row_blocks"] == 2
    assert plan(T=20, B=4096, I=64, H=128)["row_blocks"] == 16
    assert plan(T=20, B=8, I=64, H=128)["row_blocks"] == 2
    assert plan(T=15, B=8, I=64, H=128)["row_blocks"] == 1  # 60 rows of the sequence for each of two teams
    assert plan(T=20, B=4096, I=64, H=1024)["row_blocks"] == 1
    assert plan(T=128, B=8, I=64, H=128)["row_blocks"] == 2
    assert plan(T=128, B=4, I=64, H=128)["row_blocks"] == 1
    threads(64)  # whose own weights would be 128 MiB: they share one copy, from 384 rows each on
    assert plan(T=95, B=256, I=256, H=256)["row_blocks"] == 32
    assert plan(T=96, B=256, I=256, H=256)["row_blocks"] == 64


def test_more_than_two_threads_share_rows_and_units(threads):
    """(teams, members) of LSTMs of 18 to 257 units, in panels of 16."""

    def split(**sizes: int) -> tuple[int, int]:
        made = plan(**sizes)
        return made["teams"], made["members"]

    extension.use("avx512") if "avx512" in extension.instruction_sets() else pytest.skip("needs panels of 16 units")
    try:
        threads(4)
        assert split(T=15, B=16, I=64, H=128) == (2, 2)
        assert split(T=16, B=16, I=64, H=128) == (4, 1)
        threads(16)
        assert split(T=100, B=16, I=1, H=18) == (8, 1)  # two rows each
        assert split(T=100, B=16, I=1, H=18, backward=True) == (8, 2)  # the other joins in for the weights' gradients
        assert split(T=100, B=1, I=128, H=128) == (1, 8)
        assert split(T=100, B=32, I=128, H=128) == (8, 2)
        reason = fusedrnn.explain(fusedrnn.LSTM(128, 128), torch.zeros(100, 32, 128)).reason
        assert "16 threads share the rows and the units" in reason
        assert split(T=100, B=32, I=256, H=257) == (1, 9)  # two panels each, as sixteen would have at most
    finally:
        extension.use("")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tiles_where_bfloat16_weights_are_packed(isa, backward):
    sizes = {"T": 50, "B": 1, "I": 8, "H": 32}
    assert plan(backward=backward, dtype="bfloat16", **sizes)["tiled"] == (isa in WITH_TILES)
    for other in ({"dtype": "float32"}, {"H": 31}, {"T": 1}):
        assert not plan(backward=backward, **{"dtype": "bfloat16", **sizes, **other})["tiled"]


def test_explain_names_tiles(isa):
    reason = fusedrnn.explain(fusedrnn.LSTM(8, 32).bfloat16(), torch.zeros(50, 8, dtype=torch.bfloat16)).reason
    assert (f"{isa}, weights packed into tiles" in reason) == (isa in WITH_TILES)


@pytest.mark.usefixtures("isa")
def test_explain_knows_what_autocast_leaves():
    """A GRU's state stays float32, which no processor multiplies in pairs: 32 rows of a step are packed then."""
    layer, x = fusedrnn.GRU(64, 64).bfloat16(), torch.zeros(1, 32, 64)
    in_place = extension.plan("gru", "bfloat16", False, 1, 32, 64, 64, 1, narrow=False)["step"]
    with torch.autocast("cpu", torch.bfloat16):
        assert ("in place" in fusedrnn.explain(layer, x).reason) == in_place


@pytest.mark.parametrize(
    ("module", "x", "words"),
    [
        (fusedrnn.LSTM(256, 256), torch.zeros(1, 1, 256), ("in place", "2 threads share the units")),
        (fusedrnn.LSTM(256, 256), torch.zeros(70, 1, 256), ("packed", "2 threads share the units")),
        (fusedrnn.LSTM(64, 64, batch_first=True), torch.zeros(200, 50, 64), ("packed", "2 threads share the rows")),
        (
            fusedrnn.GRU(64, 256, bidirectional=True),
            torch.zeros(70, 1, 64),
            ("packed", "2 threads share the directions"),
        ),
        (fusedrnn.RNN(8, 8), torch.zeros(50, 8), ("packed", "1 thread")),
        (fusedrnn.GRUCell(8, 8), torch.zeros(8), ("in place", "1 thread")),
    ],
    ids=["step", "few rows", "many rows", "directions", "little work", "cell"],
)
def test_explain_names_the_path(module, x, words, threads):
    threads(2)
    reason = fusedrnn.explain(module, x).reason
    assert extension.instruction_set() in reason
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    ("schedules", "words"),
    [
        (("cluster", "grid"), ("cluster schedule", "; backward by the grid schedule")),
        (("grid", "step"), ("grid schedule", "; backward by the step schedule")),
        (("step", "step"), ("step schedule", "large layer)")),
        (("lone", "step"), ("one kernel for the lone step", "; backward by the step schedule")),
    ],
)
def test_explain_names_a_gpus_schedules(monkeypatch, schedules, words):
    class Extension:
        def schedule(self, *call: object) -> str:
            assert call[:-1] == ("lstm", "float32", 50, 4, 768, 1, True, 0, False)
            return schedules[call[-1]]

    monkeypatch.setattr(_dispatch, "cuda_extension", Extension())
    monkeypatch.setattr(_dispatch, "index_of", lambda _: 0)
    monkeypatch.setattr(_dispatch, "use_tf32", lambda _: False)
    said = _explain._cuda_path(
        fusedrnn.LSTM(3, 768, device="meta"), torch.zeros(50, 4, 3), torch.float32, torch.ones(4, dtype=torch.int64)
    )
    assert said.startswith(words[0])
    assert said.endswith(words[1])
