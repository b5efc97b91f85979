"""prepack: after every change of a weight that torch counts, a layer packs again."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from test_prepack import Results, assert_same, infer
from torch import Tensor
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

pytest.importorskip("fusedrnn._C", exc_type=ImportError)


# What torch counts, or puts another tensor in the place of a weight.


def in_place(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        layer.weight_hh_l0[1].mul_(2)


def in_place_without_gradients(layer: torch.nn.Module) -> None:
    with torch.inference_mode():
        layer.bias_ih_l0.add_(1)


def by_a_detached_view(layer: torch.nn.Module) -> None:
    layer.weight_ih_l0.detach()[0, 0] += 1


def by_foreach(layer: torch.nn.Module) -> None:
    torch._foreach_mul_([w.detach() for w in layer.parameters()], 0.5)


def by_state_dict(layer: torch.nn.Module) -> None:
    layer.load_state_dict({name: w + 0.25 for name, w in layer.state_dict().items()})


def by_assigned_state_dict(layer: torch.nn.Module) -> None:
    layer.load_state_dict({name: w + 0.25 for name, w in layer.state_dict().items()}, assign=True)


def by_new_parameter(layer: torch.nn.Module) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach() * 2)


def by_new_data(layer: torch.nn.Module) -> None:
    layer.weight_hh_l0.data = layer.weight_hh_l0.data * 2


def by_vector(layer: torch.nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(layer.parameters()).detach() * 2
    torch.nn.utils.vector_to_parameters(vector, layer.parameters())


def by_rounding(layer: torch.nn.Module) -> None:
    layer.half().float()


def by_initialising(layer: torch.nn.Module) -> None:
    layer.reset_parameters()


def by_two_at_once(layer: torch.nn.Module) -> None:
    """The second may lie where what is packed lay."""
    for factor in (3.0, 0.5):
        layer.weight_hh_l0.data = layer.weight_hh_l0.data * factor


def by_the_memory_of_another(layer: torch.nn.Module) -> None:
    """Which counts for itself, as the new Parameter does."""
    before = layer.weight_hh_l0
    layer.weight_hh_l0 = torch.nn.Parameter(before.data)
    with torch.no_grad():
        before.mul_(2)


def by_expanding(layer: torch.nn.Module) -> None:
    """Neither its place is another then nor torch's count of its changes."""
    layer.weight_hh_l0.data = layer.weight_hh_l0.data[:1].expand(36, 9)


def by_pruning(layer: torch.nn.Module) -> None:
    prune.random_unstructured(layer, "weight_hh_l0", amount=0.5)


def by_parametrization(layer: torch.nn.Module) -> None:
    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(layer, "weight_hh_l0", Twice())


CHANGES = (
    in_place,
    in_place_without_gradients,
    by_a_detached_view,
    by_foreach,
    by_state_dict,
    by_assigned_state_dict,
    by_new_parameter,
    by_new_data,
    by_vector,
    by_rounding,
    by_two_at_once,
    by_the_memory_of_another,
    by_expanding,
    by_initialising,
    by_pruning,
    by_parametrization,
)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_from_the_next_call_on(change, autocast, layer, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fusedrnn.prepack(layer)
        before = infer(lambda: layer(x))
        for _ in range(3):  # memory of a change may lie where that of the one before was
            change(layer)
            after = infer(lambda: layer(x))
            fusedrnn.prepack(layer, enabled=False)
            expected = infer(lambda: layer(x))
            fusedrnn.prepack(layer)
            assert_same(after, infer(lambda: layer(x)))
            torch.testing.assert_close(after, expected, atol=0.02 if autocast else 1e-6, rtol=0)
            assert autocast or not torch.equal(before[0], after[0])
            if change in (by_expanding, by_pruning, by_parametrization):
                break


OPTIMISERS = sorted(
    {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    - {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # the last wants matrices only
)


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimisers_step_counts(name, kind, layer, x):
    try:
        options = {} if kind == "plain" else {kind: True}
        optimiser = getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"{name} has no {kind} step: {error}")
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    layer(x)[0].sin().sum().backward()
    optimiser.step()
    after = infer(lambda: layer(x))
    assert_same(after, infer(lambda: fusedrnn.prepack(layer)(x)))
    assert not torch.equal(before[0], after[0])


def test_what_torch_does_not_count_waits_for_prepack(layer, x):
    """As the docstring says."""
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    layer.weight_hh_l0.detach().numpy()[:] *= 2
    assert_same(infer(lambda: layer(x)), before)
    fusedrnn.prepack(layer)
    assert not torch.equal(infer(lambda: layer(x))[0], before[0])


def test_a_fused_step_counts_within_it_and_after_loading(layer, x):
    """Where torch counts nothing: in an optimiser's own hook, and of a model that came without a call of prepack."""
    layer = pickle.loads(pickle.dumps(fusedrnn.prepack(layer)))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    seen: list[Results] = []
    optimiser.register_step_post_hook(lambda *_: seen.append(infer(lambda: layer(x))))
    before = infer(lambda: layer(x))

    def closure() -> None:
        layer(x)[0].sin().sum().backward()
        seen.append(infer(lambda: layer(x)))

    with torch.enable_grad():
        optimiser.step(closure)
    after = infer(lambda: layer(x))
    assert not torch.equal(before[0], after[0])
    assert_same(seen[0], before)
    assert_same(seen[1], after)


@pytest.mark.parametrize("cure", ["step", "prepack", "nothing left"])
def test_while_a_step_is_open_nothing_is_kept(cure, layer, x, packs):
    """One that raises may have written to weights, and says no more."""
    fusedrnn.prepack(layer)
    before = infer(lambda: layer(x))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def fail(*_: object) -> None:
        raise FloatingPointError

    hook = optimiser.register_step_post_hook(fail)
    layer(x)[0].sin().sum().backward()
    with pytest.raises(FloatingPointError):
        optimiser.step()
    expected = infer(lambda: copy.deepcopy(layer)(x))
    packs.clear()
    for _ in range(2):
        after = infer(lambda: layer(x))
        assert not torch.equal(after[0], before[0])
        torch.testing.assert_close(after, expected)
    assert not packs
    if cure == "step":
        hook.remove()
        optimiser.step()
    elif cure == "prepack":
        fusedrnn.prepack(layer)
    else:
        del optimiser, hook
        gc.collect()
    for _ in range(2):
        infer(lambda: layer(x))
    assert len(packs) == 1


def test_a_step_within_a_step(layer, x):
    """The inner one ends while the other is still to write, and then raises."""

    def fail(*_: object) -> None:
        raise FloatingPointError

    fusedrnn.prepack(layer)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])

    def closure() -> None:
        layer(x)[0].sin().sum().backward()
        other.step()
        infer(lambda: layer(x))

    optimiser.register_step_post_hook(fail)
    with torch.enable_grad(), pytest.raises(FloatingPointError):
        optimiser.step(closure)
    after = infer(lambda: layer(x))
    torch.testing.assert_close(after, infer(lambda: fusedrnn.prepack(layer)(x)))


def test_sizes_that_do_not_fit_what_is_packed_for_another_dtype(layer, x):
    fusedrnn.prepack(layer)
    with torch.autocast("cpu", torch.bfloat16):
        infer(lambda: layer(x))
    layer.hidden_size = 20_000
    with pytest.raises(RuntimeError, match=r"expected .* of shape"):
        infer(lambda: layer(x))


@pytest.mark.parametrize("view", [Tensor.t, lambda w: torch._neg_view(w)], ids=["strides", "sign"])
def test_there_and_back_in_the_same_memory(view, x):
    layer = fusedrnn.prepack(fusedrnn.RNN(5, 5))
    packed = pack_padded_sequence(x, torch.tensor([7, 3, 2]))
    for given in (x, packed):
        for _ in range(3):
            infer(lambda given=given: layer(given))
            layer.weight_hh_l0.data = view(layer.weight_hh_l0.data)
            if given is packed or view is Tensor.t:  # a dense call does not see the sign, without prepack either
                assert_same(
                    infer(lambda given=given: layer(given)), infer(lambda given=given: copy.deepcopy(layer)(given))
                )


@pytest.mark.parametrize("packed", [False, True])
def test_sizes_that_change_with_their_weights(packed):
    """The same memory and, as torch counts, no change."""
    layer, x = fusedrnn.prepack(fusedrnn.RNN(8, 64)), torch.randn(24, 4, 8)
    x = pack_padded_sequence(x, torch.full((4,), 24)) if packed else x
    infer(lambda: layer(x))
    for name, weight in layer.named_parameters():
        weight.data = weight.data[:8, :8] if name == "weight_hh_l0" else weight.data[:8]
    layer.hidden_size = 8
    assert_same(infer(lambda: layer(x)), infer(lambda: copy.deepcopy(layer)(x)))
    layer.mode = "RNN_RELU"
    assert_same(infer(lambda: layer(x)), infer(lambda: copy.deepcopy(layer)(x)))
