def architectures() -> str: ...
def use_schedules(which: int) -> None: ...
def schedule(
    cell: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    directions: int,
    has_lengths: bool,
    device: int,
    tf32: bool,
    backward: bool,
) -> str: ...
