"""Lengths, resets and streams beside what people do without them: ``python -m benchmarks.sequences --help``.

Each line is one case: the median time of a call, and what the others take in units of it, after their results were
found equal. With resets, 3 % of all steps begin an episode; in a ragged batch rows have 10 to 100 % of the steps.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.rivals import OnnxRuntime, torch_workload
from benchmarks.shapes import Case, Mode
from benchmarks.timing import check_equal, fused_module
from fusedrnn._bench import State, interleaved_medians, tensors

Run = Callable[[Tensor, State], tuple[Tensor, State]]

_SOURCES = {
    "sb3-update": "SB3 RecurrentPPO, a minibatch of 8 sequences; input chosen",
    "cleanrl-atari": "CleanRL ppo_atari_lstm, 8 environments",
    "rsl-rl": "rsl_rl, 4096 environments -> 512; input chosen",
}
EPISODES = (
    Case("sb3-update", "LSTM", 8, 128, 64, 256, source=_SOURCES["sb3-update"]),
    Case("cleanrl-atari", "LSTM", 8, 128, 512, 128, source=_SOURCES["cleanrl-atari"]),
    Case("rsl-rl", "LSTM", 512, 24, 48, 256, source=_SOURCES["rsl-rl"]),
    Case("rsl-rl", "GRU", 512, 24, 48, 256, source=_SOURCES["rsl-rl"]),
)
RAGGED = (
    Case("ragged", "LSTM", 8, 128, 64, 256, source="a small batch"),
    Case("ragged", "GRU", 32, 100, 64, 128, source="a batch of series"),
    Case("ragged", "GRU", 16, 200, 16, 18, source="narrow"),
    Case("ragged", "LSTM", 64, 50, 512, 512, layers=2, bidirectional=True, source="wide"),
)
STREAMS = (
    Case("stream", "GRU", 1, 1, 256, 256, layers=2, source="one step of two layers"),
    Case("stream", "GRU", 1, 1, 256, 256, layers=3, source="DeepFilterNet3, one frame"),
    Case("stream", "LSTM", 1, 1, 128, 128, source="Silero VAD, one chunk of a stream"),
    Case("stream", "LSTM", 1, 1, 640, 640, layers=2, source="NeMo Parakeet RNN-T predictor, one step"),
)


def by_steps(module: torch.nn.Module, resets: Tensor) -> Run:
    """A call a step, the state times zero where an episode begins: as SB3 and CleanRL run their LSTM."""
    keep = (~resets).float().unsqueeze(-1).unsqueeze(1)

    def run(x: Tensor, hx: State) -> tuple[Tensor, State]:
        outputs = []
        for step, mask in zip(x.unsqueeze(1), keep, strict=True):
            hx = tuple(mask * s for s in hx) if isinstance(hx, tuple) else mask * hx  # type: ignore[assignment]
            y, hx = module(step, hx)
            outputs.append(y)
        return torch.cat(outputs), hx

    return run


def by_episodes(module: torch.nn.Module, resets: Tensor) -> Run:
    """Rows cut where an episode begins, the pieces padded to the longest: as rsl_rl runs its networks."""
    steps, batch = resets.shape
    starts = resets.t().clone()
    starts[:, 0] = True
    places = starts.flatten().nonzero().squeeze(1)
    sizes = torch.diff(places, append=torch.tensor([steps * batch])).tolist()
    longest = max(sizes)
    fresh = resets.t().flatten()[places]
    row = places // steps

    def run(x: Tensor, hx: State) -> tuple[Tensor, State]:
        pieces = torch.split(x.transpose(0, 1).flatten(0, 1), sizes)
        padded = torch.nn.utils.rnn.pad_sequence(list(pieces))
        states = [s[:, row].masked_fill(fresh.view(1, -1, 1), 0) for s in tensors(hx)]
        y, _ = module(padded, tuple(states) if len(states) == 2 else states[0])
        valid = torch.arange(longest).unsqueeze(0) < torch.tensor(sizes).unsqueeze(1)
        return y.transpose(0, 1)[valid].view(batch, steps, -1).transpose(0, 1), hx

    return run


def by_packing(module: torch.nn.Module, lengths: Tensor) -> Run:
    """torch.nn as it is meant to be used with rows of many lengths."""

    def run(x: Tensor, hx: State) -> tuple[Tensor, State]:
        y, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(y, total_length=len(x))[0], state

    return run


def medians(case: Case, mode: Mode, seconds: float) -> dict[str, float]:
    """Median seconds by name; the first is fusedrnn without lengths and resets, the second with them."""
    workload = torch_workload(case)
    theirs, ours = workload.module, fused_module(case, workload)
    runs: dict[str, Run] = {"dense": lambda x, hx: ours(x, hx)}
    if case.name == "ragged":
        lengths = torch.tensor(Case(**{**vars(case), "lengths": "packed"}).sequence_lengths())
        runs |= {
            "lengths": lambda x, hx: ours(x, hx, lengths=lengths),
            "all valid": lambda x, hx: ours(x, hx, lengths=torch.full_like(lengths, case.seq)),
            "torch.nn packed": by_packing(theirs, lengths),
        }
    else:
        resets = torch.rand(case.seq, case.batch, generator=torch.Generator().manual_seed(0)) < 0.03
        runs |= {
            "resets": lambda x, hx: ours(x, hx, resets=resets),
            "torch.nn by steps": by_steps(theirs, resets),
            "torch.nn by episodes": by_episodes(theirs, resets),
        }
    x, hx = workload.padded, workload.hx
    weights = {id(module): list(module.parameters()) for module in (ours, theirs)}
    cotangent = torch.randn_like(ours(x, hx)[0])

    def call(name: str) -> Callable[[], list[Tensor]]:
        run, wanted = runs[name], [x, *weights[id(theirs if name.startswith("torch") else ours)]]
        if mode == "inference":
            return lambda: [run(x, hx)[0]]
        return lambda: list(torch.autograd.grad(run(x, hx)[0], wanted, cotangent))

    calls = {name: call(name) for name in runs}
    with torch.inference_mode(mode == "inference"):
        for name, theirs_called in calls.items():
            if name.startswith("torch"):
                check_equal(theirs_called(), calls["lengths" if case.name == "ragged" else "resets"]())
        return dict(zip(calls, interleaved_medians(list(calls.values()), seconds), strict=True))


def _print(case: Case, mode: str, found: dict[str, float]) -> None:
    (first, base), *others = found.items()
    ratios = ", ".join(f"{name} {seconds / base:.2f}" for name, seconds in others)
    print(f"{case.id:40} {mode:9} {first} {base * 1e3:9.4f} ms; {ratios}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequences", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--seconds-per-row", type=float, default=2.0, metavar="S")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    modes: tuple[Mode, Mode] = ("inference", "training")
    for case in (*EPISODES, *RAGGED):
        for mode in modes:
            _print(case, mode, medians(case, mode, args.seconds_per_row))
    with ExitStack() as stack, torch.inference_mode():
        rival = stack.enter_context(OnnxRuntime(args.threads)) if not OnnxRuntime.missing() else None
        for case in STREAMS:
            workload = torch_workload(case)
            stream = fused_module(case, workload).stream(case.batch)  # type: ignore[operator]
            call = partial(stream, workload.padded.detach()[0])
            found = {"stream": interleaved_medians([call], args.seconds_per_row / 2)[0]}
            if rival is not None:
                found["onnxruntime"] = rival.median_seconds(case, args.seconds_per_row / 2)
            _print(case, "step", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
