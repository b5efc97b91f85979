"""Calls without torch's dispatcher (_direct.py): the same numbers, only where nobody else sees the call, and never from
weights of the past."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn
from fusedrnn import _direct

pytest.importorskip("fusedrnn._C", exc_type=ImportError)

CELLS = ("RNN", "LSTM", "GRU")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Results = list[Tensor]


def flat(value: object) -> Results:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def make(name: str, dtype: torch.dtype = torch.float32, **options) -> tuple[torch.nn.Module, Callable[[], Results]]:
    """A cell or layer of 5 inputs and 9 units, and a call of it that gives everything it returns."""
    module = getattr(fusedrnn, name)(5, 9, dtype=dtype, **options)
    lstm = name.startswith("LSTM")
    if name.endswith("Cell"):
        x, state = torch.randn(3, 5, dtype=dtype), (3, 9)
    else:
        x, rows = torch.randn(4, 3, 5, dtype=dtype), module.num_layers * (2 if module.bidirectional else 1)
        state = (rows, x.size(0 if module.batch_first else 1), 9)
    h, c = torch.randn(2, *state, dtype=dtype).unbind()
    hx = (h.clone(), c.clone()) if lstm else h.clone()
    return module, lambda: flat(module(x, hx))


def train(module: torch.nn.Module, call: Callable[[], Results]) -> Results:
    """Results and the gradients of all parameters."""
    results = call()
    return results + list(torch.autograd.grad(sum(r.sin().sum() for r in results), list(module.parameters())))


def by_operators(call: Callable[..., Results], *arguments: object) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_direct, "kernels", None)
        return call(*arguments)


def assert_same(ours: Results, others: Results) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every pass that the extension took."""
    passes: list[str] = []
    extension = _direct.kernels

    class Noting:
        fits = extension.fits

        def forward(self, *arguments: object) -> object:
            return self.note("forward", extension.forward(*arguments))

        def backward(self, *arguments: object) -> object:
            return self.note("backward", extension.backward(*arguments))

        def note(self, name: str, results: object) -> object:
            passes.extend([] if results is None else [name])
            return results

    monkeypatch.setattr(_direct, "kernels", Noting())
    return passes


FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 3, "bidirectional": True},
    "batch first": {"batch_first": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.usefixtures("isa")
def test_layers_give_the_operators_numbers(name, form, dtype, taken):
    module, call = make(name, dtype, **FORMS[form])
    with torch.no_grad():
        assert_same(call(), by_operators(call))
    assert taken
    del taken[:]
    assert_same(train(module, call), by_operators(train, module, call))
    assert taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "bidirectional", "batch first"])
@pytest.mark.parametrize("name", CELLS)
def test_lengths_and_resets_give_the_operators_numbers(name, form, dtype, taken):
    layer = getattr(fusedrnn, name)(5, 9, dtype=dtype, **FORMS[form])
    shape = (3, 4) if layer.batch_first else (4, 3)
    x, resets, lengths = torch.randn(*shape, 5, dtype=dtype), torch.rand(shape) < 0.3, torch.tensor([4, 0, 3])
    for rows in ({"lengths": lengths}, {"resets": resets}, {"lengths": lengths, "resets": resets}):
        taken.clear()
        through_operators = flat(layer(x, **rows))
        assert not taken
        with torch.no_grad():
            directly = flat(layer(x, **rows))
        assert taken
        for mine, other in zip(directly, through_operators, strict=True):
            assert torch.equal(mine, other)


def test_lengths_and_resets_that_are_not_for_addresses(taken):
    layer, wide, x, ones = (
        fusedrnn.GRU(5, 9),
        fusedrnn.GRU(5, 64),
        torch.randn(4, 3, 5),
        torch.ones(3, dtype=torch.int64),
    )
    with torch.no_grad():
        layer(x, lengths=ones.int())
        wide(x, lengths=ones)  # goes without its padding
        layer(x[:, :0], lengths=ones[:0])
        for wrong in ({"lengths": 5 * ones}, {"lengths": -ones}, {"lengths": ones[:2]}, {"resets": ones.bool()}):
            with pytest.raises(RuntimeError, match="expected"):
                layer(x, **wrong)
        assert not taken
        assert torch.equal(wide(x, lengths=4 * ones)[0], wide(x)[0])
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.usefixtures("isa")
def test_cells_give_the_operators_numbers(name, bias, dtype, taken):
    module, call = make(name + "Cell", dtype, bias=bias)
    with torch.inference_mode():
        assert_same(call(), by_operators(call))
    assert taken == ["forward"]
    del taken[:]
    assert_same(train(module, call), by_operators(train, module, call))
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("name", [*CELLS, "RNNCell", "LSTMCell", "GRUCell"])
def test_a_training_step_is_one_node_without_an_operator(name, taken):
    """Which is what a small layer's step costs."""
    module, call = make(name)
    (result, *_), leaves = call(), list(module.parameters())
    assert [node for node, _ in result.grad_fn.next_functions if node] == [
        torch.autograd.graph.get_gradient_edge(p).node for p in leaves
    ]
    torch.autograd.grad(result, leaves, torch.ones(()).expand_as(result))  # what .sum() hands down
    assert taken == ["forward", "backward"]


def test_without_a_state(taken):
    layer, x = fusedrnn.LSTM(5, 9, 2), torch.randn(4, 3, 5)
    expected = flat(layer(x))
    with torch.no_grad():
        for mine, other in zip(flat(layer(x)), expected, strict=True):
            assert torch.equal(mine, other)
    assert taken


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WATCHERS = {
    "autocast": lambda: torch.autocast("cpu"),
    "function mode": Functions,
    "dispatch mode": Dispatches,
    "profiler": lambda: torch.autograd.profiler.profile(),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_whoever_watches_sees_operators(name, watcher, taken):
    module, call = make(name)
    with WATCHERS[watcher]():
        train(module, call)
        with torch.no_grad():
            call()
    # In backward torch has no function mode: it would not see the operator either.
    assert taken == (["backward"] if watcher == "function mode" else [])


@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNNCell", "LSTMCell"])
def test_what_is_kept_may_come_back_as_something_else(name):
    """Hooks on saved tensors may give back anything: what does not fit is for the operators to judge."""
    module, call = make(name)
    expected = train(module, call)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):
        assert_same(train(module, call), expected)
    with (
        hooks(lambda t: t, lambda t: t[..., :1].contiguous()),
        pytest.raises(RuntimeError, match=r"expected .* of shape"),
    ):
        train(module, call)


@pytest.mark.parametrize("name", ["GRU", "RNNCell"])
def test_weights_cut_between_forward_and_backward_are_refused(name):
    module, call = make(name)
    results = call()
    weight = next(p for n, p in module.named_parameters() if "weight_hh" in n)
    weight.data = weight.data[:-1].contiguous()
    with pytest.raises(RuntimeError, match="expected w_hh of shape"):
        results[0].sum().backward()


UNUSUAL = {
    "zero without memory": lambda x: torch._efficientzerotensor(x.shape),
    "sign to be changed": lambda x: torch.complex(x, x).conj().imag,
    "one of them, sign to be changed": lambda x: torch.complex(x, x)[:1, :1].conj().imag,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("grad", [True, False])
def test_unusual_tensors(kind, grad):
    x = UNUSUAL[kind](torch.randn(3, 5))
    cell, plain = fusedrnn.GRUCell(x.shape[1], 9), x.clone().contiguous() + 0
    with torch.set_grad_enabled(grad):
        assert torch.equal(cell(x), cell(plain))


def test_tensors_that_outlived_their_transform():
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.ones(3, 5))
    cell = fusedrnn.GRUCell(5, 9)
    with torch.no_grad():
        assert torch.equal(cell(kept[0]), cell(torch.ones(3, 5)))


@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
def test_vmap_sees_through(taken):
    layer, x = fusedrnn.GRU(5, 9), torch.randn(2, 4, 3, 5)
    expected = torch.stack([layer(part)[0] for part in x])
    del taken[:]
    with torch.no_grad():
        mapped = torch.vmap(lambda part: layer(part)[0])(x)
    assert not taken
    torch.testing.assert_close(mapped, expected)


@pytest.mark.filterwarnings("ignore")  # torch says much about tracing
def test_a_trace_is_refused_rather_than_blind(taken):
    """Memory written by address would look to the trace like a constant, as do weights that it does not know."""
    layer, x = fusedrnn.GRU(5, 9), torch.randn(4, 3, 5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(lambda x: layer(x)[0], x)
    assert not taken


def by_optimiser(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def by_data(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.add_(0.25)  # which no version counter sees


def by_numpy(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 2


def by_new_data(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * -1


def by_new_parameters(module: torch.nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(parameter.detach() + 1))


def by_state_dict(module: torch.nn.Module) -> None:
    module.load_state_dict({name: value + 0.5 for name, value in module.state_dict().items()})


def by_parametrization(module: torch.nn.Module) -> None:
    class Halved(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    name = next(name for name, _ in module.named_parameters() if "weight_hh" in name)
    parametrize.register_parametrization(module, name, Halved())


CHANGES = (by_optimiser, by_data, by_numpy, by_new_data, by_new_parameters, by_state_dict, by_parametrization)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["GRU", "LSTM", "LSTMCell", "RNNCell"])
def test_changed_weights_count_from_the_next_call_on(name, change):
    module, call = make(name)
    with torch.no_grad():
        before = call()
        change(module)
        after = call()
    expected = flat(call())  # through the operators, which know no past
    assert not torch.equal(before[0], after[0])
    for mine, other in zip(after, expected, strict=True):
        assert torch.equal(mine, other)


def shrunk(module: torch.nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    parameter.data = parameter.data[:-1]


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_weights_of_a_wrong_shape_are_refused(name):
    """An address says nothing of how much memory is there."""
    cell, call = make("GRUCell")
    layer, call_layer = make("GRU")
    shrunk(cell, name)
    shrunk(layer, name + "_l0")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="of shape"):
            call()
        with pytest.raises(RuntimeError, match="of shape"):
            call_layer()


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_strided_and_foreign_tensors_take_the_operators(name, taken):
    module, _ = make(name)
    shape = (3, 5) if name.endswith("Cell") else (4, 3, 5)
    x = torch.randn(*shape, 2)[..., 0]
    expected = flat(module(x))
    with torch.no_grad():
        for mine, other in zip(flat(module(x)), expected, strict=True):
            assert torch.equal(mine, other)
        swapped = copy.deepcopy(module)
        for parameter in swapped.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()  # the same numbers, columns first
        del taken[:]
        for mine, other in zip(flat(swapped(x)), expected, strict=True):
            assert torch.equal(mine, other)
    assert not taken


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_a_lone_number_whose_sign_is_to_be_changed(name):
    """Its last stride is 1, as a dense tensor's."""
    x, module = torch.tensor([[1 + 2j]]).conj().imag.unsqueeze(-1), getattr(fusedrnn, name)(1, 9)
    given = x if name == "GRU" else x[0]
    assert given.is_neg()
    assert_same(flat(module(given)), flat(module(given.resolve_neg())))
