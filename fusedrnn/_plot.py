"""What the demo shows: progress, table, JSON, and the picture of the losses and the gradient's reach."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fusedrnn

CELLS = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
LAGS = 100


class Step(NamedTuple):
    """Where the training stands; ``iteration`` counts from 1, ``seconds`` is the time of all so far."""

    iteration: int
    seconds: float
    loss: float
    accuracy: float


@dataclasses.dataclass
class Result:
    """What one cell has reached; ``None`` where an interrupted run did not get that far."""

    implementation: str | None = None
    iterations: int = 0
    seconds: float = 0.0
    loss: float | None = None
    accuracy: float | None = None
    recall: float | None = None
    torch_seconds: float | None = None
    torch_iterations: int | None = None
    speedup: float | None = None


@dataclasses.dataclass
class Curves:
    """One cell's curves: the loss per iteration, and ``memory`` at initialisation and after training."""

    loss: list[float] = dataclasses.field(default_factory=list)
    initial: list[float] = dataclasses.field(default_factory=list)
    trained: list[float] = dataclasses.field(default_factory=list)


def print_header(args: argparse.Namespace) -> None:
    """Prints what runs and on what."""
    versions = f"fusedrnn {fusedrnn.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, device {args.device}")
    print(f"{len(args.text)} characters; hidden {args.hidden}, layers {args.layers}, {args.loss}")


def show_progress(label: str, step: Step, total: int) -> None:
    """Redraws one line in a terminal; elsewhere prints a line every 50 iterations."""
    line = f"  {label} {step.iteration:4}/{total}  loss {step.loss:.4f}  accuracy {step.accuracy:.3f}"
    if sys.stdout.isatty():
        done = 24 * step.iteration // total
        print(f"\r{line}  [{'#' * done}{'.' * (24 - done)}]", end="", flush=True)
    elif step.iteration % 50 == 0:
        print(line, flush=True)


def end_progress() -> None:
    """Leaves the bar's line."""
    if sys.stdout.isatty():
        print()


def print_recital(said: str, result: Result) -> None:
    """Prints what the model says, line by line and wrapped."""
    print(f"  {result.iterations} iterations, recall {result.recall:.3f}; from the start token alone it says:")
    for line in said.splitlines():
        print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    "))


def print_table(results: dict[str, Result]) -> None:
    """Prints one line per cell; a dash stands for what was not reached."""
    row = "{:6}{:>7}{:>10}{:>12}{:>12}{:>12}{:>10}"
    print("\n" + row.format("cell", "recall", "accuracy", "iterations", "fusedrnn", "torch.nn", "speed-up"))
    for cell, r in results.items():
        recall, accuracy = ("-" if v is None else f"{v:.3f}" for v in (r.recall, r.accuracy))
        speedup = "-" if r.speedup is None else f"{r.speedup:.2f} x"
        ours, theirs = ("-" if v is None else f"{v:.2f} s" for v in (r.seconds, r.torch_seconds))
        print(row.format(CELLS[cell], recall, accuracy, r.iterations, ours, theirs, speedup))
    for cell, r in results.items():
        if r.torch_iterations is not None and r.torch_iterations < r.iterations:
            print(f"{CELLS[cell]}: torch.nn's time is scaled from {r.torch_iterations} timed iterations.")


def write_json(args: argparse.Namespace, results: dict[str, Result], interrupted: bool) -> None:
    """Writes settings, versions and one ``Result`` per cell to ``args.json``; times are in seconds."""
    options = ("hidden", "layers", "iterations", "loss", "device", "seed")
    report = {
        "interrupted": interrupted,
        "settings": {name: getattr(args, name) for name in options} | {"characters": len(args.text)},
        "threads": torch.get_num_threads(),
        "versions": {
            "fusedrnn": fusedrnn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cells": {cell: dataclasses.asdict(result) for cell, result in results.items()},
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def memory(layer: torch.nn.RNNBase, inputs: Tensor) -> list[float]:
    """Returns the spectral norms of ∂h_T/∂h_{T-k} for the lags k = 1 … min(100, T - 1), given ``[T, 1, I]``.

    h_T is the top layer's last state ``[H]``, h_{T-k} that of all layers ``[L, H]``; an LSTM's c_{T-k} is
    held fixed. The Jacobian is exact: H identical rows run as one batch, and row j gets the j-th unit vector
    as its cotangent. In float64 on the CPU, because the norms fall below what float32 can hold.
    """
    layer = copy.deepcopy(layer).cpu().double().requires_grad_(False)
    inputs = inputs.cpu().double()
    lags, hidden = min(LAGS, len(inputs) - 1), layer.hidden_size
    _, state = layer(inputs[:-lags])
    h, *c = (s.repeat(1, hidden, 1) for s in (state if isinstance(state, tuple) else (state,)))
    states = [h.requires_grad_()]
    for x in inputs[-lags:]:
        _, state = layer(x.repeat(1, hidden, 1), (states[-1], *c) if c else states[-1])
        h, *c = state if isinstance(state, tuple) else (state,)
        states.append(h)
    cotangent = torch.eye(hidden, dtype=torch.float64)
    jacobians = torch.autograd.grad(states[-1][-1], states[:-1], cotangent)
    return [torch.linalg.matrix_norm(j.transpose(0, 1).flatten(1), ord=2).item() for j in reversed(jacobians)]


def draw(path: Path, curves: dict[str, Curves]) -> None:
    """Writes the picture to ``path``, one colour per cell. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (cell, c) in enumerate(curves.items()):
        color, lags = f"C{i}", range(1, len(c.initial) + 1)
        left.plot(range(1, len(c.loss) + 1), c.loss, color=color, label=CELLS[cell])
        right.plot(lags, c.initial, color=color, linestyle="--", label=f"{CELLS[cell]}, at initialisation")
        right.plot(lags, c.trained, color=color, label=f"{CELLS[cell]}, trained")
    left.set(title="Learning a passage by heart", xlabel="iteration", ylabel="loss", yscale="log")
    right.set(title="How far back the gradient reaches", xlabel="lag k (characters)", yscale="log")
    right.set_ylabel(r"spectral norm of $\partial h_T / \partial h_{T-k}$")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
