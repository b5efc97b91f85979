"""What torch offers around modules: parametrizations, pruning, files, devices, checkpointing, hooks, quantisation."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.benchmark
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn

LAYERS = ("RNN", "LSTM", "GRU")
NAMES = pytest.mark.parametrize("name", LAYERS)


def first(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else first(result[0])


def results(module: torch.nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    y = first((call or module)(x))
    module.zero_grad()
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


# --- other weights in the weights' place ------------------------------------------------------------
REPARAMETRIZED = {
    "tanh": lambda module, name: parametrize.register_parametrization(module, name, torch.nn.Tanh()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": torch.nn.utils.weight_norm,
    "old spectral norm": torch.nn.utils.spectral_norm,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", REPARAMETRIZED)
@pytest.mark.parametrize("name", [*LAYERS, "GRUCell"])
def test_reparametrized_weights(name, change):
    """In eval mode, where a spectral norm takes no step at each look at it."""
    found = []
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for library in (fusedrnn, torch.nn):
        torch.manual_seed(0)
        module = getattr(library, name)(4, 7, dtype=torch.float64)
        REPARAMETRIZED[change](module, "weight_hh" if name.endswith("Cell") else "weight_hh_l0")
        found.append(results(module.eval(), x[0] if name.endswith("Cell") else x))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@NAMES
def test_training_with_weight_norm(name):
    """The optimiser moves the parametrization's own parameters, and the next step sees it."""
    layer = parametrizations.weight_norm(getattr(fusedrnn, name)(4, 7), "weight_hh_l0")
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.1), torch.randn(5, 3, 4)
    before = layer(x)[0].detach()
    layer(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x)[0], before)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert layer(x)[0].shape == before.shape


# --- files, devices, dtypes -------------------------------------------------------------------------


@NAMES
def test_state_dict_through_files(name, tmp_path):
    ours, theirs, x = getattr(fusedrnn, name)(4, 7), getattr(torch.nn, name)(4, 7), torch.randn(5, 3, 4)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(results(fusedrnn.convert(theirs), x), results(ours, x))


def test_whole_module_through_weights_only():
    """Of a pickled module torch.load asks which classes are trusted."""
    layer, x, file = fusedrnn.GRU(4, 7), torch.randn(5, 3, 4), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], layer(x)[0])


@NAMES
def test_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, other, x = getattr(fusedrnn, name)(4, 7), getattr(fusedrnn, name)(4, 7), torch.randn(5, 3, 4)
    safetensors.save_model(ours, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert_equal(results(other, x), results(ours, x))


@NAMES
def test_meta_device(name):
    source, x = getattr(fusedrnn, name)(4, 7, 2), torch.randn(5, 3, 4)
    with torch.device("meta"):
        empty = getattr(fusedrnn, name)(4, 7, 2)
        x_there = torch.empty(5, 3, 4)
        assert empty(x_there)[0].shape == (5, 3, 7)
        given = {"lengths": torch.ones(3, dtype=torch.int64), "resets": torch.zeros(5, 3, dtype=torch.bool)}
        y, _, states = empty(x_there, return_all_states=True, **given)
        assert y.shape == (5, 3, 7)
        assert (states[0] if name == "LSTM" else states).shape == (2, 5, 3, 7)
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    empty.load_state_dict(source.state_dict(), assign=True)
    assert_equal(results(filled, x), results(source, x))
    assert_equal(results(empty, x), results(source, x))


@NAMES
def test_default_device_and_dtype(name):
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("cpu")
    try:
        layer, x = getattr(fusedrnn, name)(4, 7), torch.randn(5, 3, 4)
        with torch.no_grad():
            y = layer(x)[0]
        assert y.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(y, layer(x)[0])


# --- what watches forward and backward ----------------------------------------------------------------


@NAMES
def test_activation_checkpointing(name):
    layer, x = getattr(fusedrnn, name)(4, 7, 2, bidirectional=True), torch.randn(5, 3, 4)
    for reentrant in (False, True):
        recomputed = results(layer, x, lambda x, r=reentrant: checkpoint(layer, x, use_reentrant=r))
        assert_equal(recomputed, results(layer, x))


@NAMES
def test_saved_tensors_on_the_host_and_anomalies(name):
    layer, x = getattr(fusedrnn, name)(4, 7, 2, bidirectional=True), torch.randn(5, 3, 4)
    expected = results(layer, x)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(results(layer, x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is on
        with torch.autograd.detect_anomaly():
            assert_equal(results(layer, x), expected)
            with pytest.raises(RuntimeError, match="Function 'RecurrenceBackward' returned nan"):
                layer(x)[0].backward(torch.full((5, 3, 14), float("nan")))


def test_hooks():
    layer, x, seen = fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4, requires_grad=True), []
    layer.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    layer.register_forward_hook(lambda _, __, result: (result[0] + 1, result[1]))
    layer.register_full_backward_hook(lambda _, grad_input, __: seen.append(grad_input[0]))
    layer.weight_hh_l0.register_hook(lambda gradient: gradient * 3)
    layer.bias_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    y, _ = layer(x)
    plain = fusedrnn.LSTM(4, 7)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(y, plain(x * 2)[0] + 1)
    y.sum().backward()
    plain(x.detach() * 2)[0].sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, plain.weight_hh_l0.grad * 3)
    assert {tuple(t.shape) for t in seen} == {(28,), (5, 3, 4)}


def test_subclass():
    class Scaled(fusedrnn.LSTM):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, input, hx=None):
            y, state = super().forward(input, hx)
            return y * self.scale, state

    layer, x = Scaled(4, 7), torch.randn(5, 3, 4)
    plain = fusedrnn.LSTM(4, 7)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(copy.deepcopy(layer)(x)[0], plain(x)[0] * 2)


def test_weights_in_the_flat_list():
    """Public code puts others there for the length of a call, which torch.nn then uses."""

    def dropping(base: type) -> type:
        class DropConnect(base):
            def forward(self, input, hx=None):
                kept = self._flat_weights
                names = zip(kept, self._flat_weights_names, strict=True)
                self._flat_weights = [F.dropout(w) if name.startswith("weight_hh") else w for w, name in names]
                try:
                    return super().forward(input, hx)
                finally:
                    self._flat_weights = kept

        return DropConnect

    for name in "RNN", "LSTM", "GRU":
        ours, theirs = (dropping(getattr(library, name))(4, 7, 2) for library in (fusedrnn, torch.nn))
        theirs.load_state_dict(ours.state_dict())
        x, found = torch.randn(5, 3, 4), []
        for layer in ours, theirs:
            torch.manual_seed(1)
            y, _ = layer(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [*layer.parameters()])])
        torch.testing.assert_close(*found)
        assert not torch.allclose(found[0][0], super(type(ours), ours).forward(x)[0])

    layer, x = fusedrnn.GRU(4, 7), torch.randn(5, 3, 4)
    layer._flat_weights[1] = torch.zeros(21, 7)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x)[0], layer(x)[0])
    wanted = copy.deepcopy(layer)  # whose list is that of its own parameters
    zeros = {"weight_hh_l0": torch.zeros(21, 7)}
    assert torch.equal(layer(x)[0], torch.func.functional_call(wanted, zeros, (x,))[0])
    with torch.no_grad():
        assert torch.equal(layer(x)[0], layer.stream(3)(x))
    layer.weight_ih_l0 = torch.nn.Parameter(wanted.weight_ih_l0.detach().clone())  # and the list is made anew
    assert torch.equal(layer(x)[0], wanted(x)[0])


def test_weights_that_were_in_the_flat_list_before():
    """A parameter that comes back, after another or a parametrization, is what is used and trained."""
    x = torch.randn(5, 3, 4)
    for forget in False, True:
        layer = fusedrnn.LSTM(4, 7)
        first, second = layer.weight_hh_l0, torch.nn.Parameter(torch.randn(28, 7))
        layer.weight_hh_l0 = second
        layer(x)
        if forget:
            del layer.weight_hh_l0
            layer.register_parameter("weight_hh_l0", first)
        else:
            layer._parameters["weight_hh_l0"] = first
        layer(x)[0].sum().backward()
        assert first.grad is not None
        assert second.grad is None

    layer = fusedrnn.LSTM(4, 7)
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight_hh_l0 = torch.zeros(28, 7)
    replica = copy.copy(layer)
    del replica._parameters  # as DataParallel makes one
    replica._parameters = dict(layer._parameters)
    replica.weight_hh_l0 = torch.nn.Parameter(torch.zeros(28, 7))
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None
    assert layer._flat_weight_refs[1]() is layer.weight_hh_l0

    layer = parametrizations.weight_norm(fusedrnn.LSTM(4, 7), "weight_hh_l0")
    with torch.no_grad():
        layer.weight_hh_l0 = torch.randn(28, 7)
    layer(x)
    copy.deepcopy(layer.requires_grad_(False)).requires_grad_()
    layer.requires_grad_()
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None
    assert layer._flat_weights[1] is layer.weight_hh_l0  # and the next call takes the short way


def test_weights_made_in_inference_mode_under_autocast():
    with torch.inference_mode():
        layer = fusedrnn.GRU(4, 7).requires_grad_(False)
    x = torch.randn(5, 3, 4, requires_grad=True)
    with torch.autocast("cpu"):
        layer(x)[0].sum().backward()
    assert x.grad.isfinite().all()


def test_counting_only_the_backward_of_a_checkpoint():
    layer, x = fusedrnn.GRU(4, 64), torch.randn(10, 4, 4, requires_grad=True)
    lengths = torch.tensor([10, 2, 3, 1])
    y = checkpoint(lambda x: layer(x, lengths=lengths)[0], x, use_reentrant=False)
    with FlopCounterMode(display=False):
        y.sum().backward()
    assert x.grad.isfinite().all()


# --- tools that know torch.nn's classes -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deprecated")  # all of it
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dynamic_quantisation_after_revert(name):
    """torch.ao finds the layers by their exact type: ours it leaves as they are, reverted ones it quantises."""
    quantize, x = torch.ao.quantization.quantize_dynamic, torch.randn(5, 3, 4)
    model = torch.nn.Sequential(getattr(fusedrnn, name)(4, 7))
    assert torch.equal(quantize(copy.deepcopy(model))(x)[0], model(x)[0])
    quantized = quantize(fusedrnn.revert(model))
    assert type(quantized[0]).__module__.startswith("torch.ao")
    assert quantized(x)[0].shape == (5, 3, 7)


def test_torch_benchmark_and_summary():
    layer, x = fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4)
    timer = torch.utils.benchmark.Timer("layer(x)", globals={"layer": layer, "x": x})
    assert timer.timeit(3).median > 0
    torchinfo = pytest.importorskip("torchinfo")
    mine, theirs = (torchinfo.summary(m, (5, 3, 4), verbose=0) for m in (layer, torch.nn.LSTM(4, 7)))
    assert (mine.total_params, mine.total_mult_adds) == (theirs.total_params, theirs.total_mult_adds)


USER = """
import torch
import fusedrnn

class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = fusedrnn.LSTM(4, 7, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)[0]
        return y

model: Tagger = fusedrnn.convert(Tagger())
layer: torch.nn.GRU = fusedrnn.GRU(4, 7)
reason: str = fusedrnn.explain(layer, torch.zeros(1, 1, 4)).reason
"""
MISTAKES = """
import fusedrnn

fusedrnn.RNNCell("4", 7)
fusedrnn.GRUCell(4)
fusedrnn.convert(3)
"""


def test_types_of_a_users_file(tmp_path):
    """mypy --strict sees torch.nn's constructors and the types of our functions."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "user.py"), str(tmp_path / "mistakes.py")]
    said = subprocess.run(command, timeout=300, capture_output=True, text=True).stdout
    assert "user.py" not in said, said
    assert [f"mistakes.py:{line}: error" in said for line in (4, 5, 6)] == [True] * 3, said


@pytest.mark.parametrize("name", [*LAYERS, *(name + "Cell" for name in LAYERS)])
def test_counted_operations(name):
    """As many as torch.nn's, whose LSTM and cells' backward are not counted, or not all of it."""
    x = torch.randn(3, 8) if name.endswith("Cell") else torch.randn(5, 3, 8)
    gates = {"R": 1, "L": 4, "G": 3}[name[0]]
    of_input, of_state = (2 * x.shape[:-1].numel() * gates * 16 * size for size in (8, 16))
    to_hx = 2 * 3 * gates * 16 * 16
    counts = {}
    for library in torch.nn, fusedrnn:
        module, given = getattr(library, name)(8, 16), x.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = first(module(given))
            forward = counter.get_total_flops()
            y.sum().backward()
        counts[library] = [forward, counter.get_total_flops() - forward]
    assert counts[fusedrnn] == [of_input + of_state, 2 * of_input + 2 * of_state - to_hx]
    if name in ("RNN", "GRU"):
        assert counts[fusedrnn] == counts[torch.nn]


def test_counted_operations_of_biases_alone():
    """Only what goes back through W_hh, from the last step to the first."""
    layer = fusedrnn.GRU(8, 16, bidirectional=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("bias"))
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(torch.randn(5, 3, 8))
        forward = counter.get_total_flops()
        y.sum().backward()
    assert counter.get_total_flops() - forward == 2 * 4 * 3 * 2 * 3 * 16 * 16
