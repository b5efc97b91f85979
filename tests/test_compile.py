"""Layers and cells under torch.compile: one graph, one node a layer, the numbers of an eager call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import _dispatch

pytest.importorskip("fusedrnn._C", exc_type=ImportError)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]

LAYERS = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
CELLS = pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(torch.nn.Module):
    """A recurrent layer between two operations whose result is the same number however they are compiled."""

    def __init__(self, library, name: str, **options) -> None:
        super().__init__()
        self.layers = getattr(library, name)(4, 7, **options)

    def forward(self, x: torch.Tensor, hx=None) -> torch.Tensor:
        return torch.relu(self.layers(torch.relu(x), hx)[0])


def results(call, model: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of inputs and parameters."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = call(*inputs)
    y = y if isinstance(y, torch.Tensor) else y[-1]
    return [y, *torch.autograd.grad(y.square().sum(), [*inputs, *model.parameters()])]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)


def operators(graph: torch.fx.GraphModule) -> list[str]:
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("fusedrnn.")]


@LAYERS
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_one_graph_with_one_node_a_layer(name, options):
    """Two graphs at most for any T and B: torch makes sizes dynamic when it sees them change."""
    model = Model(fusedrnn, name, **options)
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for T, B in ((5, 3), (9, 2), (300, 4), (2, 6)):
        x = torch.randn(T, B, 4)
        assert_same(results(compiled, model, x), results(model, model, x))
    assert compiler.frame_count <= 2
    for graph in compiler.graphs:
        assert operators(graph) == ["fusedrnn.recurrence_forward.default"] * options.get("num_layers", 1)


@LAYERS
def test_torch_breaks_the_graph_at_its_own(name):
    """Then as before: what is allowed to fusedrnn's layers changes nothing for others."""
    x = torch.randn(5, 3, 4)
    torch.compile(Model(fusedrnn, name), fullgraph=True, backend="eager")(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU"):
        torch.compile(Model(torch.nn, name), fullgraph=True, backend="eager")(x)


@CELLS
def test_cells(name):
    cell, x = getattr(fusedrnn, name)(4, 7), torch.randn(3, 4)
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, backend=compiler)
    assert_same(results(compiled, cell, x), results(cell, cell, x))
    assert operators(compiler.graphs[0]) == ["fusedrnn.step.default"]


def test_machine_code():
    """inductor, torch.compile's default, forward and in training."""
    model = Model(fusedrnn, "LSTM", dropout=0.5, num_layers=2).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T, B in ((5, 3), (9, 2)):
        x = torch.randn(T, B, 4)
        assert_same(results(compiled, model, x), results(model, model, x))
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


@LAYERS
def test_given_state(name):
    model, x, h = Model(fusedrnn, name), torch.randn(5, 3, 4), torch.randn(1, 3, 7)

    def call(module):
        return lambda x, h: module(x, (h, torch.zeros_like(h)) if name == "LSTM" else h)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(call(compiled), model, x, h), results(call(model), model, x, h))


def test_unbatched_and_autocast():
    model, x = Model(fusedrnn, "GRU"), torch.randn(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(compiled, model, x), results(model, model, x))


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed(enforce_sorted):
    """A packed sequence comes into one graph and leaves it; torch does not trace its own functions that make one."""
    layer = fusedrnn.LSTM(4, 7, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 3, 1], [4, 4, 2, 1]):
        lengths = lengths if enforce_sorted else lengths[::-1]
        x = torch.randn(max(lengths), len(lengths), 4)
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)

        def call(module, packed=packed):
            def outputs(data: torch.Tensor) -> torch.Tensor:
                y, states = module(packed._replace(data=data))
                return torch.cat([y.data.flatten(), *(state.flatten() for state in states)])

            return outputs

        assert_same(results(call(compiled), layer, packed.data), results(call(layer), layer, packed.data))


def test_subclass():
    class Residual(fusedrnn.GRU):
        def forward(self, input, hx=None):
            y, h_n = super().forward(input, hx)
            return y + input, h_n

    layer, x = Residual(4, 4), torch.randn(5, 3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], layer(x)[0])


def test_torch_func_inside():
    layer, x = fusedrnn.GRU(4, 7), torch.randn(6, 5, 3, 4)

    def batch(x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda sequence: layer(sequence)[0])(x)

    assert torch.equal(torch.compile(batch, fullgraph=True, backend="aot_eager")(x), batch(x))


@LAYERS
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. forward-mode")
def test_forward_mode_inside(name):
    layer, x, tangent = getattr(fusedrnn, name)(4, 7), torch.randn(5, 3, 4), torch.randn(5, 3, 4)

    def slope(x: torch.Tensor, tangent: torch.Tensor):
        return torch.func.jvp(lambda x: layer(x)[0], (x,), (tangent,))

    torch.testing.assert_close(torch.compile(slope, fullgraph=True, backend="aot_eager")(x, tangent), slope(x, tangent))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. forward-mode")
def test_dual_numbers_inside(name):
    """A graph enters forward mode without telling Python."""
    module = getattr(fusedrnn, name)(4, 7)
    x, tangent = (torch.randn((5, 3, 4) if name == "LSTM" else (3, 4)) for _ in range(2))

    def slope(x: torch.Tensor, tangent: torch.Tensor):
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, tangent))
            return forward_ad.unpack_dual(y[0] if name == "LSTM" else y)

    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(x, tangent)), tuple(slope(x, tangent)))


@pytest.mark.parametrize("given", [{}, {"lengths": torch.tensor([3, 0, 5])}], ids=["full", "lengths"])
def test_all_cell_states(given):
    """On the kernels, with their gradients: a fallback would be an error here."""
    layer, x = fusedrnn.LSTM(4, 7, 2, bidirectional=True), torch.randn(5, 3, 4)
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)

    def call(module):
        def states(x: torch.Tensor) -> torch.Tensor:
            y, _, (hidden, cells) = module(x, **given, return_all_states=True)
            return torch.cat([y.flatten(), hidden.flatten(), cells.flatten()])

        return states

    assert_same(results(call(compiled), layer, x), results(call(layer), layer, x))
    assert operators(compiler.graphs[0]) == ["fusedrnn.recurrence_forward.default"] * 2


@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. all cell states")
def test_all_cell_states_of_a_gradient_inside():
    layer, x = fusedrnn.LSTM(4, 7), torch.randn(5, 3, 4)

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: layer(x, return_all_states=True)[2][1].square().sum())(x)

    torch.testing.assert_close(torch.compile(slope, fullgraph=True, backend="aot_eager")(x), slope(x))


def test_questions_about_the_gpu_are_answered_while_tracing(monkeypatch):
    class Extension:
        def architectures(self) -> str:
            return "9.0a"

    monkeypatch.setattr(_dispatch, "cuda_extension", Extension())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if _dispatch._tf32_allowed() else 3) * (5 if _dispatch._why_no_kernels(0) else 7)

    x = torch.ones(1)
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="eager")(x), ask(x))


def test_import_does_not_import_the_compiler():
    """It takes seconds."""
    code = "import sys, fusedrnn; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
