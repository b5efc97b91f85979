"""Layers and cells inside what torch wraps around them: autocast, forward mode, torch.func, parametrizations."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import K
from torch.nn.utils import parametrize

import fusedrnn
from fusedrnn import _dispatch

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
MODULES = pytest.mark.parametrize("name", LAYERS + CELLS)


def pair(name: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A torch.nn module and ours, with the same weights."""
    theirs = getattr(torch.nn, name)(4, 7, **options)
    ours = getattr(fusedrnn, name)(4, 7, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_input(name: str, **options) -> torch.Tensor:
    return torch.randn(*((3, 4) if name in CELLS else (5, 3, 4)), **options)


def first(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else first(result[0])


THROUGH_REFERENCE = pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. forward-mode")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
def test_forward_mode_says_that_it_uses_the_reference():
    _dispatch._warned.clear()
    layer, x = fusedrnn.GRU(4, 7), make_input("GRU")
    with pytest.warns(fusedrnn.FallbackWarning, match="forward-mode"):
        torch.func.jvp(lambda sequence: layer(sequence)[0], (x,), (x,))


@THROUGH_REFERENCE
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
@MODULES
def test_forward_mode_derivatives(name):
    """The kernels are opaque to forward mode: were they used there, the derivative would be zero without a word."""
    theirs, ours = pair(name, dtype=torch.float64)
    x = make_input(name, dtype=torch.float64)
    for module in (theirs, ours):
        module.requires_grad_(False)
    tangent = torch.randn_like(x)
    expected = torch.autograd.functional.jvp(lambda v: first(theirs(v)), x, tangent)[1]
    _, actual = torch.func.jvp(lambda v: first(ours(v)), (x,), (tangent,))
    torch.testing.assert_close(actual, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = first(ours(torch.autograd.forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_sequences(name):
    _, ours = pair(name, dtype=torch.float64)
    x = torch.randn(6, 5, 3, 4, dtype=torch.float64)
    one_by_one = torch.stack([ours(sequence)[0] for sequence in x])
    torch.testing.assert_close(torch.func.vmap(lambda sequence: ours(sequence)[0])(x), one_by_one)


@MODULES
def test_autocast_keeps_float64(name):
    _, ours = pair(name, dtype=torch.float64)
    x = make_input(name, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(ours(x)), first(ours.double()(x)))
        assert first(ours(x)).dtype == torch.float64


@MODULES
def test_autocast_rounds_inputs_and_nothing_else(name):
    _, ours = pair(name)
    x = make_input(name)
    for given in (x,) if name in CELLS else (x, x[:1]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = first(ours(given))
        # The kernels take the weights of one step as they are.
        if _dispatch.extension is not None and (name in CELLS or len(given) == 1):
            expected = first(ours(given.bfloat16().float())).bfloat16()
        else:
            expected = first(copy.deepcopy(ours).bfloat16()(given.bfloat16()))
        assert torch.equal(under_autocast.bfloat16(), expected)


@pytest.mark.skipif(_dispatch.extension is None, reason="the reference keeps what its operations keep")
@pytest.mark.parametrize("under_autocast", [True, False], ids=["autocast", "module"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in LAYERS + CELLS), ("GRU", {"recompute": True}), ("LSTM", {"return_all_states": True})],
)
def test_no_call_keeps_a_copy_of_the_weights(name, options, dtype, under_autocast):
    """A loop over steps would keep one for each of them."""
    _, ours = pair(name)
    options = dict(options)
    ours.recompute = options.pop("recompute", False)
    x, kept, rounding = make_input(name), [], K * torch.finfo(dtype).eps
    inputs = [x] if name in CELLS else [x, x[:1]]
    exact = [torch.autograd.grad(first(ours(given)).square().sum(), [*ours.parameters()]) for given in inputs]
    if not under_autocast:
        ours, inputs = ours.to(dtype), [given.to(dtype) for given in inputs]
    shapes, places = [p.shape for p in ours.parameters()], [p.data_ptr() for p in ours.parameters()]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.extend([tensor] if tensor.shape in shapes else [])
        return tensor

    for given, expected in zip(inputs, exact, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=dtype, enabled=under_autocast):
                y = first(ours(given, **options))
            assert len(kept) >= 4
            assert all(tensor.data_ptr() in places for tensor in kept)
        many = torch.autograd.grad(
            y, [*ours.parameters()], torch.stack([y, 2 * y]), retain_graph=True, is_grads_batched=True
        )
        for mine, other in zip(many, expected, strict=True):
            assert not mine.requires_grad
            torch.testing.assert_close(mine[1].float(), other, rtol=0, atol=rounding * float(other.abs().max()))
        loss = y.float().square().sum()
        for keeps in {"retain_graph": True}, {"create_graph": True}:
            for mine, other in zip(torch.autograd.grad(loss, [*ours.parameters()], **keeps), expected, strict=True):
                torch.testing.assert_close(mine.float(), other, rtol=0, atol=rounding * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@MODULES
def test_autocast_gives_the_dtypes_of_torch(name, dtype):
    theirs, ours = pair(name)
    x = make_input(name, requires_grad=True)
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype=dtype):
            y = first(ours(given))
            try:
                expected = first(theirs(given)).dtype
            except RuntimeError:  # oneDNN has no LSTM of this dtype on every processor
                expected = dtype
        assert y.dtype == expected
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *ours.parameters()])
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_the_dtypes_of_torch_packed(name, dtype):
    theirs, ours = pair(name)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    with torch.autocast("cpu", dtype=dtype):
        (y, states), (expected_y, expected_states) = ours(packed), theirs(packed)
    assert y.data.dtype == expected_y.data.dtype
    pairs = zip(states, expected_states, strict=True) if name == "LSTM" else [(states, expected_states)]
    assert all(mine.dtype == other.dtype for mine, other in pairs)


@MODULES
def test_double_backward_under_autocast(name):
    """create_graph=True goes through the reference, which autocast must not round a second time."""
    _, ours = pair(name)
    x = make_input(name, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = first(ours(x)).float().square().sum()
        plain = torch.autograd.grad(y, x, retain_graph=True)[0]
        differentiable = torch.autograd.grad(y, x, create_graph=True)[0]
    torch.testing.assert_close(differentiable, plain, rtol=0, atol=torch.finfo(torch.bfloat16).eps)


@MODULES
def test_weights_on_another_device(name):
    ours = getattr(fusedrnn, name)(4, 7, device="meta")
    with pytest.raises(RuntimeError, match="the weights on the input's device cpu, got meta"):
        ours(make_input(name))


def test_half_a_state():
    with pytest.raises(AttributeError, match="NoneType"):
        torch.nn.LSTMCell(4, 7)(torch.zeros(3, 4), (torch.zeros(3, 7), None))
    with pytest.raises(AttributeError, match="NoneType"):
        fusedrnn.LSTMCell(4, 7)(torch.zeros(3, 4), (torch.zeros(3, 7), None))


class Counted(torch.nn.Module):
    calls = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return weight


@MODULES
def test_parametrizations_run_as_often_as_in_torch(name):
    """Spectral norm takes a power iteration whenever it runs: once too often, and training ends elsewhere."""
    counts = []
    for module in pair(name):
        parametrize.register_parametrization(module, "weight_hh" if name in CELLS else "weight_hh_l0", Counted())
        Counted.calls = 0
        module(make_input(name))
        counts.append(Counted.calls)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_padding_may_be_nan(cell):
    """What lies past a row's end is no part of it, in x and in the gradients of the weights."""
    if _dispatch.extension is None:
        pytest.skip("fusedrnn is installed without its C++ extension")
    from fusedrnn import _autograd

    gates = {"rnn_tanh": 1, "lstm": 4, "gru": 3}[cell]
    x = torch.randn(5, 2, 3)
    lengths = torch.tensor([5, 2])
    weights = [torch.randn(gates * 7, 3, requires_grad=True), torch.randn(gates * 7, 7, requires_grad=True)]
    hx, cx = torch.zeros(1, 2, 7), torch.zeros(1, 2, 7) if cell == "lstm" else None
    gradients = []
    for padding in (0.0, float("nan")):
        x[2:, 1] = padding
        y, _, _ = _autograd.recurrence(cell, x, hx, cx, weights, lengths=lengths)
        gradients.append(torch.autograd.grad(y.sum(), weights))
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)
