"""What is installed: the extension's symbols, the layers of the sources, the command line, and setup.py."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedrnn
from fusedrnn import _dispatch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = Path(fusedrnn.__file__).parent

needs_extension = pytest.mark.skipif(_dispatch.extension is None, reason="fusedrnn runs without its C++ extension")
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")
needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="setup.py is not beside the tests")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """`python arguments`, with this fusedrnn first on the path, and of its settings only those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDRNN_")}
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited | {"PYTHONPATH": paths} | environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(*arguments: str, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """Type letter and readable name of every symbol that nm lists."""
    done = subprocess.run(["nm", "-C", *options, str(file)], capture_output=True, text=True, check=True)
    found = (re.fullmatch(r"(?:[0-9a-f]+)?\s*([A-Za-z]) (.+)", line) for line in done.stdout.splitlines())
    return [(match[1], match[2]) for match in found if match]


# --- the extension --------------------------------------------------------------------------------


@needs_extension
def test_extension_is_beside_the_package():
    assert Path(_dispatch.extension.__file__).parent == PACKAGE


@needs_extension
def test_every_instruction_set_of_this_machine_is_built():
    """On x86-64 all of them, wherever it was built: which one runs is decided at run time."""
    built = _dispatch.extension.build_info()["instruction_sets"]
    assert built[-1] == "baseline"
    if platform.machine() == "x86_64":
        assert sorted(built) == ["amx", "avx2", "avx512", "avx512_bf16", "baseline"]
    assert set(_dispatch.extension.instruction_sets()) <= set(built)


# Data that the linker may take from any file: it points to the same function from all of them.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


@needs_nm
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_files_of_an_instruction_set_share_no_code(name):
    """Of several weak definitions the linker keeps one. Were it one that was compiled for AVX-512, a processor without
    it would end on an illegal instruction."""
    objects = list(ROOT.glob(f"build/temp*/csrc/cpu/{name}.o"))
    if not objects:
        pytest.skip("no object files of a build beside the tests")
    for file in objects:
        found = symbols(file)
        assert any("fusedrnn" in symbol for _, symbol in found), f"nm says nothing of {file}"
        shared = {symbol for kind, symbol in found if kind in "WVu"} - HARMLESS
        assert not shared, f"weak or unique in {file.name}: {sorted(shared)}"


@needs_nm
@needs_extension
def test_operators_use_the_stable_abi_only():
    """One build then serves every later torch: LibTorch's C entry points are kept, its C++ symbols are not."""
    undefined = [symbol for _, symbol in symbols(Path(_dispatch.extension.__file__), "-D", "--undefined-only")]
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
    unstable = [symbol for symbol in undefined if re.search(r"\b(at|c10|caffe2|torch)::", symbol)]
    assert not unstable, unstable


@needs_nm
@needs_extension
def test_extension_exports_nothing_of_its_own():
    """A second library with the same names in one process must not be mixed up with this one."""
    defined = [symbol for kind, symbol in symbols(Path(_dispatch.extension.__file__), "-D", "--defined-only")]
    assert "PyInit__C" in defined
    assert not [symbol for symbol in defined if "fusedrnn" in symbol]


@needs_sources
def test_kernels_know_no_framework():
    framework = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python)\b')
    kernels = [file for folder in ("cells", "cpu", "cuda") for file in (CSRC / folder).glob("*") if file.is_file()]
    assert kernels
    assert framework.search((CSRC / "binding" / "arguments.h").read_text()), (
        "the pattern finds nothing where there is something"
    )
    assert not [str(file) for file in kernels if framework.search(file.read_text())]


# --- the package ------------------------------------------------------------------------------------


def test_public_names_exist_and_are_documented():
    assert fusedrnn.__doc__
    assert fusedrnn.__version__
    for name in fusedrnn.__all__:
        assert inspect.getdoc(getattr(fusedrnn, name)), f"{name} has no docstring"
        # An inherited docstring would be torch.nn's, which says nothing of what is different here.
        assert getattr(fusedrnn, name).__doc__, f"{name} has no docstring of its own"


def test_types_are_shipped():
    for name in ("py.typed", "_C.pyi", "_cuda.pyi", "passage.txt"):
        assert files(fusedrnn).joinpath(name).is_file(), name


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_stub_names_what_the_extension_has(name):
    extension = {"_C": _dispatch.extension, "_cuda": _dispatch.cuda_extension}[name]
    if extension is None:
        pytest.skip("fusedrnn runs without this extension")
    declared = set(
        re.findall(r"^(?:def|class) (\w+)", files(fusedrnn).joinpath(f"{name}.pyi").read_text(), re.MULTILINE)
    )
    public = {name for name in dir(extension) if not name.startswith("_")}
    assert public == declared


def test_import_takes_no_optional_package_along():
    loaded = output_of("-c", "import sys, fusedrnn; print(*sys.modules)").split()
    assert "torch" in loaded
    assert not {"matplotlib", "onnx", "onnxruntime", "hypothesis"} & set(loaded)


# --- python -m fusedrnn info ------------------------------------------------------------------------


def info(**environment: str) -> dict[str, str]:
    lines = output_of("-m", "fusedrnn", "info", **environment).splitlines()
    return {name: text.strip() for name, text in (line.split(":", 1) for line in lines)}


@needs_extension
def test_info():
    said = info(OMP_NUM_THREADS="1")
    build = _dispatch.extension.build_info()
    assert said["fusedrnn"] == fusedrnn.__version__
    assert said["torch"] == torch.__version__
    assert said["threads"].split(";")[0] == "1"
    assert said["extension"] == f"built with torch {build['torch']}, {build['compiler']}"
    best = _dispatch.extension.instruction_sets()[0]
    assert said["instruction sets"].startswith(f"{', '.join(build['instruction_sets'])} built, {best} chosen")
    if _dispatch.cuda_extension is None:
        assert said["CUDA kernels"] == f"not available: {_dispatch.why_no_cuda}"
    else:
        assert said["CUDA kernels"] == f"built for {_dispatch.cuda_extension.architectures()}"
    if not torch.cuda.is_available():
        assert said["GPUs"].startswith("none: torch ")


@needs_extension
@pytest.mark.parametrize("name", _dispatch.extension.instruction_sets() if _dispatch.extension else [])
def test_info_says_which_instruction_set_was_asked_for(name):
    assert f"{name} chosen" in info(FUSEDRNN_ISA=name)["instruction sets"]


@needs_extension
def test_unknown_instruction_set_is_refused_in_one_sentence():
    done = run("-m", "fusedrnn", "info", FUSEDRNN_ISA="nonsense")
    assert done.returncode != 0
    offered = ", ".join(_dispatch.extension.instruction_sets())
    sentence = f"expected an instruction set of this processor ({offered}), got 'nonsense'"
    assert done.stderr.splitlines()[-1].endswith(sentence), done.stderr


@needs_extension
def test_layers_may_be_kept_from_the_grid_schedule(monkeypatch):
    used = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fusedrnn, "_cuda", SimpleNamespace(use_schedules=used.append), raising=False)
    for given in "", "1", "0":
        monkeypatch.setenv("FUSEDRNN_GRID", given)
        assert _dispatch._load_cuda() == (fusedrnn._cuda, "")
    assert used == [1 + 2]  # block and cluster
    monkeypatch.setenv("FUSEDRNN_GRID", "none")
    with pytest.raises(ValueError, match="FUSEDRNN_GRID: expected 0, 1 or nothing, got 'none'"):
        _dispatch._load_cuda()


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not_run"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("9.0a", [(9, 0)], [(8, 9), (10, 0)]),
        ("8.0;9.0a;10.0a;12.0+PTX", [(8, 6), (9, 0), (10, 0), (12, 1), (13, 0)], [(7, 5), (10, 3), (11, 0)]),
        ("8.0;9.0;10.0;12.0+PTX", [(8, 6), (9, 0), (10, 0), (10, 3), (12, 1), (13, 0)], [(7, 5), (11, 0)]),
        ("8.6 9.0+PTX", [(8, 6), (8, 9), (9, 0), (10, 3)], [(8, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_which_gpus_a_build_is_for(architectures, runs, does_not_run):
    assert all(_dispatch.built_for(architectures, capability) for capability in runs)
    assert not any(_dispatch.built_for(architectures, capability) for capability in does_not_run)


# --- setup.py ---------------------------------------------------------------------------------------
# Nothing is built: setuptools' `setup` only says what it was given.
SCRIPT = """
import runpy, setuptools
setuptools.setup = lambda **given: print([module.name for module in given.get("ext_modules", [])])
runpy.run_path("setup.py")
"""


@pytest.fixture
def project(tmp_path):
    """A copy of setup.py with a source for the CPU and one for CUDA, so that what is missing is torch's CUDA."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("binding/module.cpp", "cpu/cpu.cpp", "cuda/lstm.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    return tmp_path


def set_up(project: Path, **environment: str) -> subprocess.CompletedProcess:
    return run("-c", SCRIPT, cwd=project, **environment)


@needs_setup
def test_setup_builds_the_extension(project):
    done = set_up(project, FUSEDRNN_CUDA="0")
    assert done.stdout.strip() == "['fusedrnn._C']", done.stderr
    assert "fusedrnn: CUDA: no, FUSEDRNN_CUDA=0" in done.stderr
    assert f"torch {torch.__version__}" in done.stderr


@needs_setup
def test_setup_without_a_build(project):
    done = set_up(project, FUSEDRNN_BUILD="0")
    assert done.stdout.strip() == "[]", done.stderr
    assert "fusedrnn: FUSEDRNN_BUILD=0: pure Python package, no extension" in done.stderr


@needs_setup
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_setup_fails_where_cuda_is_asked_for_and_not_there(project):
    reason = f"torch {torch.__version__} is a build without CUDA"
    asked, unasked = set_up(project, FUSEDRNN_CUDA="1"), set_up(project)
    assert asked.returncode != 0
    assert asked.stdout == ""
    assert f"fusedrnn: FUSEDRNN_CUDA=1, but {reason}" in asked.stderr
    assert "Traceback" not in asked.stderr
    assert unasked.returncode == 0, unasked.stderr
    assert f"fusedrnn: CUDA: no, {reason}" in unasked.stderr


@needs_setup
@pytest.mark.parametrize("name", ["FUSEDRNN_CUDA", "FUSEDRNN_BUILD"])
def test_setup_refuses_what_is_no_flag(project, name):
    done = set_up(project, **{name: "2"})
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"fusedrnn: expected {name} to be 0, 1 or unset, got '2'"


@needs_setup
def test_version_is_the_one_of_the_project():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert fusedrnn.__version__ in (stated[1], "0+unknown")
