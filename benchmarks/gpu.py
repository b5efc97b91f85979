"""Times fusedrnn beside torch.nn, that is cuDNN, on a GPU: ``python -m benchmarks.gpu --help``.

Rows come in the order of their sets, the most telling first, each in every dtype and mode, until the time is up.
"""

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from benchmarks.__main__ import commit, print_summaries
from benchmarks.report import Row
from benchmarks.rivals import Workload, torch_workload
from benchmarks.shapes import GPU_SETS, MODES, Case, Mode, distinct
from benchmarks.timing import (
    OURS,
    OURS_DENSE,
    PREPARE,
    TORCH,
    TORCH_DENSE,
    ResultsDifferError,
    check_equal,
    fused_module,
)
from fusedrnn._bench import interleaved_medians

FLASHRNN = "FlashRNN"
DTYPES = ("bfloat16", "float32", "float16")
TF32_EPS = 2.0**-10  # of its mantissa's last place


def move(workload: Workload, device: torch.device) -> Workload:
    """The workload on another device."""

    def there(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device).requires_grad_()

    padded = there(workload.padded)
    x: Tensor | PackedSequence = padded
    if isinstance(workload.x, PackedSequence):
        x = workload.x.to(device=device)._replace(data=there(workload.x.data))  # type: ignore[call-arg]
    hx = (there(workload.hx[0]), there(workload.hx[1])) if isinstance(workload.hx, tuple) else there(workload.hx)
    return Workload(workload.module.to(device), x, padded, hx)


def flashrnn_call(case: Case, mode: Mode, workload: Workload) -> Callable[[], list[Tensor]]:
    """The same layer on FlashRNN's fused kernels, its input projection, which FlashRNN leaves to its user, included."""
    from flashrnn import flashrnn  # type: ignore[import-not-found]

    assert isinstance(workload.module, torch.nn.RNNBase)
    w_ih, w_hh, b_ih, b_hh = (weight.detach().requires_grad_() for weight in workload.module.parameters())
    x = workload.padded.detach().transpose(0, 1).contiguous().requires_grad_()
    shape = (case.batch, case.seq, 4, 1, case.hidden)

    def forward() -> Tensor:
        states: Tensor
        states, _ = flashrnn(
            F.linear(x, w_ih).view(shape),
            w_hh.view(4, 1, case.hidden, case.hidden),
            (b_ih + b_hh).view(4, 1, case.hidden),
            function="lstm",
            backend="cuda_fused",
            dtype=case.dtype,
        )
        return states[0]

    if mode == "inference":
        return lambda: [forward()]
    cotangent = torch.randn_like(forward())
    return lambda: list(torch.autograd.grad(forward(), [x, w_ih, w_hh, b_ih, b_hh], cotangent))


def measure(
    case: Case, mode: Mode, seconds: float, with_flashrnn: bool, device: torch.device
) -> tuple[dict[str, float], fusedrnn.Explanation]:
    """Median seconds by implementation, all in turn, and which of fusedrnn's ran."""
    here = torch_workload(case)
    ours, workload = fused_module(case, here).to(device), move(here, device)
    prepare = PREPARE[mode]
    calls = {
        OURS: prepare(ours, workload.x, workload.hx),
        TORCH: prepare(workload.module, workload.x, workload.hx),
    }
    with torch.inference_mode(mode == "inference"):
        tf32 = case.dtype == "float32" and torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
        check_equal(calls[TORCH](), calls[OURS](), TF32_EPS if tf32 else 0)
        if case.lengths == "packed":
            calls[OURS_DENSE] = prepare(ours, workload.padded, workload.hx)
            calls[TORCH_DENSE] = prepare(workload.module, workload.padded, workload.hx)
        if with_flashrnn:
            calls[FLASHRNN] = flashrnn_call(case, mode, workload)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        medians = interleaved_medians(list(calls.values()), seconds, wait)
    return dict(zip(calls, medians, strict=True)), fusedrnn.explain(ours, workload.x)


def machine() -> dict[str, str | int | None]:
    """What a result depends on besides the case."""
    return {
        "cpu": None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "fp32_precision": torch.backends.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "fusedrnn": fusedrnn.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M"),
    }


def print_row(row: Row) -> None:
    steps = row.case.seq * row.case.layers
    rivals = [f"{name} {row.seconds[name] * 1e3:.3f} {row.speedup(name):.2f}" for name in row.seconds if name != OURS]
    ours = row.seconds[OURS]
    print(
        f"{row.case.id:58} {row.mode:9} {ours * 1e3:9.3f} ms {ours / steps * 1e6:7.2f} µs/step  {', '.join(rivals)}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--set", nargs="+", choices=list(GPU_SETS), default=list(GPU_SETS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["training", "inference"])
    parser.add_argument("--seconds", type=float, default=420, help="for all rows together (%(default)s)")
    parser.add_argument("--seconds-per-row", type=float, default=0.3, help="(%(default)s)")
    parser.add_argument("--no-tf32", action="store_true", help="float32 without TF32, for both")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a line of JSON per row")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    if args.no_tf32:
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    device, here = torch.device("cuda"), machine()
    print(", ".join(f"{key} {value}" for key, value in here.items() if value is not None))
    has_flashrnn = importlib.util.find_spec("flashrnn") is not None
    print(f"FlashRNN: {'in the rows of its own figure, bfloat16' if has_flashrnn else 'not installed'}")

    sets = {name: GPU_SETS[name] for name in args.set}
    todo = [
        (replace(case, dtype=dtype), mode)
        for cases in sets.values()
        for case in distinct(cases)
        for dtype in args.dtype
        for mode in args.mode
    ]
    rows: list[Row] = []
    wrong = 0
    deadline = time.monotonic() + args.seconds
    with args.out.open("a") if args.out else contextlib.nullcontext() as out:
        for number, (case, mode) in enumerate(todo):
            if time.monotonic() > deadline:
                print(f"The time is up: {len(todo) - number} of {len(todo)} rows not measured.")
                break
            try:
                flash = has_flashrnn and case.name == "flashrnn" and case.dtype == "bfloat16"
                seconds, explanation = measure(case, mode, args.seconds_per_row, flash, device)
            except ResultsDifferError as error:
                wrong += 1
                print(f"{case.id:58} {mode:9} not timed: {error}", flush=True)
                continue
            row = Row(case, mode, seconds, explanation.implementation, explanation.reason, here)
            rows.append(row)
            print_row(row)
            if out:
                print(row.to_line(), file=out, flush=True)
    for dtype in args.dtype:
        print(f"\n{dtype}")
        print_summaries(
            [r for r in rows if r.case.dtype == dtype], {n: [replace(c, dtype=dtype) for c in sets[n]] for n in sets}
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
