"""torch.export and AOTInductor: a layer is one operator in the program, for any T and B, and can be trained."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import fusedrnn

pytest.importorskip("fusedrnn._C", exc_type=ImportError)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]

SHAPES = ((5, 3), (9, 2), (1, 1), (30, 8))


class Model(torch.nn.Module):
    def __init__(self, name: str, **options) -> None:
        super().__init__()
        self.layers = getattr(fusedrnn, name)(4, 7, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(torch.relu(x))[0])


def export(model: torch.nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    any_size = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=(any_size,), strict=strict)


def operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in targets if target.startswith("fusedrnn.")]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_export(name, strict):
    model = Model(name, num_layers=2, bidirectional=True, batch_first=True)
    program = export(model, strict)
    assert operators(program) == ["fusedrnn.recurrence_forward.default"] * 2
    exported = program.module()
    for T, B in SHAPES:
        x = torch.randn(B, T, 4)
        assert torch.equal(exported(x), model(x))
        gradients = [torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (model, exported)]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_saved_program(tmp_path):
    model, x = Model("GRU"), torch.randn(8, 2, 4)
    torch.export.save(export(model), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells(name):
    cell = getattr(fusedrnn, name)(4, 7)
    program = torch.export.export(cell, (torch.randn(3, 4),), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert operators(program) == ["fusedrnn.step.default"]
    x = torch.randn(5, 4)
    mine, theirs = program.module()(x), cell(x)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[-1], theirs[-1])


RUN_PACKAGE = """
import sys, torch
import fusedrnn  # registers the operators
run, inputs, outputs = torch._inductor.aoti_load_package(sys.argv[1]), *torch.load(sys.argv[2])
sys.exit(not all(torch.equal(run(x), y) for x, y in zip(inputs, outputs, strict=True)))
"""


def test_package_in_another_process(tmp_path):
    """AOTInductor's package has machine code for the rest of the model and calls the operators by name."""
    model = Model("LSTM", bidirectional=True)
    package = torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(T, B, 4) for T, B in SHAPES]
    torch.save((inputs, [model(x).detach() for x in inputs]), tmp_path / "expected.pt")
    command = [sys.executable, "-c", RUN_PACKAGE, package, str(tmp_path / "expected.pt")]
    assert subprocess.run(command, timeout=120).returncode == 0
