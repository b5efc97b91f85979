"""What the compiler made of the GPU kernels, without a GPU: registers, spills, and the width of accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"


def tool(name: str) -> str | None:
    """On PATH, or in the triton package, which comes with torch's CUDA builds."""
    triton = importlib.util.find_spec("triton")
    folders = (
        [Path(folder) / "backends" / "nvidia" / "bin" for folder in triton.submodule_search_locations or []]
        if triton
        else []
    )
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).exists()), None)


pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or not tool("nvcc") or not tool("cuobjdump") or not tool("c++filt"),
    reason="needs the sources, nvcc and cuobjdump",
)

ARCHITECTURES = ("sm_80", "sm_90")
CELLS = {"rnn_tanh": "RNN<false>", "rnn_relu": "RNN<true>", "lstm": "LSTM", "gru": "GRU"}  # by source file
SCALARS = {"float": 4, "double": 2, "fusedrnn::cuda::float16": 4, "fusedrnn::cuda::bfloat16": 4}  # units at once
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_file = pytest.mark.parametrize("name", CELLS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With all cubins: of the extension, where it has been built of these sources, or else compiled, for minutes."""
    made = tmp_path_factory.mktemp("cubins")
    read = [CSRC.parent / "setup.py", *CSRC.glob("*.h"), *CSRC.glob("cells/*"), *CSRC.glob("cuda/*")]
    newest = max(path.stat().st_mtime for path in read)
    for name in CELLS:
        for of_extension in CSRC.parent.glob(f"build/temp*/csrc/cuda/{name}.o"):
            if of_extension.stat().st_mtime > newest:
                subprocess.run([tool("cuobjdump"), "--extract-elf", "all", str(of_extension)], cwd=made, check=False)
                for found in list(made.glob(f"{name}.*.cubin")):
                    found.rename(cubin(made, name, re.search(r"sm_\w+", found.name)[0]))

    def make(missing: tuple[str, str]) -> None:
        name, architecture = missing
        command = [tool("nvcc"), "-std=c++20", "-O3", f"-arch={architecture}", f"-I{CSRC}", "-cubin"]
        subprocess.run([*command, str(CSRC / "cuda" / f"{name}.cu"), "-o", str(cubin(made, *missing))], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, [pair for pair in product(CELLS, ARCHITECTURES) if not cubin(made, *pair).exists()]))
    return made


def cubin(folder: Path, name: str, architecture: str) -> Path:
    return folder / f"{name}-{architecture}.cubin"


def dump(cubin: Path, what: str) -> str:
    text = subprocess.run([tool("cuobjdump"), what, str(cubin)], capture_output=True, text=True, check=True).stdout
    text = subprocess.run([tool("c++filt")], input=text, capture_output=True, text=True, check=True).stdout
    return text.replace("> >", ">>")


@cache
def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack, local and shared memory by kernel."""
    found = re.findall(r"Function (?:void )?(.+):\n\s*(REG:.+)", dump(cubin, "--dump-resource-usage"))
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@cache
def scheduled(cubin: Path) -> dict[str, list[tuple[str, int, int]]]:
    """By kernel every opcode, the barrier that its result raises (7: none), and a bit for each that it waits for."""
    found = {}
    for name, text in re.findall(
        r"Function : (?:void )?(.+)\n((?:.|\n)*?)(?=\tFunction|\Z)", dump(cubin, "--dump-sass")
    ):
        encoded = r"(?:@!?\w+ )?([A-Z][\w.]+).*/\* 0x[0-9a-f]{16} \*/\n\s+/\* 0x([0-9a-f]{16}) \*/"
        control = [(opcode, int(high, 16) >> 41) for opcode, high in re.findall(encoded, text)]
        found[name] = [(opcode, bits >> 5 & 7, bits >> 11 & 63) for opcode, bits in control]
    return found


def instructions(cubin: Path) -> dict[str, list[str]]:
    """Opcodes by kernel."""
    return {name: [opcode for opcode, _, _ in steps] for name, steps in scheduled(cubin).items()}


def kernels(name: str) -> list[tuple[str, int]]:
    """The kernels of a source file, and how many units a thread takes at once."""
    return [
        (f"fusedrnn::cuda::{kernel}<fusedrnn::{CELLS[name]}, {scalar}, {width}>(", width)
        for scalar, widest in SCALARS.items()
        for width in (widest, 1)
        for kernel in ("forward_step", "backward_step")
    ]


def blocks(name: str) -> list[str]:
    """The kernels of the block schedule."""
    return [
        f"fusedrnn::cuda::{kernel}<fusedrnn::{CELLS[name]}, {scalar}, {rows}>("
        for scalar in SCALARS
        if scalar != "double"
        for rows in (1, 2, 4)
        for kernel in ("block_forward", "block_backward")
    ]


def lone_steps(name: str) -> list[str]:
    """The kernels of lone steps."""
    return [
        f"fusedrnn::cuda::lone_step<fusedrnn::{CELLS[name]}, {scalar}, {rows}, {width}>("
        for scalar in SCALARS
        if scalar != "double"
        for rows in (1, 4)
        for width in (4, 1)
    ]


def residents(name: str, architecture: str) -> list[tuple[str, str]]:
    """The kernels of the resident schedules, and what multiplies in them; a GPU before sm_90 has no clusters."""
    multipliers = {f"TensorCores<{scalar}>": "HMMA" for scalar in SCALARS if scalar != "double"} | {"Fma": "FFMA"}
    found = []
    for multiplier, opcode in multipliers.items():
        compact = ["false", "true"] if opcode == "HMMA" else ["false"]
        teams = ("cluster", "grid") if architecture >= "sm_90" else ("grid",)
        for team, side, of in product(teams, ("forward", "backward"), compact):
            kernel = f"{team}_{side}<fusedrnn::{CELLS[name]}, fusedrnn::cuda::{multiplier}, {of}>("
            found.append((f"fusedrnn::cuda::{kernel}", opcode))
    return found


def find(kernel: str, by_name: dict):
    (found,) = [value for name, value in by_name.items() if name.startswith(kernel)]
    return found


@each_architecture
@each_file
def test_registers_and_memory(folder, name, architecture):
    tuning = (CSRC / "cuda" / "tuning.h").read_text()
    budgets = {
        prefix: int(re.search(rf"\b{number} = (\d+)", tuning)[1])
        for prefix, number in (
            ("block_", "block_register_budget"),
            ("cluster_", "resident_register_budget"),
            ("grid_", "resident_register_budget"),
            ("lone_", "lone_register_budget"),
            ("", "register_budget"),
        )
    }
    used = resources(cubin(folder, name, architecture))
    named = [kernel for kernel, _ in [*kernels(name), *residents(name, architecture)]]
    for kernel in [*named, *blocks(name), *lone_steps(name)]:
        assert find(kernel, used)
    for kernel, of in used.items():
        budget = next(number for prefix, number in budgets.items() if f"cuda::{prefix}" in kernel)
        assert of["REG"] <= budget, kernel
        # Shared memory is asked for at a launch; 1024 bytes of a block's belong to the system from sm_90 on.
        assert (of["STACK"], of["LOCAL"], of["SHARED"] % 1024) == (0, 0, 0), f"{kernel}: {of}"


@each_architecture
@each_file
def test_nothing_is_spilled_and_accesses_are_wide(folder, name, architecture):
    code = instructions(cubin(folder, name, architecture))
    for kernel, opcodes in code.items():
        assert len(opcodes) > 10 or ("cuda::cluster_" in kernel and architecture < "sm_90"), kernel
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], kernel
    for kernel, width in kernels(name):
        if "_step<" in kernel:
            wide = [opcode for opcode in find(kernel, code) if re.match(r"LDG\..*\b128\b", opcode)]
            assert bool(wide) == (width > 1), kernel
    for kernel, multiplies in residents(name, architecture):
        opcodes = find(kernel, code)
        products = [opcode for opcode in opcodes if opcode.startswith(multiplies)]
        # Two slots of 8 groups: two instructions each on tensor cores, 4 columns of 2 rows of 4 words each without.
        assert len(products) >= 16 * (2 if multiplies == "HMMA" else 32), kernel
        assert [opcode for opcode in opcodes if re.match(r"LDS.*\b128\b", opcode)], kernel
        if "forward<" in kernel:  # weights: of 2 slots, 2 rows of each group
            assert len([opcode for opcode in opcodes if re.match(r"LDG.*\b128\b", opcode)]) >= 32, kernel
        # What blocks hand each other: copied from the L2 past the L1, or sent into another's shared memory.
        in_grid, has_clusters = "cuda::grid_" in kernel, architecture >= "sm_90"
        assert bool([opcode for opcode in opcodes if re.match(r"LDGSTS.*BYPASS.*\b128\b", opcode)]) == in_grid, kernel
        # Shares of sums go as they lie in registers: of FMAs, in pairs of columns.
        width = 64 if "cuda::cluster_backward" in kernel and "Fma" in kernel and "RNN" not in kernel else 128
        sent = [opcode for opcode in opcodes if opcode.startswith("STAS")]
        assert bool(sent) == (not in_grid or ("backward<" in kernel and has_clusters)), kernel
        assert all(re.search(rf"\b{width}\b", opcode) for opcode in sent), (kernel, sent)
    for kernel in blocks(name):
        assert [opcode for opcode in find(kernel, code) if re.match(r"LDS.*\b128\b", opcode)], kernel
    for kernel in [*blocks(name), *(kernel for kernel, _ in residents(name, architecture))]:
        opcodes = find(kernel, code)
        assert not [opcode for opcode in opcodes if re.match(r"LD\.|ST\.", opcode)], f"{kernel}: of no known memory"


@each_architecture
@each_file
def test_loads_are_under_way_during_the_exchange(folder, name, architecture):
    """Nothing that a cluster's or a compact team's step loads is waited for before the wait for the other blocks."""
    code = scheduled(cubin(folder, name, architecture))
    for kernel, _ in residents(name, architecture):
        in_grid = "cuda::grid_" in kernel
        if in_grid and not kernel.endswith(", true>("):
            continue
        steps = find(kernel, code)
        asks = r"LDG.*\bSTRONG\b" if in_grid else r".*TRYWAIT"
        waits = [i for i, (opcode, _, _) in enumerate(steps) if re.fullmatch(asks + ".*", opcode)]
        # A row's length, of 64 bits, is needed to know what to load, as are, before it, the rows of a packed batch.
        near = range(waits[0] - 60, waits[0])
        loads = [i for i in near if steps[i][0].startswith("LDG") and not steps[i][0].endswith(".64")]
        assert loads, kernel
        for i in loads[-2:]:
            waiting = [steps[k][0] for k in range(i + 1, waits[0]) if steps[k][2] >> steps[i][1] & 1]
            assert not waiting, (kernel, steps[i], waiting)


@each_architecture
def test_micro_benchmark_builds(folder, architecture):
    """The program that `make gpu` runs first."""
    source = CSRC.parent / "benchmarks" / "micro.cu"
    command = [
        tool("nvcc"),
        "-std=c++20",
        f"-arch={architecture}",
        f"-I{CSRC}",
        str(source),
        "-o",
        str(folder / "micro"),
    ]
    subprocess.run(command, check=True)
