"""`convert` and `revert` change the class of modules in place; `explain` says what would run, and why."""

from __future__ import annotations

import copy
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


@every_name
def test_a_subclass_is_left_alone_and_named(name):
    theirs = type("Mine", (getattr(torch.nn, name),), {})
    model = torch.nn.ModuleDict({"outer": torch.nn.Sequential(torch.nn.Linear(1, 1), theirs(4, 7))})
    with pytest.warns(UserWarning, match=r"outer\.1"):
        fusedrnn.convert(model)
    assert type(model["outer"][1]) is theirs


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
