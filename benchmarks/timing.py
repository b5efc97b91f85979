"""Times one case in one mode: fusedrnn and its rivals, in turn, after their results were found equal."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusedrnn
from benchmarks.rivals import OnnxRuntime, Workload, projected, torch_workload
from benchmarks.shapes import Case, Mode
from fusedrnn._bench import inference_call, interleaved_medians, training_call

OURS = "fusedrnn"
ALONE = "fusedrnn alone"
PREPACKED = "fusedrnn prepacked"
OURS_DENSE = "fusedrnn dense"
FLOAT32 = "fusedrnn float32"
TORCH = "torch.nn"
TORCH_DENSE = "torch.nn dense"
ONNXRUNTIME = "onnxruntime"

Call = Callable[[], list[Tensor]]
PREPARE = {"inference": inference_call, "training": training_call}


class ResultsDifferError(Exception):
    """fusedrnn and torch.nn disagree, so that comparing their speed would mean nothing."""


@dataclass(frozen=True)
class Measurement:
    """Median seconds by implementation name, and which of fusedrnn's implementations ran and why."""

    seconds: dict[str, float]
    implementation: str
    reason: str


def fused_module(case: Case, workload: Workload) -> torch.nn.Module:
    """The fusedrnn module of the case, with the weights of the workload's torch.nn module."""
    if case.step:
        cell: torch.nn.Module = getattr(fusedrnn, case.cell + "Cell")(case.input, case.hidden)
        cell.load_state_dict(workload.module.state_dict())
        return cell
    module: torch.nn.RNNBase = getattr(fusedrnn, case.cell)(
        case.input,
        case.hidden,
        case.layers,
        bidirectional=case.bidirectional,
        dtype=getattr(torch, case.dtype),
        **projected(case),
    )
    module.load_state_dict(workload.module.state_dict())
    return module


def check_equal(expected: list[Tensor], actual: list[Tensor], eps: float = 0) -> None:
    """Raises where a pair differs by more than the root of its dtype's eps, or of ``eps``, of the largest value."""
    for index, (theirs, mine) in enumerate(zip(expected, actual, strict=True)):
        scale = max(1.0, theirs.abs().max().item())
        difference = (mine - theirs).abs().max().item() / scale
        # Written so that a NaN fails.
        if not difference <= max(eps, torch.finfo(theirs.dtype).eps) ** 0.5:
            raise ResultsDifferError(f"result {index} is {difference:.1e} from torch.nn's")


def _medians(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    return dict(zip(calls, interleaved_medians(list(calls.values()), seconds), strict=True))


def measure(case: Case, mode: Mode, with_torch: bool, onnxruntime: OnnxRuntime | None, seconds: float) -> Measurement:
    """Median seconds of fusedrnn and of each rival.

    fusedrnn and torch.nn share ``seconds`` in one process. A packed case is also given to both as a padded batch, which
    does more arithmetic and gives other results, but spares torch.nn the packing's cost. A bfloat16 case is also run by
    fusedrnn in float32. onnxruntime, for inference only, has a quarter of ``seconds`` before them and another after
    them, and the better median counts; as it then has the machine's caches for itself, it is compared with fusedrnn
    ``ALONE``, timed in the same way, as is fusedrnn with its weights packed before, which onnxruntime's are.
    """
    workload = torch_workload(case)
    ours = fused_module(case, workload)
    explanation = fusedrnn.explain(ours, workload.x)
    prepare = PREPARE[mode]
    calls: dict[str, Call] = {OURS: prepare(ours, workload.x, workload.hx)}
    prepacked = fused_module(case, workload)
    packed_before = prepare(prepacked if case.step else fusedrnn.prepack(prepacked), workload.x, workload.hx)
    theirs = prepare(workload.module, workload.x, workload.hx)
    with torch.inference_mode(mode == "inference"):
        check_equal(theirs(), calls[OURS]())
        if with_torch:
            calls[TORCH] = theirs
        if case.lengths == "packed":
            calls[OURS_DENSE] = prepare(ours, workload.padded, workload.hx)
            if with_torch:
                calls[TORCH_DENSE] = prepare(workload.module, workload.padded, workload.hx)
        if case.dtype == "bfloat16":
            wide_case = replace(case, dtype="float32")
            wide = torch_workload(wide_case)
            calls[FLOAT32] = prepare(fused_module(wide_case, wide), wide.x, wide.hx)

        if onnxruntime is None:
            return Measurement(_medians(calls, seconds), explanation.implementation, explanation.reason)
        alone: dict[str, Call] = {ALONE: calls[OURS]}
        if case.seq > 1:
            alone[PREPACKED] = packed_before
            check_equal(calls[OURS](), packed_before())
        theirs_before = onnxruntime.median_seconds(case, seconds / 4)
        before = _medians(alone, seconds / 8 * len(alone))
        medians = _medians(calls, seconds)
        after = _medians(alone, seconds / 8 * len(alone))
        medians |= {name: min(before[name], after[name]) for name in alone}
        medians[ONNXRUNTIME] = min(theirs_before, onnxruntime.median_seconds(case, seconds / 4))
    return Measurement(medians, explanation.implementation, explanation.reason)
