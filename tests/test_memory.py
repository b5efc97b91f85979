"""Memory: what a training step needs at its peak, what inference needs beside its output, and what stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn

extension = pytest.importorskip("fusedrnn._C", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or not (ROOT / "benchmarks").is_dir(),
    reason="needs Linux's account of a process and the checkout's benchmarks",
)

MIB = 1 << 20


def run(script: str) -> list[int]:
    """The numbers that a script prints last, from a process of its own."""
    prelude = "import torch, fusedrnn\nfrom benchmarks.memory import *\nfrom benchmarks.memory import _kilobytes\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + script],
        cwd=ROOT,
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"},  # as benchmarks/memory.py has it
        capture_output=True,
        text=True,
        check=False,
        timeout=600,  # of a hang: beside other work a test has taken over two minutes
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


def peaks(case: str, implementation: str) -> list[int]:
    """Its peak and torch.nn's. Many steps on one thread: beside another process torch.nn's two take minutes."""
    return run(f"""
case = Case("memory", {case})
print(*(in_process(case, name, 1 if case.seq > 1000 else 2)[0] for name in ({implementation}, TORCH)))
""")


CASES = ("'LSTM', 32, 60, 64, 256", "'GRU', 64, 100, 128, 128", "'RNN', 16, 100, 256, 512", "'LSTM', 2, 2000, 32, 96")
HALF = "'GRU', 1, 100, 256, 256, dtype='bfloat16'"


@pytest.mark.parametrize("case", [*CASES, HALF])
def test_a_training_step_needs_no_more_than_torch(case):
    ours, theirs = peaks(case, "OURS")
    assert ours <= theirs, f"peak {ours / MIB:.1f} MiB, torch.nn {theirs / MIB:.1f} MiB"


@pytest.mark.parametrize("case", ["'LSTM', 8, 4096, 32, 128", "'GRU', 8, 4096, 32, 128"])
def test_recompute_halves_it(case):
    ours, theirs = peaks(case, "RECOMPUTED")
    assert ours <= theirs / 2, f"peak {ours / MIB:.1f} MiB, torch.nn {theirs / MIB:.1f} MiB"


@pytest.mark.parametrize("case", CASES[:2])
def test_nothing_grows_from_step_to_step(case):
    early, late = run(f"""
case, pooled = Case("memory", {case}), fusedrnn._dispatch.extension.pooled

def kept(steps):  # but for working memory, which goes after some time
    before = pooled()
    return step_growth(case, OURS, steps)[1] - (pooled() - before)

print(kept(4), kept(24))
""")
    assert late <= early + 4 * MIB, f"{early / MIB:.1f} MiB kept after 4 steps, {late / MIB:.1f} after 24"


def test_inference_needs_its_output_and_little_else():
    """Nothing else grows with the length of the sequence: 256 MiB of output, and the peak is not 8 MiB above it."""
    output, peak = run("""
layer = fusedrnn.LSTM(8, 64)
x = torch.randn(32768, 32, 8)
with torch.no_grad():
    layer(x[:100])
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    y, _ = layer(x)
    print(y.numel() * 4, (_kilobytes("VmHWM") - before) << 10)
""")
    assert peak <= output + 8 * MIB, f"output {output / MIB:.0f} MiB, peak {peak / MIB:.1f} MiB"


def test_kept_working_memory_is_bounded():
    """Many sizes, none of which fits another's blocks, and one whose blocks are larger than all that may be kept."""
    sizes = [*range(200, 1000, 20), 3000]
    (kept,) = run(f"""
for size in {sizes}:
    layer = fusedrnn.LSTM(size, size)
    layer(torch.randn(12, 2, size))[0].sum().backward()
print(fusedrnn._C.pooled())
""")
    assert 0 < kept <= 256 * MIB


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_backward_reads_goes_back_with_its_graph(cell, dtype):
    """Several graphs alive and read twice have memory of their own; the next step gets it once they are done."""
    during, after, *equal = run(f"""
layer, pooled = fusedrnn.{cell}(64, 128, dtype=torch.{dtype}), fusedrnn._C.pooled
inputs = [torch.randn(100, 16, 64, dtype=torch.{dtype}) for _ in range(3)]
def gradients(y, **options):
    return torch.autograd.grad(y.sin().sum(), list(layer.parameters()), **options)
alone = [gradients(layer(x)[0]) for x in inputs]
outputs = [layer(x)[0] for x in inputs]
together = [gradients(y, retain_graph=True) for y in reversed(outputs)]
during = pooled()
again = [gradients(y) for y in reversed(outputs)]
print(during, pooled(), *(
    int(torch.equal(a, t) and torch.equal(a, b))
    for of in zip(reversed(alone), together, again) for a, t, b in zip(*of)
))
""")
    gates = 3 * 128 * 1600 * (4 if dtype == "float32" else 8)  # bytes, of one graph at least
    assert after >= during + 3 * gates
    assert equal == [1] * 12


@pytest.mark.parametrize(("cell", "batch"), [("RNN", 32), ("LSTM", 8)])
def test_the_input_s_weights_are_never_copied_as_a_whole(cell, batch):
    """An RNN of large weights, or a call whose rows meet them at once: both passes pack W_hh, in the same memory."""
    kept, recurrent = run(f"""
torch.set_num_threads(2)  # each has working memory of its own
size = 2048 if "{cell}" == "RNN" else 1024
layer = fusedrnn.{cell}(size, size)
layer(torch.randn(32, {batch}, size, requires_grad=True))[0].sum().backward()
print(fusedrnn._C.pooled(), layer.weight_hh_l0.nbytes)
""")
    assert recurrent <= kept < 2 * recurrent  # beside it what backward reads, and a chunk's gradients


def test_nothing_is_in_the_pool_at_first():
    assert run("print(fusedrnn._C.pooled())") == [0]
    assert fusedrnn._dispatch.extension is extension


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_no_memory_left_is_what_torch_says(name):
    """RuntimeError, and the layer can be used again."""
    (again,) = run(f"""
import resource
layer, x = fusedrnn.{name}(64, 512), torch.randn(400, 16, 64)
layer(x[:2])
used = _kilobytes("VmSize") << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
try:
    layer(x)
except RuntimeError as error:
    assert "can't allocate memory" in str(error), error
else:
    raise SystemExit("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(int(layer(x)[0].isfinite().all()))
""")
    assert again
