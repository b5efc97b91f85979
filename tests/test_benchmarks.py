"""The benchmarks time what they say: well-formed cases, equal results, right arithmetic, readable reports."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compiled, gpu, report, roofline, shapes
from benchmarks.rivals import ONNX_GATES, OnnxRuntime, onnx_feeds, onnx_session, torch_outputs, torch_workload
from benchmarks.shapes import Case
from benchmarks.timing import (
    ALONE,
    FLOAT32,
    ONNXRUNTIME,
    OURS,
    OURS_DENSE,
    PREPACKED,
    TORCH,
    TORCH_DENSE,
    ResultsDifferError,
    check_equal,
    fused_module,
    measure,
)
from fusedrnn._bench import inference_call, interleaved_medians, random_state, tensors, training_call

MACHINE: dict[str, str | int | None] = {
    "cpu": "some CPU",
    "threads": 2,
    "torch": "2.13.0",
    "onnxruntime": None,
    "fusedrnn": "0.1.0",
    "commit": "abc1234",
    "date": "2026-11-23T12:00",
}
TINY = [
    Case("tiny", cell, 3, 7, 5, 6, layers=2, bidirectional=True, lengths=lengths)
    for cell in shapes.GATES
    for lengths in ("dense", "packed")
]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def row(case: Case, mode: shapes.Mode, **rivals: float) -> report.Row:
    """A result in which fusedrnn took one second."""
    return report.Row(case, mode, {OURS: 1.0, **rivals}, "cpu", "a reason", MACHINE)


def test_gpu_case_ids_are_unique() -> None:
    cases = shapes.distinct(case for cases in shapes.GPU_SETS.values() for case in cases)
    assert len({case.id for case in cases}) == len(cases)


def test_case_ids_are_unique() -> None:
    ids = [case.id for case in shapes.ALL]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("case", shapes.ALL, ids=lambda case: case.id)
def test_case_is_well_formed(case: Case) -> None:
    assert case.cell in shapes.GATES
    assert min(case.batch, case.seq, case.input, case.hidden, case.layers) >= 1
    assert isinstance(getattr(torch, case.dtype), torch.dtype)
    assert case.source
    lengths = case.sequence_lengths()
    assert len(lengths) == case.batch
    assert max(lengths) == case.seq
    assert min(lengths) >= max(1, case.seq // 10)


def test_sets() -> None:
    assert {case.id for case in shapes.QUICK} == set(shapes._QUICK_IDS)
    assert all(case.batch <= 16 for case in shapes.SMALL_BATCH)
    assert any(case.lengths == "packed" for case in shapes.ALL)


def test_flops_counts_every_product() -> None:
    case = Case("f", "LSTM", batch=2, seq=3, input=5, hidden=7, layers=2, bidirectional=True)
    first, second = 4 * 7 * (5 + 7), 4 * 7 * (14 + 7)
    assert case.flops("inference") == 2 * (2 * 3) * 2 * (first + second)
    assert case.flops("training") == 3 * case.flops("inference")
    first, second = 7 * (4 * (5 + 3) + 3), 7 * (4 * (6 + 3) + 3)
    assert replace(case, projection=3).flops("inference") == 2 * (2 * 3) * 2 * (first + second)


def test_interleaved_medians_alternates_the_order() -> None:
    seen: list[str] = []
    medians = interleaved_medians([lambda: seen.append("a"), lambda: seen.append("b")], seconds=0)
    assert len(medians) == 2
    assert all(median > 0 for median in medians)
    changes = "".join(name for name, before in zip(seen, ["", *seen], strict=False) if name != before)
    # The warm-up ab and the rounds ab ba ab ba ab; a name that follows itself shows once.
    assert changes == "ab" * 4


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_training_call_returns_every_gradient(case: Case) -> None:
    workload = torch_workload(case)
    wanted = [*tensors(workload.x), *tensors(workload.hx), *workload.module.parameters()]
    gradients = training_call(workload.module, workload.x, workload.hx)()
    assert [g.shape for g in gradients] == [w.shape for w in wanted]
    assert all(g.abs().sum() > 0 for g in gradients)


def test_measure_times_every_rival_of_a_packed_case() -> None:
    measured = measure(TINY[1], "training", with_torch=True, onnxruntime=None, seconds=0)
    assert set(measured.seconds) == {OURS, OURS_DENSE, TORCH, TORCH_DENSE}
    assert measured.implementation


def test_measure_times_onnxruntime_and_what_is_packed_before() -> None:
    class Rival(OnnxRuntime):
        def __init__(self) -> None:
            self.asked: list[str] = []

        def median_seconds(self, case: Case, seconds: float) -> float:  # noqa: ARG002
            self.asked.append(case.id)
            return 1.0

    for case, more in ((TINY[0], {PREPACKED}), (replace(TINY[0], seq=1), set())):
        rival = Rival()
        measured = measure(case, "inference", with_torch=False, onnxruntime=rival, seconds=0)
        assert set(measured.seconds) == {OURS, ALONE, ONNXRUNTIME} | more
        assert rival.asked == [case.id] * 2
        result = row(case, "inference", **measured.seconds)
        assert (result.speedup(report.ONNXRUNTIME_TOO) is not None) == bool(more)


def test_measure_times_float32_beside_bfloat16() -> None:
    case = replace(TINY[0], dtype="bfloat16")
    measured = measure(case, "inference", with_torch=True, onnxruntime=None, seconds=0)
    assert set(measured.seconds) == {OURS, TORCH, FLOAT32}


@pytest.mark.parametrize("cell", shapes.GATES)
def test_measure_times_a_cell(cell: shapes.Cell) -> None:
    case = Case("tiny", cell, 1, 1, 5, 6, step=True)
    assert case.id.endswith("-cell")
    assert set(measure(case, "inference", with_torch=True, onnxruntime=None, seconds=0).seconds) == {OURS, TORCH}


@pytest.mark.parametrize("mode", shapes.MODES)
@pytest.mark.parametrize("lengths", ["dense", "packed"])
def test_gpu_benchmark_times_every_rival(lengths: shapes.Lengths, mode: shapes.Mode) -> None:
    case = Case("here", "GRU", 2, 3, 4, 5, lengths=lengths)
    seconds, explanation = gpu.measure(case, mode, 0.01, False, torch.device("cpu"))
    dense = {gpu.OURS_DENSE, gpu.TORCH_DENSE} if lengths == "packed" else set()
    assert seconds.keys() == {gpu.OURS, gpu.TORCH} | dense
    assert explanation.implementation == "cpu"


def test_onnxruntime_is_compared_with_what_was_timed_as_it_was() -> None:
    result = row(TINY[0], "inference", **{ALONE: 0.5, PREPACKED: 0.25, ONNXRUNTIME: 2.0, TORCH: 3.0})
    assert result.speedup(ONNXRUNTIME) == 4.0
    assert result.speedup(report.ONNXRUNTIME_TOO) == 8.0
    assert result.speedup(TORCH) == 3.0


def test_limit_is_arithmetic_or_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "peak_flops", lambda _: 1e9)
    monkeypatch.setattr(roofline, "bandwidth", lambda _: 1e9)
    wide = Case("wide", "GRU", batch=64, seq=3, input=5, hidden=7)
    assert roofline.limit(wide, "training") == pytest.approx(wide.flops("training") / 1e9)
    lone = Case("lone", "GRU", batch=1, seq=10, input=1, hidden=7)
    assert roofline.limit(lone, "inference") == pytest.approx(10 * 3 * 7 * 7 * 4 / 1e9)
    assert roofline.limit(lone, "training") == pytest.approx(2 * 10 * 3 * 7 * 7 * 4 / 1e9)
    step = Case("step", "GRU", batch=1, seq=1, input=5, hidden=7)
    assert roofline.limit(step, "inference") == pytest.approx(3 * 7 * (5 + 7) * 4 / 1e9)


def test_rates_are_measured() -> None:
    pytest.importorskip("fusedrnn._C", exc_type=ImportError)
    assert roofline.peak_flops("float32") > 1e8
    assert roofline.peak_flops("bfloat16") > 1e8
    assert roofline.bandwidth(1 << 16) > 1e8


def test_check_equal_refuses_other_weights_and_nan() -> None:
    case = TINY[0]
    workload = torch_workload(case)
    module = fused_module(case, workload)
    expected = inference_call(workload.module, workload.x, workload.hx)()
    check_equal(expected, inference_call(module, workload.x, workload.hx)())
    with pytest.raises(ResultsDifferError):
        check_equal(expected, inference_call(module, workload.x, random_state(module, case.batch))())
    with pytest.raises(ResultsDifferError):
        check_equal(expected, [tensor * math.nan for tensor in expected])


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_onnx_model_equals_torch(case: Case) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    workload = torch_workload(case)
    session = onnx_session(case, workload, threads=1)
    outputs = session.run(None, onnx_feeds(case, workload))
    for actual, expected in zip(outputs, torch_outputs(workload), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_onnx_session_refuses_wrong_gate_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(ONNX_GATES, "LSTM", (0, 1, 2, 3))
    case = replace(TINY[0], cell="LSTM")
    with pytest.raises(AssertionError):
        onnx_session(case, torch_workload(case), threads=1)


def test_row_round_trips_through_a_line() -> None:
    original = row(TINY[1], "inference", **{TORCH: 3.0, ONNXRUNTIME: 0.5})
    assert report.Row.from_line(original.to_line()) == original
    assert "\n" not in original.to_line()


def test_summary_has_geometric_mean_and_worst_row() -> None:
    cases = [Case(name, "GRU", 1, 1, 1, 1) for name in ("first", "second", "other")]
    rows = [row(case, "training", **{TORCH: ratio}) for case, ratio in zip(cases, (0.5, 8.0, 9.0), strict=True)]
    (summary,) = report.summarise(rows, {"chosen": cases[:2]})
    assert summary.geometric_mean == pytest.approx(2.0)
    assert (summary.rows, summary.losses, summary.worst) == (2, 1, 0.5)
    assert summary.worst_id == cases[0].id


def test_newest_of_two_results_counts(tmp_path: Path) -> None:
    old = row(TINY[0], "training", **{TORCH: 2.0})
    new = replace(old, seconds={OURS: 1.0, TORCH: 4.0}, machine=MACHINE | {"date": "2026-11-24T12:00"})
    path = tmp_path / "results.jsonl"
    other = replace(old, machine=MACHINE | {"instruction_set": "another"})  # names of processors are those of several
    path.write_text(f"{new.to_line()}\n{old.to_line()}\n{other.to_line()}\n")
    assert sorted(report.read_rows([path]), key=lambda r: r.seconds[TORCH]) == [other, new]


def test_markdown_shows_losing_rows() -> None:
    case = shapes.MODELS[0]
    text = report.markdown([row(case, "inference", **{TORCH: 0.25})])
    assert f"| models | {case.cell} | inference | torch.nn | 1 | 1 | 0.25× | 0.25× {case.id} |" in text
    assert f"| {case.id} | 1000 | 250 | 0.25× |" in text


def test_overview_has_a_column_for_each_rival() -> None:
    case = shapes.MODELS[0]
    rows = [
        row(case, "training", **{TORCH: 0.25}),
        row(case, "inference", **{TORCH: 4.0, ONNXRUNTIME: 2.0, OURS_DENSE: 3.0}),
    ]
    lines = report.overview(rows).splitlines()
    columns = ("inference over torch.nn", "inference over onnxruntime", "training over torch.nn")
    assert lines[2] == f"| Sizes | Cell | {' | '.join(columns)} |"
    faster, level, slower = (
        f"**{n}×** (from {n}×; {losses} of 1 slower)" for n, losses in (("4.00", 0), ("2.00", 0), ("0.25", 1))
    )
    assert lines[4] == f"| grid | {case.cell} | {faster} | {level} | {slower} |"


def test_draw_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    rows = [row(case, "inference", **{TORCH: 0.5, ONNXRUNTIME: 2.0}) for case in TINY[:2]]
    rows += [row(case, "training", **{TORCH: 2.0}) for case in TINY[:2]]
    report.draw(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    report.draw_growth([row(case, "training", **{TORCH: 2.0}) for case in shapes.GROWTH], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_compiled_prints_a_line_for_each_size_and_mode(monkeypatch, capsys) -> None:
    monkeypatch.setattr(compiled, "SIZES", ((2, 1, 4),))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr("sys.argv", ["compiled", "--seconds-per-row", "0"])
    assert compiled.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [f"{cell}-T2-B1-H4", mode] for cell in ("LSTM", "GRU", "Linear") for mode in ("inference", "training")
    ]
