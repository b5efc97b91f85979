"""Derivatives of any order and torch.func: double backward, vmap, per-sample gradients, ensembles, Hessians."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import FAST
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import _derivatives, _vmap

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated"),  # torch's own, at its first forward mode
    pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. forward-mode"),
    pytest.mark.filterwarnings("ignore:fusedrnn runs on a fallback. the extension is not built"),
]

NAMES = pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
OPTIONS = pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "both"])


def pair(name: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch.nn's with the same weights, in float64."""
    ours = getattr(fusedrnn, name)(4, 5, dtype=torch.float64, **options)
    return ours, fusedrnn.revert(copy.deepcopy(ours))


def randn(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, **options)


def loss(module: torch.nn.Module, parameters: dict, x: torch.Tensor) -> torch.Tensor:
    y, state = functional_call(module, parameters, (x,))
    state = state if isinstance(state, torch.Tensor) else state[-1]
    return y.square().sum() + state.sin().sum()


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients(module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss(module, named, x), list(named.values()))
    return dict(zip(named, found, strict=True))


# --- autograd ---------------------------------------------------------------------------------------


@NAMES
@OPTIONS
def test_gradgradcheck(name, options):
    ours, _ = pair(name, **options)
    x = randn(3, 2, 4, requires_grad=True)

    def call(x, *parameters):
        return functional_call(ours, dict(zip(dict(ours.named_parameters()), parameters, strict=True)), (x,))[0]

    assert torch.autograd.gradgradcheck(call, (x, *ours.parameters()), **FAST)


def test_gradgradcheck_packed():
    layer = fusedrnn.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    packed = pack_padded_sequence(randn(3, 2, 2), torch.tensor([3, 1]))

    def call(data, *_):
        return layer(PackedSequence(data, packed.batch_sizes))[0].data

    assert torch.autograd.gradgradcheck(call, (packed.data.requires_grad_(), *layer.parameters()), **FAST)


def penalty(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gulrajani et al. 2017: how far the critic's gradient is from norm one."""
    (gradient,) = torch.autograd.grad(module(x)[0].tanh().sum(), x, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean()


@NAMES
def test_gradient_penalty(name):
    x = randn(6, 3, 4, requires_grad=True)
    found = [torch.autograd.grad(penalty(m, x), list(m.parameters()), allow_unused=True) for m in pair(name)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@NAMES
def test_hessian_vector_product(name):
    ours, theirs = pair(name)
    x, vectors = randn(6, 3, 4), [randn(*p.shape) for p in ours.parameters()]
    products = []
    for module in (ours, theirs):
        first = torch.autograd.grad(module(x)[0].sin().sum(), list(module.parameters()), create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        products.append(torch.autograd.grad(dot, list(module.parameters())))
    for mine, other in zip(*products, strict=True):
        torch.testing.assert_close(mine, other)


@NAMES
def test_third_order(name):
    x = randn(3, 2, 4, requires_grad=True)
    found = []
    for module in pair(name, bidirectional=True):
        value = module(x)[0].tanh().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        found.append(torch.autograd.grad(value, list(module.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@NAMES
def test_batched_cotangents(name):
    """is_grads_batched, which autograd.functional's vectorize=True is."""
    ours, theirs = pair(name)
    x = randn(3, 1, 4)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, m=module: m(x)[0], x, vectorize=True) for module in (ours, theirs)
    ]
    torch.testing.assert_close(*jacobians)


@NAMES
def test_batched_cotangents_of_all_states(name):
    ours, theirs = pair(name)
    x = randn(5, 1, 4)
    mine = torch.autograd.functional.jacobian(lambda x: ours(x, return_all_states=True)[0], x, vectorize=True)
    torch.testing.assert_close(mine, torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x))


# --- torch.func -------------------------------------------------------------------------------------


@NAMES
@OPTIONS
def test_vmap_over_batches(name, options):
    ours, theirs = pair(name, **options)
    x = randn(6, 3, 2, 4)
    expected = torch.stack([theirs(batch)[0] for batch in x])
    torch.testing.assert_close(vmap(lambda batch: ours(batch)[0])(x), expected)
    moved = vmap(lambda batch: ours(batch)[0], in_dims=2, out_dims=1)(x.movedim(0, 2))
    torch.testing.assert_close(moved, expected.movedim(0, 1))
    nested = vmap(vmap(lambda row: ours(row.unsqueeze(1))[0].squeeze(1), in_dims=1, out_dims=1))(x)
    torch.testing.assert_close(nested, expected)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda batch: theirs(batch)[0])(x)


def test_vmap_over_packed_sequences():
    ours, _ = pair("GRU", bidirectional=True)
    packed = pack_padded_sequence(randn(5, 3, 4), torch.tensor([5, 3, 1]))
    data, states = randn(4, *packed.data.shape), randn(4, 2, 3, 5)

    def call(data, state):
        y, h_n = ours(PackedSequence(data, packed.batch_sizes), state)
        return y.data, h_n

    expected = [call(*each) for each in zip(data, states, strict=True)]
    for mine, theirs in zip(vmap(call)(data, states), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs))


@NAMES
@OPTIONS
def test_per_sample_gradients(name, options):
    ours, theirs = pair(name, **options)
    x = randn(6, 3, 2, 4)
    found = vmap(grad(lambda p, x: loss(ours, p, x)), (None, 0))(parameters_of(ours), x)
    expected = [gradients(theirs, batch) for batch in x]
    for key, value in found.items():
        torch.testing.assert_close(value, torch.stack([each[key] for each in expected]))
    summed = grad(lambda p: vmap(lambda x: loss(ours, p, x))(x).sum())(parameters_of(ours))
    for key, value in summed.items():
        torch.testing.assert_close(value, sum(each[key] for each in expected))
    if name != "LSTM":
        with pytest.raises(RuntimeError, match="broadcast shape"):
            vmap(grad(lambda p, x: loss(theirs, p, x)), (None, 0))(parameters_of(theirs), x)


@NAMES
def test_ensemble(name):
    """Stacked parameters: every member has weights of its own."""
    members = [pair(name)[0] for _ in range(3)]
    stacked, buffers = stack_module_state(members)
    empty, x = copy.deepcopy(members[0]).to("meta"), randn(3, 2, 4)
    found = vmap(lambda p, b: functional_call(empty, (p, b), (x,))[0])(stacked, buffers)
    torch.testing.assert_close(found, torch.stack([fusedrnn.revert(member)(x)[0] for member in members]))
    slopes = vmap(grad(lambda p: loss(empty, p, x)))({k: v.detach() for k, v in stacked.items()})
    expected = [gradients(member, x) for member in members]
    for key, value in slopes.items():
        torch.testing.assert_close(value, torch.stack([each[key] for each in expected]))


@NAMES
def test_jacobians_and_hessians(name, monkeypatch):
    """By x alone, though the weights require a gradient too: every pass of vmap is one call."""
    monkeypatch.delattr(_vmap, "one_by_one")
    ours, theirs = pair(name)
    x = randn(3, 1, 4)
    torch.testing.assert_close(
        jacrev(lambda x: ours(x)[0])(x), torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    )
    expected = torch.autograd.functional.hessian(lambda x: theirs(x)[0].tanh().sum(), x)
    for second in (hessian(lambda x: ours(x)[0].tanh().sum()), jacrev(jacrev(lambda x: ours(x)[0].tanh().sum()))):
        torch.testing.assert_close(second(x), expected)


@NAMES
def test_meta_learning(name):
    """A gradient step inside a gradient (Finn et al. 2017), of weights that also require a gradient outside."""
    ours, theirs = pair(name)
    x = randn(3, 2, 4)

    def after_a_step(module, parameters):
        slopes = grad(lambda p: loss(module, p, x))(parameters)
        return loss(module, {k: p - 0.1 * slopes[k] for k, p in parameters.items()}, x)

    found = grad(lambda p: after_a_step(ours, p))(dict(ours.named_parameters()))
    named = dict(theirs.named_parameters())
    slopes = torch.autograd.grad(loss(theirs, named, x), list(named.values()), create_graph=True)
    stepped = {k: p - 0.1 * s for (k, p), s in zip(named.items(), slopes, strict=True)}
    expected = torch.autograd.grad(loss(theirs, stepped, x), list(named.values()))
    for mine, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(mine, other)


@NAMES
def test_forward_mode_of_parameters(name):
    ours, theirs = pair(name)
    x, tangents = randn(3, 2, 4), {k: randn(*p.shape) for k, p in ours.named_parameters()}
    _, found = jvp(lambda p: loss(ours, p, x), (parameters_of(ours),), (tangents,))
    slopes = gradients(theirs, x)
    torch.testing.assert_close(found, sum((slopes[k] * t).sum() for k, t in tangents.items()))


@NAMES
def test_forward_mode_of_a_cotangent(name):
    """A pulled-back cotangent is linear in it, and forward mode asks for that."""
    ours, theirs = pair(name)
    x, cotangent, tangent = randn(3, 2, 4), randn(3, 2, 5), randn(3, 2, 5)
    found = []
    for module in (ours, theirs):
        _, pull = torch.func.vjp(lambda x, m=module: m(x)[0], x)
        found.append(jvp(lambda g, pull=pull: pull(g)[0], (cotangent,), (tangent,)))
    torch.testing.assert_close(*found)


@NAMES
def test_only_gradients_that_were_used_are_differentiated(name, monkeypatch):
    """Of a gradient penalty that is the input's alone: those of the weights would take as long again."""
    asked = []
    original = _derivatives.gradients
    monkeypatch.setattr(_derivatives, "gradients", lambda *a: asked.append(sum(a[-1])) or original(*a))
    penalty(pair(name)[0], randn(6, 3, 4, requires_grad=True)).backward()
    assert asked == [1]
