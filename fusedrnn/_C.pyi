from typing import Any

import numpy

def build_info() -> dict[str, Any]: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use(instruction_set: str) -> None: ...
def pooled() -> int: ...
def use_threads(at_once: bool) -> None: ...
def evaluate(function: str, x: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]: ...
def forward_at(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    I: int,
    H: int,
    directions: int,
    x: int,
    hx: int,
    cx: int,
    weights: list[int],
    y: int,
    h_n: int,
    c_n: int,
) -> None: ...
