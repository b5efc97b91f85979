"""Builds fusedrnn's extension. Reads the environment, never the network or git, and prints what it decided.

FUSEDRNN_BUILD=0     pure Python package, no compiler needed: the layers run on their PyTorch fallback
FUSEDRNN_CUDA=0|1    without CUDA kernels; with them, or fail (default: with them where everything needed is there)
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS    as torch.utils.cpp_extension reads them
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has all that the binding uses; one build serves every later torch.
OLDEST_TORCH = (2, 10)


def say(text: str) -> None:
    print(f"fusedrnn: {text}", file=sys.stderr, flush=True)


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fusedrnn: expected {name} to be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def cuda_sources() -> list[str]:
    """The CUDA sources to build, or an empty list with the reason said."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = flag("FUSEDRNN_CUDA")
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
    if wanted is False:
        reason = "FUSEDRNN_CUDA=0"
    elif not sources:
        reason = "this version has no CUDA kernels (csrc/cuda is empty)"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif CUDA_HOME is None:
        reason = "no CUDA toolkit found (nvcc on PATH, or CUDA_HOME)"
    else:
        say(f"CUDA: yes, toolkit {CUDA_HOME}, architectures {os.environ.get('TORCH_CUDA_ARCH_LIST', 'default')}")
        return sources
    if wanted:
        raise SystemExit(f"fusedrnn: FUSEDRNN_CUDA=1, but {reason}")
    say(f"CUDA: no, {reason}")
    return []


def compiler_version(compiler: str) -> str:
    try:
        output = subprocess.run(
            [*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"fusedrnn: expected a working C++ compiler, got {error}. Install one or name it in CXX; or set "
            "FUSEDRNN_BUILD=0 for the pure Python package."
        ) from error
    return output.splitlines()[0].replace('"', "")


def extension() -> dict[str, Any]:
    if flag("FUSEDRNN_BUILD") is False:
        say("FUSEDRNN_BUILD=0: pure Python package, no extension")
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
    except ImportError as error:
        raise SystemExit(
            f"fusedrnn: building needs torch >= {'.'.join(map(str, OLDEST_TORCH))} and pybind11 ({error}). Install "
            "them, then `pip install --no-build-isolation .`; or set FUSEDRNN_BUILD=0 for the pure Python package."
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"fusedrnn: expected torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch.__version__}")

    cuda = cuda_sources()
    compiler = compiler_version(get_cxx_compiler())
    say(f"CPU: {platform.machine()}, {compiler}, torch {torch.__version__}")
    macros: list[tuple[str, str | None]] = [
        ("TORCH_TARGET_VERSION", f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"),
        ("FUSEDRNN_TORCH_VERSION", f'"{torch.__version__}"'),
        ("FUSEDRNN_COMPILER", f'"{compiler}"'),
    ]
    if cuda:
        macros.append(("USE_CUDA", None))
    # -ffp-contract=fast: a product and a sum become one fused instruction.
    # -g0: debug information would be ten times the code.
    cxx = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"]
    sources = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    module = (CUDAExtension if cuda else CppExtension)(
        "fusedrnn._C",
        sources + cuda,
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=macros,
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")),
        extra_compile_args={"cxx": cxx, "nvcc": ["-std=c++20", "-O3"]} if cuda else cxx,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
