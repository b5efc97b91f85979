"""lengths= and resets= of the layers: against torch.nn's packing and against the loop over steps that people write."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from cases import Case, expected, for_all_cells, leaf, make_data, run_module
from numerics import FAST, assert_all_as_good, to_numpy
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import _dispatch, _ragged

LAYERS = ("RNN", "LSTM", "GRU")


def flat(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def loop(module: torch.nn.RNNBase, x: Tensor, hx, lengths=None, resets=None, every: list | None = None):
    """A torch.nn module, time first, a step at a time with the state zeroed and held in between.

    ``every`` is given per layer and direction the states after every step, zero past a row's end."""
    lstm, directions = module.mode == "LSTM", 2 if module.bidirectional else 1
    states = list(hx) if lstm else [hx]
    lengths = torch.full((x.size(1),), len(x)) if lengths is None else lengths
    resets = torch.zeros(x.shape[:2], dtype=torch.bool) if resets is None else resets
    last = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            state = [s[k : k + 1] for s in states]
            output, kept = {}, {}
            for t in reversed(range(len(x))) if direction else range(len(x)):
                here = (t < lengths).view(1, -1, 1)
                before = [torch.where(here & resets[t].view(1, -1, 1), torch.zeros_like(s), s) for s in state]
                _, *after = getattr(torch._VF, module.mode.lower())(
                    x[t : t + 1], before if lstm else before[0], module.all_weights[k], module.bias, 1, 0.0, False,
                    False, False,
                )  # fmt: skip
                state = [torch.where(here, new, old) for new, old in zip(after, state, strict=True)]
                kept[t] = [torch.where(here, s, torch.zeros_like(s)) for s in state]
                output[t] = kept[t][0]
            outputs.append(torch.cat([output[t] for t in range(len(x))]))
            last.append(state)
            if every is not None:
                every.append([torch.cat([kept[t][i] for t in range(len(x))]) for i in range(len(states))])
        x = torch.cat(outputs, -1)
    ends = tuple(torch.cat([state[i] for state in last]) for i in range(len(states)))
    return x, ends if lstm else ends[0]


def run(call, module: torch.nn.Module, case: Case, seed: int = 1) -> dict[str, Tensor]:
    """`call(x, hx)` forward and backward, as cases.run_module has its results."""
    data = make_data(case, seed)
    module.zero_grad(set_to_none=True)
    x, states = leaf(data.x), [leaf(s) for s in ((data.h0, data.c0) if case.cell == "lstm" else (data.h0,))]
    outputs = flat(call(x, tuple(states) if case.cell == "lstm" else states[0]))
    torch.autograd.backward(outputs, [data.dy, data.dh_n, data.dc_n][: len(outputs)])
    named = dict(zip(("y", "h_n", "c_n"), outputs, strict=False)) | {"dx": x.grad}
    named |= {name: s.grad for name, s in zip(("dh0", "dc0"), states, strict=False)}
    named |= {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: tensor.detach() for name, tensor in named.items()}


def run_oracle(case: Case, lengths: Tensor | None, resets: Tensor | None) -> dict[str, np.ndarray]:
    data = make_data(case)
    weights = {name: to_numpy(w) for name, w in case.module(torch.nn).named_parameters()}
    result = oracle.run(
        case.equations,
        weights,
        *map(to_numpy, (data.x, data.h0, data.c0)),
        layers=case.layers,
        bidirectional=case.bidirectional,
        lengths=None if lengths is None else lengths.numpy(),
        reset=None if resets is None else resets.numpy(),
    )
    lstm = case.cell == "lstm"
    gradients = result.backward(*map(to_numpy, (data.dy, data.dh_n, data.dc_n if lstm else data.dc_n * 0)))
    outputs = {"y": result.y, "h_n": result.h_n} | ({"c_n": result.c_n} if lstm else {})
    return outputs | {f"d{name}": value for name, value in gradients.items() if lstm or name != "c0"}


RAGGED = {"B": 6, "lengths": (1, 4, 4, 5, 2, 3)}
SHORT = {"T": 9, "B": 5, "H": 65, "lengths": (2, 9, 1, 3, 2)}  # wide and short enough that padding is left out
PACKED = (
    *for_all_cells(
        {**RAGGED},
        {**RAGGED, "layers": 2, "bidirectional": True, "H": 17},
        {**RAGGED, "batch_first": True, "hx": False},
        {**SHORT},
        {**SHORT, "layers": 2, "bidirectional": True, "bias": False},
        {**SHORT, "batch_first": True, "contiguous": False},
    ),
    *(replace(Case(**SHORT), dtype=dtype) for dtype in ("float64", "bfloat16", "float16")),
    Case(**RAGGED, dtype="bfloat16"),
    Case(**RAGGED, proj=3, bidirectional=True, layers=2),
)


def by_lengths(module: torch.nn.RNNBase, steps: int, dtype: torch.dtype) -> torch.nn.Module:
    """The module, called with a padded batch and lengths where it is given a packed one."""
    forward = module.forward

    def padded(packed, hx=None):
        x, lengths = pad_packed_sequence(packed, module.batch_first, padding_value=float("nan"), total_length=steps)
        y, last = forward(x, hx, lengths=lengths.to(dtype))
        for row, length in enumerate(lengths):
            assert not (y[row, length:] if module.batch_first else y[length:, row]).any()
        return pack_padded_sequence(y, lengths, module.batch_first, enforce_sorted=False), last

    module.forward = padded
    return module


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.usefixtures("isa")
def test_lengths_are_what_packing_is(case):
    module = by_lengths(case.module(fusedrnn), case.T, torch.int32 if case.bidirectional else torch.int64)
    assert_all_as_good(run_module(module, case, make_data(case)), *expected(case), case.torch_dtype)


STEPS = (
    *for_all_cells(
        {"T": 7, "B": 6},
        {"T": 4, "B": 6, "layers": 2, "bidirectional": True, "H": 17},
        {"T": 6, "B": 4, "layers": 2, "H": 65},
        {"T": 6, "B": 4, "bidirectional": True, "H": 65, "bias": False},
    ),
    Case(T=4, B=6, proj=3, layers=2, bidirectional=True),
    Case(T=6, B=4, H=70, dtype="float64"),
    Case("gru", T=40, B=6, H=20),  # blocks of rows, with x·W_ih of several steps
)


def rows_of(case: Case, which: str) -> tuple[Tensor | None, Tensor | None]:
    lengths = torch.tensor([0, case.T, 1, 3, 0, 2][: case.B])
    resets = torch.rand(case.T, case.B, generator=torch.Generator().manual_seed(3)) < 0.3
    resets[0, 1] = resets[case.T - 1, 1] = resets[1, 1] = True  # at both ends, and two in a row
    return (lengths if "lengths" in which else None), (resets if "resets" in which else None)


@pytest.mark.parametrize("which", ["lengths", "resets", "lengths and resets"])
@pytest.mark.parametrize("case", STEPS, ids=str)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
def test_lengths_and_resets_are_what_a_loop_is(case, which):
    lengths, resets = rows_of(case, which)
    theirs, ours = case.module(torch.nn), case.module(fusedrnn)
    by_steps = run(lambda x, hx: loop(theirs, x, hx, lengths, resets), theirs, case)
    at_once = run(lambda x, hx: ours(x, hx, lengths=lengths, resets=resets), ours, case)
    assert_all_as_good(at_once, by_steps, run_oracle(case, lengths, resets), case.torch_dtype)


@pytest.mark.parametrize("hidden", [2, _ragged._LEAST_HIDDEN], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name, hidden):
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(2, hidden, 1, bidirectional=hidden == 2, dtype=torch.float64)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([2, 0, 3, 1]), torch.rand(3, 4) < 0.4

    def run(*_):
        return tuple(flat(module(x, lengths=lengths, resets=resets)))

    assert gradcheck(run, (x, *module.parameters()), **({} if hidden == 2 else FAST))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_given_is_nothing_changed(name):
    layer, x = getattr(fusedrnn, name)(4, 65, 2, bidirectional=True), torch.randn(6, 3, 4)
    expected = flat(layer(x))
    for given in ({"lengths": torch.full((3,), 6)}, {"resets": torch.zeros(6, 3, dtype=torch.bool)}):
        for mine, other in zip(flat(layer(x, **given)), expected, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", LAYERS)
def test_layouts_of_resets(name):
    layer, x, resets = getattr(fusedrnn, name)(4, 7), torch.randn(5, 3, 4), torch.rand(5, 3) < 0.5
    first = getattr(fusedrnn, name)(4, 7, batch_first=True)
    first.load_state_dict(layer.state_dict())
    y, last = layer(x, resets=resets)
    y_first, last_first = first(x.transpose(0, 1), resets=resets.t())
    assert torch.equal(y, y_first.transpose(0, 1))
    assert all(torch.equal(one, other) for one, other in zip(flat(last), flat(last_first), strict=True))
    alone, _ = layer(x[:, 0], resets=resets[:, 0])
    torch.testing.assert_close(alone, y[:, 0])


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    layer, x = getattr(fusedrnn, name)(4, 65, 2), torch.randn(6, 3, 4)
    given = {"lengths": torch.tensor([0, 2, 6]), "resets": torch.rand(6, 3) < 0.3}
    nothing = {"lengths": torch.full((3,), 6), "resets": torch.zeros(6, 3, dtype=torch.bool)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, same, under = flat(layer(x)), flat(layer(x, **nothing)), flat(layer(x, **given))
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))
    assert [t.dtype for t in under] == [t.dtype for t in plain]
    if name != "GRU":  # which keeps a float32 state there, as torch.nn's does
        rounded = flat(layer.bfloat16()(x.bfloat16(), **given))
        assert all(torch.equal(one, other) for one, other in zip(under, rounded, strict=True))


def test_no_valid_step_and_no_row():
    layer = fusedrnn.LSTM(4, 65)
    hx = (torch.randn(1, 3, 65), torch.randn(1, 3, 65))
    y, last = layer(torch.full((5, 3, 4), float("nan")), hx, lengths=torch.zeros(3, dtype=torch.int32))
    assert not y.any()
    assert all(torch.equal(one, other) for one, other in zip(last, hx, strict=True))
    y, _ = layer(torch.zeros(5, 0, 4), lengths=torch.zeros(0, dtype=torch.int64), resets=torch.zeros(5, 0) > 0)
    assert y.shape == (5, 0, 65)


def test_a_fallback_is_said_once(monkeypatch):
    """Without the extension torch.nn runs projections, but knows neither lengths nor resets; the reference does."""
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_dispatch, "extension", None)
    monkeypatch.setattr(_dispatch, "why_no_extension", "the extension is not there")
    layer, x, resets = fusedrnn.LSTM(4, 7, proj_size=3), torch.randn(5, 3, 4), torch.zeros(5, 3) > 0
    explained = fusedrnn.explain(layer, x, resets=resets)
    assert explained.implementation == "reference"
    assert fusedrnn.explain(layer, x).implementation == "torch"
    with pytest.warns(fusedrnn.FallbackWarning, match="torch.nn has no lengths, resets, all states") as seen:
        y, _ = layer(x, resets=resets)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, lengths=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(y, torch.nn.LSTM.forward(layer, x)[0])
    plain = fusedrnn.LSTM(4, 7)
    assert fusedrnn.explain(plain, x, lengths=torch.tensor([1, 2, 3])) == fusedrnn.explain(plain, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:fusedrnn runs on a fallback")
def test_compiled_and_under_vmap(name):
    layer, x = getattr(fusedrnn, name)(4, 70, 2), torch.randn(6, 3, 4, requires_grad=True)
    lengths, resets = torch.tensor([6, 0, 3]), torch.rand(6, 3) < 0.3

    def call(x: Tensor, lengths: Tensor, resets: Tensor) -> Tensor:
        return layer(x, lengths=lengths, resets=resets)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ys = [f(x, lengths, resets) for f in (compiled, call)]
    torch.testing.assert_close(*ys)
    for one, other in zip(*(torch.autograd.grad(y.sum(), [x, *layer.parameters()]) for y in ys), strict=True):
        torch.testing.assert_close(one, other)
    if _dispatch.extension is not None:
        with pytest.raises(RuntimeError, match="expected lengths between 0 and 6, got 7"):
            compiled(x, lengths + 1, resets)
    many = (torch.randn(5, 6, 3, 4), torch.randint(0, 7, (5, 3)), torch.rand(5, 6, 3) < 0.3)
    one_by_one = torch.stack([call(*given) for given in zip(*many, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(*many), one_by_one)


X = torch.zeros(5, 3, 4)
MISTAKES = {
    "list": ({"lengths": [5, 3, 2]}, TypeError, "lengths to be a tensor of integers, got a list"),
    "floats": ({"lengths": torch.zeros(3)}, RuntimeError, "lengths of dtype int32 or int64, got torch.float32"),
    "shape": ({"lengths": torch.tensor([5, 3])}, RuntimeError, r"lengths of shape \[3\], one per row, got \[2\]"),
    "negative": ({"lengths": torch.tensor([5, -1, 3])}, RuntimeError, "lengths between 0 and 5, got -1"),
    "too long": ({"lengths": torch.tensor([5, 6, 3])}, RuntimeError, "lengths between 0 and 5, got 6"),
    "mask of floats": ({"resets": torch.zeros(5, 3)}, RuntimeError, "resets of dtype bool, got torch.float32"),
    "mask transposed": ({"resets": torch.zeros(3, 5) > 0}, RuntimeError, r"resets of shape \[5, 3\], .*got \[3, 5\]"),
    "mask in a list": ({"resets": [[True] * 3] * 5}, TypeError, "resets to be a tensor of bool, got a list"),
    "mask elsewhere": ({"resets": torch.zeros(5, 3, dtype=torch.bool, device="meta")}, RuntimeError, "device cpu"),
    "unbatched": (
        {"input": X[:, 0], "lengths": torch.tensor([5])},
        RuntimeError,
        "a batched 3-D input with lengths, got an unbatched 2-D one",
    ),
    **{
        f"packed, {name}": (
            {"input": pack_padded_sequence(X, torch.tensor([5, 4, 2])), name: value},
            RuntimeError,
            "a padded input with lengths, resets or all states, got a PackedSequence",
        )
        for name, value in (
            ("lengths", torch.tensor([5, 4, 2])),
            ("resets", torch.zeros(5, 3) > 0),
            ("return_all_states", True),
        )
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", LAYERS)
def test_mistakes(name, mistake):
    given, error, says = MISTAKES[mistake]
    with pytest.raises(error, match=f"^{name}.*: expected {says}" if "device" not in says else says):
        getattr(fusedrnn, name)(4, 7)(**{"input": X} | given)


@pytest.mark.parametrize("hidden", [2, _ragged._LEAST_HIDDEN], ids=["padded", "packed"])
def test_another_default_device(hidden):
    layer, x, lengths = fusedrnn.GRU(4, hidden), torch.randn(6, 2, 4), torch.tensor([6, 1])
    wanted, _ = layer(x, lengths=lengths)
    with torch.device("meta"):
        assert torch.equal(layer(x, lengths=lengths)[0], wanted)
