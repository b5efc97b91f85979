"""Results as JSON lines, tables for README and docs/results.md, and plots: ``python -m benchmarks.report --help``."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.shapes import GATES, GPU_SETS, GRID, MODES, SETS, Case, Mode
from benchmarks.timing import ALONE, FLOAT32, ONNXRUNTIME, OURS, OURS_DENSE, PREPACKED, TORCH, TORCH_DENSE

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DIAMOND: dict[str, Any] = {"marker": "D", "ls": "", "color": "black", "mfc": "white", "ms": 4}
# A GPU's rows come in several dtypes, each of which is a set of its own.
GPU_DTYPE_SETS: dict[str, tuple[Case, ...]] = {
    f"{name} {dtype}": tuple(replace(case, dtype=dtype) for case in cases)
    for name, cases in GPU_SETS.items()
    for dtype in ("bfloat16", "float16", "float32")
}
# The rival of a layer that fusedrnn.prepack has been told of.
ONNXRUNTIME_TOO = "onnxruntime, prepacked"
COLOURS = {"LSTM": "#0072b2", "GRU": "#e69f00", "RNN": "#009e73"}


@dataclass(frozen=True)
class Row:
    """One case in one mode: median seconds by implementation name, and what ran where."""

    case: Case
    mode: Mode
    seconds: Mapping[str, float]
    implementation: str
    reason: str
    machine: Mapping[str, str | int | None]
    limit: float | None = None  # seconds that the machine needs at least (roofline.py)

    def speedup(self, rival: str) -> float | None:
        """The rival's time over ours: above 1 where fusedrnn is faster; None where the rival did not run."""
        ours = ALONE if rival == ONNXRUNTIME and ALONE in self.seconds else OURS  # as the rival was timed
        if rival == ONNXRUNTIME_TOO:
            rival, ours = ONNXRUNTIME, PREPACKED
        return self.seconds[rival] / self.seconds[ours] if {rival, ours} <= self.seconds.keys() else None

    @property
    def share(self) -> float | None:
        """Of the machine's limit that fusedrnn reaches."""
        best = min(self.seconds[OURS], self.seconds.get(ALONE, self.seconds[OURS]))
        return None if self.limit is None else self.limit / best

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations per second of fusedrnn."""
        return self.case.flops(self.mode) / self.seconds[OURS] / 1e9

    def to_line(self) -> str:
        """One line of JSON; its speed-ups and GFLOP/s are for other readers than ``from_line``."""
        rivals = [name for name in self.seconds if name != OURS]
        return json.dumps(
            {"id": self.case.id, **asdict(self.case), "mode": self.mode}
            | {"seconds": self.seconds, "speedup": {name: self.speedup(name) for name in rivals}}
            | {"gflops": self.gflops, "implementation": self.implementation, "reason": self.reason}
            | {"limit": self.limit, "share": self.share, "machine": self.machine}
        )

    @classmethod
    def from_line(cls, line: str) -> "Row":
        record: dict[str, Any] = json.loads(line)
        case = Case(**{field.name: record[field.name] for field in fields(Case) if field.name in record})
        own = ("mode", "seconds", "implementation", "reason", "machine")
        return cls(case, **{name: record[name] for name in own}, limit=record.get("limit"))


@dataclass(frozen=True)
class Summary:
    """The rows of one set, cell and mode against one rival."""

    set_name: str
    cell: str
    mode: Mode
    rival: str
    rows: int
    losses: int
    geometric_mean: float
    worst: float
    worst_id: str


def summarise(rows: Sequence[Row], sets: Mapping[str, Iterable[Case]]) -> list[Summary]:
    """Summaries against each rival, in the order of the sets; a case counts in each of its sets."""
    summaries = []
    for set_name, cases in sets.items():
        ids = {case.id for case in cases}
        for cell, mode, rival in (
            (c, m, r) for c in GATES for m in MODES for r in (TORCH, ONNXRUNTIME, ONNXRUNTIME_TOO, OURS_DENSE, FLOAT32)
        ):
            ratios = {
                row.case.id: ratio
                for row in rows
                if row.case.id in ids and row.case.cell == cell and row.mode == mode
                if (ratio := row.speedup(rival)) is not None
            }
            if ratios:
                worst_id = min(ratios, key=ratios.__getitem__)
                mean = statistics.geometric_mean(ratios.values())
                losses = sum(ratio < 1 for ratio in ratios.values())
                summary = Summary(set_name, cell, mode, rival, len(ratios), losses, mean, ratios[worst_id], worst_id)
                summaries.append(summary)
    return summaries


def _machine(row: Row) -> str:
    """A machine by what its makers say of it: its GPU, or else its processor, whose name may be that of several."""
    isa = row.machine.get("instruction_set")
    name = f"{row.machine['cpu']}{f' ({isa})' if isa else ''}, {row.machine['threads']} threads"
    return str(row.machine.get("gpu") or name)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of the files: of those alike in case, mode, machine and threads only the newest."""
    rows = [Row.from_line(line) for path in paths for line in path.read_text().splitlines() if line]
    rows.sort(key=lambda row: str(row.machine["date"]))
    newest = {(_machine(row), row.case.id, row.mode): row for row in rows}
    return list(newest.values())


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped under a machine's description, GPUs after the others, in the order of the case list."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_machine(row), []).append(row)
    sets = (*GPU_DTYPE_SETS.values(), *SETS.values())
    order = {case.id: position for position, case in enumerate(c for cases in sets for c in cases)}
    for group in groups.values():
        group.sort(key=lambda row: order.get(row.case.id, len(order)))
    return dict(sorted(groups.items(), key=lambda group: bool(group[1][0].machine.get("gpu"))))


def _versions(rows: Sequence[Row]) -> str:
    def seen(key: str) -> str:
        return ", ".join(sorted({str(row.machine[key]) for row in rows if row.machine.get(key) is not None}))

    named = [f"{key} {seen(key)}" for key in ("fusedrnn", "commit", "torch", "cudnn", "onnxruntime") if seen(key)]
    days = sorted({str(row.machine["date"])[:10] for row in rows})
    return "; ".join([*named, ", ".join(days)])


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _milliseconds(row: Row, name: str) -> str:
    return _number(row.seconds[name] * 1e3) if name in row.seconds else ""


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


SUMMARY = [
    "| Rows | Cell | Mode | Against | Number | Slower | Geometric mean | Worst |",
    "|---|---|---|---|--:|--:|--:|---|",
]


def _summary_lines(rows: Sequence[Row], sets: Mapping[str, Iterable[Case]]) -> list[str]:
    return SUMMARY + [
        f"| {s.set_name} | {s.cell} | {s.mode} | {s.rival} | {s.rows} | {s.losses} "
        f"| {_times(s.geometric_mean)} | {_times(s.worst)} {s.worst_id} |"
        for s in summarise(rows, sets)
    ]


def _overview_lines(rows: Sequence[Row], sets: Mapping[str, Iterable[Case]], rivals: Sequence[str]) -> list[str]:
    """A line per set and cell, with a column per mode and rival."""
    summaries = summarise(rows, sets)
    columns = list(dict.fromkeys((s.mode, s.rival) for s in summaries if s.rival in rivals))
    columns.sort(key=lambda column: MODES.index(column[0]))
    lines = [
        "| Sizes | Cell |" + "".join(f" {mode} over {rival} |" for mode, rival in columns),
        "|---|---|" + "--:|" * len(columns),
    ]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for s in summaries:
        text = f"**{_times(s.geometric_mean)}** (from {_times(s.worst)}; {s.losses} of {s.rows} slower)"
        cells.setdefault((s.set_name, s.cell), {})[s.mode, s.rival] = text
    for (set_name, cell), found in cells.items():
        lines.append(f"| {set_name} | {cell} |" + "".join(f" {found.get(column, '')} |" for column in columns))
    return lines


def overview(rows: Iterable[Row]) -> str:
    """README's results: for each machine the whole grid in a few lines; of a GPU torch.nn only, and not every model."""
    lines: list[str] = []
    for machine, group in by_machine(rows).items():
        sets: dict[str, tuple[Case, ...]] = {"grid": GRID, "one step": SETS["streaming"]}
        sets |= {name: SETS[name] for name in ("bfloat16", "projected", "truncated")}
        if group[0].machine.get("gpu"):
            sets = {name: cases for name, cases in GPU_DTYPE_SETS.items() if "models" not in name}
        rivals = [TORCH, ONNXRUNTIME, ONNXRUNTIME_TOO]
        lines += [f"**{machine}** ({_versions(group)})", "", *_overview_lines(group, sets, rivals), ""]
    return "\n".join(lines).rstrip() + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.0f} %"


def markdown(rows: Iterable[Row]) -> str:
    """All results: for each machine the summaries of every set, then every row."""
    lines: list[str] = []
    others = (TORCH_DENSE, OURS_DENSE, FLOAT32, PREPACKED)
    for machine, group in by_machine(rows).items():
        sets = GPU_DTYPE_SETS if group[0].machine.get("gpu") else {"grid": GRID, **SETS}
        lines += [f"## {machine}", "", _versions(group), "", *_summary_lines(group, sets)]
        for mode in (mode for mode in MODES if any(row.mode == mode for row in group)):
            lines += ["", f"### Every row, {mode}", ""]
            lines += ["| Case | fusedrnn ms | torch.nn ms | × | onnxruntime ms | × | GFLOP/s | of limit | also, ms |"]
            lines += ["|---|--:|--:|--:|--:|--:|--:|--:|---|"]
            lines += [
                f"| {row.case.id} | {_milliseconds(row, OURS)} "
                f"| {_milliseconds(row, TORCH)} | {_times(row.speedup(TORCH))} "
                f"| {_milliseconds(row, ONNXRUNTIME)} | {_times(row.speedup(ONNXRUNTIME))} "
                f"| {_number(row.gflops)} | {_percent(row.share)} "
                f"| {', '.join(f'{name} {_milliseconds(row, name)}' for name in others if name in row.seconds)} |"
                for row in group
                if row.mode == mode
            ]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Speed-up over torch.nn as bars, over onnxruntime as diamonds: a row per case, a panel per mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, NullFormatter

    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    cells = [cell for cell in COLOURS if any(row.case.cell == cell for row in rows)]
    # Cells from top to bottom; y counts upwards.
    ids = list(dict.fromkeys(row.case.id for cell in cells for row in rows if row.case.cell == cell))[::-1]
    height = 1.3 + 0.2 * len(ids)
    figure, axes = pyplot.subplots(1, len(modes), figsize=(11, height), sharey=True, squeeze=False)
    diamonds = False
    for axis, mode in zip(axes[0], modes, strict=True):
        for row in (row for row in rows if row.mode == mode):
            y = ids.index(row.case.id)
            ratio, onnx_ratio = row.speedup(TORCH), row.speedup(ONNXRUNTIME)
            if ratio is not None:
                axis.barh(y, ratio - 1, left=1, height=0.72, color=COLOURS[row.case.cell])
                offset, align = (1.03, "left") if ratio >= 1 else (1 / 1.03, "right")
                axis.text(ratio * offset, y, f"{ratio:.2f}", ha=align, va="center", size=7)
            if onnx_ratio is not None:
                diamonds = True
                axis.plot(onnx_ratio, y, **DIAMOND)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.12)
        axis.set_title(f"{mode}, torch.nn's time over fusedrnn's", size=10)
        axis.set_axisbelow(True)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(ids)), ids, size=7.5)
    axes[0][0].set_ylim(-0.7, len(ids) - 0.3)
    handles: list[Patch | Line2D] = [Patch(color=COLOURS[cell], label=cell) for cell in cells]
    if diamonds:
        handles += axes[0][0].plot([], [], label="over onnxruntime", **DIAMOND)
    machine, group = next(iter(by_machine(rows).items()))
    figure.legend(handles=handles, loc="lower right", ncols=len(handles), frameon=False, fontsize=8)
    figure.text(0.01, 0.08 / height, f"{machine} ({_versions(group)})", size=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1))
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")
    pyplot.close(figure)


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Time of a call while T, B or H grows, for fusedrnn and its rivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = {"growth-T": ("seq", "T, steps"), "growth-B": ("batch", "B, rows"), "growth-H": ("hidden", "H = I, units")}
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, axes = pyplot.subplots(len(modes), len(sizes), figsize=(11, 3.1 * len(modes)), squeeze=False)
    for line, mode in zip(axes, modes, strict=True):
        for axis, (name, (field, label)) in zip(line, sizes.items(), strict=True):
            chosen = [row for row in rows if row.mode == mode and row.case.name == name]
            chosen.sort(key=lambda row: int(getattr(row.case, field)))
            for rival, colour in ((OURS, "#0072b2"), (TORCH, "#d55e00"), (ONNXRUNTIME, "#666666")):
                points = [
                    (getattr(row.case, field), row.seconds[rival] * 1e3) for row in chosen if rival in row.seconds
                ]
                if points:
                    axis.loglog(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=rival)
            limits = [(getattr(row.case, field), row.limit * 1e3) for row in chosen if row.limit]
            if limits:
                axis.loglog(*zip(*limits, strict=True), ls=":", color="black", label="limit of the machine")
            axis.set_xlabel(label)
            axis.set_ylabel(f"{mode}, ms")
            axis.grid(color="#dddddd", linewidth=0.6)
            if chosen:
                first = chosen[0].case
                fixed = {"T": first.seq, "B": first.batch, "I": first.input, "H": first.hidden}
                fixed.pop(name[-1])
                if name == "growth-H":
                    fixed.pop("I")
                axis.set_title(f"{first.cell}, " + ", ".join(f"{k} {v}" for k, v in fixed.items()), size=9)
    axes[0][0].legend(fontsize=7.5, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def _between_markers(path: Path, text: str) -> bool:
    """Puts text between the markers of a file; says so and returns False where they are missing."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"report: error: {path.name} lacks {BEGIN} .. {END}", file=sys.stderr)
        return False
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="result files (benchmarks/results/*.jsonl)")
    parser.add_argument("--write", action="store_true", help="put the tables into README and docs/results.md instead")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the first machine's rows")
    parser.add_argument("--set", nargs="+", choices=SETS, default=["models"], help="sets drawn (models)")
    parser.add_argument("--plot-growth", type=Path, metavar="FILE.png", help="also draw the set growth")
    parser.add_argument("--plot-gpu", type=Path, metavar="FILE.png", help="also draw the first GPU's bfloat16")
    args = parser.parse_args()
    rows = read_rows(args.files or sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    if not rows:
        print("report: error: no results; make some with python -m benchmarks --out FILE.jsonl", file=sys.stderr)
        return 1
    if args.write:
        written = (
            _between_markers(ROOT / "README.md", overview(rows)),
            _between_markers(ROOT / "docs" / "results.md", markdown(rows)),
        )
        if not all(written):
            return 1
    else:
        print(markdown(rows), end="")
    first = next(iter(by_machine(rows).values()))
    if args.plot:
        drawn = {case.id for name in args.set for case in SETS[name]}
        draw([row for row in first if row.case.id in drawn], args.plot)
    if args.plot_growth:
        draw_growth(first, args.plot_growth)
    if args.plot_gpu:
        drawn = {case.id for case in GPU_DTYPE_SETS["headline bfloat16"]}
        gpus = (group for group in by_machine(rows).values() if group[0].machine.get("gpu"))
        draw([row for row in next(gpus) if row.case.id in drawn], args.plot_gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
