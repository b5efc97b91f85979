"""How threads share out a call: rows of the batch among teams, hidden units among the members of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, make_data
from test_equality import check
from test_operators import calls
from test_operators import check as check_call
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.usefixtures("isa")
def test_rows_with_one_copy_of_the_weights(bidirectional, threads):
    """A copy for each thread would be more than most_copies of csrc/cpu/tuning.h."""
    case = Case("lstm", T=8, B=8, I=65_600, H=40, bidirectional=bidirectional)
    threads(2 * case.directions)
    assert "share the rows" in fusedrnn.explain(case.module(fusedrnn), make_data(case).x).reason
    check(case)


# Fewer rows than gathered_rows of csrc/cpu/tuning.h for each of two threads, or of the two that each direction has.
GATHERED = (
    Case("lstm", T=20, B=5, I=18, H=20),
    Case("gru", T=70, B=11, I=33, H=70),
    Case("gru", T=21, B=7, I=35, H=40, bidirectional=True),
    Case("lstm", T=30, B=9, I=5, H=33, bidirectional=True, lengths=(9, 30, 4, 30, 2, 1, 1, 12, 3)),
)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_rows_gathered_from_several_steps(case, dtype, isa, threads):
    case = replace(case, dtype=dtype)
    threads(2 * case.directions)
    reason = fusedrnn.explain(case.module(fusedrnn), make_data(case).x).reason
    assert "share the rows" in reason or (isa == "amx" and dtype == "bfloat16")  # whose tiles want 16 rows
    check(case)


# Sixteen threads make teams of several members of them, forward and backward.
TEAMS = (
    Case("lstm", T=40, B=9, I=5, H=70),
    Case("gru", T=20, B=40, I=33, H=130),
    Case("rnn", T=20, B=12, I=5, H=150),
    Case("gru", T=40, B=8, I=5, H=100, layers=2, bidirectional=True),
    Case("lstm", T=30, B=13, I=5, H=130, lengths=(30, 4, 30, 28, 30, 30, 9, 30, 25, 1, 30, 30, 12)),
    Case("lstm", T=20, B=12, I=5, H=130, proj=40),
)


def batch_sizes(case: Case) -> list[int]:
    return [sum(length > t for length in case.lengths) for t in range(case.T)] if case.lengths else []


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", TEAMS, ids=str)
def test_rows_and_units(case, dtype, isa, threads):
    threads(16)
    cell = "rnn_tanh" if case.cell == "rnn" else case.cell
    sizes = (case.T, case.B, case.I, case.H, case.directions)
    for backward in (False, True):
        plan = extension.plan(cell, dtype, backward, *sizes, projection=case.proj, batch_sizes=batch_sizes(case))
        of_16 = isa == "amx" and dtype == "bfloat16" and not backward  # rows that a team wants
        assert plan["members"] > 1
        assert plan["row_blocks"] > 1 or (of_16 and case.B < 32)
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize(
    "case",
    [Case("lstm", T=40, B=21, I=5, H=70), Case("gru", T=30, B=24, I=5, H=100, bidirectional=True), TEAMS[-1]],
    ids=str,
)
@pytest.mark.usefixtures("isa")
def test_lengths_and_resets(case, name, threads):
    threads(16)
    check_call(calls(case)[name])


def test_explain_knows_the_rows_of_a_packed_batch(threads):
    """Few rows in most steps are not shared out, however many the longest rows' steps would have."""
    threads(2)
    layer = fusedrnn.LSTM(5, 130)
    for lengths, shared in (([30] * 9, "rows"), ([30, 2, 2, 2, 1, 1, 1, 1, 1], "units")):
        packed = pack_padded_sequence(torch.zeros(30, 9, 5), torch.tensor(lengths))
        assert f"2 threads share the {shared}" in fusedrnn.explain(layer, packed).reason
