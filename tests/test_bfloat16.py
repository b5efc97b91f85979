"""bfloat16 on CPUs: weights, and beside them x and the states, each for themselves."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from test_operators import (
    FORMS,
    SMALL,
    backward,
    backward_arguments,
    for_each_cell,
    for_each_number_of_directions,
    forward,
    forward_arguments,
)
from test_reference import Call, arguments

import fusedrnn


@for_each_cell
@for_each_number_of_directions
@pytest.mark.parametrize("B", [1, 40])  # of 40 rows teams have sums of their own
@pytest.mark.usefixtures("isa")
def test_what_goes_with_the_weights(B, bidirectional, kind):
    """Their gradients are float32 sums, rounded once: see an RNN, which saves nothing, of few units, for no tiles."""
    call = Call(Case(**kind, T=9, B=B, I=10, H=21, bidirectional=bidirectional))
    halves = [w.bfloat16() for w in arguments(call)["weights"]]
    found = []
    for weights in halves, [w.float() for w in halves]:
        torch.manual_seed(0)
        given = backward_arguments(call, weights=weights)
        assert {t.dtype for t in given["saved"]} <= {weights[0].dtype}
        found.append(backward(**given))
    states = len(found[0]) - len(halves)
    assert [t.dtype for t in found[0]] == [torch.float32] * states + [torch.bfloat16] * len(halves)
    assert call.case.cell != "rnn" or all(
        torch.equal(one, wide.to(one.dtype)) for one, wide in zip(*found, strict=True)
    )


SEQUENCE, STATES = ("x", "y", "dy"), ("hx", "cx", "dh_n", "dc_n")
# A step, which packs nothing; rows that two teams share out; units for tiles, and inputs beyond their edges.
SHAPES = ({"T": 1, "B": 3, "I": 9, "H": 13}, {"T": 9, "B": 40, "I": 10, "H": 21}, {"T": 30, "B": 17, "I": 33, "H": 70})
CALLS = {form: (FORMS[form], SMALL) for form in FORMS} | {f"B{shape['B']}": (Call, shape) for shape in SHAPES}


def cast(given: dict, names: tuple[str, ...], dtype: torch.dtype) -> dict:
    return given | {name: given[name].to(dtype) for name in names if given.get(name) is not None}


@for_each_cell
@for_each_number_of_directions
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("narrow", [SEQUENCE, STATES, SEQUENCE + STATES], ids=["x", "states", "all"])
@pytest.mark.usefixtures("isa")
def test_the_rest_is_rounded_once(narrow, call, bidirectional, kind):
    """Results are those of the same numbers in float32, but for dX of two directions, a sum of rounded ones."""
    form, shape = CALLS[call]
    given = forward_arguments(form(Case(**kind, **shape, bidirectional=bidirectional)))
    given["weights"] = [w.bfloat16() for w in given["weights"]]
    given = cast(cast(given, SEQUENCE + STATES, torch.bfloat16), SEQUENCE + STATES, torch.float32)

    def compare(operator, given, inexact=()):
        wide, found = operator(**given), operator(**cast(given, narrow, torch.bfloat16))
        for i, (one, other) in enumerate(zip(found, wide, strict=True)):
            eps = torch.finfo(torch.bfloat16).eps if i in inexact else 0
            torch.testing.assert_close(one, other.to(one.dtype), rtol=eps, atol=eps, equal_nan=True)
        return found

    y, h_n, *_ = compare(forward, given)
    assert y.dtype == (torch.bfloat16 if "x" in narrow else torch.float32)
    assert h_n.dtype == (torch.bfloat16 if "hx" in narrow else torch.float32)
    y, *rest = forward(**given)
    y, states = y.bfloat16().float(), rest[: 1 if given["cx"] is None else 2]
    gradients = [torch.randn_like(t).bfloat16().float() for t in (y, *states)]
    given |= dict(zip(("dy", "dh_n", "dc_n"), [*gradients, None][:3], strict=True))
    del given["save"]
    given |= {"y": y, "saved": rest[len(states) :], "wanted": [True] * (1 + len(states) + len(given["weights"]))}
    dx, dhx, *_ = compare(backward, given, inexact=(0,) if bidirectional else ())
    assert dhx.dtype == h_n.dtype
    assert dx.dtype == (torch.bfloat16 if "x" in narrow else torch.float32)


@for_each_cell
@for_each_number_of_directions
@pytest.mark.parametrize("B", [1, 2, 7, 40])
@pytest.mark.parametrize("inputs", [3, 40, 65])
@pytest.mark.usefixtures("isa")
def test_a_step_multiplies_the_same_numbers(inputs, B, bidirectional, kind):
    """In pairs, where the processor has products of them: in another order, and with other ends of rows."""
    given = forward_arguments(Call(Case(**kind, T=1, B=B, I=inputs, H=51, bidirectional=bidirectional)))
    given["weights"] = [w.bfloat16() for w in given["weights"]]
    given = cast(given, SEQUENCE + STATES, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    for one, other in zip(forward(**given), forward(**cast(given, SEQUENCE + STATES, torch.float32)), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")  # torch's own, at its first forward mode
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. forward-mode")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_derivatives_of_any_order(name):
    """By the reference in float32: as if all were float32 but what comes in and goes out."""
    layer = getattr(fusedrnn, name)(3, 5).bfloat16()
    wide = getattr(fusedrnn, name)(3, 5)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3).bfloat16()

    def second(layer, x):
        x = x.requires_grad_()
        (dx,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), [x, *layer.parameters()])

    def forward_mode(layer, x):
        return torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))

    found, wanted = ([*second(m, v), *forward_mode(m, v)] for m, v in ((layer, x), (wide, x.float())))
    for one, right in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - right).norm() <= 2 * torch.finfo(torch.bfloat16).eps * right.norm()
