"""The layers stand in for torch.nn's in everything but the arithmetic."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from numerics import FAST, assert_as_good
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

every_layer = pytest.mark.parametrize("name", LAYERS)
every_module = pytest.mark.parametrize("name", LAYERS + CELLS)


def make(name: str, *sizes: int, library=fusedrnn, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(library, name)(*(sizes or (4, 7)), **options)


def make_input(name: str, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (3, 4) if name in CELLS else (5, 3, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_(requires_grad)


def flat(outputs) -> list[torch.Tensor]:
    """The tensors of a module's nested result, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flat(part)]


def backward(outputs) -> None:
    """From cotangents that differ from element to element."""
    tensors = flat(outputs)
    torch.autograd.backward(tensors, [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in tensors])


def gradients(*owners) -> list[torch.Tensor | None]:
    """Copies of the gradients of tensors and of modules' parameters."""
    tensors = [t for owner in owners for t in ([owner] if isinstance(owner, torch.Tensor) else owner.parameters())]
    return [t.grad if t.grad is None else t.grad.clone() for t in tensors]


def assert_bit_equal(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


# --- construction, parameters, state ----------------------------------------------------------


@every_module
def test_is_a_torch_nn_module(name):
    theirs = getattr(torch.nn, name)
    assert isinstance(make(name), theirs)
    assert inspect.signature(getattr(fusedrnn, name)) == inspect.signature(theirs)
    assert repr(make(name)) == repr(make(name, library=torch.nn))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LAYERS + CELLS),
        *((name, {"bias": False}) for name in LAYERS + CELLS),
        *((name, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for name in LAYERS),
        ("LSTM", {"proj_size": 3, "dtype": torch.float64}),
        ("RNN", {"nonlinearity": "relu"}),
    ],
)
def test_same_parameters_under_the_same_seed(name, options):
    ours, theirs = make(name, **options), make(name, library=torch.nn, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_bit_equal(ours.parameters(), theirs.parameters())
    assert repr(ours) == repr(theirs)
    ours.reset_parameters()
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
    assert_bit_equal(ours.parameters(), theirs.parameters())


@every_layer
def test_positional_arguments(name):
    given = (4, 7, 2, "relu") if name == "RNN" else (4, 7, 2)
    given += (False, True, 0.0, True)
    assert repr(getattr(fusedrnn, name)(*given)) == repr(getattr(torch.nn, name)(*given))


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_module
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies(name, copied):
    module, x = make(name), make_input(name)
    before = flat(module(x))
    twin = copied(module)
    assert type(twin) is type(module)
    assert_bit_equal(flat(twin(x)), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_bit_equal(flat(module(x)), before)
    assert not flat(twin(x))[0].any(), "the copy computes with the weights of the original"


@every_layer
def test_flatten_parameters_changes_nothing(name):
    module, x = make(name, num_layers=2), make_input(name)
    before = flat(module(x))
    assert module.flatten_parameters() is None
    assert_bit_equal(flat(module(x)), before)


@every_layer
def test_eval_mode_changes_nothing_without_dropout(name):
    module, x = make(name), make_input(name, requires_grad=True)
    trained = module(x)
    backward(trained)
    expected = gradients(x, module)
    module.zero_grad()
    x.grad = None
    evaluated = module.eval()(x)
    backward(evaluated)
    assert not module.training
    assert_bit_equal(flat(evaluated), flat(trained))
    assert_bit_equal(gradients(x, module), expected)


# --- autograd -----------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("asking", ["nothing", "input", "weight_hh", "all weights"])
def test_gradients_only_for_what_asks(name, asking):
    module, x = make(name), make_input(name, requires_grad=asking == "input")
    for parameter_name, parameter in module.named_parameters():
        parameter.requires_grad_(asking == "all weights" or parameter_name.startswith(asking))
    outputs = flat(module(x))
    assert all(output.requires_grad == (asking != "nothing") for output in outputs)
    if asking != "nothing":
        backward(outputs)
    for tensor in (x, *module.parameters()):
        assert (tensor.grad is not None) == tensor.requires_grad


@every_module
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(name, mode):
    module, x = make(name), make_input(name, requires_grad=True)
    with mode():
        outputs = flat(module(x))
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
    assert_bit_equal(outputs, flat(module(x)))


@every_module
def test_backward_twice_with_retained_graph(name):
    module, x = make(name), make_input(name, requires_grad=True)
    loss = sum((output**2).sum() for output in flat(module(x)))
    once = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
    assert_bit_equal(torch.autograd.grad(loss, [x, *module.parameters()]), once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_module
def test_bit_equal_from_run_to_run(name):
    def run() -> list[torch.Tensor]:
        module, x = make(name, 33, 65), torch.linspace(-1, 1, 6 * 13 * 33).view(-1, 13, 33)
        x = (x[0] if name in CELLS else x).requires_grad_()
        outputs = flat(module(x))
        backward(outputs)
        return outputs + gradients(x, module)

    first = run()
    for _ in range(3):
        assert_bit_equal(run(), first)


@every_module
@pytest.mark.parametrize("changed", ["weight", "input"])
def test_changes_in_place_before_backward_are_refused(name, changed):
    def run(library) -> None:
        module = make(name, library=library)
        x = make_input(name, requires_grad=True) * 1.0
        outputs = module(x)
        with torch.no_grad():
            (module.parameters().__next__() if changed == "weight" else x).mul_(2.0)
        backward(outputs)

    for library in (torch.nn, fusedrnn):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(library)


@every_module
def test_output_changed_in_place_is_refused_or_right(name):
    def run(in_place: bool) -> list[torch.Tensor]:
        module, x = make(name), make_input(name, requires_grad=True)
        outputs = flat(module(x))
        outputs[0] = outputs[0].mul_(2.0) if in_place else outputs[0] * 2.0
        backward(outputs)
        return gradients(x, module)

    expected = run(in_place=False)
    try:
        got = run(in_place=True)
    except RuntimeError as error:
        refused = str(error)
        got = None
    if got is None:
        assert "modified by an inplace operation" in refused
    else:
        assert_bit_equal(got, expected)


def check_gradients(check, module, x, state) -> None:
    inputs = (x, *flat(state), *module.parameters())
    # The check perturbs its inputs in place, so the function may read them where they live.
    assert check(lambda *_: tuple(flat(module(x, state))), inputs, **(FAST if check is gradgradcheck else {}))


def random_state(name: str, *shape: int):
    def draw() -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return (draw(), draw()) if name.startswith("LSTM") else draw()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"num_layers": 2, "bidirectional": True}) for name in LAYERS),
        *((name, {"bias": False}) for name in LAYERS),
        ("RNN", {"nonlinearity": "relu"}),
        ("LSTM", {"proj_size": 2, "num_layers": 2}),
    ],
)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradcheck_layers(name, options, check):
    # Twice differentiated, the smallest shape that has two rows, two steps and two units will do.
    B, hidden = (2, 3) if check is gradcheck else (2, 2 + ("proj_size" in options))
    module = make(name, 2, hidden, dtype=torch.float64, **options)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x = torch.randn(3, B, 2, dtype=torch.float64, requires_grad=True)
    state = random_state(name, rows, B, hidden)
    if "proj_size" in options:
        state = (random_state("RNN", rows, B, 2), state[1])
    check_gradients(check, module, x, state)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@every_layer
def test_gradcheck_lengths(name, check):
    module = make(name, 2, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    state = random_state(name, 2, 3, 2)

    def packed(*_):
        y, last = module(pack_padded_sequence(x, torch.tensor([2, 3, 1]), enforce_sorted=False), state)
        return (y.data, *flat(last))

    assert check(packed, (x, *flat(state), *module.parameters()), **(FAST if check is gradgradcheck else {}))


@every_layer
def test_last_steps_of_a_packed_batch_without_a_row(name):
    ours, theirs = make(name, 4, 7), getattr(torch.nn, name)(4, 7)
    theirs.load_state_dict(ours.state_dict())
    packed = PackedSequence(torch.randn(6, 4), torch.tensor([3, 2, 1, 0, 0]))
    (y, states), (expected, expected_states) = ours(packed), theirs(packed)
    torch.testing.assert_close([y.data, *flat(states)], [expected.data, *flat(expected_states)])
    assert torch.equal(y.batch_sizes, packed.batch_sizes)


# --- dropout ------------------------------------------------------------------------------------


def probe(name: str, p: float) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Two layers with dropout, and each alone. From one step and no initial state the second layer gives
    zero exactly where its input is zero, so that its output shows what was dropped."""
    both = make(name, 4, 4, 2, bias=False, dropout=p, dtype=torch.float64)
    with torch.no_grad():
        both.weight_ih_l1.copy_(torch.eye(4).repeat(len(both.weight_ih_l1) // 4, 1))
    alone = [make(name, 4, 4, bias=False, dtype=torch.float64) for _ in range(2)]
    for index, layer in enumerate(alone):
        weights = {key: both.state_dict()[key.replace("_l0", f"_l{index}")] for key in layer.state_dict()}
        layer.load_state_dict(weights)
    return both, *alone


@every_layer
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_between_layers(name, p):
    both, first, second = probe(name, p)
    x = torch.randn(1, 5000, 4, dtype=torch.float64)
    y, _ = both(x)
    dropped = y == 0.0
    # 20 000 independent draws: five standard deviations are below 0.02.
    assert abs(dropped.double().mean() - p) <= 5 * (p * (1 - p) / y.numel()) ** 0.5
    # What was kept is the first layer's output, scaled so that the mean stays.
    kept, _ = second(first(x)[0] * (0.0 if p == 1.0 else 1.0 / (1.0 - p)))
    assert_as_good("y", y, torch.where(dropped, y, kept), torch.where(dropped, y, kept), y.dtype)
    both.eval()
    assert_bit_equal(both(x)[0], second(first(x)[0])[0])


@every_layer
@pytest.mark.parametrize("lengths", [None, (2, 5, 1)])
def test_dropout_follows_the_seed(name, lengths):
    module = make(name, num_layers=3, bidirectional=True, dropout=0.5)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        x = make_input(name)
        given = x if lengths is None else pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        return flat(module(given)[0])[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    module.dropout = 0.0
    assert torch.equal(run(1), run(2))


@every_layer
def test_gradients_through_dropout(name):
    module = make(name, 2, 3, 2, dropout=0.5, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def same_mask(*_):
        torch.manual_seed(3)
        return tuple(flat(module(x)))

    assert gradcheck(same_mask, (x, *module.parameters()))
