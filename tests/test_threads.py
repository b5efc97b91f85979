"""Threads and processes. Every test runs its script in a process of its own and under a time limit, so
that a deadlock fails instead of hanging."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn

TIME_LIMIT = 120  # seconds; the scripts take a few, most of them importing torch
PATHS = (Path(fusedrnn.__file__).parents[1], Path(__file__).parent)

# What the scripts begin with: cases large enough that two threads share the work, and the rule as a check.
PRELUDE = """
import os, signal, sys, threading
import torch
import fusedrnn
from cases import Case, expected, make_data, run_module
from numerics import assert_all_as_good

CASES = (
    Case(cell="lstm", T=6, B=4, I=64, H=256),
    Case(cell="gru", T=6, B=1, I=64, H=256),
    Case(cell="rnn", T=9, B=13, I=5, H=65),
    Case(cell="lstm", T=5, B=3, H=33, layers=2, bidirectional=True, lengths=(2, 5, 1)),
    # Rows shared out by their lengths: one has more steps than all others together; and two have most.
    Case(cell="lstm", T=40, B=8, I=5, H=20, lengths=(3, 40, 1, 2, 7, 2, 1, 5)),
    Case(cell="gru", T=30, B=9, I=5, H=20, bidirectional=True, lengths=(9, 30, 4, 30, 2, 1, 1, 12, 3)),
)

def check(case, module=None):
    ours = run_module(module or case.module(fusedrnn), case, make_data(case))
    assert_all_as_good(ours, *expected(case), torch.float32)

def check_all():
    for case in CASES:
        check(case)

def in_child(work, seconds=60):
    # Forks, works in the child, and kills a child that hangs.
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def run_script(script: str, **environment: str) -> None:
    paths = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        timeout=TIME_LIMIT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    run_script(f"torch.set_num_threads({threads}); check_all()")


def test_the_number_of_threads_may_change():
    run_script("""
for threads in (2, 1, 4, 2):
    torch.set_num_threads(threads)
    check_all()
""")


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_one_thread_by_the_environment(variable):
    run_script("check_all()", **{variable: "1"})


def test_bit_equal_with_two_threads():
    run_script("""
torch.set_num_threads(2)
for case in CASES:
    module, data = case.module(fusedrnn), make_data(case)
    first = run_module(module, case, data)
    for _ in range(10):
        again = run_module(module, case, data)
        assert all(torch.equal(again[name], value) for name, value in first.items())
""")


@pytest.mark.parametrize("shared", [False, True], ids=["own modules", "one module"])
def test_several_python_threads(shared):
    """Gradients of a shared module would run into one another, so there only the outputs are compared."""
    run_script(f"""
SHARED = {shared}
torch.set_num_threads(2)
sets = [[case.module(fusedrnn) for case in CASES] for _ in range(1 if SHARED else 4)]
for case in CASES:
    expected(case)
failures = []

def check_outputs(case, module):
    data = make_data(case)
    with torch.no_grad():
        y, _ = module(data.x, (data.h0, data.c0) if case.cell == "lstm" else data.h0)
    theirs, truth = expected(case)
    assert_all_as_good({{"y": y}}, {{"y": theirs["y"]}}, {{"y": truth["y"]}}, torch.float32)

def work(number):
    try:
        for turn in range(8):
            index = (turn + number) % 3
            if SHARED:
                check_outputs(CASES[index], sets[0][index])
            else:
                check(CASES[index], sets[number][index])
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(90)
    assert not thread.is_alive(), "a thread hangs"
if failures:
    raise failures[0]
""")


def test_backward_of_one_graph_from_another_thread():
    run_script("""
torch.set_num_threads(2)
module = CASES[0].module(fusedrnn)
y, _ = module(make_data(CASES[0]).x)
thread = threading.Thread(target=lambda: y.sum().backward(), daemon=True)
thread.start()
thread.join(60)
assert not thread.is_alive(), "backward hangs"
assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
""")


@needs_fork
def test_fork_with_one_thread():
    run_script("""
torch.set_num_threads(1)
check_all()
in_child(check_all)
check_all()
""")


@needs_fork
def test_child_of_a_threaded_parent():
    """The child inherits no threads, only what they left behind. torch's own OpenMP does not survive this,
    so the child is told to keep to one thread, as DataLoader tells its workers."""
    run_script("""
torch.set_num_threads(2)
data = [make_data(case) for case in CASES]
modules = [case.module(fusedrnn) for case in CASES]
forward = lambda: [module(d.x)[0] for module, d in zip(modules[:3], data)]
before = forward()

def work():
    torch.set_num_threads(1)
    for now, then, case in zip(forward(), before, CASES):
        then = then.detach()
        assert_all_as_good({"y": now}, {"y": then}, {"y": then.double()}, torch.float32)

in_child(work)
forward()
""")


@needs_fork
def test_data_loader_whose_workers_run_a_module():
    run_script("""
torch.set_num_threads(2)
torch.manual_seed(0)
encoder = fusedrnn.GRU(8, 65)
inputs = torch.randn(12, 20, 3, 8)

class Encoded(torch.utils.data.Dataset):
    def __len__(self):
        return len(inputs)

    def __getitem__(self, index):
        with torch.no_grad():
            return encoder(inputs[index])[0]

expected_items = [Encoded()[index] for index in range(len(inputs))]
loader = torch.utils.data.DataLoader(
    Encoded(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
)
count = 0
for got, wanted in zip(loader, expected_items):
    assert_all_as_good({"y": got}, {"y": wanted}, {"y": wanted.double()}, torch.float32)
    count += 1
assert count == len(inputs)
""")


def test_exit_while_threads_exist():
    """The interpreter ends in time although threads of the package may be waiting for work."""
    run_script("""
torch.set_num_threads(2)
check_all()
thread = threading.Thread(target=check_all, daemon=True)
thread.start()
thread.join(60)
sys.exit(0)
""")
