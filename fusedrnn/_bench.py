"""``python -m fusedrnn bench``: this package beside torch.nn, for one layer size of the user's choice."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fusedrnn

State: TypeAlias = Tensor | tuple[Tensor, Tensor]

CELLS = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
MIN_ROUNDS = 5
# A sample shorter than this is mostly clock and loop overhead; shorter calls are repeated to fill it.
_SAMPLE_SECONDS = 1e-3


def interleaved_medians(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    synchronize: Callable[[], None] = lambda: None,
) -> list[float]:
    """Median seconds of each call, timed in turn so that drift of the machine meets all of them alike.

    Every round times each call once, and every other round runs them in reverse order. Rounds go on for
    ``seconds`` and number at least ``MIN_ROUNDS``. ``synchronize`` waits for work queued on a device.
    """

    def sample(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeats

    repeats = []
    for call in calls:
        call()  # the first call allocates and packs
        # A coarse clock may see no time pass at all.
        once = max(sample(call, 1), _SAMPLE_SECONDS / 1000)
        repeats.append(max(1, round(_SAMPLE_SECONDS / once)))

    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < MIN_ROUNDS or time.perf_counter() < deadline:
        for index in order:
            samples[index].append(sample(calls[index], repeats[index]))
        order.reverse()
    return [statistics.median(row) for row in samples]


def tensors(value: object) -> list[Tensor]:
    """The tensors of an output or a state, in order; a PackedSequence counts as its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, tuple)
    return [tensor for part in value for tensor in tensors(part)]


def random_state(module: torch.nn.RNNBase, batch: int) -> State:
    """An initial state (layers * directions, batch, hidden or proj_size) that requires a gradient; an LSTM's pair."""
    weight = next(module.parameters())
    rows = module.num_layers * (2 if module.bidirectional else 1)

    def part(size: int) -> Tensor:
        return torch.randn(rows, batch, size, dtype=weight.dtype, device=weight.device, requires_grad=True)

    h = part(module.proj_size or module.hidden_size)
    return (h, part(module.hidden_size)) if module.mode == "LSTM" else h


def inference_call(module: torch.nn.Module, x: Tensor | PackedSequence, hx: State) -> Callable[[], list[Tensor]]:
    """A call that runs the module and returns y and the final states; for use under ``torch.inference_mode()``."""

    def call() -> list[Tensor]:
        return tensors(module(x, hx))

    return call


def training_call(module: torch.nn.Module, x: Tensor | PackedSequence, hx: State) -> Callable[[], list[Tensor]]:
    """A call that runs forward and backward and returns the gradients of x, hx and every weight.

    The cotangents, on y and on the final states, are random and the same for modules of the same sizes.
    """
    wanted = [*tensors(x), *tensors(hx), *module.parameters()]
    generator = torch.Generator(wanted[0].device).manual_seed(0)
    cotangents = [
        torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        for output in tensors(module(x, hx))
    ]

    def call() -> list[Tensor]:
        return list(torch.autograd.grad(tensors(module(x, hx)), wanted, cotangents))

    return call


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench`` to a parser."""
    parser.add_argument("--cell", choices=list(CELLS), default="lstm", type=str.lower)
    parser.add_argument("--batch", type=_positive, default=8, metavar="B", help="rows of the batch (8)")
    parser.add_argument("--seq", type=_positive, default=100, metavar="T", help="time steps (100)")
    parser.add_argument("--input", type=_positive, default=64, metavar="I", help="input features (64)")
    parser.add_argument("--hidden", type=_positive, default=128, metavar="H", help="hidden units (128)")
    parser.add_argument("--layers", type=_positive, default=1, metavar="L", help="stacked layers (1)")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (cpu)")


def run(args: argparse.Namespace) -> int:
    """Times inference and training and prints a table; the exit status is 2 without the asked-for device."""
    device: torch.device = args.device
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        print(f"bench: error: torch finds no GPU for --device {device}", file=sys.stderr)
        return 2

    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, args.dtype)
    name = CELLS[args.cell]
    sizes = (args.input, args.hidden, args.layers)
    rival = getattr(torch.nn, name)(*sizes, bidirectional=args.bidirectional, dtype=dtype, device=device)
    ours = getattr(fusedrnn, name)(*sizes, bidirectional=args.bidirectional, dtype=dtype, device=device)
    ours.load_state_dict(rival.state_dict())
    x = torch.randn(args.seq, args.batch, args.input, dtype=dtype, device=device, requires_grad=True)
    hx = random_state(rival, args.batch)

    explanation = fusedrnn.explain(ours, x)
    place = f"{args.dtype} on {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    print(f"{ours}, x {tuple(x.shape)}, {place}")
    print(f"fusedrnn runs: {explanation.implementation} ({explanation.reason})\n")
    print(f"{'':10} {'torch.nn':>12} {'fusedrnn':>12} {'speed-up':>9}")

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for mode, prepare in (("inference", inference_call), ("training", training_call)):
        calls = [prepare(module, x, hx) for module in (rival, ours)]
        with torch.inference_mode(mode == "inference"):
            theirs, mine = interleaved_medians(calls, seconds=2.0, synchronize=synchronize)
        print(f"{mode:10} {theirs * 1e3:9.3f} ms {mine * 1e3:9.3f} ms {theirs / mine:8.2f}x")
    return 0
