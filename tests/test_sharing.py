"""How threads share out a call: rows of the batch among teams, hidden units among the members of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import Case, make_data
from test_equality import check
from test_operators import calls
from test_operators import check as check_call

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)


@pytest.mark.usefixtures("isa")
def test_rows_with_one_copy_of_the_weights(threads):
    """Two copies would be more than most_own_weights of csrc/cpu/tuning.h."""
    case = Case("lstm", T=8, B=8, I=65_600, H=32)
    threads(2)
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


# Eight threads make teams of several members of them, forward and backward.
TEAMS = (
    Case("lstm", T=40, B=9, I=5, H=70),
    Case("gru", T=20, B=13, I=33, H=130),
    Case("rnn", T=20, B=12, I=5, H=150),
    Case("gru", T=40, B=8, I=5, H=100, layers=2, bidirectional=True),
    Case("lstm", T=30, B=9, I=5, H=130, lengths=(9, 30, 4, 30, 2, 1, 1, 12, 3)),
    Case("lstm", T=20, B=12, I=5, H=130, proj=40),
)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", TEAMS, ids=str)
def test_rows_and_units(case, dtype, isa, threads):
    threads(8)
    cell = "rnn_tanh" if case.cell == "rnn" else case.cell
    for backward in (False, True):
        plan = extension.plan(
            cell, dtype, backward, case.T, case.B, case.I, case.H, case.directions, projection=case.proj
        )
        tiles = isa == "amx" and dtype == "bfloat16" and not backward  # which want 16 rows
        assert (plan["row_blocks"] > 1 and plan["members"] > 1) or tiles
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize("case", [TEAMS[0], replace(TEAMS[3], layers=1), TEAMS[-1]], ids=str)
@pytest.mark.usefixtures("isa")
def test_lengths_and_resets(case, name, threads):
    threads(8)
    check_call(calls(case)[name])
