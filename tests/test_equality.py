"""Every result of the layers, by name, against the oracle and torch.nn under the rule of numerics.py."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cases import CORNER, FEATURE, LOW_PRECISION, REGULAR, ZERO, Case, expected, make_data, run_module
from numerics import Scene, assert_all_as_good, assert_long_memory, assert_scenario, difference, to_numpy

import fusedrnn


def check(case: Case) -> None:
    ours = run_module(case.module(fusedrnn), case, make_data(case))
    assert_all_as_good(ours, *expected(case), case.torch_dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", REGULAR + CORNER, ids=str)
@pytest.mark.usefixtures("isa")
def test_sizes(case, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize(
    "case", [replace(case, dtype=dtype) for case in REGULAR for dtype in ("float32", "float64")], ids=str
)
@pytest.mark.usefixtures("isa")
def test_regular_sizes_run_on_the_kernels(case):
    """Were they handed to torch.nn, the comparison above would hold for nothing."""
    assert fusedrnn.explain(case.module(fusedrnn), make_data(case).x).implementation == "cpu"


@pytest.mark.usefixtures("isa")
def test_weights_are_fetched_ahead(threads):
    """W_hh is more than far_weights of csrc/cpu/tuning.h, and neither its vectors nor loops over k are whole."""
    threads(1)
    check(Case("rnn", T=2, B=13, I=3, H=1101))


@pytest.mark.parametrize("case", FEATURE + ZERO, ids=str)
def test_options(case):
    check(case)


@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
@pytest.mark.usefixtures("isa")
def test_low_precision(case):
    check(case)


@pytest.mark.usefixtures("isa")
def test_bfloat16_products_keep_infinity_and_nan():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 40).bfloat16()
    x[0, 1, 3], x[0, 2, 7], x[0, 3, 39] = math.inf, -math.inf, math.nan
    theirs = torch.nn.RNN(40, 48, nonlinearity="relu").bfloat16()
    ours = fusedrnn.RNN(40, 48, nonlinearity="relu").bfloat16()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.usefixtures("isa")
def test_bfloat16_gradients_through_a_long_memory(name):
    # too few units for tiles, which round the state of every step to begin with
    assert_long_memory(fusedrnn, name, torch.bfloat16, 21, 400)


# --- what users do with a module, held against torch.nn doing the same --------------------------

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def output_of(outputs) -> torch.Tensor:
    """The first tensor of a module's result."""
    return outputs if isinstance(outputs, torch.Tensor) else output_of(outputs[0])


def input_for(name: str, scene: Scene) -> torch.Tensor:
    return scene.randn(*((3, 4) if name in CELLS else (5, 3, 4)), requires_grad=True)


def gradients_of(**owners) -> dict[str, torch.Tensor]:
    named = {}
    for label, owner in owners.items():
        tensors = {"": owner} if isinstance(owner, torch.Tensor) else dict(owner.named_parameters())
        named |= {f"d{label}.{name}": tensor.grad for name, tensor in tensors.items()}
    return named


def accumulated(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module = scene.module(name, 4, 7)
    for _ in range(3):
        output_of(module(input_for(name, scene))).sum().backward()
    return gradients_of(module=module)


def tied(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    first, second = scene.module(name, 4, 4), scene.module(name, 4, 4)
    for parameter_name, parameter in first.named_parameters():
        setattr(second, parameter_name, parameter)
    y = output_of(second(output_of(first(input_for(name, scene)))))
    y.pow(2).sum().backward()
    return {"y": y} | gradients_of(module=first)


def tied_within(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 4), input_for(name, scene)
    module.register_parameter("weight_hh" + ("" if name in CELLS else "_l0"), None)
    source = "weight_ih" + ("" if name in CELLS else "_l0")
    setattr(module, source.replace("ih", "hh"), getattr(module, source))
    y = output_of(module(x))
    y.pow(2).sum().backward()
    return {"y": y} | gradients_of(x=x, module=module)


def weight_norm(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    torch.nn.utils.weight_norm(module, "weight_hh" + ("" if name in CELLS else "_l0"))
    y = output_of(module(x))
    y.pow(2).sum().backward()
    return {"y": y} | gradients_of(x=x, module=module)


def hooks(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    seen = {}
    module.register_forward_pre_hook(lambda _, given: (given[0] * 2.0, *given[1:]))
    module.register_forward_hook(lambda _, given, result: seen.update(given=given[0], y=output_of(result)))
    module.register_full_backward_hook(lambda _, grad_input, __: seen.update(grad_input=grad_input[0]))
    next(module.parameters()).register_hook(lambda grad: grad * 3.0)
    output_of(module(x)).pow(2).sum().backward()
    return seen | gradients_of(x=x, module=module)


def data_parallel(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    y = output_of(torch.nn.DataParallel(module)(x))
    y.pow(2).sum().backward()
    return {"y": y} | gradients_of(x=x, module=module)


def functional_call(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    doubled = {key: (value * 2.0).detach().requires_grad_() for key, value in module.named_parameters()}
    y = output_of(torch.func.functional_call(module, doubled, x))
    y.pow(2).sum().backward()
    return {"y": y} | gradients_of(x=x, **doubled)


def hessian_vector_product(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    inputs = {"x": x} | dict(module.named_parameters())
    loss = output_of(module(x)).pow(3).sum()
    first = torch.autograd.grad(loss, inputs.values(), create_graph=True)
    along = sum((grad * scene.randn(*grad.shape)).sum() for grad in first)
    second = torch.autograd.grad(along, inputs.values())
    return {
        f"{label}{key}": grad
        for label, grads in (("d", first), ("Hv ", second))
        for key, grad in zip(inputs, grads, strict=True)
    }


def changed_after_a_run(name: str, scene: Scene) -> dict[str, torch.Tensor]:
    """Weights rewritten in place, through .data and by assignment are all seen by the next call."""
    module, x = scene.module(name, 4, 7), input_for(name, scene)
    results = {"before": output_of(module(x))}
    parameters = list(module.named_parameters())
    with torch.no_grad():
        parameters[0][1].mul_(2.0)
    results["in place"] = output_of(module(x))
    parameters[1][1].data = parameters[1][1].data * 3.0
    results["data"] = output_of(module(x))
    setattr(module, parameters[2][0], torch.nn.Parameter(parameters[2][1].detach() + 1.0))
    return results | {"assigned": output_of(module(x))}


SCENARIOS = (
    accumulated,
    tied,
    tied_within,
    weight_norm,
    hooks,
    data_parallel,
    functional_call,
    hessian_vector_product,
    changed_after_a_run,
)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_in_use(scenario, name):
    assert_scenario(partial(scenario, name), fusedrnn)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_they_go_in_torch(name, bad):
    def run(library) -> dict[str, torch.Tensor]:
        scene = Scene(library, torch.float32)
        module, x = scene.module(name, 4, 7), input_for(name, scene).detach()
        x[(1,) * (x.dim() - 1)][2] = bad
        y = output_of(module(x.requires_grad_()))
        y.sum().backward()
        return {"y": y} | gradients_of(x=x, module=module)

    ours, theirs = run(fusedrnn), run(torch.nn)
    for key, value in theirs.items():
        distance = difference(to_numpy(ours[key]), to_numpy(value))
        assert np.isfinite(distance).all(), f"{key}: ours is {ours[key]}, torch.nn's {value}"
