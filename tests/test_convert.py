"""`convert` and `revert` change the class of modules in place; `explain` says what would run, and why."""

from __future__ import annotations

import abc
import copy
import functools
import pickle
import re

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")

every_name = pytest.mark.parametrize("name", NAMES)


class Model(torch.nn.Module):
    """Recurrent modules in every place where one can be: an attribute, a list, deep down, and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(4, 8)
        self.encoder = torch.nn.GRU(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.LSTM(16, 16, proj_size=8))])
        self.cells = torch.nn.ModuleDict({"a": torch.nn.LSTMCell(8, 8), "b": torch.nn.GRUCell(8, 8)})
        self.last = torch.nn.RNNCell(8, 8, nonlinearity="relu")
        self.rnn = torch.nn.RNN(8, 8, nonlinearity="relu", bias=False)
        self.again = self.rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.blocks[0](self.encoder(self.embed(x))[0])
        y, _ = self.again(self.rnn(y)[0])
        h, _ = self.cells["a"](y[-1])
        return self.last(self.cells["b"](h))


def recurrent(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in NAMES]


@every_name
def test_a_module_itself(name):
    module = getattr(torch.nn, name)(4, 7)
    parameters = list(module.parameters())
    assert fusedrnn.convert(module) is module
    assert type(module) is getattr(fusedrnn, name)
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))
    assert fusedrnn.revert(module) is module
    assert type(module) is getattr(torch.nn, name)
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))


def test_everything_inside_a_model():
    model = Model()
    found = recurrent(model)
    expected = [type(module).__name__ for module in found]
    assert len(found) == 6
    fusedrnn.convert(model)
    assert [type(module) for module in found] == [getattr(fusedrnn, name) for name in expected]
    assert all(now is before for now, before in zip(recurrent(model), found, strict=True))
    assert model.rnn is model.again
    assert type(model.embed) is torch.nn.Linear
    fusedrnn.revert(model)
    assert [type(module) for module in found] == [getattr(torch.nn, name) for name in expected]


def test_results_and_state_dict_stay():
    model, x = Model().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    fusedrnn.convert(model)
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(fusedrnn.revert(model)(x), before)


def test_twice_is_harmless():
    model = Model()
    types = [type(module) for module in fusedrnn.convert(model).modules()]
    assert [type(module) for module in fusedrnn.convert(model).modules()] == types
    types = [type(module) for module in fusedrnn.revert(model).modules()]
    assert [type(module) for module in fusedrnn.revert(model).modules()] == types


def test_optimizer_hooks_and_tied_weights_survive():
    model, x = Model(), torch.randn(2, 5, 4)
    model.last.weight_hh = model.last.weight_ih
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.encoder.register_forward_hook(lambda module, *_: calls.append(type(module)))
    before = model.encoder.weight_hh_l0.clone()
    fusedrnn.convert(model)
    model(x).pow(2).sum().backward()
    optimizer.step()
    assert calls == [fusedrnn.GRU]
    assert not torch.equal(model.encoder.weight_hh_l0, before)
    assert model.last.weight_hh is model.last.weight_ih


def test_mode_and_attributes_survive():
    model = Model().eval()
    model.encoder.note = "kept"
    model.encoder.weight_hh_l0.requires_grad_(False)
    fusedrnn.convert(model)
    assert not any(module.training for module in model.modules())
    assert model.encoder.note == "kept"
    assert not model.encoder.weight_hh_l0.requires_grad


class Halved(torch.nn.GRU):
    """A user's class, with a method, an argument and a state of its own."""

    def __init__(self, *args, factor=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, x, hx=None, scale=1.0):
        y, h = super().forward(x, hx=hx)
        return self.scaled(y, scale), h

    def scaled(self, y, scale):
        return y * (self.factor * scale)


@every_name
def test_a_subclass_keeps_its_methods_and_gets_the_kernels_by_super(name):
    def forward(self, *args):
        calls.append(type(self))
        return super(theirs, self).forward(*args)

    calls = []
    theirs = type("Mine", (getattr(torch.nn, name),), {"forward": forward, "reset_parameters": str})
    module, x = theirs(4, 7, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    model = torch.nn.ModuleDict({"outer": torch.nn.Sequential(torch.nn.Linear(1, 1), module)})
    before = module(x)
    assert fusedrnn.convert(model) is model
    assert isinstance(module, theirs)
    assert isinstance(module, getattr(fusedrnn, name))
    assert fusedrnn.explain(module, x).implementation == "cpu"
    torch.testing.assert_close(module(x), before)
    assert calls == [theirs, type(module)]
    assert type(fusedrnn.convert(module)) is calls[1]
    assert type(fusedrnn.revert(model)["outer"][1]) is theirs


def test_a_converted_subclass_is_copied_pickled_and_made_anew():
    module, x = fusedrnn.convert(Halved(4, 7, factor=0.25)), torch.randn(5, 3, 4)
    expected = module(x, scale=3.0)[0]
    copies = [copy.deepcopy(module), copy.copy(module)]
    copies += [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is type(module)
        assert torch.equal(other(x, scale=3.0)[0], expected)
    assert type(module)(4, 7)(x)[0].shape == (5, 3, 7)
    assert type(pickle.loads(pickle.dumps(fusedrnn.revert(module)))) is Halved


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")  # torch's own, while it compiles
def test_a_converted_subclass_is_compiled_and_parametrized():
    module, x = fusedrnn.convert(Halved(4, 7)), torch.randn(5, 3, 4)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert torch.equal(copy.deepcopy(module)(x)[0], module(x)[0])


def own(**attributes):
    return type("Mine", (torch.nn.LSTM,), attributes)(4, 7)


def without_super(self, x):
    return torch.nn.LSTM.forward(self, x)


def by_type(self):
    return super(type(self), self).extra_repr()


def by_class(self, x):
    return super(self.__class__, self).forward(x)


def keeps_state(self, x):
    y, self._states = super(torch.nn.LSTM, self).forward(x)
    return y


class OfMeta(torch.nn.LSTM, metaclass=type("Meta", (type,), {})):
    pass


CLASSES = []


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (own(forward=without_super), "Mine.forward does not call super().forward"),
        (own(forward=functools.partial(without_super)), "Mine.forward does not call super().forward"),
        (own(permute_hidden=None), "Mine has a permute_hidden of its own"),
        (own(_run=None), "Mine has a _run of its own"),
        (own(stream=property(lambda _: 1 / 0)), "Mine has a stream of its own"),
        (own(forward=keeps_state), "Mine has a _states of its own"),
        (own(extra_repr=by_type), "Mine calls super() by its object's class"),
        (own(forward=by_class), "Mine calls super() by its object's class"),
        (own(__reduce__=lambda self: (type(self), (4, 7))), "Mine has a __reduce__ of its own"),
        (own(__init_subclass__=classmethod(CLASSES.append)), "Mine has a __init_subclass__ of its own"),
        (OfMeta(4, 7), "OfMeta has a metaclass"),
    ],
)
def test_a_subclass_that_would_change_is_left_alone_and_named(module, why):
    before = type(module)
    with pytest.warns(UserWarning, match=rf"left 0 alone: {re.escape(why)}$"):
        fusedrnn.convert(torch.nn.Sequential(module))
    assert type(module) is before
    assert not CLASSES


def test_a_module_with_an_attribute_of_our_name_is_left_alone():
    module = Halved(4, 7)
    module._states = []
    with pytest.warns(UserWarning, match="left the model alone: Halved has a _states of its own"):
        fusedrnn.convert(module)
    assert type(module) is Halved


def test_an_abstract_and_a_frozen_class():
    abstract = type("Abstract", (abc.ABC, torch.nn.RNNBase), {})
    assert isinstance(fusedrnn.convert(type("Mine", (abstract, torch.nn.LSTM), {})(4, 7)), fusedrnn.LSTM)

    class Frozen(torch.nn.LSTM):
        def __setattr__(self, name, value):
            if self.__dict__.get("frozen"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    module = Frozen(4, 7)
    module.frozen = True
    assert isinstance(fusedrnn.convert(module), fusedrnn.LSTM)
    assert type(fusedrnn.revert(module)) is Frozen


def test_fx_says_that_it_cannot_trace_a_subclass():
    """A node for the layer would call the forward that is being traced."""
    for model in (torch.nn.Sequential(fusedrnn.convert(Halved(4, 7))), fusedrnn.convert(Halved(4, 7))):
        with pytest.raises(torch.fx.proxy.TraceError, match="make Halved a leaf"):
            torch.fx.symbolic_trace(model)


def test_what_torch_makes_a_subclass_of_is_to_be_converted_before():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.LSTM(4, 7), "weight_hh_l0")
    with pytest.warns(UserWarning, match=r"left the model alone: it is parametrized \(convert first\)"):
        fusedrnn.convert(layer)


def test_a_subclass_of_ours_is_not_reverted():
    class Mine(fusedrnn.LSTM):
        pass

    model = torch.nn.Sequential(Mine(4, 7))
    with pytest.warns(UserWarning, match="left 0 alone: Mine is a subclass"):
        fusedrnn.revert(model)
    assert type(model[0]) is Mine


def test_a_model_without_recurrent_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert fusedrnn.convert(model) is model
    assert fusedrnn.revert(model) is model


# --- explain -----------------------------------------------------------------------------------------


def check_explanation(explanation) -> None:
    assert explanation.implementation in {"cpu", "torch", "reference"}
    assert len(explanation.reason.split()) > 1
    assert explanation.implementation in str(explanation)
    assert explanation.reason in str(explanation)


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_explain(name, dtype):
    module = getattr(fusedrnn, name)(4, 7, dtype=dtype)
    is_cell = name.endswith("Cell")
    x = torch.randn(*((3, 4) if is_cell else (5, 3, 4)), dtype=dtype)
    check_explanation(fusedrnn.explain(module, x))


def test_explain_takes_packed_and_unbatched_input():
    module, x = fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4)
    check_explanation(fusedrnn.explain(module, x[:, 0]))
    check_explanation(fusedrnn.explain(module, pack_padded_sequence(x, torch.tensor([5, 4, 2]))))


def test_explain_says_what_autocast_makes_of_a_call():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "bfloat16 weights" in fusedrnn.explain(fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4)).reason
        one_step = torch.randn(1, 3, 4)
        for given in one_step, one_step.bfloat16(), one_step[0]:
            layer = fusedrnn.LSTM(4, 7) if given.dim() == 3 else fusedrnn.LSTMCell(4, 7)
            assert "bfloat16" not in fusedrnn.explain(layer, given).reason
            assert "bfloat16 weights" in fusedrnn.explain(layer.bfloat16(), given).reason
        packed = pack_padded_sequence(one_step, torch.ones(3))
        assert "bfloat16 weights" in fusedrnn.explain(fusedrnn.LSTM(4, 7), packed).reason


def test_explain_refuses_what_is_no_input():
    with pytest.raises(ValueError, match="LSTM: expected input of 2 or 3 dimensions, got 1"):
        fusedrnn.explain(fusedrnn.LSTM(4, 7), torch.randn(4))


def test_a_fallback_warns_once_and_says_why():
    module, x = fusedrnn.LSTM(4, 7, dtype=torch.complex64), torch.randn(5, 3, 4, dtype=torch.complex64)
    explanation = fusedrnn.explain(module, x)
    assert explanation.implementation != "cpu"
    with pytest.warns(UserWarning, match=re.escape(explanation.reason)):
        module(x)
    module(x)  # were it said again, this would fail: warnings are errors in these tests


def test_explain_does_not_run_the_layer():
    module, x = fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append("hook"))
    module.forward = lambda *_: calls.append("forward")
    state = torch.get_rng_state()
    fusedrnn.explain(module, x)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
