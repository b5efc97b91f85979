"""Shapes and options drawn at random, against the oracle and torch.nn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import CELLS, Case, expected, make_data, run_module
from numerics import assert_all_as_good

import fusedrnn

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The same examples in every run: a failure is of the change, not of the day.
quiet = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw) -> Case:
    T, B = draw(st.integers(1, 9)), draw(st.integers(1, 14))
    H = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(CELLS))
    packed = draw(st.booleans())
    unbatched = not packed and B == 1 and draw(st.booleans())
    return Case(
        **kind,
        T=T,
        B=B,
        I=draw(st.integers(1, 20)),
        H=H,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=not unbatched and draw(st.booleans()),
        proj=draw(st.integers(0, H - 1)) if kind["cell"] == "lstm" else 0,
        lengths=tuple(draw(st.lists(st.integers(1, T), min_size=B, max_size=B))) if packed else None,
        unbatched=unbatched,
        hx=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        magnitude=draw(st.sampled_from((0.1, 1.0, 20.0))),
        dtype=draw(st.sampled_from(("float32", "float64"))),
    )


@quiet
@given(case=cases(), seed=st.integers(0, 2**16))
def test_any_case(case, seed):
    data = make_data(case, seed)
    ours = run_module(case.module(fusedrnn), case, data)
    assert_all_as_good(ours, *expected(case, seed), case.torch_dtype)


@quiet
@given(case=cases(), data=st.data())
def test_rows_of_a_batch_are_independent(case, data):
    """A row's results stay when the other rows change: nothing leaks from row to row."""
    if case.B == 1:
        case = dataclasses.replace(case, B=2, unbatched=False, lengths=case.lengths and case.lengths * 2)
    row = data.draw(st.integers(0, case.B - 1))
    module, before = case.module(fusedrnn), make_data(case)
    others = torch.arange(case.B) != row
    noise = torch.from_numpy(np.random.default_rng(9).standard_normal(case.B)).to(case.torch_dtype)
    changed = dataclasses.replace(
        before,
        **{
            name: getattr(before, name) * torch.where(others, noise, 1.0).to(case.torch_dtype)[:, None]
            for name in ("x", "dy", "dh_n") + (("h0", "c0", "dc_n") if case.hx else ())
        },
    )
    first, second = run_module(module, case, before), run_module(module, case, changed)
    for name in ("y", "h_n", "dx", *(["dh0"] if case.hx else [])):
        assert torch.equal(first[name][:, row], second[name][:, row]), name


@quiet
@given(case=cases(), cut=st.integers(1, 8))
def test_a_sequence_in_two_pieces_is_the_sequence(case, cut):
    """Handing the state on at any step gives the outputs of one long call."""
    plain = {"bidirectional": False, "lengths": None, "unbatched": False, "batch_first": False, "hx": True}
    case = dataclasses.replace(case, T=max(case.T, cut + 1), **plain)
    module, data = case.module(fusedrnn), make_data(case)
    state = (data.h0, data.c0) if case.cell == "lstm" else data.h0
    with torch.no_grad():
        head, between = module(data.x[:cut], state)
        tail, last = module(data.x[cut:], between)
    h_n, c_n = last if case.cell == "lstm" else (last, None)
    theirs, truth = expected(case)
    pieces = {"y": torch.cat([head, tail]), "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})
    assert_all_as_good(
        pieces,
        {name: theirs[name] for name in pieces},
        {name: truth[name] for name in pieces},
        case.torch_dtype,
    )
