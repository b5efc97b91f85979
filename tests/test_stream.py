"""Streams: the bits of the whole sequence however it is divided, and a state that can be reset, saved and restored."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _dispatch

LAYERS = ("RNN", "LSTM", "GRU")
needs_kernels = pytest.mark.skipif(_dispatch.extension is None, reason="without the extension, weights are not copied")


def flat(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def make(name: str, *sizes: int, steps: int = 40, rows: int = 2, **options):
    torch.manual_seed(0)
    layer = getattr(fusedrnn, name)(*(sizes or (4, 9, 2)), **options)
    x = torch.randn(steps, rows, layer.input_size, dtype=layer.weight_ih_l0.dtype)
    return layer, x


def assert_bits(one, other) -> None:
    assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


# Rows: one, two, those of a tile with a rest, more than a chunk takes. Units: a rest of a vector, an odd number
# of vectors, enough for two threads.
SHAPES = (
    (1, 5, 18, 1),
    (1, 33, 65, 2),
    (2, 20, 70, 2),
    (3, 16, 40, 3),
    (7, 9, 100, 1),
    (30, 5, 33, 2),
    (2, 64, 256, 2),
)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("isa")
def test_any_division_gives_the_same_bits(dtype, name, shape):
    rows, *sizes = shape
    layer, x = make(name, *sizes, rows=rows, dtype=dtype, bias=rows != 3)
    y, last = layer(x)  # with gradients: that training and inference agree is tested elsewhere
    step_by_step, by_chunks, whole = (layer.stream(rows) for _ in range(3))
    assert_bits(torch.stack([step_by_step(step) for step in x]), y)
    assert_bits(torch.cat([by_chunks(chunk) for chunk in x.split([1, 7, 2, 0, 29, 1])]), y)
    assert_bits(whole(x), y)
    for stream in (step_by_step, by_chunks, whole):
        assert_bits(stream.state, last)


@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("hidden", "rows", "steps"), [(191, 1, 20), (192, 1, 64), (511, 16, 4), (512, 1, 128), (512, 16, 8)]
)
@pytest.mark.usefixtures("isa")
def test_the_layer_gives_the_same_bits_from_some_rows_on(hidden, rows, steps, name):
    """As many rows × steps as Stream's docstring names."""
    layer, x = make(name, 8, hidden, steps=steps, rows=rows)
    assert_bits(layer.stream(rows)(x), layer(x)[0])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_halves_keep_float32_between_steps(name, rows, dtype):
    layer, x = make(name, 16, 70, 2, rows=rows, dtype=dtype)
    stream = layer.stream(rows)
    y, last = layer(x)
    assert_bits(torch.stack([stream(step) for step in x]), y)
    assert_bits(stream.state, last)
    assert all(value.dtype == torch.float32 for value in stream.state_dict().values())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
def test_batch_first_strides_and_a_first_state(name, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(_dispatch, "extension", None)
    layer, x = make(name, batch_first=True, rows=40, steps=3)
    hx = torch.randn(2, 2, 3, 9).unbind()
    hx = tuple(hx) if name == "LSTM" else hx[0]
    x = x.transpose(0, 1).contiguous().transpose(0, 1)[:, :, :]
    y, last = layer(x.contiguous(), hx)
    stream = layer.stream(3, hx)
    outputs = [stream(x[:, :10]), stream(x[:, 10]).unsqueeze(1), stream(x[:, 11:])]
    torch.testing.assert_close(torch.cat(outputs, 1), y)
    for one, other in zip(flat(stream.state), flat(last), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LAYERS)
def test_resets_by_row_and_within_a_chunk(name):
    layer, x = make(name)
    resets = torch.rand(40, 2) < 0.2
    y, _ = layer(x, resets=resets)
    by_mask, by_step, by_chunk = (layer.stream(2) for _ in range(3))
    stepped = []
    for step, mask in zip(x, resets, strict=True):
        by_mask.reset(mask)
        stepped.append(by_mask(step))
    assert_bits(torch.stack(stepped), torch.stack([by_step(*both) for both in zip(x, resets, strict=True)]))
    assert_bits(torch.stack(stepped), by_chunk(x, resets))
    assert_bits(torch.stack(stepped), y)
    for rows, kept in ((1, [0]), ([0], [1]), (torch.tensor([0, 1]), []), (None, [])):
        by_chunk(x)
        before = by_chunk.state_dict()
        by_chunk.reset(rows)
        for key, value in by_chunk.state_dict().items():
            assert torch.equal(value[:, kept], before[key][:, kept])
            assert not value[:, [row for row in range(2) if row not in kept]].any()


@pytest.mark.parametrize("name", LAYERS)
def test_state_saved_and_restored(name):
    layer, x = make(name)
    stream = layer.stream(2)
    stream(x[:10])
    saved, kept = stream.state_dict(), copy.deepcopy(stream.state_dict())
    expected = stream(x[10:])
    assert all(torch.equal(saved[key], kept[key]) for key in kept), "what was saved changes with the stream"
    for other in (stream, layer.stream(2)):
        other.load_state_dict(saved)
        assert_bits(other(x[10:]), expected)
    stream.load_state_dict(saved)
    y, _ = layer(x[10:], stream.state)
    torch.testing.assert_close(y, expected)


@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_the_last_refresh(name):
    layer, x = make(name)
    stream, saved = layer.stream(2), layer.stream(2).state_dict()
    before = stream(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    stream.load_state_dict(saved)
    assert_bits(stream(x), before)
    stream.refresh()
    stream.load_state_dict(saved)
    assert_bits(stream(x), layer(x)[0])
    del layer
    stream.reset()
    stream(x)  # the layer lives on with the stream


@needs_kernels
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("isa")
def test_projection(dtype, rows, bias):
    layer, x = make("LSTM", 4, 70, 2, proj_size=33, rows=rows, bias=bias, dtype=dtype)
    hx = tuple(torch.randn(2, rows, size, dtype=dtype) for size in (33, 70))
    stream, by_chunks = layer.stream(rows), layer.stream(rows)
    for one in stream, by_chunks:
        one.load_state_dict(dict(zip("hc", hx, strict=True)))
    y, last = layer(x, hx)
    assert_bits(torch.stack([stream(step) for step in x]), y)
    assert_bits(torch.cat([by_chunks(chunk) for chunk in x.split([7, 1, 32])]), y)
    assert_bits(stream.state, last)
    with torch.no_grad():
        layer.weight_hr_l0.mul_(2)
    stream.refresh()
    stream.load_state_dict(dict(zip("hc", hx, strict=True)))
    assert_bits(stream(x), layer(x, hx)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_neither_dropout_nor_gradients_nor_autocast(name):
    layer, x = make(name, dropout=0.5)
    expected, _ = layer.eval()(x)
    layer.train()
    stream = layer.stream(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stream(x.requires_grad_())
    assert_bits(y, expected)
    assert not y.requires_grad


def test_the_instruction_set_may_change_behind_a_stream():
    extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)
    layer, x = make("LSTM")
    stream, saved = layer.stream(2), layer.stream(2).state_dict()
    expected = stream(x)
    try:
        for name in extension.instruction_sets():
            extension.use(name)
            stream.load_state_dict(saved)
            assert_bits(stream(x), expected)
    finally:
        extension.use("")


Z = torch.zeros
MISTAKES = {
    "two directions": (lambda: fusedrnn.GRU(4, 9, bidirectional=True).stream(2), ValueError, "with one direction"),
    "no rows": (lambda: fusedrnn.GRU(4, 9).stream(0), ValueError, "batch_size of at least 1, got 0"),
    "half a row": (lambda: fusedrnn.GRU(4, 9).stream(1.5), ValueError, "batch_size of at least 1, got 1.5"),
    "rows": (lambda: fusedrnn.GRU(4, 9).stream(2)(Z(3, 4)), RuntimeError, r"step of shape \[2, 4\].*got \[3, 4\]"),
    "chunk": (
        lambda: fusedrnn.GRU(4, 9).stream(2)(Z(5, 2, 3)),
        RuntimeError,
        r"chunk \[steps, 2, 4\], got \[5, 2, 3\]",
    ),
    "dtype": (lambda: fusedrnn.GRU(4, 9).stream(2)(Z(2, 4).double()), RuntimeError, "float32, got torch.float64"),
    "device": (lambda: fusedrnn.GRU(4, 9).stream(2)(Z(2, 4, device="meta")), RuntimeError, "device meta, got cpu"),
    "mask": (lambda: fusedrnn.GRU(4, 9).stream(2)(Z(2, 4), Z(2)), RuntimeError, "resets of dtype bool"),
    "mask shape": (lambda: fusedrnn.GRU(4, 9).stream(2)(Z(2, 4), Z(3) > 0), RuntimeError, r"shape \[2\], .*got \[3\]"),
    "state": (lambda: fusedrnn.LSTM(4, 9).stream(2, Z(1, 2, 9)), IndexError, "a pair of two tensors"),
    "state shape": (
        lambda: fusedrnn.GRU(4, 9).stream(2, Z(1, 3, 9)),
        RuntimeError,
        r"h of shape \[1, 2, 9\], got \[1, 3",
    ),
    "no cell": (
        lambda: fusedrnn.LSTM(4, 9).stream(2).load_state_dict({"h": Z(1, 2, 9)}),
        RuntimeError,
        "a state of h, c, got h",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, error, says = MISTAKES[mistake]
    with pytest.raises(error, match=f"expected .*{says}"):
        call()


@needs_kernels
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l1"])
def test_weights_of_a_wrong_shape_are_refused(name):
    """An address says nothing of how much memory is there."""
    layer, _ = make("GRU")
    stream = layer.stream(2)
    parameter = layer._parameters[name]
    parameter.data = parameter.data[:-1]
    with pytest.raises(RuntimeError, match="expected a weight of shape"):
        stream.refresh()


@needs_kernels
@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 8}, {"input_size": 3}, {"num_layers": 1}, {"bias": False}, {"hidden_size": 90}], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_other_sizes_is_refused(name, sizes):
    layer, _ = make(name)
    stream = layer.stream(2)
    layer.__init__(**{"input_size": 4, "hidden_size": 9, "num_layers": 2} | sizes)
    with pytest.raises(RuntimeError, match=r"expected .* as when the stream was made"):
        stream.refresh()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_copies_go_on_alone(name, again):
    x = torch.randn(9, 3, 4)
    stream, whole = (getattr(fusedrnn, name)(4, 7, 2).stream(3) for _ in range(2))
    whole._module.load_state_dict(stream._module.state_dict())
    whole.refresh()
    expected = whole(x)
    stream(x[:4])
    other = again(stream)
    assert torch.equal(other(x[4:]), expected[4:])
    assert torch.equal(stream(x[4:]), expected[4:])


def test_made_in_inference_mode_and_used_outside():
    layer = fusedrnn.LSTM(4, 7)
    with torch.inference_mode():
        stream = layer.stream(3)
        first = stream(torch.ones(3, 4))
    stream.reset()
    assert torch.equal(stream(torch.ones(3, 4)), first)
    stream.load_state_dict(stream.state_dict())


def test_numpy_s_integers_are_numbers_of_rows():
    assert fusedrnn.GRU(4, 7).stream(np.int64(3))(torch.ones(3, 4)).shape == (3, 7)


@pytest.mark.parametrize("mask", [torch.ones(1), torch.ones(2), torch.ones(1, 3)], ids=lambda m: str(list(m.shape)))
def test_masks_of_other_shapes_are_refused(mask):
    with pytest.raises(RuntimeError, match=r"GRU: expected a mask of shape \[3\], got"):
        fusedrnn.GRU(4, 7).stream(3).reset(mask > 0)


@needs_kernels
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_what_has_no_memory_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    refused = pytest.raises(RuntimeError, match="expected a tensor with memory of its own, got a")
    with FakeTensorMode(), refused:
        fusedrnn.GRU(4, 7).stream(2)
    stream = fusedrnn.GRU(4, 7).stream(2)
    empty = torch.Tensor._make_wrapper_subclass(WithoutMemory, (2, 4))
    for x in empty, empty.unsqueeze(0):
        with refused:
            stream(x)


class WithoutMemory(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return torch.Tensor._make_wrapper_subclass(cls, (1, 2, 4))


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_refused():
    stream = fusedrnn.GRU(4, 7).stream(2)
    for x in torch.randn(2, 4), torch.randn(3, 2, 4):
        with pytest.raises(RuntimeError, match=r"expected no torch\.jit\.trace of a stream"):
            torch.jit.trace(stream.__call__, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_of_the_weights_dtype(dtype):
    stream = fusedrnn.GRU(4, 7).to(dtype).stream(2)
    for x in torch.randn(2, 4), torch.randn(3, 2, 4):
        with pytest.raises(RuntimeError, match="expected input of the weights' dtype"):
            stream(x)


def test_a_negative_view():
    stream, other = (fusedrnn.GRU(1, 7).stream(1) for _ in range(2))
    other._module.load_state_dict(stream._module.state_dict())
    other.refresh()
    x = torch.randn(1, 1, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert torch.equal(stream(x), other(x.clone().resolve_neg()))


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_a_hook_makes(how):
    layer, x = make("GRU", 4, 9, steps=3)
    if how == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight_hh_l0", 0.3)
    else:
        getattr(torch.nn.utils, how)(layer.eval(), "weight_hh_l0")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        y = layer.stream(2)(x)
        torch.testing.assert_close(y, layer(x)[0])
