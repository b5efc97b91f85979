"""The GPU schedules of csrc/cuda executed on the host: the same sources, compiled by g++ against shim.h.

`forward` and `backward` take and give what the operators of the same names do, on CPU tensors, and raise AssertionError
where the kernels do what a GPU would not forgive.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX", "g++")  # GCC: Clang calls the access functions by other names
KERNELS = tuple(Path(f"{cell}.cu") for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"))  # of csrc/cuda
FEW_KERNELS = (HERE / "few.cu",)  # GRU in bfloat16, LSTM in float32
ONE_KERNEL = (HERE / "one.cu",)  # GRU in bfloat16

# As csrc/params.h numbers them.
CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}
SCALARS = {torch.float32: 0, torch.float64: 1, torch.float16: 3, torch.bfloat16: 4}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 4, "gru": 4}


def _run_compiler(*arguments: object) -> None:
    subprocess.run([COMPILER, *map(str, arguments)], check=True, capture_output=True, text=True)


def _read_by(source: Path, csrc: Path) -> list[Path]:
    """A source and all headers of ours that it includes."""
    read = [source]
    for path in read:
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            found = next(f / name for f in (path.parent, csrc, HERE) if (f / name).exists())
            if found not in read:
                read.append(found)
    return read


def build(
    csrc: Path = ROOT / "csrc", folder: Path = ROOT / "build" / "hostcuda", kernels: tuple[Path, ...] = KERNELS
) -> Path:
    """Compiles what has changed of `csrc`, `kernels` and the shim; returns the module's file."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += [f"-I{csrc}", f"-I{HERE}", "-DFUSEDRNN_HOSTCUDA"]
    watched = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fsanitize=bounds", "-x", "c++"]
    glue = ["-O1", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [(csrc / "cuda" / kernel, watched) for kernel in kernels]
    sources += [
        (csrc / "cuda" / "cuda.cpp", []),
        *((HERE / f"{name}.cpp", ["-O2"]) for name in ("memory", "threads", "exchange")),
        (HERE / "module.cpp", glue),
    ]

    def compile(source: Path, extra: list[str]) -> Path:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in _read_by(source, csrc)))
        digest.update(repr((COMPILER, flags, extra)).replace(str(csrc), "").encode())
        made = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not made.exists():
            unfinished = made.with_suffix(f".{os.getpid()}")
            _run_compiler(*flags, *extra, "-c", source, "-o", unfinished)
            unfinished.rename(made)
        return made

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process compiles the same
        objects = list(pool.map(lambda arguments: compile(*arguments), sources))
    digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    made = folder / digest / f"hostcuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        _run_compiler("-shared", *objects, "-o", unfinished)
        unfinished.rename(made)
    return made


def changed(folder: Path, file: str, line: int, new: str, kernels: tuple[Path, ...] = ONE_KERNEL) -> Path:
    """Builds a copy of the sources in `folder` with another line (counted from 0) in a file of csrc/cuda."""
    csrc, made = folder / "csrc", folder / "build"
    for part in ("cells", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, csrc)
    path = csrc / "cuda" / file
    lines = path.read_text().splitlines()
    lines[line] = new
    path.write_text("\n".join(lines) + "\n")
    # The objects that the change leaves as they are; others lie there too, of every change before.
    ignore = shutil.ignore_patterns("lock")
    shutil.copytree(build(kernels=kernels).parents[1], made, copy_function=os.symlink, ignore=ignore)
    return build(csrc, made, kernels)


@cache
def library(path: Path | None = None) -> ModuleType:
    """The module of that file, of FUSEDRNN_HOSTCUDA, or of this checkout."""
    path = path or Path(os.environ.get("FUSEDRNN_HOSTCUDA") or build())
    # The folder, a digest, tells two modules apart; the last part of a name is the one in the file.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.hostcuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Schedules(IntEnum):
    """Which may be used besides the step schedule, as csrc/cuda/tuning.h numbers them."""

    STEP = 0
    BLOCK = 1
    CLUSTER = 2
    GRID = 4
    SPLIT_GRID = 8  # backward; forward by the step schedule
    ALL = 15


seed = 0  # of the order in which a launch's threads run
chunk_bytes = 32 << 20  # as tuning.h has it
shifted = False  # whether arrays begin an element after an aligned address
multiprocessors = 132  # of the GPU that is imitated, and the most blocks of a cluster there
largest_cluster = 16
active_blocks = 1 << 30  # of those that wait for each other, by what the device says
schedules = Schedules.STEP


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def _sizes(cell: str, dtype: torch.dtype, shape: tuple[int, ...]):
    limits = (multiprocessors, largest_cluster, active_blocks, int(schedules))
    return library().Sizes(CELLS[cell], SCALARS[dtype], *shape, chunk_bytes, *limits, shifted)


def schedule(cell: str, dtype: torch.dtype, shape: tuple[int, ...], tf32: bool = False, backward: bool = False) -> str:
    """The one that such a call, of T, B, I, H and directions, takes."""
    return library().schedule(_sizes(cell, dtype, shape), tf32, backward)


def schedule_of(case, tf32: bool = False) -> str:
    """That of a case of tests/cases.py."""
    return schedule(case.equations, case.torch_dtype, (case.T, case.B, case.I, case.H, case.directions), tf32)


def _run(pass_name, cell, x: Tensor, hx: Tensor, batch_sizes, tf32, inputs: dict, results: dict, partly=()) -> None:
    directions, batch, hidden = hx.shape
    steps = x.size(0) if batch_sizes is None else len(batch_sizes)
    offsets = None if batch_sizes is None else [0, *np.cumsum(batch_sizes.numpy()).tolist()]
    shape = (steps, batch, x.size(-1), hidden, directions)
    sizes = _sizes(cell, x.dtype, shape)
    given = {name: _array(tensor) for name, tensor in (inputs | {"x": x, "hx": hx}).items() if tensor is not None}
    made = {name: _array(tensor) for name, tensor in results.items()}
    error, not_whole = getattr(library(), pass_name)(seed, sizes, tf32, offsets, given, made)
    assert not error, error
    assert set(not_whole) <= set(partly), f"{not_whole} are not written as a whole"


def _named_weights(weights: list[Tensor], hx: Tensor, prefix: str = "") -> dict[str, Tensor]:
    each = len(weights) // len(hx)
    names = [f"{prefix}{name}{d}" for d in range(len(hx)) for name in ("w_ih", "w_hh", "b_ih", "b_hh")[:each]]
    return dict(zip(names, weights, strict=True))


def forward(cell, x, hx, cx, weights, batch_sizes, lengths, resets, save, tf32) -> list[Tensor]:
    rows = x.shape[:-1].numel()
    directions, _, hidden = hx.shape
    results = {"y": x.new_empty(*x.shape[:-1], directions * hidden), "h_n": torch.empty_like(hx)}
    if cx is not None:
        results["c_n"] = torch.empty_like(cx)
    if save and SAVED[cell]:
        results["gates"] = x.new_empty(directions, rows, SAVED[cell] * hidden)
    if save and cx is not None:
        results["cells"] = x.new_empty(directions, rows, hidden)
    inputs = {"cx": cx, "lengths": lengths, "resets": resets} | _named_weights(weights, hx)
    _run("forward", cell, x, hx, batch_sizes, tf32, inputs, results, () if lengths is None else ("gates", "cells"))
    return list(results.values())


def backward(
    cell, dy, dh_n, dc_n, x, y, hx, cx, saved, weights, batch_sizes, lengths, resets, wanted, tf32, dcells=None
) -> list[Tensor]:
    inputs = {
        "y": y,
        "cx": cx,
        "dy": dy,
        "dh_n": dh_n,
        "dc_n": dc_n,
        "dcells": dcells,
        "lengths": lengths,
        "resets": resets,
    }
    inputs |= dict(zip(("gates", "cells"), saved)) | _named_weights(weights, hx)  # noqa: B905
    like = {"dx": x, "dhx": hx} | ({} if cx is None else {"dcx": cx}) | _named_weights(weights, hx, "d")
    results = {
        n: torch.empty_like(t, memory_format=torch.contiguous_format)
        for (n, t), want in zip(like.items(), wanted, strict=True)
        if want
    }
    _run("backward", cell, x, hx, batch_sizes, tf32, inputs, results)
    return list(results.values())
