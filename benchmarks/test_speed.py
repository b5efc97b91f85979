"""The cases under pytest-benchmark: ``pytest benchmarks/test_speed.py --benchmark-only``."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.rivals import torch_workload
from benchmarks.shapes import ALL, MODES, Case, Mode
from benchmarks.timing import OURS, PREPARE, TORCH, check_equal, fused_module


@pytest.mark.parametrize("implementation", [TORCH, OURS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
def test_speed(benchmark: BenchmarkFixture, case: Case, mode: Mode, implementation: str) -> None:
    workload = torch_workload(case)
    theirs = PREPARE[mode](workload.module, workload.x, workload.hx)
    ours = PREPARE[mode](fused_module(case, workload), workload.x, workload.hx)
    check_equal(theirs(), ours())
    benchmark.group = f"{case.id} {mode}"
    benchmark(ours if implementation == OURS else theirs)
