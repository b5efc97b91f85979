"""Builds fusedrnn's extension. Reads the environment, never the network or git, and prints what it decided.

FUSEDRNN_BUILD=0     pure Python package, no compiler needed: the layers run on their PyTorch fallback
FUSEDRNN_CUDA=0|1    without CUDA kernels; with them, or fail (default: with them where everything needed is there)
TORCH_CUDA_ARCH_LIST the GPUs to compile for (default: 8.0;9.0;10.0;12.0+PTX)
CUDA_HOME, MAX_JOBS  as torch.utils.cpp_extension reads them
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import setup

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI has all that the binding uses; one build serves every later torch.
OLDEST_TORCH = (2, 10)
# A100, H100 and H200, B200 and B300, and the consumer cards of Blackwell; what comes later compiles the last one's PTX.
# Nothing here needs the instructions of one architecture alone (9.0a), with which code would run on no other.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


def say(text: str) -> None:
    print(f"fusedrnn: {text}", file=sys.stderr, flush=True)


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"fusedrnn: expected {name} to be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


class Cuda(NamedTuple):
    """What the CUDA extension is built with."""

    sources: list[str]
    cublas_headers: str
    cublas: str


def cuda_home() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH, which may be a link or a script from elsewhere."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given or not shutil.which("nvcc"):
        return given
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else None


def cuda() -> Cuda | None:
    """What the CUDA extension is built with, or None with the reason said."""
    import torch

    wanted, home = flag("FUSEDRNN_CUDA"), cuda_home()
    # The toolkit's cuBLAS, or that of the packages beside torch.
    folders = [*map(Path, [home] if home else []), *Path(torch.__file__).parent.parent.glob("nvidia/cu*")]
    headers = [folder / "include" for folder in folders if (folder / "include" / "cublas_v2.h").exists()]
    libraries = [path for folder in folders for path in sorted(folder.glob("lib*/libcublas.so*"))]
    if wanted is False:
        reason = "FUSEDRNN_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif home is None or not (Path(home) / "include" / "cuda_runtime.h").exists():
        reason = f"no CUDA toolkit found (nvcc on PATH, or CUDA_HOME; got {home})"
    elif not headers or not libraries:
        reason = f"no cuBLAS found (include/cublas_v2.h and lib/libcublas.so in {' or '.join(map(str, folders))})"
    else:
        os.environ["CUDA_HOME"] = home  # torch.utils.cpp_extension reads it when it is imported
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        say(f"CUDA: yes, toolkit {home}, cuBLAS {libraries[0]}, architectures {architectures}")
        sources = files("csrc/cuda/*.cu", "csrc/cuda/*.cpp", "csrc/binding/cuda.cpp")
        return Cuda(sources, str(headers[0]), str(libraries[0]))
    if wanted:
        raise SystemExit(f"fusedrnn: FUSEDRNN_CUDA=1, but {reason}")
    say(f"CUDA: no, {reason}")
    return None


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

        found = cuda()
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
    except ImportError as error:
        raise SystemExit(
            f"fusedrnn: building needs torch >= {'.'.join(map(str, OLDEST_TORCH))} and pybind11 ({error}). Install "
            "them, then `pip install --no-build-isolation .`; or set FUSEDRNN_BUILD=0 for the pure Python package."
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"fusedrnn: expected torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch.__version__}")

    compiler = compiler_version(get_cxx_compiler())
    say(f"CPU: {platform.machine()}, {compiler}, torch {torch.__version__}")
    # -ffp-contract=fast: a product and a sum become one fused instruction.
    # -g0: debug information would be ten times the code.
    cxx = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"]
    common: dict[str, Any] = {
        "include_dirs": [pybind11.get_include(), str(ROOT / "csrc")],
        "depends": files("csrc/**/*.*h"),
    }
    macros: list[tuple[str, str | None]] = [
        ("TORCH_TARGET_VERSION", f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"),
        ("FUSEDRNN_TORCH_VERSION", f'"{torch.__version__}"'),
        ("FUSEDRNN_COMPILER", f'"{compiler}"'),
    ]
    sources = sorted({*files("csrc/binding/*.cpp", "csrc/cpu/*.cpp")} - {"csrc/binding/cuda.cpp"})
    modules = [CppExtension("fusedrnn._C", sources, define_macros=macros, extra_compile_args=cxx, **common)]
    if found:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        macros = [*macros, ("USE_CUDA", None), ("FUSEDRNN_CUDA_ARCHITECTURES", f'"{architectures}"')]
        flags = {
            # The packages' headers come after the toolkit's, of which they are a part.
            "cxx": [*cxx, "-idirafter", found.cublas_headers],
            "nvcc": ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"],
        }
        modules.append(
            CUDAExtension(
                "fusedrnn._cuda",
                found.sources,
                define_macros=macros,
                extra_compile_args=flags,
                extra_link_args=[found.cublas],
                **common,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
