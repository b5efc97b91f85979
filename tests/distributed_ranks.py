"""What each of test_distributed.py's processes runs: training on its part of a batch equals training on all of it.

torchrun --nproc-per-node 2 tests/distributed_ranks.py ddp|shard FOLDER
"""

from __future__ import annotations

import copy
import datetime
import gc
import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

specification = importlib.util.spec_from_file_location(
    "example", Path(__file__).parent.parent / "examples" / "distributed.py"
)
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def assert_equal(distributed: torch.nn.Module, alone: torch.nn.Module) -> None:
    """Up to the order of sums: the mean over the whole batch, or of the means over its halves."""
    for mine, theirs in zip(distributed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(mine), theirs.detach(), rtol=1e-10, atol=1e-12)


def check(shard: bool, folder: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = example.Model().double()
    fresh = copy.deepcopy(alone)
    distributed = example.distribute(copy.deepcopy(alone), shard, torch.device("cpu"))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (alone, distributed)]
    for _ in range(3):
        symbols = torch.randint(example.SYMBOLS, (8, example.STEPS))
        example.train_step(alone, optimizers[0], symbols)
        example.train_step(distributed, optimizers[1], symbols[rank::world])
        assert_equal(distributed, alone)
    example.save(distributed, optimizers[1], folder)
    restored = example.distribute(fresh, shard, torch.device("cpu"))
    optimizer = torch.optim.Adam(restored.parameters(), lr=1e-2)
    example.load(restored, optimizer, folder)
    assert_equal(restored, alone)
    example.train_step(alone, optimizers[0], symbols)
    example.train_step(restored, optimizer, symbols[rank::world])
    assert_equal(restored, alone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    check(sys.argv[1] == "shard", sys.argv[2])
    gc.collect()  # the models, before the group (see the example)
    dist.destroy_process_group()
