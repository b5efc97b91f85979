"""torch.onnx.export: our layers become ONNX's own nodes, which onnxruntime runs to the same numbers."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch.export import Dim
from torch.utils import _pytree

import fusedrnn
from fusedrnn import _autograd

pytest.importorskip("fusedrnn._C", exc_type=ImportError)
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from fusedrnn.onnx import TRANSLATIONS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # torch's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporter's libraries
]

SHAPES = ((5, 3), (9, 2), (1, 1))
ANY = Dim.DYNAMIC


def export(model: torch.nn.Module, *inputs: torch.Tensor, dynamic) -> tuple[Counter, onnxruntime.InferenceSession]:
    """How many nodes of each kind, and a session."""
    program = torch.onnx.export(
        model.eval(),
        inputs,
        dynamic_shapes=dynamic,
        dynamo=True,
        verbose=False,
        custom_translation_table=TRANSLATIONS,
    )
    model_proto = program.model_proto
    return Counter(node.op_type for node in model_proto.graph.node), onnxruntime.InferenceSession(
        model_proto.SerializeToString()
    )


def assert_runs_alike(
    session: onnxruntime.InferenceSession, model: torch.nn.Module, *inputs: torch.Tensor, atol: float = 1e-5
) -> None:
    names = [each.name for each in session.get_inputs()]
    results = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    for mine, theirs in zip(results, _pytree.tree_leaves(model(*inputs)), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers(name, options):
    model = getattr(fusedrnn, name)(4, 7, **options)
    kinds, session = export(model, torch.randn(5, 3, 4), dynamic=({0: ANY, 1: ANY},))
    assert kinds[name] == options.get("num_layers", 1)
    assert not kinds.keys() & {"Loop", "Scan", "Sigmoid", "Tanh"}
    for T, B in SHAPES:
        assert_runs_alike(session, model, torch.randn(T, B, 4))


@pytest.mark.parametrize("options", [{"nonlinearity": "relu"}, {"bias": False}], ids=str)
def test_options(options):
    model = fusedrnn.RNN(4, 7, bidirectional=True, **options)
    _, session = export(model, torch.randn(5, 3, 4), dynamic=({0: ANY, 1: ANY},))
    assert_runs_alike(session, model, torch.randn(6, 2, 4))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name):
    cell = getattr(fusedrnn, name)(4, 7)
    kinds, session = export(cell, torch.randn(3, 4), dynamic=({0: ANY},))
    assert kinds[name.removesuffix("Cell")] == 1
    assert_runs_alike(session, cell, torch.randn(5, 4))


class OfLengths(torch.nn.Module):
    """One bidirectional layer over rows of different lengths, from a state."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell, self.layer = cell, getattr(fusedrnn, cell.upper())(4, 7, bidirectional=True)

    def forward(self, x: torch.Tensor, h: torch.Tensor, lengths: torch.Tensor):
        c = h * 2 if self.cell == "lstm" else None
        results = _autograd.recurrence(self.cell, x, h, c, self.layer._weights(), lengths=lengths)
        return [t for t in results if t is not None]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_lengths(cell):
    model = OfLengths(cell)
    given = (torch.randn(5, 3, 4), torch.randn(2, 3, 7), torch.tensor([5, 2, 1]))
    kinds, session = export(model, *given, dynamic=({0: ANY, 1: ANY}, {1: ANY}, {0: ANY}))
    assert kinds[cell.upper()] == 1
    assert_runs_alike(session, model, *given)
    assert_runs_alike(session, model, torch.randn(6, 2, 4), torch.randn(2, 2, 7), torch.tensor([3, 6]))
    assert_runs_alike(session, model, torch.randn(6, 2, 4), torch.randn(2, 2, 7), torch.tensor([0, 6]))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bfloat16(name):
    """ONNX's nodes have one type, which onnxruntime knows as float32 only."""
    layer = getattr(fusedrnn, name)(4, 7).bfloat16()
    x = torch.randn(5, 3, 4)
    _, session = export(InBfloat16(layer), x, dynamic=None)
    assert_runs_alike(session, InBfloat16(layer), x, atol=torch.finfo(torch.bfloat16).eps)


class InBfloat16(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.bfloat16())[0].float()


class WithLengths(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fusedrnn.LSTM(4, 7, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.rnn(x, lengths=lengths)[0]


def export_by_trace(model: torch.nn.Module, *inputs: torch.Tensor, **options) -> onnxruntime.InferenceSession:
    """By the exporter before torch.export's: it knows torch's operators only, and gives a lone layer every argument."""
    file = io.BytesIO()
    torch.onnx.export(
        torch.nn.Sequential(model).eval() if len(inputs) == 1 else model.eval(), inputs, file, dynamo=False, **options
    )
    return onnxruntime.InferenceSession(file.getvalue())


@pytest.mark.filterwarnings("ignore")  # torch says much about tracing
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_layers_by_trace(name, options):
    model = getattr(fusedrnn, name)(4, 7, **options)
    session = export_by_trace(model, torch.randn(5, 3, 4), input_names=["x"], dynamic_axes={"x": {0: "T", 1: "B"}})
    for T, B in SHAPES:
        assert_runs_alike(session, model, torch.randn(T, B, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_by_trace(name):
    model = getattr(fusedrnn, name)(4, 7)
    session = export_by_trace(model, torch.randn(3, 4))
    assert_runs_alike(session, model, torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore")
def test_lengths_by_trace():
    """Unrolled over the steps of the example, for any lengths."""
    model = WithLengths()
    session = export_by_trace(model, torch.randn(5, 3, 4), torch.tensor([5, 2, 3]))
    assert_runs_alike(session, model, torch.randn(5, 3, 4), torch.tensor([1, 5, 4]))


def test_what_onnx_lacks():
    class Resets(torch.nn.Module):
        def forward(self, x, resets):
            return _autograd.recurrence("gru", x, x.new_zeros(1, 3, 7), None, list(layer._weights()), resets=resets)[0]

    layer = fusedrnn.GRU(4, 7).requires_grad_(False)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="cannot reset their state"):
        export(Resets(), torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool), dynamic=None)


@pytest.mark.filterwarnings("ignore")
def test_a_projection_is_refused():
    """torch makes of torch.nn's an LSTM node whose states onnxruntime finds of the wrong shape."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="ONNX's LSTM has no projection"):
        export(fusedrnn.LSTM(4, 7, proj_size=3), torch.randn(5, 3, 4), dynamic=None)
