"""Installing and building: wheels of every kind, first use, no compiler, several processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import __version__ as setuptools_version

from lbr_kernels.ops import _extension

ROOT = Path(__file__).parent.parent
USE = """
import warnings
warnings.simplefilter("always")
import torch
from lbr_kernels import ops
u = torch.full((1, 2), 0.5, dtype=torch.float64)
print("tokens", ops.sample_children(torch.tensor([[0.0, 1.0, 2.0]]), u)[0].tolist())
print("cpu", ops.backends()["sample_children"]["cpu"])
"""


def run_python(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on this checkout, with an extension cache of its own."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=cache.parent, capture_output=True, text=True, timeout=600)


def build_wheel(where: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` of a copy of this checkout, as a user would run it."""
    source = where / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(where), *options, str(source)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)


def contents(where: Path) -> tuple[str, list[str]]:
    (wheel,) = where.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_isolated_wheel_is_pure_python(tmp_path):
    """No torch, no compiler, no nvcc: Python, the C++ sources, and the demo's checkpoint."""
    bin_without_tools = tmp_path / "bin"
    bin_without_tools.mkdir()
    done = build_wheel(tmp_path, PATH=str(bin_without_tools))
    assert done.returncode == 0, done.stderr
    name, files = contents(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert "lbr_kernels/csrc/cpu/tree_attention.h" in files
    assert "lbr_kernels/py.typed" in files
    assert "lbr_kernels/trace.html" in files
    assert not [file for file in files if file.endswith(".so")]


def test_wheel_without_isolation_is_compiled(tmp_path):
    """The binary is in the wheel, serves every Python from 3.10 on, and is what a fresh install loads."""
    done = build_wheel(tmp_path, "--no-build-isolation")
    assert done.returncode == 0, done.stderr
    name, files = contents(tmp_path)
    assert "-cp310-abi3-" in name
    assert [file for file in files if file.startswith(f"lbr_kernels/{_extension.CPU.name()}")]
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    used = run_python(USE, tmp_path / "cache", PYTHONPATH=str(site), CXX="no-such-compiler")
    assert "cpu None" in used.stdout, used.stderr
    assert "compiling" not in used.stderr


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_missing_or_failing_compiler_does_not_fail_the_install(tmp_path, compiler):
    done = build_wheel(tmp_path, "--no-build-isolation", CXX=compiler)
    assert done.returncode == 0, done.stderr
    name, files = contents(tmp_path)
    assert not [file for file in files if file.endswith(".so")]
    assert name.endswith("-py3-none-any.whl") or compiler == "false"


def test_a_forced_build_that_cannot_be_done_is_an_error(tmp_path):
    done = build_wheel(tmp_path, "--no-build-isolation", CXX="false", LBR_KERNELS_FORCE_BUILD="1")
    assert done.returncode != 0
    isolated = build_wheel(tmp_path / "isolated", LBR_KERNELS_FORCE_BUILD="1")
    assert isolated.returncode != 0
    assert "LBR_KERNELS_FORCE_BUILD=1, but torch cannot be imported here" in isolated.stdout + isolated.stderr
    missing = build_wheel(tmp_path / "missing", "--no-build-isolation", CXX="none", LBR_KERNELS_FORCE_BUILD="1")
    assert missing.returncode != 0
    assert "LBR_KERNELS_FORCE_BUILD=1, but no C++ compiler found" in missing.stdout + missing.stderr


@pytest.mark.full
def test_first_use_builds_once_for_all_processes(tmp_path):
    """Three processes at the same time: one compiles, the others wait and load; a later one finds it done."""
    cache = tmp_path / "cache"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", USE], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=900) for process in processes]
    assert all("cpu None" in out for out, _ in results), results
    assert sum("compiling the CPU kernels for" in err for _, err in results) == 1
    assert sum("waiting for another process" in err for _, err in results) == 2
    lock = next(cache.rglob("*.lock"))
    lock.unlink()
    lock.mkdir()  # as in a cache that is read-only: what is finished is loaded without a lock
    again = run_python(USE, cache)
    assert "cpu None" in again.stdout, again.stderr
    assert "compiling" not in again.stderr


@pytest.mark.full
def test_a_killed_build_is_taken_up_again(tmp_path):
    """What a killed build leaves behind, torch's own lock file among it, does not hang the next one."""
    import torch

    cache = tmp_path / "cache"
    directory = cache / f"lbr_kernels-torch{torch.__version__}" / _extension.CPU.name()
    directory.mkdir(parents=True)
    (directory / "lock").touch()
    (directory / f"{_extension.CPU.name()}.so").write_bytes(b"half a library")
    used = run_python(USE, cache)
    assert "cpu None" in used.stdout, used.stderr


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_reference_runs(tmp_path, compiler):
    """One plain warning, the same results."""
    used = run_python(USE + USE.split("from lbr_kernels import ops")[1], tmp_path, CXX=compiler)
    assert used.returncode == 0, used.stderr
    assert used.stdout.count("tokens [[2, 2]]") == 2
    assert used.stderr.count("The plain PyTorch reference runs in its place") == 1
    wanted = (
        "no C++ compiler found (looked for 'no-such-compiler'" if "such" in compiler else "compiling the kernels failed"
    )
    assert wanted in used.stderr


def test_a_forced_build_is_an_error_at_first_use(tmp_path):
    used = run_python(USE, tmp_path, CXX="no-such-compiler", LBR_KERNELS_FORCE_BUILD="1")
    assert used.returncode != 0
    assert "LBR_KERNELS_FORCE_BUILD=1, but no C++ compiler found" in used.stderr


def test_an_unwritable_cache_is_said(tmp_path):
    (tmp_path / "file").touch()
    used = run_python(USE, tmp_path / "file")
    assert used.returncode == 0, used.stderr
    assert "cannot write the kernels to" in used.stderr


def test_nothing_is_shared_between_instruction_sets(tmp_path):
    """Every symbol that a linker may merge carries its instruction set's namespace: none takes another's place."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    compiler = os.environ.get("CXX", "c++")
    for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
        source = _extension.source_dir() / "cpu" / f"isa_{isa}.cpp"
        target = tmp_path / f"{isa}.o"
        subprocess.run([compiler, *_extension.CPU.cxx_flags(), "-O1", "-fPIC", "-c", source, "-o", target], check=True)
        listing = subprocess.run(["nm", "-C", target], check=True, capture_output=True, text=True).stdout
        weak = [line for line in listing.splitlines() if line[17:18] in "WVu" and "DW.ref" not in line]
        assert weak
        assert not [line for line in weak if f"lbr::{isa}::" not in line]


def test_the_cuda_extension_compiles_and_links(tmp_path):
    """All of it by nvcc; of torch it needs the stable ABI alone. Machine code, which `make gpu-check` makes, is not."""
    if shutil.which("nvcc") is None or shutil.which("nm") is None:
        pytest.skip("nvcc or nm is not installed")
    from torch.utils.cpp_extension import include_paths

    library = tmp_path / "library.so"
    host = ",".join(["-fPIC", *(flag for flag in _extension.CUDA.cxx_flags() if flag.startswith("-f"))])
    macros = [flag for flag in _extension.CUDA.cxx_flags() if flag.startswith("-D")]
    folders = [f"-I{folder}" for folder in include_paths()]
    options = [
        *_extension.CUDA.nvcc_flags(),
        *macros,
        "-gencode=arch=compute_90,code=compute_90",
        "-shared",
        "-Xcompiler",
        host,
        *folders,
    ]
    subprocess.run(["nvcc", *options, *_extension.CUDA.sources(), "-o", library], check=True, timeout=600)
    command = ["nm", "-D", "--undefined-only", library]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wanted = {line.split()[-1] for line in listing.splitlines() if line.split()[0] == "U"}
    of_torch = {name for name in wanted if "torch" in name or "c10" in name or "at6" in name or "2at" in name}
    assert of_torch
    assert [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))] == []


def test_setuptools_is_new_enough():
    """pyproject.toml names the licence as an expression, which older ones do not read."""
    assert int(setuptools_version.split(".")[0]) >= 77
