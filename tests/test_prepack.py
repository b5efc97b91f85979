"""prepack: what a layer gives without it, packed once, and packed again after every change that torch counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)

LAYERS = ("RNN", "LSTM", "GRU")
OPTIONS = (
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bias": False},
    {"proj_size": 5, "bidirectional": True},
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Results = list[Tensor]


def flat(value) -> Results:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def infer(call: Callable[[], object]) -> Results:
    with torch.no_grad():
        return flat(call())


def assert_same(ours: Results, others: Results) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def unseen_change(layer: torch.nn.Module) -> None:
    """One that torch does not count, so that what is packed can be told from the weights."""
    for weight in layer.parameters():
        weight.data.mul_(0.5)


def calls(
    layer: torch.nn.RNNBase, steps: int = 24, rows: int = 4
) -> Iterator[tuple[str, Callable[[torch.nn.Module], object]]]:
    """Every form of a call, of so many rows and steps that a call packs all weights without prepack, too."""
    lstm, batch_first = layer.mode == "LSTM", layer.batch_first
    x = torch.randn(*((rows, steps) if batch_first else (steps, rows)), layer.input_size)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = torch.randn(states, rows, layer.proj_size or layer.hidden_size), torch.randn(states, rows, layer.hidden_size)
    resets = torch.rand(x.shape[:2]) < 0.2
    lengths = torch.tensor([steps, 0, 2, steps - 1])
    packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False, batch_first=batch_first)

    def hx(like: torch.nn.Module) -> object:
        dtype = next(like.parameters()).dtype
        return (h.to(dtype), c.to(dtype)) if lstm else h.to(dtype)

    def form(given, state: bool, **options) -> Callable[[torch.nn.Module], object]:
        return lambda m: m(given.to(next(m.parameters()).dtype), hx(m) if state else None, **options)

    yield "dense", form(x, False)
    yield "state", form(x, True)
    yield "unbatched", form(x[0] if batch_first else x[:, 0], False)
    yield "lengths", form(x, True, lengths=lengths)
    yield "resets", form(x, True, resets=resets)
    yield "both", form(x, True, lengths=lengths.int(), resets=resets)
    yield "packed", form(packed, True)


def check(name: str, hidden: int, dtype: torch.dtype, options: dict, autocast: torch.dtype | None = None) -> None:
    if "proj_size" in options and name != "LSTM":
        pytest.skip("an LSTM's option")
    plain = getattr(fusedrnn, name)(33, hidden, **options).to(dtype)
    packed = fusedrnn.prepack(copy.deepcopy(plain))
    changed = copy.deepcopy(plain)
    unseen_change(changed)
    for form, call in calls(plain):
        fusedrnn.prepack(packed)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            expected, others = infer(lambda call=call: call(plain)), infer(lambda call=call: call(changed))
            found = infer(lambda call=call: call(packed))
            packed.load_state_dict(changed.state_dict())
            after = infer(lambda call=call: call(packed))
            for mine, theirs in ((found, expected), (after, others)):
                for ours, other in zip(mine, theirs, strict=True):
                    assert ours.dtype == other.dtype
                    assert torch.equal(ours, other), form
            packed.load_state_dict(plain.state_dict())
            infer(lambda call=call: call(packed))
            unseen_change(packed)
            assert_same(infer(lambda call=call: call(packed)), expected)  # by what it has packed
            for weight, before in zip(packed.parameters(), plain.parameters(), strict=True):
                weight.data.copy_(before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [9, 70])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("isa")
def test_every_form_of_a_call(name, hidden, dtype, options):
    check(name, hidden, dtype, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name, autocast, options):
    check(name, 40, torch.float32, options, autocast)


@pytest.mark.parametrize("shape", [(1, 5, 18), (2, 20, 70), (7, 9, 100), (30, 5, 33), (4, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("isa")
def test_a_stream_gives_the_same_bits(name, dtype, shape):
    rows, inputs, hidden = shape
    layer = fusedrnn.prepack(getattr(fusedrnn, name)(inputs, hidden, 2).to(dtype))
    x = torch.randn(20, rows, inputs).to(dtype)
    y, _ = infer(lambda: layer(x))[:2]
    stream = layer.stream(rows)
    assert torch.equal(y, stream(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pack_serves_every_batch_and_length(dtype, packs, isa):
    layer = fusedrnn.GRU(8, 40, dtype=dtype)
    inputs = [torch.randn(steps, rows, 8).to(dtype) for steps, rows in ((2, 1), (9, 33), (30, 2), (3, 5), (40, 1))]
    alone = [infer(lambda x=x: fusedrnn.prepack(copy.deepcopy(layer))(x)) for x in inputs]
    fusedrnn.prepack(layer)
    packs.clear()
    for _ in range(2):
        for x, expected in zip(inputs, alone, strict=True):
            assert_same(infer(lambda x=x: layer(x)), expected)
    # bfloat16 without products of its own is packed one way for up to two rows and another way for more
    assert len(packs) == (2 if dtype == torch.bfloat16 and isa in ("baseline", "avx2", "avx512") else 1)


def test_another_instruction_set_packs_for_itself(layer, x, packs):
    fusedrnn.prepack(layer)
    for name in extension.instruction_sets() * 2:
        extension.use(name)
        found = infer(lambda: layer(x))
        assert_same(infer(lambda: copy.deepcopy(layer)(x)), found)
    extension.use("")
    assert len(packs) == 4 * len(extension.instruction_sets()) or len(extension.instruction_sets()) == 1


def test_what_is_packed_is_left_with_the_weights(layer, x, packs):
    """Not kept in memory beside others of another dtype, or for weights that are no longer there."""
    fusedrnn.prepack(layer)
    infer(lambda: layer(x))
    layer.double()
    assert layer._prepacked._packed is None
    infer(lambda: layer(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        infer(lambda: layer.float()(x))
    assert len(layer._prepacked._packed._stacks) == 1
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(36, 9))
    infer(lambda: layer(x))
    assert len(layer._prepacked._packed._stacks) == 1
    assert len(packs) == 4


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_as_without(name, autocast, x):
    layer = getattr(fusedrnn, name)(5, 9, 2, dropout=0.5)
    other = fusedrnn.prepack(copy.deepcopy(layer))
    infer(lambda: other(x))
    unseen_change(layer)
    unseen_change(other)

    def train(module: torch.nn.Module) -> Results:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = flat(module(x))
        return results + list(torch.autograd.grad(sum(r.sin().sum() for r in results), list(module.parameters())))

    assert_same(train(other), train(layer))
    torch.manual_seed(1)
    expected = infer(lambda: layer(x))
    torch.manual_seed(1)
    assert_same(infer(lambda: other(x)), expected)  # dropout
    layer.dropout = other.dropout = 0.0
    x = pack_padded_sequence(x, torch.tensor([7, 3, 2]))
    assert_same(train(other), train(layer))


def test_layers_whose_weights_want_no_gradient_use_it_too(layer, x):
    layer.requires_grad_(False)
    fusedrnn.prepack(layer)
    before = flat(layer(x))
    unseen_change(layer)
    assert_same(flat(layer(x)), before)
    assert layer(x.clone().requires_grad_())[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_steps_read_weights_in_place_but_in_float16(dtype):
    layer, x = fusedrnn.GRU(5, 9, dtype=dtype), torch.randn(1, 3, 5).to(dtype)
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    unseen_change(layer)
    assert torch.equal(infer(lambda: layer(x))[0], before[0]) == (dtype == torch.float16)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_single_steps_of_float16_under_autocast(name, autocast):
    layer, x = getattr(fusedrnn, name)(5, 9).half(), torch.randn(1, 3, 5)
    with torch.autocast("cpu", autocast):
        expected = infer(lambda: layer(x))
        found = infer(lambda: fusedrnn.prepack(layer)(x))
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, atol=2 * torch.finfo(autocast).eps, rtol=0)


def test_all_states_are_as_without(layer, x):
    expected = infer(lambda: layer(x, return_all_states=True))
    assert_same(infer(lambda: fusedrnn.prepack(layer)(x, return_all_states=True)), expected)


@pytest.mark.parametrize("wrong", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_of_a_wrong_shape_are_refused(wrong, layer, x):
    fusedrnn.prepack(layer)
    setattr(layer, wrong, torch.nn.Parameter(torch.zeros_like(getattr(layer, wrong))[:-1]))
    with pytest.raises(RuntimeError, match=r"expected [wb]_[ih]h of shape"):
        infer(lambda: layer(x))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_several_dtypes_are_refused(packed, layer, x):
    fusedrnn.prepack(layer)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().double())
    given = pack_padded_sequence(x, torch.tensor([7, 3, 2])) if packed else x
    with pytest.raises(RuntimeError, match="expected w_hh of dtype float32, got float64"):
        infer(lambda: layer(given))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}], ids=str)
def test_wrong_arguments_are_refused_as_without(options, x):
    plain = fusedrnn.LSTM(5, 9, **options)
    packed = fusedrnn.prepack(copy.deepcopy(plain))
    h, c = torch.zeros(2, plain.num_layers, 3, 9)
    many = pack_padded_sequence(x, torch.tensor([7, 3, 2]))
    broken = PackedSequence(many.data, many.batch_sizes.flip(0))
    narrow = PackedSequence(many.data[:3], torch.tensor([3], dtype=torch.int32))
    for arguments in (
        (x[..., :4],),
        (x.double(),),
        (x[:0],),
        (x, (h[:, :2], c)),
        (x, (h, c.double())),
        (x, h),
        (x[0, 0],),
        (broken,),
        (narrow,),
        (PackedSequence(many.data[1:], many.batch_sizes),),
    ):
        errors = []
        for layer in (plain, packed):
            with pytest.raises(Exception, match=r".") as raised:
                infer(lambda layer=layer, arguments=arguments: layer(*arguments))
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("wrong", [-5, 100_000])
def test_lengths_of_another_type_are_looked_at(wrong, layer, x):
    fusedrnn.prepack(layer)
    lengths = torch.nn.Parameter(torch.tensor([wrong, 2, 7]), requires_grad=False)
    with pytest.raises(RuntimeError, match="expected lengths between 0 and 7"):
        infer(lambda: layer(x, lengths=lengths))


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_nothing(name):
    layer = getattr(fusedrnn, name)(5, 9)
    x = torch.randn(3, 0, 5)
    expected = infer(lambda: layer(x))
    assert_same(infer(lambda: fusedrnn.prepack(layer)(x)), expected)


def test_unusual_tensors(layer, x):
    """Strides, a sign to be changed, a subclass: as without."""
    fusedrnn.prepack(layer)
    negative = torch.complex(torch.zeros(x.shape), -x).conj().imag
    assert negative.is_neg()
    packed = pack_padded_sequence(negative, torch.tensor([7, 3, 2]))
    dense = PackedSequence(packed.data.resolve_neg(), packed.batch_sizes)
    for given, same in (
        (negative, x),
        (x.transpose(0, 1).contiguous().transpose(0, 1), x),
        (torch.nn.Parameter(x, requires_grad=False), x),
        (PackedSequence(packed.data, packed.batch_sizes), dense),
        (torch._efficientzerotensor(x.shape), torch.zeros(x.shape)),
    ):
        torch.testing.assert_close(infer(lambda given=given: layer(given)), infer(lambda same=same: layer(same)))


def test_weights_whose_sign_is_to_be_changed():
    values = torch.randn(9, 5)
    layer = fusedrnn.RNN(5, 9, bias=False)
    layer.weight_ih_l0 = torch.nn.Parameter(values)
    x = torch.randn(7, 3, 5)
    expected = infer(lambda: layer(x))
    layer.weight_ih_l0 = torch.nn.Parameter(torch._neg_view(-values))
    fusedrnn.prepack(layer)
    packed = pack_padded_sequence(x, torch.tensor([7, 7, 7]))
    torch.testing.assert_close(infer(lambda: layer(packed))[0], expected[0].flatten(0, 1))
    assert_same([layer.stream(3)(x)], [fusedrnn.prepack(layer, enabled=False).stream(3)(x)])
