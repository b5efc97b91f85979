"""sigmoid and tanh as the kernels compute them, against wider arithmetic: float32 against float64, float64 against
NumPy's longdouble."""

from __future__ import annotations

import numpy as np
import pytest

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)

# Largest error in units in the last place, as csrc/cpu/functions.h states it.
BOUNDS = {"sigmoid": 2.5, "tanh": 2.6}
WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}
SAMPLES = 200_000
FUNCTIONS = pytest.mark.parametrize("function", BOUNDS)
DTYPES = pytest.mark.parametrize("dtype", WIDER, ids=str)


def truth(function: str, x: np.ndarray) -> np.ndarray:
    """In the wider type, whose own error is a small part of a unit in the last place of x's type."""
    with np.errstate(invalid="ignore"):  # which is what NumPy says of a signalling NaN
        wide = x.astype(WIDER[x.dtype])
    if function == "tanh":
        return np.tanh(wide)
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(wide) if function == "exp" else 1 / (1 + np.exp(-wide))


def rounded(wide: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return wide.astype(dtype)


def error_in_ulp(y: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """|y − truth| in units in the last place of the truth. Where the truth is beyond the largest finite number to the
    type's own rounding, only infinity will do; where it is NaN, only NaN."""
    limits = np.finfo(y.dtype)
    _, exponent = np.frexp(wide)
    unit = np.ldexp(np.ones_like(wide), np.maximum(exponent - 1, limits.minexp) - limits.nmant)
    nearest = rounded(wide, y.dtype)
    same = (y == nearest) | (np.isnan(y) & np.isnan(nearest))
    with np.errstate(invalid="ignore"):
        error = np.abs(y - wide) / unit
    return np.where(np.isfinite(nearest) & np.isfinite(y), error, np.where(same, 0.0, np.inf)).astype(np.float64)


def errors(function: str, x: np.ndarray) -> np.ndarray:
    """Of our value for each x. A sigmoid below the smallest normal number may also be zero: 1/(1 + exp(-x)) ends where
    exp(-x) is infinite, and what is lost is below any rounding of a sum."""
    y, wide = extension.evaluate(function, x), truth(function, x)
    assert y.dtype == x.dtype
    error = error_in_ulp(y, wide)
    if function == "sigmoid":
        error[(y == 0) & (wide < np.finfo(x.dtype).tiny)] = 0.0
    return error


def assert_within_bound(function: str, x: np.ndarray) -> None:
    error = errors(function, x)
    worst = x[[error.argmax()]]
    assert error.max() <= BOUNDS[function], (
        f"{function}({worst[0]!r}) = {extension.evaluate(function, worst)[0]!r} is {error.max():.3f} units in the last "
        f"place from {truth(function, worst)[0]!r}"
    )


def edges(dtype: np.dtype) -> tuple[float, float, float]:
    """Where exp becomes zero, subnormal and infinite."""
    limits = np.finfo(dtype)
    return tuple(float(np.log(np.longdouble(v))) for v in (limits.smallest_subnormal, limits.tiny, limits.max))


def ranges(dtype: np.dtype) -> dict[str, np.ndarray]:
    """Dense samples, by the name of the range, with both signs where that makes sense."""
    limits, (zero, subnormal, infinite) = np.finfo(dtype), edges(dtype)
    random = np.random.default_rng(4)
    sign = random.choice([-1.0, 1.0], SAMPLES)
    # Every power of two down to the smallest subnormal number, and the middle range in which the gates live.
    exponents = random.uniform(limits.minexp - limits.nmant, 0, SAMPLES)
    drawn = {
        "gates": random.uniform(-20, 20, SAMPLES),
        "around zero": random.uniform(-1, 1, SAMPLES),
        "tiny": np.exp2(exponents) * sign,
        "all": random.uniform(zero, infinite, SAMPLES),
        "underflow": random.uniform(zero - 3, subnormal + 3, SAMPLES),
        "overflow": random.uniform(infinite - 3, infinite + 3, SAMPLES),
        "negative overflow": -random.uniform(infinite - 3, infinite + 3, SAMPLES),
        "saturation": random.uniform(7, 45, SAMPLES) * sign,
        "beyond": np.exp2(random.uniform(7, limits.maxexp - 1, SAMPLES)) * sign,
    }
    return {name: x.astype(dtype) for name, x in drawn.items()}


@FUNCTIONS
@DTYPES
@pytest.mark.parametrize("range_name", ranges(np.dtype(np.float32)))
@pytest.mark.usefixtures("isa")
def test_error(function, dtype, range_name):
    assert_within_bound(function, ranges(dtype)[range_name])


@DTYPES
@pytest.mark.usefixtures("isa")
def test_subnormal_numbers_are_their_own_tanh(dtype):
    limits = np.finfo(dtype)
    x = np.concatenate([np.arange(1, 1000) * limits.smallest_subnormal, [limits.tiny, 3 * limits.tiny]]).astype(dtype)
    for signed in (x, -x):
        np.testing.assert_array_equal(extension.evaluate("tanh", signed), signed)


# At -inf, inf, 0 and -0. The sign of a zero is not looked at.
SPECIAL = {"sigmoid": (0.0, 1.0, 0.5, 0.5), "tanh": (-1.0, 1.0, 0.0, 0.0)}


@FUNCTIONS
@DTYPES
@pytest.mark.usefixtures("isa")
def test_special_values(function, dtype):
    x = np.array([-np.inf, np.inf, 0.0, -0.0, np.nan, -np.nan], dtype)
    wanted = np.array([*SPECIAL[function], np.nan, np.nan], dtype)
    np.testing.assert_array_equal(extension.evaluate(function, x), wanted)


@FUNCTIONS
@DTYPES
@pytest.mark.usefixtures("isa")
def test_saturation_is_reached_and_kept(function, dtype):
    """Where the exact value rounds to the limit there is nothing but the limit, up to the largest number."""
    limits, (zero, _, infinite) = np.finfo(dtype), edges(dtype)
    start = max(-zero, infinite) + 1
    x = np.concatenate([np.linspace(start, 4 * start, 1000), np.geomspace(start, limits.max / 2, 1000), [limits.max]])
    x = x.astype(dtype)
    low, high = SPECIAL[function][:2]
    np.testing.assert_array_equal(extension.evaluate(function, x), np.full_like(x, high))
    np.testing.assert_array_equal(extension.evaluate(function, -x), np.full_like(x, low))


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
@DTYPES
@pytest.mark.usefixtures("isa")
def test_nothing_leaves_the_interval(function, dtype):
    """A gate above one, or a cell output above one, would let a state grow without bound."""
    for name, x in ranges(dtype).items():
        y = extension.evaluate(function, x)
        assert y.min() >= (0.0 if function == "sigmoid" else -1.0), name
        assert y.max() <= 1.0, name


@DTYPES
@pytest.mark.usefixtures("isa")
def test_tanh_is_odd(dtype):
    """Within the bound on each side, hence twice it."""
    for name, x in ranges(dtype).items():
        above, below = extension.evaluate("tanh", x), -extension.evaluate("tanh", -x)
        error = error_in_ulp(below, above.astype(WIDER[x.dtype]))
        assert error.max() <= 2 * BOUNDS["tanh"], name


@FUNCTIONS
@DTYPES
@pytest.mark.usefixtures("isa")
def test_any_count_is_evaluated(function, dtype):
    """The last vector may be a partial one: every count up to two of the widest gives the same values."""
    x = np.linspace(-3, 3, 33).astype(dtype)
    whole = extension.evaluate(function, x)
    for count in range(len(x)):
        np.testing.assert_array_equal(extension.evaluate(function, x[:count]), whole[:count])


def test_unknown_function():
    with pytest.raises(ValueError, match="expected sigmoid or tanh, got cosh"):
        extension.evaluate("cosh", np.zeros(3))


def test_unknown_instruction_set():
    before = extension.instruction_set()
    with pytest.raises(ValueError, match=r"expected an instruction set .*baseline.*, got 'nonsense'"):
        extension.use("nonsense")
    assert extension.instruction_set() == before


def test_instruction_set_in_use_is_the_one_chosen(isa):
    assert extension.instruction_set() == isa
    assert isa in fusedrnn._dispatch.extension.build_info()["instruction_sets"]


@pytest.mark.slow
@FUNCTIONS
@pytest.mark.usefixtures("isa")
def test_every_float32(function):
    """All 2^32 patterns, NaN included, in the order of their bits."""
    chunk, worst, where = 1 << 22, 0.0, np.float32(0)
    for start in range(0, 1 << 32, chunk):
        x = np.arange(start, start + chunk, dtype=np.uint32).view(np.float32)
        error = errors(function, x)
        if error.max() > worst:
            worst, where = float(error.max()), x[error.argmax()]
    assert worst <= BOUNDS[function], f"{function}({where!r}) is {worst:.3f} units in the last place off"
