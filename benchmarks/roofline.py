"""The least time that a case can take on this machine, from two rates measured in the same run."""

from functools import cache

from benchmarks.shapes import GATES, Case, Mode
from fusedrnn._dispatch import extension

# A measurement during which other work has one of the cores is too low, by half on two: the best of so many.
TRIES = 5
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@cache
def peak_flops(dtype: str) -> float:
    """Operations per second from registers, all threads: fused multiply-adds, or bfloat16's products if any."""
    assert extension is not None
    return float(max(extension.peak_flops(dtype) for _ in range(TRIES)))


@cache
def bandwidth(size: int) -> float:
    """Bytes per second at which all threads read ``size`` bytes again and again, each its part."""
    assert extension is not None
    return float(max(extension.read_bandwidth(max(size, 1 << 14)) for _ in range(TRIES)))


def weight_bytes(case: Case) -> int:
    """Bytes of one layer's recurrent weights, all directions: what every step reads."""
    rows = GATES[case.cell] * case.state + case.projection  # W_hr beside W_hh
    return case.directions * rows * case.hidden * BYTES[case.dtype]


def limit(case: Case, mode: Mode) -> float:
    """Seconds for the arithmetic, or for the recurrent weights to come from where they fit, whichever is longer.

    Every step reads the recurrent weights of its layer, backward once more; a lone step reads those of the input, too.
    """
    size = weight_bytes(case)
    reads = case.seq * case.layers * size * (1 if mode == "inference" else 2)
    if case.seq == 1:
        inputs = case.input + (case.layers - 1) * case.directions * case.state
        once = case.directions * GATES[case.cell] * case.hidden * inputs * BYTES[case.dtype]
        reads += once
        size += once // case.layers
    arithmetic = case.flops(mode) / peak_flops(case.dtype) * (2 if case.dtype == "float64" else 1)
    return max(arithmetic, reads / bandwidth(size))
