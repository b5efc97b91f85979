"""Peak memory of a training step, fusedrnn (and recomputing) beside torch.nn: ``python -m benchmarks.memory --help``.

Each is measured in a process of its own: how far the resident set grows above what it was before a step (forward and
backward with every gradient) when the code, the weights, the input and the allocator's caches are there. Each block
from 64 KiB on is a mapping of its own, so that what counts is what is in use and not what the C library keeps in the
holes between blocks, which differs by a weight's gradient from one step to the next. Linux with glibc only.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

from benchmarks.rivals import Workload, torch_workload
from benchmarks.shapes import SETS, Case, distinct
from benchmarks.timing import OURS, TORCH, fused_module

STATUS = Path("/proc/self/status")
RECOMPUTED = "recompute"
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}  # the environment of a process to be measured


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")


def _train(module: torch.nn.Module, workload: Workload) -> None:
    """Forward and backward, with the gradients of the input and of every parameter."""
    y, _ = module(workload.x, workload.hx)
    x, y = (t.data if isinstance(t, PackedSequence) else t for t in (workload.x, y))
    torch.autograd.grad(y.sum(), [x, *module.parameters()])


def _prepared(case: Case, implementation: str) -> tuple[torch.nn.Module, Workload]:
    workload = torch_workload(case)
    if implementation == TORCH:
        return workload.module, workload
    module = fused_module(case, workload)
    module.recompute = implementation == RECOMPUTED  # type: ignore[assignment]
    return module, workload


def step_growth(case: Case, implementation: str, steps: int = 3) -> tuple[int, int]:
    """How far, in bytes, some steps rise above the memory before them at their peak, and how much they leave behind."""
    hidden = min(case.hidden, 128)
    projection = min(case.projection, hidden // 2)
    small = replace(case, batch=min(case.batch, 2), seq=min(case.seq, 30), hidden=hidden, projection=projection)
    _train(*_prepared(small, implementation))  # loads code and starts threads
    module, workload = _prepared(case, implementation)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(steps):
        _train(module, workload)
    return (_kilobytes("VmHWM") - before) << 10, (_kilobytes("VmRSS") - before) << 10


def in_process(case: Case, implementation: str, threads: int) -> tuple[int, int]:
    """:func:`step_growth` in a new process."""
    request = json.dumps({"case": asdict(case), "implementation": implementation, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.memory", "--child", request]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **ALLOCATOR})
    peak, kept = json.loads(done.stdout.splitlines()[-1])
    return int(peak), int(kept)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--set", nargs="+", choices=list(SETS), default=["models", "trial"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line of JSON per row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        request = json.loads(args.child)
        torch.set_num_threads(request["threads"])
        print(json.dumps(step_growth(Case(**request["case"]), request["implementation"])))
        return 0
    print(f"{'peak of a training step, MB':55} {OURS:>10} {RECOMPUTED:>10} {TORCH:>10} {'ratios':>12}")
    for case in distinct(case for name in args.set for case in SETS[name] if not case.step):
        peaks = {name: in_process(case, name, args.threads)[0] for name in (OURS, RECOMPUTED, TORCH)}
        numbers = " ".join(f"{peak / 1e6:10.1f}" for peak in peaks.values())
        ratios = " ".join(f"{peaks[name] / max(1, peaks[TORCH]):5.2f}" for name in (OURS, RECOMPUTED))
        print(f"{case.id:55} {numbers}  {ratios}", flush=True)
        if args.out:
            with args.out.open("a") as out:
                print(json.dumps({"id": case.id, "peak_bytes": peaks, "threads": args.threads}), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
