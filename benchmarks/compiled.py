"""A small model compiled beside itself eager: ``python -m benchmarks.compiled --help``.

Linear, a recurrent layer, Linear. Each line is one size: the median time of a call, and what the compiled model takes
in units of it, after their results were found equal. "Linear" has one in the layer's place: torch.compile's own part.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fusedrnn
from benchmarks.timing import check_equal
from fusedrnn._bench import interleaved_medians

SIZES = ((1, 1, 64), (50, 16, 128), (100, 32, 512))  # T, B, H


class Model(torch.nn.Module):
    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.before, self.after = torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, hidden)
        self.layer = getattr(torch.nn if cell == "Linear" else fusedrnn, cell)(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        between = self.layer(self.before(x).relu())
        y: Tensor = self.after((between if isinstance(between, Tensor) else between[0]).relu())
        return y


def calls(
    module: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]
) -> dict[str, Callable[[], list[Tensor]]]:
    cotangent = torch.ones_like(x)

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [module(x)]

    return {
        "inference": inference,
        "training": lambda: list(torch.autograd.grad(module(x), parameters, cotangent)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--seconds-per-row", type=float, default=2.0, metavar="S")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for cell in ("LSTM", "GRU", "Linear"):
        for steps, batch, hidden in SIZES:
            torch._dynamo.reset()
            model, x = Model(cell, hidden), torch.randn(steps, batch, hidden)
            parameters: list[Tensor] = list(model.parameters())
            eager = calls(model, x, parameters)
            compiled = calls(torch.compile(model, fullgraph=True), x, parameters)
            for mode in eager:
                check_equal(eager[mode](), compiled[mode]())
                one, other = interleaved_medians([eager[mode], compiled[mode]], args.seconds_per_row)
                name = f"{cell}-T{steps}-B{batch}-H{hidden}"
                print(f"{name:24} {mode:9} eager {one * 1e3:9.4f} ms; compiled {other / one:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
