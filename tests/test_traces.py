"""Graphs that others make: torch.jit.trace, torch.fx, make_fx. torch.compile and export have files of their own."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from test_direct import CELLS, flat
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedrnn

pytest.importorskip("fusedrnn._C", exc_type=ImportError)

MODULES = pytest.mark.parametrize("name", [*CELLS, *(name + "Cell" for name in CELLS)])


def make_input(name: str, steps: int = 5, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 4) if name.endswith("Cell") else torch.randn(steps, rows, 4)


def gradients(results: list[torch.Tensor], of: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(sum(r.sin().sum() for r in results), of))


def assert_close(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for mine, other in zip(ours, others, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore")  # torch says much about tracing
@MODULES
def test_jit_trace(name):
    """Saved and loaded, for other numbers of steps and rows, and differentiable."""
    module = getattr(fusedrnn, name)(4, 7)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, make_input(name)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = make_input(name, 9, 2)
    ours, others = flat(module(x)), flat(loaded(x))
    assert_close(others, ours)
    named = dict(loaded.named_parameters())
    of_loaded = gradients(others, [named[key] for key, _ in module.named_parameters()])
    assert_close(of_loaded, gradients(ours, list(module.parameters())))


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:.*torch.jit.script compiles")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@MODULES
def test_jit_script(name, options):
    """torch.nn's module is compiled, with the same Parameters, and leaves its place in the model that was given."""
    if options and name.endswith("Cell"):
        pytest.skip("an option of layers")
    module = getattr(fusedrnn, name)(4, 7, **options)
    model = torch.nn.Sequential(module)
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    x = make_input(name)
    for other in scripted, torch.jit.load(file):
        assert_close(flat(other(x)), flat(module(x)))
    assert type(model[0]) is getattr(torch.nn, name)
    assert all(a is b for a, b in zip(model.parameters(), module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_jit_script_says_what_it_compiles():
    """Each time; and where it fails, the model is as good as new after convert."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fusedrnn.GRU(4, 7)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.rnn(x, lengths=lengths)[0]

    model, given = Model(), (make_input("GRU"), torch.tensor([2, 5, 1]))
    before = model(*given)
    warns = partial(pytest.warns, fusedrnn.FallbackWarning, match="rnn.GRU in place of .*fusedrnn.convert")
    with warns(), pytest.raises(RuntimeError, match="lengths"):
        torch.jit.script(model)
    assert torch.equal(fusedrnn.convert(model)(*given), before)
    with warns():
        model.rnn.__prepare_scriptable__()


def test_jit_script_gets_a_converted_subclass_as_it_was():
    class Mine(torch.nn.GRU):
        """With torch.nn's forward."""

    module = fusedrnn.convert(Mine(4, 7))
    with pytest.warns(fusedrnn.FallbackWarning, match="Mine in place of .*fusedrnn.convert"):
        assert type(module.__prepare_scriptable__()) is Mine


def test_jit_script_leaves_other_classes_alone():
    class Own(fusedrnn.GRU):
        """Whose forward may be another."""

    own = Own(4, 7)
    assert own.__prepare_scriptable__() is own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", [torch.jit.trace, make_fx], ids=["jit", "fx"])
def test_lengths_in_a_trace(trace):
    """Nobody looks at their values, which would become part of it: here four of five steps are padding."""
    layer = fusedrnn.GRU(4, 80).requires_grad_(False)

    def run(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return layer(x, lengths=lengths)[0]

    example = torch.randn(5, 4, 4), torch.tensor([5, 1, 1, 1])
    traced = trace(run)(*example) if trace is make_fx else trace(run, example)
    for rows in ([5, 1, 2, 1],) if trace is make_fx else ([5, 1, 2, 1, 3], [1] * 8, [5, 2]):
        given = torch.randn(5, len(rows), 4), torch.tensor(rows)
        torch.testing.assert_close(traced(*given), run(*given))


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.filterwarnings("ignore")  # as many as torch.compile itself gives
@MODULES
def test_compiled_autograd(name, options):
    if name.endswith("Cell") and options:
        pytest.skip("an option of layers")
    module, x = getattr(fusedrnn, name)(4, 7, **options), make_input(name)
    expected = gradients(flat(module(x)), list(module.parameters()))
    loss = sum(r.sin().sum() for r in flat(module(x)))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="aot_eager")(loss)
    assert_close([p.grad for p in module.parameters()], expected)


@MODULES
def test_fx_makes_a_node_of_a_module(name):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = getattr(fusedrnn, name)(4, 7)

        def forward(self, x: torch.Tensor) -> object:
            return self.recurrent(x)

    model, x = Model(), make_input(name)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes if node.op != "placeholder"] == ["call_module", "output"]
    assert_close(flat(graph(x)), flat(model(x)))


def test_fx_keeps_lengths():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = fusedrnn.GRU(4, 7)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> object:
            return self.gru(x, lengths=lengths)

    model, x, lengths = Model(), make_input("GRU"), torch.tensor([5, 2, 0])
    assert_close(flat(torch.fx.symbolic_trace(model)(x, lengths)), flat(model(x, lengths)))


@MODULES
def test_the_graph_of_make_fx_is_differentiable(name):
    module = getattr(fusedrnn, name)(4, 7)

    def run(x: torch.Tensor) -> torch.Tensor:
        return x.sum() + sum(r.sin().sum() for r in flat(module(x)))

    graph, x = make_fx(run)(make_input(name)), make_input(name).requires_grad_()
    assert_close(gradients([graph(x)], [x]), gradients([run(x)], [x]))


@pytest.mark.parametrize("name", [name + "Cell" for name in CELLS])
def test_checkpointing_may_keep_an_operator_s_results(name):
    cell, x = getattr(fusedrnn, name)(4, 7), torch.randn(3, 4, requires_grad=True)

    def keep(_: object, operator: object, *__: object, **___: object) -> CheckpointPolicy:
        kept = "fusedrnn" in str(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep)
    results = flat(checkpoint(cell, x, use_reentrant=False, context_fn=contexts))
    assert_close(gradients(results, [x]), gradients(flat(cell(x)), [x]))
