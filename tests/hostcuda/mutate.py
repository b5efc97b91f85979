"""How much the host tests see: changes the GPU sources in one place at a time and runs the tests on each change.

    PYTHONPATH=.:tests python tests/hostcuda/mutate.py [--files elementwise.cuh …] [--every N] [--out FILE]

Prints each mutant that no test notices, and how many were killed. Changes that do not compile are not counted.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import test_hostcuda as tests
import test_resident
import torch
from cases import Case

import hostcuda
from fusedrnn import _autograd, _direct, _dispatch, _ops
from hostcuda import Schedules

FILES = (
    *("elementwise.cuh", "block.cuh", "resident.cuh", "team.cuh", "exchange.cuh", "mma.cuh", "chunk_kernel.cuh"),
    *("recurrence.cuh", "layer.cuh", "places.h", "values.cuh", "tuning.h"),
)
# What is replaced by what. A whole token is matched, with the spaces around an operator.
REPLACEMENTS = (
    (r" \+ ", (" - ",)),
    (r" - ", (" + ",)),
    (r" \* ", (" + ",)),
    (r" / ", (" * ",)),
    (r" \+= ", (" = ",)),
    (r" < ", (" <= ", " > ")),
    (r" > ", (" >= ",)),
    (r" <= ", (" < ",)),
    (r" >= ", (" > ",)),
    (r" == ", (" != ",)),
    (r" && ", (" || ",)),
    (r" \|\| ", (" && ",)),
    (r"!(?=[\w(])", ("",)),
    (r"\btrue\b", ("false",)),
    (r"\bfalse\b", ("true",)),
    (r"(?<![\w.<])0(?![\w.>])", ("1",)),
    (r"(?<![\w.<])1(?![\w.>])", ("0", "2")),
    (r"\bprevious\b", ("here",)),
    (r"\blater\b", ("here",)),
    (r"\bhere\b", ("later",)),
    (r"\bCell::sums\b", ("Cell::gates",)),
    (r"\bCell::gates\b", ("Cell::sums",)),
    (r"\bCell::saved\b", ("Cell::gates",)),
    (r"\bstd::max\b", ("std::min",)),
    (r"\bstd::min\b", ("std::max",)),
    (r"\.x\b", (".y",)),
    (r"\.y\b", (".x",)),
)
STATEMENT = re.compile(
    r"^\s+(?!return\b|const\b|auto\b|if\b|for\b|using\b|explicit\b|static\b|[A-Z]\w*[ *&]\s*\w+[;{(])[\w>.:-]+[^;{}]*;$"
)


DECLARATIONS = "template|using|namespace|struct|class|static_assert|extern|public|private"


class Mutant(NamedTuple):
    file: str
    line: int  # counted from 0
    new: str


def code_lines(text: str) -> list[tuple[int, str]]:
    """Lines of functions that the host runs: no comments, directives, template heads and declarations of members."""
    lines, on_gpu = [], [False]  # of each #if around
    for number, line in enumerate(text.splitlines()):
        code = line.split("//")[0].rstrip()
        if code.startswith("#if"):
            on_gpu.append(on_gpu[-1])
        elif code == "#else":
            on_gpu[-1] = True
        elif code == "#endif":
            on_gpu.pop()
        elif code and not on_gpu[-1] and not re.match(rf"\s*(#|{DECLARATIONS})", code):
            lines.append((number, code))
    return lines


def mutants(file: str) -> list[Mutant]:
    text = (hostcuda.ROOT / "csrc" / "cuda" / file).read_text()
    found = []
    for number, code in code_lines(text):
        for pattern, replacements in REPLACEMENTS:
            for match in re.finditer(pattern, code):
                for new in replacements:
                    found.append(Mutant(file, number, code[: match.start()] + new + code[match.end() :]))
        if STATEMENT.match(code):
            found.append(Mutant(file, number, ";"))
    return found


def checks() -> list[Callable[[], None]]:
    """The tests that see most, those first that fail most often; what they want is found here. Only instantiations of
    few.cu are built: GRU in bfloat16 and LSTM in float32."""
    kinds = ({"cell": "gru", "dtype": "bfloat16"}, {"cell": "lstm"})
    shapes = [{"T": 5, "B": 4, "I": 3, "H": h, "bidirectional": both} for h in (9, 8) for both in (True, False)]
    cases = [Case(**kind, **shape) for shape in shapes for kind in kinds]
    rows = [call for case in cases for call in tests.calls(case).values()]
    rows += [tests.Call(replace(case, **kind)) for case in tests.SIZES[::3] for kind in kinds]
    rows += [tests.Call(replace(case, bias=False)) for case in cases[:4]]
    rows += [tests.Call(replace(case, B=0)) for case in cases[:4]]
    chunk_kernels = [
        tests.calls(replace(case, T=8, **shape))[name]
        for shape in ({"B": 4, "bidirectional": True}, {"H": 26, "B": 17, "bidirectional": False})  # several teams
        for case in cases[:2]
        for name in ("padded", "packed", "lengths and resets")
    ]
    large = [tests.Call(Case("lstm", T=8, B=3, I=2, H=160))]
    for call in rows + chunk_kernels + large:
        tests.wanted(call)

    def check(call: tests.Call, **settings: int) -> None:
        for name, value in settings.items():
            setattr(hostcuda, name, value)
        tests.check(call)

    def check_tf32(call: tests.Call, schedule: Schedules) -> None:
        hostcuda.schedules = schedule
        ours, use_tf32 = None, _dispatch.use_tf32
        _dispatch.use_tf32 = lambda x: x.dtype == torch.float32
        try:
            ours = tests.run_recurrence(_autograd.recurrence, call)
        finally:
            _dispatch.use_tf32 = use_tf32
        tests.assert_all_as_good(ours, *tests.wanted(call), torch.float16)

    few = [call for call in rows if call.case.lengths or not (call.lengths or call.resets)]
    usual = {"chunk_bytes": 1 << 20, "multiprocessors": 4}
    todo = []
    for schedules in (Schedules.CLUSTER, Schedules.GRID, Schedules.BLOCK):
        todo += [partial(check, call, schedules=schedules, seed=i, **usual) for i, call in enumerate(chunk_kernels)]
        todo += [partial(check_tf32, call, schedules) for call in chunk_kernels if call.case.cell == "lstm"]
    todo += [partial(check, call, schedules=Schedules.STEP, **usual) for call in rows]
    for chunk_bytes in (2000, 1):
        for schedules in (Schedules.STEP, Schedules.CLUSTER, Schedules.GRID, Schedules.BLOCK):
            calls = few if schedules == Schedules.STEP else chunk_kernels[::2]
            todo += [partial(check, call, schedules=schedules, chunk_bytes=chunk_bytes) for call in calls]
    todo += [partial(check, call, schedules=Schedules.BLOCK, multiprocessors=100) for call in chunk_kernels]
    todo += [partial(check, c, schedules=Schedules.GRID, chunk_bytes=1 << 20, multiprocessors=8) for c in chunk_kernels]
    todo += [test_resident.test_plans, *of_tests()]
    for schedules in (Schedules.CLUSTER, Schedules.GRID):
        todo += [partial(check, call, schedules=schedules, largest_cluster=4, **usual) for call in large]
    return todo


def of_tests() -> Iterator[Callable[[], None]]:
    """Tests of the choice of a schedule that few.cu can pass, and of what only a larger size has."""

    def run_test(test: Callable[..., None], *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(hostcuda, "multiprocessors", 132)
            test(monkeypatch, *arguments)

    yield partial(run_test, test_resident.test_slots_that_are_left_over)
    for test in (
        test_resident.test_schedule_on_an_h100,
        test_resident.test_device_says_how_many_blocks_there_is_room_for,
    ):
        for arguments in test.pytestmark[0].args[1]:
            if arguments[1:3] in (("gru", torch.bfloat16), ("lstm", torch.float32)) or len(arguments) == 3:
                yield partial(run_test, test, *arguments)


def run(mutant: Mutant, todo: list[Callable[[], None]], seconds: float) -> str:
    """killed, also by running for more than so much of a processor's time, survived or stillborn."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.environ["FUSEDRNN_HOSTCUDA"] = str(hostcuda.changed(Path(folder), *mutant))
        except subprocess.CalledProcessError as error:
            if "error:" not in error.stderr:  # not the compiler's
                raise
            return "stillborn"
        child = os.fork()  # a change may crash or hang
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                for check in todo:
                    check()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return "killed" if os.waitpid(child, 0)[1] else "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth mutant")
    parser.add_argument("--out", type=Path, help="a JSON line for every mutant")
    arguments = parser.parse_args()
    shutil.rmtree(hostcuda.ROOT / "build" / "hostcuda", ignore_errors=True)
    os.environ["FUSEDRNN_HOSTCUDA"] = str(hostcuda.build(kernels=hostcuda.FEW_KERNELS))
    torch.set_num_threads(1)
    _ops.recurrence_forward, _ops.recurrence_backward = hostcuda.forward, hostcuda.backward
    _direct.kernels = None
    todo = checks()
    mutated = [mutant for file in arguments.files for mutant in mutants(file)][:: arguments.every]
    print(f"{len(mutated)} mutants, {len(todo)} checks", flush=True)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    begin = time.process_time()
    for check in todo:  # of what is not changed: none may fail
        check()
    seconds = 3 * (time.process_time() - begin)
    for mutant in mutated:
        result = run(mutant, todo, seconds)
        counts[mutant.file][result] += 1
        if arguments.out:
            with arguments.out.open("a") as out:
                out.write(json.dumps({**mutant._asdict(), "result": result}) + "\n")
        if result == "survived":
            print(f"survived: {mutant.file}:{mutant.line + 1}: {mutant.new.strip()}", flush=True)
    for file, count in counts.items():
        print(f"{file}: {count['killed']} of {count['killed'] + count['survived']} killed")
    killed = sum(count["killed"] for count in counts.values())
    born = killed + sum(count["survived"] for count in counts.values())
    print(f"all: {killed} of {born} killed ({100 * killed / max(1, born):.1f} %)")


if __name__ == "__main__":
    main()
