"""Fixtures that every test file shares."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Known and announced once per process; any other fallback is an error in these tests.
    # torch.nn says this of its own projected LSTM, once per process.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is filled with NaN, so that reading what nobody wrote is seen.

    In deterministic mode torch fills whatever torch.empty returns; operators written in C++ get the
    same memory, because their allocations go through the dispatcher too."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets how many threads torch has, for the length of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def layer() -> torch.nn.Module:
    """An LSTM of 5 inputs and 9 units."""
    return importlib.import_module("fusedrnn").LSTM(5, 9)


@pytest.fixture
def x() -> torch.Tensor:
    """Its input: 7 steps of 3 rows."""
    return torch.randn(7, 3, 5)


@pytest.fixture
def packs(monkeypatch) -> list[object]:
    """Grows with everything that fusedrnn.prepack packs."""
    from fusedrnn import _prepack

    made: list[object] = []
    pack = _prepack._pack
    monkeypatch.setattr(_prepack, "_pack", lambda *arguments: made.append(pack(*arguments)) or made[-1])
    return made


def instruction_sets() -> list:
    if importlib.util.find_spec("fusedrnn._C") is None:
        skip = pytest.mark.skip(reason="fusedrnn is installed without its C++ extension")
        return [pytest.param("none", marks=skip)]
    return list(importlib.import_module("fusedrnn._C").instruction_sets())


@pytest.fixture(params=instruction_sets())
def isa(request):
    """Each instruction set that this processor has, chosen for the length of the test."""
    extension = importlib.import_module("fusedrnn._C")
    extension.use(request.param)
    yield request.param
    extension.use("")
