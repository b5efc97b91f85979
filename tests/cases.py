"""The shapes and options that are tested (and measured), and how one of them is run.

A Case says everything about one call of a recurrent module. `make_data` draws its numbers,
`run_module` runs it through a module of any library with torch.nn's interface and `run_oracle`
through the oracle. Both give every result by name, laid out as [T, B, …].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import oracle
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Case:
    cell: str = "lstm"  # rnn, lstm or gru
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 7
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    proj: int = 0
    nonlinearity: str = "tanh"  # of an rnn
    lengths: tuple[int, ...] | None = None  # given: the input is packed
    unbatched: bool = False
    hx: bool = True  # whether the call is given an initial state
    contiguous: bool = True
    magnitude: float = 1.0  # of the input; large ones saturate the gates
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = [self.cell if self.nonlinearity == "tanh" else f"{self.cell}_{self.nonlinearity}"]
        parts += [f"{name}{getattr(self, name)}" for name in "TBIH"]
        parts += [f"L{self.layers}"] if self.layers > 1 else []
        parts += ["bi"] if self.bidirectional else []
        parts += ["nobias"] if not self.bias else []
        parts += ["batch_first"] if self.batch_first else []
        parts += [f"proj{self.proj}"] if self.proj else []
        parts += ["lengths" + "_".join(map(str, self.lengths))] if self.lengths else []
        parts += ["unbatched"] if self.unbatched else []
        parts += ["nohx"] if not self.hx else []
        parts += ["strided"] if not self.contiguous else []
        parts += [f"times{self.magnitude:g}"] if self.magnitude != 1.0 else []
        parts += [self.dtype] if self.dtype != "float32" else []
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def equations(self) -> str:
        """The oracle's name of this cell."""
        return f"rnn_{self.nonlinearity}" if self.cell == "rnn" else self.cell

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        return self.proj or self.H

    def module(self, library) -> torch.nn.Module:
        """This case's module from torch.nn or fusedrnn; its weights are the same from either."""
        options = {"proj_size": self.proj} if self.proj else {}
        options |= {"nonlinearity": self.nonlinearity} if self.cell == "rnn" else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(library, self.cell.upper())(
                self.I,
                self.H,
                self.layers,
                bias=self.bias,
                batch_first=self.batch_first,
                bidirectional=self.bidirectional,
                dtype=self.torch_dtype,
                **options,
            )


@dataclass(frozen=True)
class Data:
    """Inputs and the cotangents of the outputs, in the case's dtype, laid out as [T, B, …]."""

    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    dy: torch.Tensor
    dh_n: torch.Tensor
    dc_n: torch.Tensor


def make_data(case: Case, seed: int = 1) -> Data:
    random = np.random.default_rng(seed)
    rows, h = case.layers * case.directions, case.output_size

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape)).to(case.torch_dtype)

    x, y = (case.T, case.B, case.I), (case.T, case.B, h * case.directions)
    hidden, cell = (rows, case.B, h), (rows, case.B, case.H)
    h0, c0 = (draw(*hidden), draw(*cell)) if case.hx else (draw(*hidden) * 0, draw(*cell) * 0)
    return Data(draw(*x) * case.magnitude, h0, c0, draw(*y), draw(*hidden), draw(*cell))


# ---------------------------------------------------------------------------------------------
# One run of a module, every result by name.


def leaf(tensor: torch.Tensor, contiguous: bool = True) -> torch.Tensor:
    """A copy that asks for its gradient, on request with gaps between its elements."""
    copy = tensor.clone() if contiguous else torch.stack([tensor, tensor], dim=-1)[..., 0]
    return copy.detach().requires_grad_()


def run_module(module: torch.nn.Module, case: Case, data: Data) -> dict[str, torch.Tensor]:
    """Forward and backward; y, h_n, c_n, the gradients dx, dh0, dc0 and d<parameter>."""

    def outside(tensor: torch.Tensor) -> torch.Tensor:  # from [T, B, …] to the layout of the call
        if case.unbatched:
            return tensor[:, 0]
        return tensor.transpose(0, 1) if case.batch_first else tensor

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        if case.unbatched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if case.batch_first else tensor

    def state(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, 0] if case.unbatched else tensor

    is_lstm = case.cell == "lstm"
    module.zero_grad(set_to_none=True)
    x = leaf(outside(data.x).contiguous(), case.contiguous)
    h0, c0 = (leaf(state(t).contiguous(), case.contiguous) for t in (data.h0, data.c0))
    given = ((h0, c0) if is_lstm else h0) if case.hx else None
    if case.lengths is None:
        y, last = module(x, given)
    else:
        descending = list(case.lengths) == sorted(case.lengths, reverse=True)
        packed = pack_padded_sequence(
            x, torch.tensor(case.lengths), batch_first=case.batch_first, enforce_sorted=descending
        )
        y, last = module(packed, given)
        y, _ = pad_packed_sequence(y, batch_first=case.batch_first, total_length=case.T)
    outputs = {"y": y, "h_n": last[0], "c_n": last[1]} if is_lstm else {"y": y, "h_n": last}
    cotangents = {"y": outside(data.dy), "h_n": state(data.dh_n), "c_n": state(data.dc_n)}
    torch.autograd.backward(list(outputs.values()), [cotangents[name] for name in outputs])

    if case.unbatched:
        outputs |= {name: outputs[name].unsqueeze(1) for name in outputs if name != "y"}
    results = outputs | {"y": inside(y), "dx": inside(x.grad)}
    if case.hx:
        results["dh0"] = h0.grad.unsqueeze(1) if case.unbatched else h0.grad
        if is_lstm:
            results["dc0"] = c0.grad.unsqueeze(1) if case.unbatched else c0.grad
    results |= {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach() for name, value in results.items()}


def run_oracle(weights: dict[str, torch.Tensor], case: Case, data: Data) -> dict[str, np.ndarray]:
    """What `run_module` should give, from the weights by name."""
    x, h0, c0, dy, dh_n, dc_n = (t.double().numpy() for t in (data.x, data.h0, data.c0, data.dy, data.dh_n, data.dc_n))
    named = {name: value.detach().double().numpy() for name, value in weights.items()}
    result = oracle.run(
        case.equations,
        named,
        x,
        h0,
        c0,
        layers=case.layers,
        bidirectional=case.bidirectional,
        lengths=case.lengths,
    )
    unused = {"dc0"} if case.cell != "lstm" else set()
    unused |= set() if case.hx else {"dh0", "dc0"}
    grads = result.backward(dy, dh_n, dc_n if case.cell == "lstm" else np.zeros_like(dc_n))
    outputs = {"y": result.y, "h_n": result.h_n}
    outputs |= {"c_n": result.c_n} if case.cell == "lstm" else {}
    return outputs | {f"d{name}": value for name, value in grads.items() if f"d{name}" not in unused}


@cache
def expected(case: Case, seed: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """torch.nn's results and the oracle's: the same for every instruction set, so found once."""
    module, data = case.module(torch.nn), make_data(case, seed)
    return run_module(module, case, data), run_oracle(dict(module.named_parameters()), case, data)


# ---------------------------------------------------------------------------------------------
# The grids. Vectors are 16, 8 or 4 values wide and tiles up to 12 rows high, so the corners are one
# element, one less and one more than a vector, several vectors with and without a rest, primes.

CELLS = (
    {"cell": "lstm"},
    {"cell": "gru"},
    {"cell": "rnn"},
    {"cell": "rnn", "nonlinearity": "relu"},
)


def for_all_cells(*shapes: dict) -> tuple[Case, ...]:
    return tuple(Case(**cell, **shape) for shape in shapes for cell in CELLS)


def sizes(*rows: tuple[int, int, int, int]) -> tuple[Case, ...]:
    return for_all_cells(*(dict(zip("TBIH", row, strict=True)) for row in rows))


REGULAR = sizes((7, 4, 16, 32), (12, 8, 32, 64), (20, 2, 8, 16))

CORNER = (
    *sizes(
        (1, 1, 1, 1),
        (2, 1, 3, 1),
        (1, 2, 16, 3),
        (3, 5, 1, 15),
        (5, 6, 3, 16),
        (4, 7, 33, 17),
        (2, 12, 16, 31),
        (3, 13, 3, 33),
        (6, 1, 16, 48),
        (3, 25, 1, 64),
        (5, 2, 33, 65),
        (2, 33, 3, 100),
        (4, 6, 270, 130),  # more columns than are packed together
        (7, 13, 5, 7),
        (1, 12, 33, 2),
        (6, 1, 64, 256),  # large enough that threads share the work
        (6, 4, 64, 256),
        (40, 1, 16, 200),  # weights are read in place
        (6, 4, 3, 516),
        (9, 12, 20, 130),  # many enough that backward packs them
        (40, 3, 2, 5),
    ),
    *for_all_cells({"bidirectional": True, "T": 6, "B": 4, "H": 140}),
)

RAGGED = tuple(1 + (7 * row) % 11 for row in range(25))

FEATURE = (
    *for_all_cells(
        {"layers": 2},
        {"layers": 3, "bidirectional": True, "H": 17},
        {"bidirectional": True},
        {"bias": False},
        {"bias": False, "layers": 2, "bidirectional": True},
        {"batch_first": True},
        {"batch_first": True, "layers": 2, "bidirectional": True, "contiguous": False},
        {"hx": False},
        {"hx": False, "layers": 2, "bidirectional": True, "T": 1},
        {"contiguous": False},
        {"unbatched": True, "B": 1},
        {"unbatched": True, "B": 1, "layers": 2, "bidirectional": True, "hx": False},
        {"lengths": (5, 5, 5)},
        {"lengths": (5, 3, 1)},
        {"lengths": (2, 5, 1)},
        {"lengths": (2, 5, 1), "hx": False, "batch_first": True},
        {"lengths": (1, 4, 4, 5, 2, 3), "B": 6, "H": 17, "layers": 2, "bidirectional": True},
        {"lengths": RAGGED, "T": 11, "B": len(RAGGED), "H": 33, "bidirectional": True},
        {"lengths": (4,), "T": 4, "B": 1},
        {"magnitude": 50.0, "T": 9},
        {"magnitude": 1e-3, "hx": False},
        {"magnitude": 1e4, "T": 2, "layers": 2},
    ),
    Case(proj=3),
    Case(proj=1, H=16),
    Case(proj=6, bias=False),
    Case(proj=5, H=33, B=13, layers=2, bidirectional=True),
    Case(proj=3, hx=False, batch_first=True),
    Case(proj=3, unbatched=True, B=1, bidirectional=True),
    Case(proj=3, lengths=(2, 5, 1), layers=2, bidirectional=True),
)

# torch.nn refuses T, I and H of zero and takes an empty batch.
ZERO = for_all_cells(
    {"B": 0},
    {"B": 0, "hx": False},
    {"B": 0, "layers": 2, "bidirectional": True, "batch_first": True},
)

# Without relu: where a pre-activation rounds to the other side of zero, a whole gradient comes or goes,
# which says nothing about accuracy.
LOW_PRECISION = tuple(
    replace(case, dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for case in (
        *for_all_cells(
            {},
            {"T": 12, "B": 6, "I": 16, "H": 33},
            {"layers": 2, "bidirectional": True},
            {"T": 1, "B": 1, "I": 40, "H": 70},
            {"T": 1, "B": 5, "I": 33, "H": 65},
            {"T": 9, "B": 2, "I": 16, "H": 70},
            {"T": 30, "B": 1, "I": 16, "H": 65},  # packed bfloat16 is in pairs, the last alone
            # Products in tiles of 16 rows, 16 outputs and 32 in k: just enough, and beyond every edge.
            {"T": 3, "B": 16, "I": 32, "H": 32},
            {"T": 9, "B": 37, "I": 70, "H": 65},
            {"T": 21, "B": 13, "I": 33, "H": 48, "bidirectional": True, "layers": 2},
            {"T": 5, "B": 300, "I": 3, "H": 50},
        ),
        *for_all_cells({"lengths": (2, 9, 1, 9, 4), "T": 9, "B": 5, "I": 20, "H": 40, "bidirectional": True}),
        Case(lengths=(2, 5, 1)),
        Case(proj=3),
    )
    if case.nonlinearity == "tanh"
)
