"""prepack: what a layer gives without it, packed once, and packed again after every change that torch counts."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
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


@pytest.fixture
def layer() -> torch.nn.Module:
    return fusedrnn.LSTM(5, 9)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, 5)


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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pack_serves_every_batch_and_length(dtype):
    layer = fusedrnn.GRU(8, 40, dtype=dtype)
    inputs = [torch.randn(steps, rows, 8).to(dtype) for steps, rows in ((2, 1), (9, 33), (30, 2), (3, 5), (40, 1))]
    alone = [infer(lambda x=x: fusedrnn.prepack(copy.deepcopy(layer))(x)) for x in inputs]
    fusedrnn.prepack(layer)
    for x, expected in zip(inputs, alone, strict=True):
        assert_same(infer(lambda x=x: layer(x)), expected)


# Changes that torch counts, or that put another tensor in a weight's place.


def in_place(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        layer.weight_hh_l0[1].mul_(2)


def in_place_without_gradients(layer: torch.nn.Module) -> None:
    with torch.inference_mode():
        layer.bias_ih_l0.add_(1)


def by_a_detached_view(layer: torch.nn.Module) -> None:
    layer.weight_ih_l0.detach()[0, 0] += 1


def by_foreach(layer: torch.nn.Module) -> None:
    torch._foreach_mul_([w.detach() for w in layer.parameters()], 0.5)


def by_state_dict(layer: torch.nn.Module) -> None:
    layer.load_state_dict({name: w + 0.25 for name, w in layer.state_dict().items()})


def by_assigned_state_dict(layer: torch.nn.Module) -> None:
    layer.load_state_dict({name: w + 0.25 for name, w in layer.state_dict().items()}, assign=True)


def by_new_parameter(layer: torch.nn.Module) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach() * 2)


def by_new_data(layer: torch.nn.Module) -> None:
    layer.weight_hh_l0.data = layer.weight_hh_l0.data * 2


def by_vector(layer: torch.nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(layer.parameters()).detach() * 2
    torch.nn.utils.vector_to_parameters(vector, layer.parameters())


def by_rounding(layer: torch.nn.Module) -> None:
    layer.half().float()


def by_initialising(layer: torch.nn.Module) -> None:
    layer.reset_parameters()


def by_pruning(layer: torch.nn.Module) -> None:
    prune.random_unstructured(layer, "weight_hh_l0", amount=0.5)


def by_parametrization(layer: torch.nn.Module) -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight_hh_l0", Twice())


CHANGES = (
    in_place,
    in_place_without_gradients,
    by_a_detached_view,
    by_foreach,
    by_state_dict,
    by_assigned_state_dict,
    by_new_parameter,
    by_new_data,
    by_vector,
    by_rounding,
    by_initialising,
    by_pruning,
    by_parametrization,
)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_from_the_next_call_on(change, autocast, layer, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fusedrnn.prepack(layer)
        before = infer(lambda: layer(x))
        for _ in range(3):  # memory of a change may lie where that of the one before was
            change(layer)
            after = infer(lambda: layer(x))
            fusedrnn.prepack(layer, enabled=False)
            expected = infer(lambda: layer(x))
            fusedrnn.prepack(layer)
            assert_same(after, infer(lambda: layer(x)))
            torch.testing.assert_close(after, expected, atol=0.02 if autocast else 1e-6, rtol=0)
            assert autocast or not torch.equal(before[0], after[0])
            if change in (by_pruning, by_parametrization):
                break


OPTIMISERS = sorted(
    {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    - {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # the last wants matrices only
)


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimisers_step_counts(name, kind, layer, x):
    try:
        options = {} if kind == "plain" else {kind: True}
        optimiser = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"{name} has no {kind} step: {error}")
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    layer(x)[0].sin().sum().backward()
    optimiser.step()
    after = infer(lambda: layer(x))
    assert_same(after, infer(lambda: fusedrnn.prepack(layer)(x)))
    assert not torch.equal(before[0], after[0])


def test_what_torch_does_not_count_waits_for_prepack(layer, x):
    """As the docstring says."""
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    layer.weight_hh_l0.detach().numpy()[:] *= 2
    assert_same(infer(lambda: layer(x)), before)
    fusedrnn.prepack(layer)
    assert not torch.equal(infer(lambda: layer(x))[0], before[0])


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


def test_all_states_are_as_without(layer, x):
    expected = infer(lambda: layer(x, return_all_states=True))
    assert_same(infer(lambda: fusedrnn.prepack(layer)(x, return_all_states=True)), expected)


def test_copies_pack_for_themselves(layer, x):
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert_same(infer(lambda other=other: other(x)), before)
        unseen_change(other)
        assert_same(infer(lambda other=other: other(x)), before)  # which it had packed
    assert "_prepacked" not in layer.state_dict()


def test_undone(layer, x):
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    unseen_change(layer)
    assert fusedrnn.prepack(layer, enabled=False) is layer
    assert not torch.equal(infer(lambda: layer(x))[0], before[0])
    fusedrnn.prepack(layer)
    assert type(fusedrnn.revert(layer)) is torch.nn.LSTM
    assert "_prepacked" not in vars(layer)
    infer(lambda: layer(x))


def test_a_model_without_layers():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4), fusedrnn.GRUCell(3, 4))
    with pytest.warns(UserWarning, match="found no layer .*convert"):
        assert fusedrnn.prepack(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedrnn.prepack(fusedrnn.convert(model))
    assert model[0]._prepacked is not None


def test_a_users_subclass():
    class Reversed(torch.nn.GRU):
        def forward(self, x, hx=None):
            return super().forward(x.flip(0), hx)

    layer, x = fusedrnn.convert(Reversed(3, 9)), torch.randn(5, 2, 3)
    expected = infer(lambda: layer(x))
    fusedrnn.prepack(layer)
    torch.testing.assert_close(infer(lambda: layer(x)), expected)
    unseen_change(layer)
    torch.testing.assert_close(infer(lambda: layer(x)), expected)


@pytest.mark.parametrize("wrong", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_weights_of_a_wrong_shape_are_refused(wrong, layer, x):
    fusedrnn.prepack(layer)
    setattr(layer, wrong, torch.nn.Parameter(torch.zeros_like(getattr(layer, wrong))[:-1]))
    with pytest.raises(RuntimeError, match=r"expected [wb]_[ih]h of shape"):
        infer(lambda: layer(x))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}], ids=str)
def test_wrong_arguments_are_refused_as_without(options, x):
    plain = fusedrnn.LSTM(5, 9, **options)
    packed = fusedrnn.prepack(copy.deepcopy(plain))
    h, c = torch.zeros(2, plain.num_layers, 3, 9)
    many = pack_padded_sequence(x, torch.tensor([7, 3, 2]))
    broken = PackedSequence(many.data, many.batch_sizes.flip(0))
    for arguments in (
        (x[..., :4],),
        (x.double(),),
        (x[:0],),
        (x, (h[:, :2], c)),
        (x, (h, c.double())),
        (x, h),
        (x[0, 0],),
        (broken,),
        (PackedSequence(many.data[1:], many.batch_sizes),),
    ):
        errors = []
        for layer in (plain, packed):
            with pytest.raises(Exception, match=r".") as raised:
                infer(lambda layer=layer, arguments=arguments: layer(*arguments))
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


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
    ):
        torch.testing.assert_close(infer(lambda given=given: layer(given)), infer(lambda same=same: layer(same)))


def test_weights_of_inference_mode_are_packed_at_every_call(x):
    """torch does not count their changes."""
    with torch.inference_mode():
        layer = fusedrnn.prepack(fusedrnn.GRU(5, 9))
        before = flat(layer(x))
        layer.weight_hh_l0.mul_(2)
        assert not torch.equal(flat(layer(x))[0], before[0])


@pytest.mark.filterwarnings("ignore")  # torch says much about tracing
@pytest.mark.parametrize("how", ["compile", "export", "trace", "vmap", "functional_call"])
def test_whoever_sees_through_sees_the_weights(how, layer, x):
    expected = infer(lambda: layer(x))
    fusedrnn.prepack(layer)
    infer(lambda: layer(x))
    weights = {name: w.detach() for name, w in layer.named_parameters()}
    with torch.no_grad():
        if how == "compile":
            call = torch.compile(layer, fullgraph=True, backend="eager")
        elif how == "export":
            call = torch.export.export(layer, (x,)).module()
        elif how == "trace":
            call = torch.jit.trace(layer, x)
        elif how == "vmap":
            call = lambda x: [t[0] for t in flat(torch.func.vmap(layer)(x[None]))]  # noqa: E731
        else:
            call = lambda x: torch.func.functional_call(layer, weights, (x,))  # noqa: E731
        torch.testing.assert_close(flat(call(x)), expected)


def test_explain_names_it(layer, x):
    assert "once" not in fusedrnn.explain(layer, x).reason
    fusedrnn.prepack(layer)
    assert "once" not in fusedrnn.explain(layer, x).reason  # as things are, a training step
    with torch.no_grad():
        assert "packed weights once, " in fusedrnn.explain(layer, x).reason
        assert "once" not in fusedrnn.explain(layer, x[:1]).reason
        assert "once" not in fusedrnn.explain(fusedrnn.LSTMCell(5, 9), x[0]).reason


def test_many_threads_and_a_change_meanwhile():
    """Every result is of the weights before or after a change."""
    layer = fusedrnn.prepack(fusedrnn.GRU(5, 40))
    inputs = [torch.randn(9, rows, 5) for rows in (1, 2, 3, 8)]
    states = [{name: w * factor for name, w in layer.state_dict().items()} for factor in (1.0, 0.5)]
    expected = []
    for state in states:
        layer.load_state_dict(state)
        expected.append([infer(lambda x=x: layer(x))[0] for x in inputs])
    wrong: list[str] = []
    lock = threading.Lock()  # for torch's copy is no single moment

    def work(turn: int) -> None:
        for i in range(200):
            which = (i + turn) % len(inputs)
            with lock:
                now = (i + turn) // 7 % 2
                layer.load_state_dict(states[now])
                found = infer(lambda which=which: layer(inputs[which]))[0] if i % 2 else None
            if found is None:
                found = infer(lambda which=which: layer(inputs[which]))[0]
                if found.shape != expected[0][which].shape or not torch.isfinite(found).all():
                    wrong.append(f"{turn} {i}")
            elif not torch.equal(found, expected[now][which]):
                wrong.append(f"{turn} {i} alone")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
