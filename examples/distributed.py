"""Data-parallel training of a fused layer, on any number of processes, with or without GPUs.

    torchrun --nproc-per-node 2 examples/distributed.py            # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/distributed.py --shard    # FSDP2: parameters, gradients and optimiser sharded

The layer is used like torch.nn's. Every process has its part of the batch; the task is to name the first input again at
the end of a sequence.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedrnn

SYMBOLS, HIDDEN, STEPS, BATCH = 8, 32, 10, 64


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(SYMBOLS, HIDDEN)
        self.layers = fusedrnn.LSTM(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(symbols))[0][:, -1])


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, symbols: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(symbols), symbols[:, 0])
    loss.backward()
    optimizer.step()
    return loss.item()


def distribute(model: torch.nn.Module, shard: bool, device: torch.device) -> torch.nn.Module:
    if not shard:
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model.layers, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Every process writes its part; the number of processes may differ when it is read."""
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def train(steps: int, shard: bool, folder: str | None, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model and the same batches everywhere
    model = distribute(Model().to(device), shard, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        symbols = torch.randint(SYMBOLS, (BATCH, STEPS))
        loss = train_step(model, optimizer, symbols[rank::world].to(device))
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")
    if folder:
        save(model, optimizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="FSDP2 in place of DistributedDataParallel")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoint", metavar="FOLDER", help="write the state here at the end")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    train(options.steps, options.shard, options.checkpoint, device)
    # A model that distribution made refers to itself, and to the group, whose threads must end while Python still runs:
    # gloo's, which let go of tensors, are else ended by it, and the process with them.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
