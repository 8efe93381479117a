"""Builds CUDA kernels for the CPU on the SIMT shim; tests/simt/README.md says what that is.

Contract
--------
:func:`build` compiles ``.cu`` and ``.cpp`` files with the C++ compiler into one Python module, together with the shim,
and imports it. The module has ``configure``; ops that a source registers with torch are there once it is imported. It
is named after a hash of sources, headers and flags, wherever they stand, and built once, into torch's extension cache,
under a lock.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from lbr_kernels.ops import _extension

SIMT = Path(__file__).resolve().parent / "simt"
_CUDA = _extension.source_dir() / "cuda"
# No strict aliasing: kernels read registers and shared memory as what they need, which nvcc lets them do. No
# contraction: primitives that must not be fused are plain operators here.
_FLAGS = ("-std=c++17", "-DLBR_SIMT", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")


def sanitized() -> bool:
    """Whether the environment asks for sanitizers in all builds, as ``make test-sanitize`` does."""
    return bool(_extension.link_flags())


def build(
    sources: Sequence[Path],
    *,
    name: str,
    sanitize: bool = False,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> ModuleType:
    """Compile ``sources`` with the shim and import them.

    Headers are looked for in the folders of the sources, in ``include``, in ``csrc/cuda`` and in ``tests/simt``.
    ``sanitize`` builds with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes the process must have
    preloaded. Raises ``RuntimeError`` with what the compiler said.
    """
    sources = [Path(source).resolve() for source in sources]
    include = [*(Path(folder).resolve() for folder in include), SIMT, _CUDA]
    link = list(_extension._SANITIZE) if sanitize or sanitized() else []
    options = [*_FLAGS, *flags, *(["-O1", "-g1", *link] if link else ["-O2", "-g1"])]

    name = f"{name}_{_digest(sources, include, options)}"
    if name in sys.modules:
        return sys.modules[name]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    directory = root / f"lbr_kernels-simt-torch{torch.__version__}" / name
    directory.mkdir(parents=True, exist_ok=True)
    complete = directory / "complete"
    with FileLock(directory.with_suffix(".lock")):
        if not complete.exists():
            (directory / "lock").unlink(missing_ok=True)  # torch's own, left behind by a build that was killed
            cpp_extension.load(
                name,
                [str(path) for path in (*_as_cpp(sources, directory), SIMT / "simt.cpp", SIMT / "module.cpp")],
                extra_cflags=options,
                extra_ldflags=link,
                extra_include_paths=[str(folder) for folder in include],
                build_directory=str(directory),
            )
            complete.touch()
    return _import(name, directory / f"{name}.so")


def _digest(sources: Sequence[Path], include: Sequence[Path], options: Sequence[str]) -> str:
    """Of all that a build may depend on: the sources, the shim, every header in their folders and in csrc but cpu/."""
    csrc = _extension.source_dir()
    folders = {source.parent for source in sources} | set(include) | {csrc}
    headers = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh")}
    headers = {path for path in headers if csrc / "cpu" not in path.parents}
    digest = hashlib.sha256(" ".join(options).encode())
    # By name and content: a checkout elsewhere has the same build.
    files = {*sources, *headers, SIMT / "simt.cpp", SIMT / "module.cpp"}
    for name, content in sorted((path.name, path.read_bytes()) for path in files):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


def _as_cpp(sources: Sequence[Path], directory: Path) -> list[Path]:
    """The sources under names that torch's build rules give to the C++ compiler: a .cu file is included by a .cpp."""
    paths = []
    for number, source in enumerate(sources):
        path = source
        if source.suffix == ".cu":
            path = directory / f"{source.stem}_{number}.cpp"
            path.write_text(f'#include "{source}"\n', encoding="utf-8")
        paths.append(path)
    return paths


def _import(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
