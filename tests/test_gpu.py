"""The kernels on a GPU: every case against the oracle, and what only a device can show. Skipped where there is none."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
# torch's own products are refused without it in the deterministic mode in which conftest.py runs every test.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from cases import (
    CELLS,
    CORNER,
    REGULAR,
    ZERO,
    Case,
    Data,
    expected,
    for_all_cells,
    make_data,
    run_module,
    run_oracle,
    sizes,
)
from hostcuda import Schedules
from numerics import FAST, assert_all_as_good, assert_long_memory
from test_hostcuda import BEYOND, OPTIONS, SHAPES, WITHIN, calls
from test_reference import Call, run_recurrence
from test_reference import run_oracle as run_oracle_of_call

import fusedrnn
from fusedrnn import _autograd, _dispatch, _recompute, _reference

pytestmark = [
    pytest.mark.skipif(_dispatch.cuda_extension is None, reason=_dispatch.why_no_cuda),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single"),  # torch.nn's, in bfloat16
]

for_each_cell = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: Case(**kind).equations)


@pytest.fixture(autouse=True)
def no_tf32():
    """float32 is float32, unless a test says otherwise."""
    rnn, before = torch.backends.cudnn.rnn, torch.backends.cudnn.rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    yield rnn
    rnn.fp32_precision = before


def on_gpu(case: Case, library=fusedrnn, recompute: bool = False) -> dict[str, torch.Tensor]:
    """`run_module` there; the results are brought back."""
    data = make_data(case)
    there = Data(**{field.name: getattr(data, field.name).cuda() for field in fields(Data)})
    module = case.module(library).cuda()
    module.recompute = recompute
    results = run_module(module, case, there)
    return {name: value.cpu() for name, value in results.items()}


def check(case: Case) -> None:
    assert_all_as_good(on_gpu(case), *expected(case), case.torch_dtype)


@pytest.fixture(autouse=True, params=Schedules, ids=lambda schedules: schedules.name.lower())
def schedule(request):
    """The step schedule, which runs anything; each other, where it takes a case; and then the one that is chosen."""
    _dispatch.cuda_extension.use_schedules(int(request.param))
    yield request.param
    _dispatch.cuda_extension.use_schedules(int(Schedules.ALL))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", REGULAR + CORNER, ids=str)
def test_sizes(case, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.parametrize("case", [*OPTIONS, *ZERO], ids=str)
def test_options(case):
    check(case)


# More rows and units than a block, several chunks, many steps; shapes that torch.nn runs on cuDNN's own kernels.
LARGE = sizes((3, 70, 40, 1031), (30, 64, 128, 512), (3000, 2, 3, 20), (10, 256, 64, 1024), (40, 300, 20, 96))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [*LARGE, *(replace(c, bidirectional=True) for c in LARGE[:8])], ids=str)
def test_large(case, dtype):
    case = replace(case, dtype=dtype)
    truth = run_oracle(dict(case.module(torch.nn).named_parameters()), case, make_data(case))
    assert_all_as_good(on_gpu(case), on_gpu(case, torch.nn), truth, case.torch_dtype)


@for_each_cell
def test_tf32(kind, no_tf32):
    """Rounded as torch.nn rounds where its switch is on, and not at all where it is off."""
    case = Case(**kind, T=12, B=32, I=256, H=512)  # cuDNN's kernels for small layers do not round
    truth = run_oracle(dict(case.module(torch.nn).named_parameters()), case, make_data(case))
    exact = on_gpu(case)
    no_tf32.fp32_precision = "tf32"
    rounded = on_gpu(case)
    assert_all_as_good(rounded, on_gpu(case, torch.nn), truth, torch.float32)
    assert not torch.equal(rounded["y"], exact["y"])


def recurrence_on_gpu(cell, x, hx, cx, weights, batch_sizes, lengths, resets):
    def there(t):
        return None if t is None else t.cuda()

    y, h_n, c_n = _autograd.recurrence(
        cell, there(x), there(hx), there(cx), [w.cuda() for w in weights], batch_sizes, there(lengths), there(resets)
    )
    return y.cpu(), h_n.cpu(), None if c_n is None else c_n.cpu()


def check_rows(call: Call) -> None:
    ours, theirs = run_recurrence(recurrence_on_gpu, call), run_recurrence(_reference.recurrence, call)
    assert_all_as_good(ours, theirs, run_oracle_of_call(call), call.case.torch_dtype)


FEW = for_all_cells({"T": 8, "H": 8, "dtype": "bfloat16"}, {"T": 8, "H": 9, "bidirectional": True, "dtype": "float32"})


@pytest.mark.sanitize
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", ["padded", "packed", "lengths and resets"])
def test_small(name, case):
    """Every kernel, wide and narrow."""
    check_rows(calls(case)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("name", calls(Case()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"H{shape['H']}")
@for_each_cell
def test_rows(kind, shape, name, bidirectional, dtype):
    check_rows(calls(Case(**kind, **shape, bidirectional=bidirectional, dtype=dtype))[name])


@for_each_cell
def test_lengths_out_of_range_are_clamped(kind):
    """By a module, which does not wait to look at them, and by the kernels."""
    case = Case(**kind, T=9, B=6, H=8, bidirectional=True)
    beyond, within = (run_recurrence(recurrence_on_gpu, Call(case, lengths=rows)) for rows in (BEYOND, WITHIN))
    assert all(torch.equal(beyond[name], within[name]) for name in within)

    module, x = case.module(fusedrnn).cuda(), make_data(case).x.cuda()
    lengths = [torch.tensor(rows, device="cuda") for rows in (BEYOND, WITHIN)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ys = [module(x, lengths=rows)[0] for rows in lengths]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*ys)
    with pytest.raises(RuntimeError, match="expected lengths between 0 and 9"):
        module(x, lengths=lengths[0].cpu())


@for_each_cell
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_gradcheck(kind, bidirectional):
    layer = Case(**kind, bidirectional=bidirectional, dtype="float64").module(fusedrnn).cuda()
    x = torch.randn(3, 2, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        y, last = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)
        return (y, *last) if isinstance(last, tuple) else (y, last)

    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *weights), **FAST)


@for_each_cell
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_equal_from_run_to_run(kind, dtype):
    case = Case(**kind, T=20, B=37, I=65, H=130, bidirectional=True, dtype=dtype)
    first, again = on_gpu(case), on_gpu(case)
    assert all(torch.equal(first[name], again[name]) for name in first)


def layer_and_input(kind: dict, **options) -> tuple[torch.nn.Module, torch.Tensor]:
    """Of as many steps as every schedule takes."""
    case = Case(**kind, **{"T": 12, "B": 5, "I": 12, "H": 20} | options)
    return case.module(fusedrnn).cuda(), make_data(case).x.cuda()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")  # of the steps before
@for_each_cell
def test_cuda_graph(kind):
    """A training step is captured once and replayed on other numbers."""
    layer, x = layer_and_input(kind, layers=2, bidirectional=True)
    fixed = x.clone().requires_grad_()

    batch_sizes = torch.tensor([5] * 4 + [3] * 5 + [1] * 3)

    def step():
        y, _ = layer(fixed)
        packed, _ = layer(PackedSequence(fixed.flatten(0, 1)[: batch_sizes.sum()], batch_sizes))
        loss = y.square().sum() + packed.data.square().sum()
        return y, packed.data, *torch.autograd.grad(loss, [fixed, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        fixed.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(captured, step(), strict=True))


def test_lengths_on_the_host_are_refused_in_a_graph():
    layer, x = layer_and_input({"cell": "gru"})
    lengths = torch.full((x.size(1),), x.size(0)).pin_memory()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(x, lengths=lengths)  # what is asked of the device and of cuBLAS once, before the capture
    with torch.no_grad(), torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="expected lengths on cuda:0 in a CUDA graph, got them on the CPU"):
            layer(x, lengths=lengths)
        layer(x, lengths=x.new_full((x.size(1),), 2, dtype=torch.int64))


@for_each_cell
def test_side_stream(kind):
    layer, x = layer_and_input(kind)
    wanted, _ = layer(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y, _ = layer(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, wanted)


def test_layers_on_several_streams():
    """Each by itself may fill the GPU."""
    layer, x = layer_and_input({"cell": "lstm"}, T=100, B=16, H=1024, dtype="bfloat16")
    with torch.no_grad():
        wanted, _ = layer(x)
        torch.cuda.synchronize()
        streams, ys = [torch.cuda.Stream() for _ in range(3)], []
        for _ in range(4):
            for stream in streams:
                with torch.cuda.stream(stream):
                    ys.append(layer(x)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in ys)


@for_each_cell
def test_nothing_waits_for_the_gpu(kind):
    layer, x = layer_and_input(kind, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([12, 9, 9, 4, 1]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (x, packed):
            y, _ = layer(given)
            (y if isinstance(y, torch.Tensor) else y.data).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@for_each_cell
def test_backward_in_eval_mode(kind):
    layer, x = layer_and_input(kind)
    layer.eval()
    layer(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None


@for_each_cell
def test_double_backward(kind):
    layer, x = layer_and_input(kind)
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@for_each_cell
def test_recompute(kind, bidirectional, monkeypatch):
    """Of a packed batch the last chunk is one step, of fewer rows than the batch has."""
    monkeypatch.setattr(_recompute, "CHUNK", 4)
    case = Case(**kind, T=9, B=5, H=20, lengths=(2, 9, 4, 5, 1), bidirectional=bidirectional)
    assert_all_as_good(on_gpu(case, recompute=True), *expected(case), case.torch_dtype)


@pytest.mark.parametrize("hidden", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_long_memory(name, dtype, hidden):
    assert_long_memory(fusedrnn, name, dtype, hidden, 60, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@for_each_cell
def test_autocast(kind, dtype):
    layer, x = layer_and_input(kind)
    theirs = Case(**kind, I=12, H=20).module(torch.nn).cuda()
    with torch.autocast("cuda", dtype):
        y, _ = layer(x)
        assert y.dtype == dtype
        if dtype == torch.float16:  # torch.nn's layers know no other on a GPU, and stay float32
            assert theirs(x)[0].dtype == dtype
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    scaler.scale(y.float().sum()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("case", for_all_cells({"T": 70_000, "B": 1, "I": 2, "H": 8}), ids=str)
def test_many_steps(case):
    layer = case.module(fusedrnn).cuda()
    x = torch.randn(case.T, 1, 2, device="cuda")
    y, _ = layer(x)
    wanted, _ = case.module(torch.nn)(x.cpu())
    torch.testing.assert_close(y.cpu(), wanted, rtol=0, atol=1e-4)


def test_explain(schedule):
    layer, x = layer_and_input({"cell": "lstm"})
    assert fusedrnn.explain(layer, x).implementation == "cuda"
    assert "step schedule" in fusedrnn.explain(layer, x[:6]).reason
    chosen = {Schedules.ALL: "block", Schedules.SPLIT_GRID: "backward by the grid"}.get(schedule, schedule.name.lower())
    assert f"{chosen} schedule" in fusedrnn.explain(layer, x).reason
    assert "lone step" in fusedrnn.explain(layer, x[:1]).reason
    lengths = torch.ones(x.size(1), dtype=torch.int64, device="cuda")
    assert "step schedule" in fusedrnn.explain(layer, x[:1], lengths=lengths).reason
    assert "step schedule" in fusedrnn.explain(layer.double(), x.double()).reason


def test_mixed_devices_are_refused():
    layer, x = layer_and_input({"cell": "lstm"})
    with pytest.raises(RuntimeError, match="expected the weights on the input's device"):
        layer(x.cpu())
    with pytest.raises(RuntimeError, match="on the device of x"):
        torch.ops.fusedrnn.recurrence_forward(
            "lstm", x, x.new_zeros(1, 5, 20), torch.zeros(1, 5, 20), list(layer.parameters()), None, None, None, False
        )
