"""``python -m fusedrnn demo``: a character model learns one passage by heart and says it again.

Teacher forcing trains the model to name the next letter at every place of the passage. Then it gets the start
token alone and its own choices as input: one wrong letter and the rest may be lost, so it is a hard test.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import fusedrnn

from . import _plot
from ._plot import CELLS, Curves, Result, Step

ALPHABET = "abcdefghijklmnopqrstuvwxyz ?!.,:;-0123456789"

# Twice this learns faster with cross-entropy, but stalls the GRU with mse; half of it only takes longer.
LEARNING_RATE = 0.01
# The gradient of a tanh RNN can grow over hundreds of steps as well as vanish.
CLIP_NORM = 1.0
# Long texts would take torch.nn many minutes; its time per iteration is known well before.
TORCH_SECONDS = 10.0

LayerClass = Callable[..., torch.nn.RNNBase]
State = Tensor | tuple[Tensor, Tensor]


class CharacterModel(torch.nn.Module):
    """A recurrent layer on one-hot letters, and a linear read-out: a score for each possible next letter.

    ``layer_class`` is ``fusedrnn.LSTM``, ``torch.nn.LSTM`` or the like; ``letters`` (K) includes both tokens.
    """

    def __init__(self, layer_class: LayerClass, letters: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        self.layer = layer_class(letters, hidden, num_layers=layers)
        self.readout = torch.nn.Linear(hidden, letters)
        self.letters = letters

    def one_hot(self, ids: Tensor) -> Tensor:
        """Turns ``ids [T]`` into the layer's input ``[T, 1, K]``."""
        return one_hot(ids, self.letters).float().unsqueeze(1)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Maps ``ids [T]`` and the layer's state to scores ``[T, K]`` and the layer's state after them."""
        y, state = self.layer(self.one_hot(ids), state)
        return self.readout(y.squeeze(1)), state


def encode(text: str, alphabet: str) -> Tensor:
    """Turns N characters into ``int64 [N + 2]``: start token, places in ``alphabet``, end token.

    The tokens are the two numbers after the alphabet's. Raises ``ValueError`` for a character outside it.
    """
    start, end = len(alphabet), len(alphabet) + 1
    return torch.tensor([start, *map(alphabet.index, text), end])


def decode(ids: Tensor, alphabet: str) -> str:
    """Turns ``int64 [N]`` back into text. The start and the end token have no letter and are left out."""
    return "".join(alphabet[i] for i in ids.tolist() if i < len(alphabet))


def train(model: CharacterModel, ids: Tensor, iterations: int, loss: str) -> Iterator[Step]:
    """Trains on ``ids [N + 2]``, back-propagating through all N + 1 steps; yields after each iteration.

    ``loss`` is ``"cross-entropy"`` or ``"mse"`` (against the one-hot next letter). Loss and accuracy (the
    share of next letters named) are those before the update. What the caller does in between is not timed.
    """
    targets, target_scores = ids[1:], model.one_hot(ids[1:]).squeeze(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def forward_backward() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        scores, _ = model(ids[:-1])
        value = cross_entropy(scores, targets) if loss == "cross-entropy" else mse_loss(scores, target_scores)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), scores.argmax(1)

    forward_backward()  # The first pass also starts threads and chooses kernels, so it is not timed.
    seconds = 0.0
    for iteration in range(1, iterations + 1):
        started = time.perf_counter()
        value, named = forward_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        accuracy = (named == targets).float().mean().item()
        seconds += time.perf_counter() - started
        yield Step(iteration, seconds, value.item(), accuracy)


@torch.no_grad()
def recite(model: CharacterModel, length: int) -> Tensor:
    """Lets the model speak from the start token alone; returns ``int64 [M]``, M at most ``length``.

    Each step hears the letter that scored highest in the step before, and goes on from the layer's own state.
    The end token ends it and is part of the result.
    """
    start, end = model.letters - 2, model.letters - 1
    choice, state = torch.tensor([start], device=model.readout.weight.device), None
    said: list[Tensor] = []
    while len(said) < length and choice != end:
        scores, state = model(choice, state)
        choice = scores.argmax(1)
        said.append(choice)
    return torch.cat(said)


def learn(args: argparse.Namespace, cell: str, result: Result, curves: Curves) -> None:
    """Trains one cell, lets it speak, times torch.nn; fills ``result`` and ``curves`` on the way."""
    alphabet = ALPHABET + "".join(sorted(set(args.text) - set(ALPHABET)))
    ids = encode(args.text, alphabet).to(args.device)

    def model_of(package: Any) -> CharacterModel:
        layer_class = getattr(package, CELLS[cell])
        return CharacterModel(layer_class, len(alphabet) + 2, args.hidden, args.layers).to(args.device)

    torch.manual_seed(args.seed)
    model, rival = model_of(fusedrnn), model_of(torch.nn)
    rival.load_state_dict(model.state_dict())
    inputs = model.one_hot(ids[:-1])
    result.implementation = fusedrnn.explain(model.layer, inputs).implementation
    print(f"\n{CELLS[cell]}, implementation: {result.implementation}")
    if args.plot:
        curves.initial = _plot.memory(model.layer, inputs)

    for step in train(model, ids, args.iterations, args.loss):
        result.iterations, result.seconds, result.loss, result.accuracy = step
        curves.loss.append(step.loss)
        _plot.show_progress("fusedrnn", step, args.iterations)
        if step.accuracy == 1.0 and torch.equal(recite(model, len(ids) - 1), ids[1:]):
            break
    _plot.end_progress()
    said = recite(model, len(ids) - 1)
    result.recall = (said == ids[1 : len(said) + 1])[: len(args.text)].sum().item() / len(args.text)
    _plot.print_recital(decode(said, alphabet), result)
    if args.plot:
        curves.trained = _plot.memory(model.layer, inputs)

    for step in train(rival, ids, result.iterations, args.loss):
        _plot.show_progress("torch.nn", step, result.iterations)
        if step.seconds > TORCH_SECONDS:
            break
    _plot.end_progress()
    result.torch_iterations = step.iteration
    result.torch_seconds = step.seconds * result.iterations / step.iteration
    result.speedup = result.torch_seconds / result.seconds


def passage_file(name: str) -> str:
    """Reads the text to learn; blanks and line ends around it are no part of it."""
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {name}: {error.strerror}") from None
    if not text:
        raise argparse.ArgumentTypeError(f"{name} holds no text")
    return text


def integer_from(lowest: int) -> Callable[[str], int]:
    """Returns a parser of integers from ``lowest`` to what 63 bits hold."""

    def integer(number: str) -> int:
        if not lowest <= (value := int(number)) < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {lowest} and below 2^63, not {value}")
        return value

    return integer


def device(name: str) -> str:
    """Accepts a device that can compute."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"torch has no device {name!r} here") from None
    return name


def output_file(name: str) -> Path:
    """Accepts a file in a folder that exists, before the time for training is lost."""
    if Path(name).is_dir() or not Path(name).parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {name}")
    return Path(name)


def picture_file(name: str) -> Path:
    """Accepts a PNG file, where matplotlib can draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib (pip install matplotlib)")
    if not name.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{name} does not end in .png")
    return output_file(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options; a bad value ends in the parser's one-line error, before any training."""
    add, count, default = parser.add_argument, integer_from(1), "(default: %(default)s)"
    passage = str(Path(__file__).with_name("passage.txt"))
    add("--text", type=passage_file, default=passage, metavar="FILE", help="UTF-8 text to learn by heart")
    add("--cell", choices=CELLS, help="train only this one (default: all three)")
    add("--hidden", type=count, default=128, help=f"units per layer {default}")
    add("--layers", type=count, default=1, help=default)
    add("--iterations", type=count, default=400, help=f"give up after so many {default}")
    # A tanh RNN that names every letter after 100 iterations with cross-entropy has three in four after 400
    # with mse, which spreads its effort over exact scores for all the letters that do not come next.
    add("--loss", choices=["cross-entropy", "mse"], default="cross-entropy", help=default)
    add("--device", type=device, default="cpu", help=default)
    add("--seed", type=integer_from(0), default=0, help=f"of the initial weights {default}")
    add("--json", type=output_file, metavar="FILE", help="write the figures, machine-readable")
    add("--plot", type=picture_file, metavar="FILE.png", help="draw losses and gradients; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Runs the demo with what ``add_arguments`` parsed; returns the exit status, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal may lack the passage's letters.
    _plot.print_header(args)
    results: dict[str, Result] = {}
    curves: dict[str, Curves] = {}
    interrupted = False
    try:
        for cell in [args.cell] if args.cell else CELLS:
            results[cell], curves[cell] = Result(), Curves()
            learn(args, cell, results[cell], curves[cell])
        if args.plot:
            _plot.draw(args.plot, curves)
    except KeyboardInterrupt:
        print("\n\nInterrupted. Reached so far:")
        interrupted = True
    _plot.print_table(results)
    if args.json:
        _plot.write_json(args, results, interrupted)
    return 130 if interrupted else 0
