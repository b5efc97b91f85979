"""How much the host tests see: changes the GPU sources in one place at a time and runs the tests on each change.

    python tests/hostcuda/mutate.py [--files elementwise.cuh …] [--sample N] [--seed S] [--out FILE]

The tests are those of test_hostcuda.py, test_hostcalls.py and test_resident.py that the two instantiations of few.cu
can pass. Prints each mutant that none of them notices, and how many were killed. Changes that do not compile are not
counted.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _pytest.runner import runtestprotocol

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import hostcuda  # noqa: E402

FILES = (
    *(
        "units.cuh",
        "biases.cuh",
        "elementwise.cuh",
        "block.cuh",
        "resident.cuh",
        "team.cuh",
        "product.cuh",
        "exchange.cuh",
        "mma.cuh",
        "chunk_kernel.cuh",
    ),
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


@dataclass
class Test:
    item: pytest.Item
    seconds: float  # of a processor, of what is not changed
    kills: Counter = field(default_factory=Counter)  # by the file that was changed

    def passes(self) -> bool:
        return all(report.passed for report in runtestprotocol(self.item, log=False, nextitem=None))


def passing(items: list[pytest.Item]) -> list[Test]:
    tests = []
    for item in items:
        begin = time.process_time()
        test = Test(item, 0)
        if test.passes():
            test.seconds = time.process_time() - begin
            tests.append(test)
    return tests


def run(mutant: Mutant, tests: list[Test]) -> tuple[str, Test | None]:
    """killed and by which test, also by running for far longer than it should; or survived, or stillborn."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            module = hostcuda.changed(Path(folder), *mutant, hostcuda.FEW_KERNELS)
        except subprocess.CalledProcessError as error:
            if "error:" not in error.stderr:  # not the compiler's
                raise
            return "stillborn", None
        # What has killed before comes first.
        order = sorted(tests, key=lambda test: (-test.kills[mutant.file], -test.kills.total(), test.seconds))
        reached = mmap.mmap(-1, 4)
        child = os.fork()  # a change may crash or hang
        if child == 0:
            os.environ["FUSEDRNN_HOSTCUDA"] = str(module)
            hostcuda.library.cache_clear()
            for number, test in enumerate(order):
                reached[:] = number.to_bytes(4, "little")
                signal.setitimer(signal.ITIMER_PROF, 2 + 10 * test.seconds)
                if not test.passes():
                    os._exit(1)
            os._exit(0)
        if not os.waitpid(child, 0)[1]:
            return "survived", None
        killer = order[int.from_bytes(reached, "little")]
        killer.kills[mutant.file] += 1
        return "killed", killer


class Mutation:
    """A plugin: in place of running the tests once, runs them on each mutant."""

    def __init__(self, mutated: list[Mutant], out: Path | None) -> None:
        self.mutated, self.out = mutated, out

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        tests = passing(session.items)
        seconds = sum(test.seconds for test in tests)
        print(f"{len(self.mutated)} mutants, {len(tests)} of {len(session.items)} tests, {seconds:.0f} s", flush=True)
        counts: dict[str, Counter] = defaultdict(Counter)
        for mutant in self.mutated:
            begin = time.monotonic()
            result, killer = run(mutant, tests)
            counts[mutant.file][result] += 1
            if self.out:
                told = {"result": result, "by": killer and killer.item.nodeid, "seconds": time.monotonic() - begin}
                with self.out.open("a") as out:
                    out.write(json.dumps(mutant._asdict() | told) + "\n")
            if result == "survived":
                print(f"survived: {mutant.file}:{mutant.line + 1}: {mutant.new.strip()}", flush=True)
        for file, count in {**counts, "all": sum(counts.values(), Counter())}.items():
            born = count["killed"] + count["survived"]
            print(f"{file}: {count['killed']} of {born} killed ({100 * count['killed'] / max(1, born):.1f} %)")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn at random, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--out", type=Path, help="a JSON line for every mutant")
    arguments = parser.parse_args()
    mutated = [mutant for file in arguments.files for mutant in mutants(file)]
    random.Random(arguments.seed).shuffle(mutated)
    shutil.rmtree(hostcuda.ROOT / "build" / "hostcuda", ignore_errors=True)
    os.environ["FUSEDRNN_HOSTCUDA"] = str(hostcuda.build(kernels=hostcuda.FEW_KERNELS))
    torch.set_num_threads(1)
    files = [str(TESTS / f"test_{name}.py") for name in ("hostcuda", "hostcalls", "resident")]
    options = ["-q", "-s", "--tb=line", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", "not planted"]
    pytest.main([*files, *options], plugins=[Mutation(mutated[: arguments.sample], arguments.out)])


if __name__ == "__main__":
    main()
