"""``python -m fusedrnn demo | info | bench``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import fusedrnn
from fusedrnn import _bench, _demo, _dispatch


def info() -> int:
    """Print what this installation is and can do, and why something is not available."""
    lines = {
        "fusedrnn": fusedrnn.__version__,
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    if _dispatch.extension is None:
        lines["extension"] = f"not available: {_dispatch.why_no_extension}"
    else:
        build = _dispatch.extension.build_info()
        runnable = _dispatch.extension.instruction_sets()
        missing = [name for name in build["instruction_sets"] if name not in runnable]
        lines["extension"] = f"built with torch {build['torch']}, {build['compiler']}"
        lines["instruction sets"] = (
            f"{', '.join(build['instruction_sets'])} built, {_dispatch.extension.instruction_set()} chosen"
        )
        if missing:
            lines["instruction sets"] += f"; not available: {', '.join(missing)} (this processor lacks it)"
        if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
            lines["threads"] += "; layers use one: torch's thread pool is not OpenMP"
    if _dispatch.cuda_extension is None:
        lines["CUDA kernels"] = f"not available: {_dispatch.why_no_cuda}"
    else:
        lines["CUDA kernels"] = f"built for {_dispatch.cuda_extension.architectures()}"
    if torch.cuda.is_available():
        lines["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        lines["GPUs"] = "none: " + (
            "torch is a build without CUDA" if torch.version.cuda is None else "torch sees no device"
        )
    for name, text in lines.items():
        print(f"{name + ':':<18}{text}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fusedrnn", description=fusedrnn.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a character model learns a passage by heart and says it again")
    _demo.add_arguments(demo)
    commands.add_parser("info", help="what is installed, chosen and not available")
    bench = commands.add_parser("bench", help="compare with torch.nn at your own sizes")
    _bench.add_arguments(bench)
    args = parser.parse_args(arguments)
    if args.command == "info":
        return info()
    return _demo.run(args) if args.command == "demo" else _bench.run(args)


if __name__ == "__main__":
    sys.exit(main())
