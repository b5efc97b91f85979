"""The one tolerance rule of the test suite:

    err(ours) ≤ 2 · err(torch.nn in the same dtype) + K · eps(dtype)

where err is the largest absolute difference from the oracle, divided by max(1, max |oracle|).
The first term grows with the problem exactly as rounding does; the second lets a result be off by
a few roundings where torch happened to make none.
"""

from __future__ import annotations

import numpy as np
import torch

# Roundings of an element of size one that are forgiven where torch.nn was lucky. Over the grids of
# cases.py, the equations written with other torch operations than torch.nn uses come out up to 1.2 eps
# beyond the factor of two; the rest is room for an exponential that is good to one or two eps.
K = 4

# For torch's gradcheck, of many inputs and outputs all at once along random directions. Its own tolerance, which it
# multiplies by their number, lets a GRU's gradients be off by 1 %; this finds 3 in 1000.
FAST = {"fast_mode": True, "atol": 1e-8}


def to_numpy(value: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64)


def difference(value: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """|value − oracle| element by element, where equal infinities and a NaN on both sides differ by
    nothing, and any other NaN or infinity differs infinitely."""
    same = (value == oracle) | (np.isnan(value) & np.isnan(oracle))
    with np.errstate(invalid="ignore"):
        distance = np.abs(value - oracle)
    return np.where(same, 0.0, np.where(np.isfinite(distance), distance, np.inf))


def scale(oracle: np.ndarray) -> float:
    return float(np.max(np.abs(oracle), where=np.isfinite(oracle), initial=1.0))


def assert_as_good(name, ours, torch_value, oracle, dtype: torch.dtype) -> None:
    """`ours` may be no further from `oracle` than the rule at the head of this file allows."""
    ours, torch_value, oracle = to_numpy(ours), to_numpy(torch_value), to_numpy(oracle)
    assert ours.shape == torch_value.shape == oracle.shape, (
        f"{name}: shapes differ: ours {ours.shape}, torch.nn {torch_value.shape}, oracle {oracle.shape}"
    )
    if ours.size == 0:
        return
    distance, unit = difference(ours, oracle), scale(oracle)
    error = distance.max() / unit
    torch_error = difference(torch_value, oracle).max() / unit
    bound = 2.0 * torch_error + K * torch.finfo(dtype).eps
    worst = tuple(int(i) for i in np.unravel_index(distance.argmax(), distance.shape))
    assert np.isfinite(torch_error), f"{name}: torch.nn itself is infinitely far from the oracle"
    assert error <= bound, (
        f"{name} ({str(dtype).removeprefix('torch.')}): error {error:.3g} is above the bound {bound:.3g} "
        f"(torch.nn's error is {torch_error:.3g}); worst at {list(worst)} of {list(ours.shape)}: "
        f"ours {ours[worst]!r}, torch.nn {torch_value[worst]!r}, oracle {oracle[worst]!r}"
    )


def assert_all_as_good(ours: dict, torch_values: dict, oracle: dict, dtype: torch.dtype) -> None:
    """The rule for every tensor by name; all three must have the same names."""
    assert ours.keys() == torch_values.keys() == oracle.keys(), (
        f"names differ: ours {sorted(ours)}, torch.nn {sorted(torch_values)}, oracle {sorted(oracle)}"
    )
    for name in oracle:
        assert ours[name].dtype == torch_values[name].dtype, (
            f"{name}: dtype {ours[name].dtype}, but torch.nn has {torch_values[name].dtype}"
        )
        assert_as_good(name, ours[name], torch_values[name], oracle[name], dtype)


class Scene:
    """What a scenario draws on: a library with torch.nn's names, and one dtype. The same scenario sees
    the same numbers from every Scene, as float32 values."""

    def __init__(self, library, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.generator = torch.Generator().manual_seed(7)

    def module(self, name: str, *args, **options) -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(self.library, name)(*args, **options).to(self.dtype)

    def randn(self, *shape: int, requires_grad: bool = False) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(self.dtype).requires_grad_(requires_grad)


def assert_scenario(scenario, library) -> None:
    """Runs `scenario(scene) -> results by name` with `library` and with torch.nn in float32, and with
    torch.nn in float64 for the truth, which test_oracle.py has shown to be the oracle's."""
    ours = scenario(Scene(library, torch.float32))
    theirs = scenario(Scene(torch.nn, torch.float32))
    assert_all_as_good(ours, theirs, scenario(Scene(torch.nn, torch.float64)), torch.float32)


def assert_long_memory(library, name: str, dtype: torch.dtype, hidden: int, steps: int, device: str = "cpu") -> None:
    """Gradients through gates of 0.9985, which 16 bits do not have: saved so, they are off by more at every step."""
    torch.manual_seed(0)
    ours = getattr(library, name)(8, hidden).to(dtype)
    with torch.no_grad():
        ours.bias_ih_l0[hidden : 2 * hidden] += 6.5  # f, z
    exact = getattr(torch.nn, name)(8, hidden).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(steps, 2, 8).to(dtype)

    def gradients(layer, x):
        x = x.requires_grad_()
        return torch.autograd.grad(layer(x)[0][-1].sum(), [x, *layer.parameters()])

    found, wanted = gradients(ours.to(device), x.to(device)), gradients(exact, x.double())
    for mine, right in zip((*found, found[0][0]), (*wanted, wanted[0][0]), strict=True):  # the first step's apart
        assert (mine.cpu() - right).norm() <= 2 * torch.finfo(dtype).eps * right.norm()
