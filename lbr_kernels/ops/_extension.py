"""The compiled kernels: found where an install put them, else built once at first use.

Contract
--------
The extension is named after a hash of its sources and flags. :func:`load` takes the installed one of that name if there
is one, else builds it with the C++ compiler into torch's extension cache (``TORCH_EXTENSIONS_DIR``), one folder per
torch version, under a lock that ends with the process that holds it. A build never fails an import or a call: where it
cannot be done, the reason is kept, a warning says so once, and the reference runs.

``setup.py`` reads the sources and flags from here, so this file imports nothing of the package, and torch only inside
functions.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = (
    "bindings.cpp",
    "cpu/commit.cpp",
    "cpu/isa_avx2.cpp",
    "cpu/isa_avx512.cpp",
    "cpu/isa_avx512_bf16.cpp",
    "cpu/isa_portable.cpp",
    "cpu/kernels.cpp",
)
# No contraction: which operations are fused is written in the source (csrc/cpu/simd.h). The last macro is the oldest
# torch whose stable ABI the binary must run on: 2.10.
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_lock = threading.Lock()


def source_dir() -> Path:
    """Where the C++ sources are: inside an installed package, or beside the package in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def sources() -> list[Path]:
    """The files to compile."""
    return [source_dir() / name for name in _SOURCES]


def cxx_flags() -> list[str]:
    """What the compiler is given."""
    return [*CXX_FLAGS, *link_flags(), *(["-O1", "-g"] if link_flags() else [])]


def link_flags() -> list[str]:
    """What the linker is given: with ``LBR_KERNELS_SANITIZE=1`` AddressSanitizer and UndefinedBehaviorSanitizer.

    Such a build is for tests, in a process that has libasan preloaded; see ``make test-sanitize``.
    """
    return list(_SANITIZE) if os.environ.get("LBR_KERNELS_SANITIZE") == "1" else []


def extension_name() -> str:
    """``_kernels_<hash>``: another source or flag is another extension, so a stale binary is never loaded."""
    digest = hashlib.sha256(" ".join(cxx_flags()).encode())
    for path in sorted(source_dir().rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.relative_to(source_dir()).as_posix().encode() + path.read_bytes())
    return f"_kernels_{digest.hexdigest()[:12]}"


def build_is_forced() -> bool:
    """Whether the environment asks for an error where a build would be skipped."""
    return os.environ.get("LBR_KERNELS_FORCE_BUILD") == "1"


def load() -> str | None:
    """Make the C++ kernels available. Returns None if they are, else the reason why not; the first call decides.

    Raises ``RuntimeError`` in the place of a reason if ``LBR_KERNELS_FORCE_BUILD=1``.
    """
    with _lock:
        return _load_once()


def library_path() -> Path | None:
    """The compiled library that :func:`load` takes, None if there is none."""
    built = _build_directory() / f"{extension_name()}.so"
    return _installed() or (built if built.exists() else None)


@functools.cache
def _load_once() -> str | None:
    import torch

    try:
        library = _installed() or _build()
    except BuildUnavailableError as error:
        if build_is_forced():
            raise RuntimeError(f"LBR_KERNELS_FORCE_BUILD=1, but {error}") from error
        warnings.warn(
            f"lbr_kernels: {error}. The plain PyTorch reference runs in its place; it gives the same results, slower.",
            stacklevel=2,
        )
        return str(error)
    torch.ops.load_library(library)
    return None


def missing_compiler() -> str | None:
    """Says which C++ compiler was looked for in vain; None if there is one."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is not None:
        return None
    named = "which CXX names" if "CXX" in os.environ else "as CXX is not set"
    return f"no C++ compiler found (looked for {compiler!r}, {named})"


class BuildUnavailableError(Exception):
    """The extension cannot be built here; the message says why."""


def _installed() -> Path | None:
    """The extension that an install with ``--no-build-isolation`` has compiled."""
    return next(_PACKAGE.glob(f"{extension_name()}.*"), None)


def _build_directory() -> Path:
    """A folder for this extension and this torch inside torch's own cache of extensions."""
    import torch
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return root / f"lbr_kernels-torch{torch.__version__}" / extension_name()


def _build() -> Path:
    import torch

    name, directory = extension_name(), _build_directory()
    library, complete = directory / f"{name}.so", directory / "complete"
    if complete.exists():
        return library  # also from a cache that this process may not write to
    if (missing := missing_compiler()) is not None:
        raise BuildUnavailableError(missing)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _building_alone(directory.with_suffix(".lock")):
            if complete.exists():
                return library
            start = time.monotonic()
            print(f"lbr_kernels: compiling the CPU kernels for torch {torch.__version__}, once ...", file=sys.stderr)
            (directory / "lock").unlink(missing_ok=True)  # torch's own, left behind by a build that was killed
            _compile(name, directory)
            complete.touch()
            print(f"lbr_kernels: compiled in {time.monotonic() - start:.0f} s into {directory}", file=sys.stderr)
    except OSError as error:
        raise BuildUnavailableError(f"cannot write the kernels to {directory} ({error})") from error
    return library


@contextmanager
def _building_alone(path: Path) -> Iterator[None]:
    """Holds the lock in ``path``, and says so if another process has to be waited for."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("lbr_kernels: waiting for another process that is compiling the CPU kernels ...", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compile(name: str, directory: Path) -> None:
    from torch.utils import cpp_extension

    try:
        cpp_extension.load(
            name,
            [str(path) for path in sources()],
            extra_cflags=cxx_flags(),
            extra_ldflags=link_flags(),
            build_directory=str(directory),
            is_python_module=False,
        )
    except Exception as error:  # whatever torch, ninja or the compiler have to say
        log = directory / "build.log"
        log.write_text(str(error))
        raise BuildUnavailableError(f"compiling the kernels failed, see {log}") from error
