"""An LSTM whose hidden state is projected (proj_size; Sak et al. 2014) on the CPU's kernels.

Every result by the rule of numerics.py, at sizes around every edge of units and of the state's numbers.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, expected, make_data, run_module
from numerics import assert_all_as_good
from test_operators import (
    CHECKS,
    WITHOUT_GRADIENTS,
    backward,
    backward_arguments,
    calls,
    forward,
    forward_arguments,
    leaves,
)
from test_operators import check as check_call
from test_reference import Call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import _direct

pytest.importorskip("fusedrnn._C", exc_type=ImportError)

for_each_number_of_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
# T, B, I, H and the projection's size.
SIZES = (
    (1, 1, 1, 2, 1),
    (1, 1, 16, 300, 100),  # a step of one row, and of more than a dot product takes at a time
    (1, 40, 5, 70, 33),
    (3, 2, 3, 17, 16),  # weights read in place
    (2, 3, 4, 128, 127),
    (40, 1, 16, 200, 17),
    (9, 4, 20, 130, 64),
    (7, 13, 33, 33, 5),  # rows shared out
    (6, 4, 16, 256, 250),  # units shared out, of the state's panels one member has fewer
    (6, 4, 16, 256, 15),  # a panel for one member only
    (5, 300, 3, 40, 31),  # blocks of rows
    (2, 33, 70, 100, 48),
    (4, 6, 3, 516, 272),  # more columns than are packed together
)


def projected(T: int, B: int, I: int, H: int, proj: int, **more) -> Case:  # noqa: E741
    return Case("lstm", T=T, B=B, I=I, H=H, proj=proj, **more)


def check(case: Case) -> None:
    module, data = case.module(fusedrnn), make_data(case)
    assert fusedrnn.explain(module, data.x).implementation == "cpu"
    assert_all_as_good(run_module(module, case, data), *expected(case), case.torch_dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@for_each_number_of_directions
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("isa")
def test_sizes(sizes, bidirectional, dtype):
    check(projected(*sizes, bidirectional=bidirectional, dtype=dtype))


@pytest.mark.parametrize("sizes", [(1, 1, 5, 17, 3), (9, 4, 20, 130, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"layers": 2, "bidirectional": True}, {"bias": False, "hx": False}], ids=str)
def test_without_the_dispatcher(options, sizes, monkeypatch):
    """The extension reads the tensors itself, in inference and training, and gives what the operators give."""
    case = projected(*sizes, **options)
    module, data = case.module(fusedrnn), make_data(case)
    whole, hx = run_module(module, case, data), (data.h0, data.c0) if case.hx else None
    taken = _direct.kernels.forward("lstm", data.x, data.h0, data.c0, module._flat_weights, case.layers, False)
    with torch.no_grad():
        y, states = module(data.x, hx)
        assert all(torch.equal(a, b) for a, b in zip((y, *states), taken, strict=True))
        monkeypatch.setattr(_direct, "kernels", None)
        y, states = module(data.x, hx)
        assert all(torch.equal(a, b) for a, b in zip((y, *states), taken, strict=True))
    again = run_module(module, case, data)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.usefixtures("isa")
def test_threads(count, threads):
    threads(count)
    for sizes in SIZES[-5:]:
        check(projected(*sizes))


SHAPES = ((7, 13, 5, 33, 20), (3, 2, 4, 17, 3), (9, 5, 17, 65, 64))


@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_each_number_of_directions
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_lengths_and_resets(dtype, bidirectional, shape, name):
    check_call(calls(projected(*shape, bidirectional=bidirectional, dtype=dtype))[name])


@for_each_number_of_directions
@pytest.mark.usefixtures("isa")
def test_nothing_past_a_row_is_read(bidirectional):
    call = calls(projected(*SHAPES[0], bidirectional=bidirectional))["lengths"]
    given = backward_arguments(call)
    past = (torch.arange(call.case.T).unsqueeze(1) >= given["lengths"]).unsqueeze(-1)
    outputs, gradients = forward(**forward_arguments(call, save=False)), backward(**given)
    for name in ("x", "dy"):
        given[name] = given[name].masked_fill(past, float("nan"))
    again = forward(**forward_arguments(call, save=False) | {"x": given["x"]})
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    wanted = zip(gradients, backward(**given), strict=True)
    assert all(torch.equal(a, b) for a, b in wanted)


def test_each_gradient_alone():
    """Bits do not depend on which other gradients are asked for."""
    given = backward_arguments(Call(projected(9, 5, 17, 65, 64, bidirectional=True)))
    everything = backward(**given)
    for i, whole in enumerate(everything):
        (alone,) = backward(**given | {"wanted": [i == j for j in range(len(everything))]})
        assert torch.equal(alone, whole)


@pytest.mark.parametrize("form", ["padded", "resets"])
@pytest.mark.parametrize("operator", ["forward", "forward and save", "backward"])
def test_opcheck(operator, form):
    call = Call(projected(4, 3, 2, 5, 3), resets=form == "resets")
    if operator == "backward":
        torch.library.opcheck(backward, (), backward_arguments(call), test_utils=WITHOUT_GRADIENTS)
    else:
        given = forward_arguments(call, "save" in operator)
        torch.library.opcheck(forward, (), leaves(given), test_utils=CHECKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_exported_and_under_vmap():
    layer, x = fusedrnn.LSTM(4, 9, 2, proj_size=3, bidirectional=True), torch.randn(5, 3, 4)
    y, states = layer(x)
    compiled, others = torch.compile(layer, backend="eager", fullgraph=True)(x)
    exported, _ = torch.export.export(layer, (x,)).module()(x)
    mapped = torch.func.vmap(lambda x: layer(x)[0], 2, 2)(torch.stack([x, 2 * x], 2))
    for other in (compiled, exported, mapped[:, :, 0]):
        torch.testing.assert_close(other, y)
    torch.testing.assert_close(others, states)


def test_recomputed():
    case = projected(600, 2, 3, 9, 4, bidirectional=True)
    module, data = case.module(fusedrnn), make_data(case)
    module.recompute = True
    assert_all_as_good(run_module(module, case, data), *expected(case), case.torch_dtype)


def test_a_mistake_is_named():
    layer = fusedrnn.LSTM(4, 9, proj_size=3)
    layer.weight_hr_l0 = torch.nn.Parameter(torch.zeros(3, 8))
    with pytest.raises(RuntimeError, match=r"expected w_hr of shape \[3, 9\], got \[3, 8\]"):
        layer(torch.zeros(5, 3, 4))


def test_counted_operations():
    layer, x = fusedrnn.LSTM(8, 16, proj_size=4, bidirectional=True), torch.randn(5, 3, 8, requires_grad=True)
    of_input, of_state, of_projection = (2 * 2 * 15 * n for n in (64 * 8, 64 * 4, 16 * 4))
    to_hx = 2 * 2 * 3 * 64 * 4
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == of_input + of_state + of_projection
    assert counter.get_total_flops() - forward == 2 * forward - to_hx


def test_all_states_under_autocast():
    """Of the dtypes of the last ones."""
    case = projected(9, 3, 16, 70, 33, layers=2)
    layer, x = case.module(fusedrnn), make_data(case).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h_n, c_n), (h, c) = layer(x, return_all_states=True)
    assert (h.dtype, c.dtype) == (h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h[1], y)
    assert torch.equal(h[:, -1], h_n)
    torch.testing.assert_close(c[:, -1].bfloat16(), c_n.bfloat16())  # kept as backward reads them


@pytest.mark.parametrize("hx", ["no state", "float32 state", "bfloat16 state"])
@pytest.mark.parametrize("lengths", [None, (9, 9, 9), (9, 4, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, steps, lengths, hx):
    """torch's dtypes, of the cell state, too, which it does not round."""
    # Both directions of a packed batch torch.nn refuses.
    case = projected(steps, 3, 16, 70, 33, layers=2, bidirectional=lengths is None)
    x, results = make_data(case).x, []
    rows = case.layers * case.directions
    if lengths is not None:
        x = pack_padded_sequence(x, torch.tensor(lengths).clamp(max=steps))
    states = (torch.randn(rows, 3, 33), torch.randn(rows, 3, 70))
    given = {"no state": (), "float32 state": (states,), "bfloat16 state": (tuple(s.bfloat16() for s in states),)}[hx]
    for library in fusedrnn, torch.nn:
        layer = case.module(library)
        with torch.autocast("cpu", dtype=dtype):
            y, (h, c) = layer(x, *given)
        y = y if lengths is None else y.data
        (y.float().sum() + h.float().sum() + c.float().sum()).backward()
        results.append([y, h, c, *(p.grad for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
