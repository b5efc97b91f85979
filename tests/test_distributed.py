"""Two processes, each with half of the batch, train to the weights of one with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "distributed.py"

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are part of a checkout"),
]


def torchrun(script: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    started = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, errors = started.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        started.terminate()  # which ends its ranks, as killing it would not
        started.communicate(timeout=60)
        raise
    assert started.returncode == 0, errors
    return printed


@pytest.mark.parametrize("mode", ["ddp", "shard"])
def test_equal_to_one_process(mode, tmp_path):
    torchrun(HERE / "distributed_ranks.py", mode, str(tmp_path / "state"))


def test_example(tmp_path):
    printed = torchrun(EXAMPLE, "--steps=41", f"--checkpoint={tmp_path / 'state'}")
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert any((tmp_path / "state").iterdir())
