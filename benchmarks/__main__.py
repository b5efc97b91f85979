"""Times fusedrnn beside torch.nn and onnxruntime on named sets of layer sizes, on the CPU."""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import fusedrnn
from benchmarks.report import ROOT, Row, draw, summarise
from benchmarks.rivals import OnnxRuntime
from benchmarks.roofline import limit, peak_flops
from benchmarks.shapes import GATES, MODES, QUICK, SETS, Case, Mode, distinct
from benchmarks.timing import (
    FLOAT32,
    ONNXRUNTIME,
    OURS,
    OURS_DENSE,
    PREPACKED,
    TORCH,
    TORCH_DENSE,
    ResultsDifferError,
    measure,
)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checked-out commit, marked when files differ from it; None where there is none."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def machine() -> dict[str, str | int | None]:
    """What a result depends on besides the case."""
    has_onnxruntime = importlib.util.find_spec("onnxruntime") is not None
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": importlib.metadata.version("onnxruntime") if has_onnxruntime else None,
        "instruction_set": fusedrnn._dispatch.extension.instruction_set() if fusedrnn._dispatch.extension else None,
        "fusedrnn": fusedrnn.__version__,
        "commit": commit(),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


def _print_header(mode: Mode) -> None:
    columns = f"{OURS:>10} {TORCH:>11} {'×':>6} {ONNXRUNTIME:>11} {'×':>6} {'GFLOP/s':>8} {'limit':>6}"
    print(f"\n{mode + ', ms':53} {columns}")


def _print_row(row: Row) -> None:
    def against(rival: str) -> str:
        ratio = row.speedup(rival)
        return f"{'-':>11} {'-':>6}" if ratio is None else f"{row.seconds[rival] * 1e3:11.3f} {ratio:6.2f}"

    line = f"{row.case.id:53} {row.seconds[OURS] * 1e3:10.3f} {against(TORCH)} {against(ONNXRUNTIME)}"
    notes = [
        f"{name} {row.seconds[name] * 1e3:.3f} {row.speedup(name):.2f}"
        for name in (OURS_DENSE, TORCH_DENSE, FLOAT32, PREPACKED)
        if name in row.seconds
    ]
    share = "" if row.share is None else f"{row.share * 100:5.0f}%"
    print(f"{line} {row.gflops:8.1f} {share} {', '.join(notes)}", flush=True)


def print_summaries(rows: list[Row], sets: Mapping[str, Iterable[Case]]) -> None:
    """What ran, and the speed-up of each set."""
    print()
    for (implementation, reason), count in Counter((r.implementation, r.reason) for r in rows).items():
        print(f"fusedrnn ran {implementation} ({reason}) in {count} rows")
    print("\nSpeed-up per set; above 1 fusedrnn is faster")
    for s in summarise(rows, sets):
        print(
            f"{s.set_name:12} {s.cell:5} {s.mode:10} against {s.rival:12} "
            f"geometric mean {s.geometric_mean:6.2f}, slower in {s.losses:2} of {s.rows:2}, "
            f"worst {s.worst:5.2f} {s.worst_id}"
        )


def _budget(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cases in under two minutes")
    which.add_argument("--set", nargs="+", choices=list(SETS), metavar="NAME", help=", ".join(SETS) + " (all)")
    parser.add_argument("--cell", nargs="+", choices=list(GATES), default=list(GATES), type=str.upper)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--against", nargs="+", choices=["torch", "onnxruntime"], default=["torch", "onnxruntime"])
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line of JSON per row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    parser.add_argument(
        "--seconds-per-row",
        type=_budget,
        metavar="S",
        help="timing budget of a case in one mode (2; quick: 1)",
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error("argument --threads: not above 0")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --plot: matplotlib is not installed")
    return args


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    sets = {"quick": QUICK} if args.quick else {name: SETS[name] for name in args.set or SETS}
    chosen = distinct(case for cases in sets.values() for case in cases if case.cell in args.cell)
    if not chosen:
        print(f"benchmarks: error: no {' or '.join(args.cell)} in {', '.join(sets)}", file=sys.stderr)
        return 2
    seconds = args.seconds_per_row or (1.0 if args.quick else 2.0)
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items() if value is not None))
    if fusedrnn._dispatch.extension is not None:
        # Before any rival's workers spin; it is the peak of every row's limit.
        print(f"peak {peak_flops('float32') / 1e9:.0f} GFLOP/s, {fusedrnn._dispatch.extension.instruction_set()}")

    rows: list[Row] = []
    wrong = 0
    with contextlib.ExitStack() as stack:
        onnxruntime = None
        if "onnxruntime" in args.against and "inference" in args.mode:
            if missing := OnnxRuntime.missing():
                print(f"Going on without onnxruntime: {' and '.join(missing)} not installed.")
            else:
                onnxruntime = stack.enter_context(OnnxRuntime(args.threads))
        out = stack.enter_context(args.out.open("a")) if args.out else None
        for mode in MODES:
            if mode not in args.mode:
                continue
            _print_header(mode)
            for case in chosen:
                if case.step and mode == "training":
                    continue
                # ONNX has no projections.
                has_rival = mode == "inference" and case.dtype == "float32" and not case.projection
                rival = onnxruntime if has_rival else None
                try:
                    measured = measure(case, mode, "torch" in args.against, rival, seconds)
                except ResultsDifferError as error:
                    wrong += 1
                    print(f"{case.id:53} not timed: {error}", flush=True)
                    continue
                row = Row(
                    case, mode, measured.seconds, measured.implementation, measured.reason, here, limit(case, mode)
                )
                rows.append(row)
                _print_row(row)
                if out:
                    print(row.to_line(), file=out, flush=True)
    print_summaries(rows, sets)
    if args.plot and rows:
        draw(rows, args.plot)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
