"""The oracle is tested too: its gradients against differences, its forward pass against torch.nn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from cases import FEATURE, REGULAR, Case, make_data, run_module, run_oracle

STEP = 1e-6
# Of central differences in float64: the truncation is about STEP², the cancellation eps / STEP.
DIFFERENCE_TOLERANCE = 1e-8
# Between two float64 evaluations of the same equations over tens of steps.
FLOAT64_TOLERANCE = 1e-12

OPTIONS = {
    "plain": {},
    "two layers, both directions": {"layers": 2, "bidirectional": True},
    "lengths": {"lengths": [3, 1, 2], "bidirectional": True},
    "reset": {"reset": True},
    "lengths and reset": {"lengths": [2, 3, 1], "reset": True, "layers": 2, "bidirectional": True},
}


def problem(equations: str, proj: int, options: dict):
    """Everything `oracle.run` takes, and the cotangents; small, so that differences are cheap."""
    T, B, I, H = 3, 3, 2, 4  # noqa: E741
    options = dict(options)
    layers, directions = options.get("layers", 1), 1 + options.get("bidirectional", False)
    draw = np.random.default_rng(2).standard_normal
    gates, output = oracle.GATES[equations] * H, proj or H
    weights = {}
    for layer in range(layers):
        for ending in ("", "_reverse")[:directions]:
            suffix = f"_l{layer}{ending}"
            weights["weight_ih" + suffix] = draw((gates, output * directions if layer else I))
            weights["weight_hh" + suffix] = draw((gates, output))
            weights["bias_ih" + suffix], weights["bias_hh" + suffix] = draw(gates), draw(gates)
            if proj:
                weights["weight_hr" + suffix] = draw((proj, H))
    if "reset" in options:
        options["reset"] = np.random.default_rng(3).random((T, B)) < 0.4
    rows = layers * directions
    states = {"x": draw((T, B, I)), "h0": draw((rows, B, output)), "c0": draw((rows, B, H))}
    cotangents = draw((T, B, output * directions)), draw((rows, B, output)), draw((rows, B, H))
    return weights, states, options, cotangents


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("equations", "proj"), [("rnn_tanh", 0), ("rnn_relu", 0), ("gru", 0), ("lstm", 0), ("lstm", 3)]
)
def test_gradients_are_central_differences(equations, proj, options):
    weights, states, options, cotangents = problem(equations, proj, options)
    tensors = weights | states

    def loss() -> float:
        result = oracle.run(equations, weights, **states, **options)
        outputs = (result.y, result.h_n, result.c_n)
        return sum(float((out * cotangent).sum()) for out, cotangent in zip(outputs, cotangents, strict=True))

    gradients = oracle.run(equations, weights, **states, **options).backward(*cotangents)
    assert gradients.keys() == tensors.keys()
    for name, value in tensors.items():
        differences = np.empty_like(value)
        for index in np.ndindex(value.shape):
            original = value[index]
            value[index] = original + STEP
            above = loss()
            value[index] = original - STEP
            below = loss()
            value[index] = original
            differences[index] = (above - below) / (2 * STEP)
        np.testing.assert_allclose(
            gradients[name],
            differences,
            atol=DIFFERENCE_TOLERANCE * 100,
            rtol=DIFFERENCE_TOLERANCE * 100,
            err_msg=name,
        )


@pytest.mark.parametrize("case", [replace(case, dtype="float64") for case in REGULAR + FEATURE], ids=str)
def test_torch_in_float64_says_the_same(case: Case):
    module, data = case.module(torch.nn), make_data(case)
    theirs = run_module(module, case, data)
    ours = run_oracle(dict(module.named_parameters()), case, data)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        unit = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(theirs[name].numpy() / unit, value / unit, atol=FLOAT64_TOLERANCE, err_msg=name)


def test_a_reset_starts_the_sequence_anew():
    weights, states, _, _ = problem("lstm", 0, {})
    reset = np.zeros((3, 3), dtype=bool)
    reset[1] = True
    whole = oracle.run("lstm", weights, **states, reset=reset)
    tail = {"x": states["x"][1:], "h0": states["h0"] * 0, "c0": states["c0"] * 0}
    np.testing.assert_array_equal(whole.y[1:], oracle.run("lstm", weights, **tail).y)
