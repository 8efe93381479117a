"""The compiled kernels: found where an install put them, else built once at first use.

Contract
--------
There are two libraries, :data:`CPU` and :data:`CUDA`, each named after a hash of its sources and flags.
:meth:`Extension.load` takes the installed one of that name if there is one, else builds it into torch's extension cache
(``TORCH_EXTENSIONS_DIR``), one folder per torch version, under a lock that ends with the process that holds it. A build
never fails an import or a call: where it cannot be done, the reason is kept, a warning says so once, and the reference
runs.

``setup.py`` reads the sources and flags from here, so this file imports nothing of the package, and torch only inside
functions. ``MAX_JOBS``, ``CXX``, ``CUDA_HOME`` and ``TORCH_CUDA_ARCH_LIST`` mean what they mean to torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
# The last macro is the oldest torch whose stable ABI the binary must run on: 2.10.
_COMMON_FLAGS = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# No contraction: which operations are fused is written in the source (csrc/cpu/simd.h).
_CXX_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def source_dir() -> Path:
    """Where the C++ sources are: inside an installed package, or beside the package in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def link_flags() -> list[str]:
    """What the linker is given: with ``LBR_KERNELS_SANITIZE=1`` AddressSanitizer and UndefinedBehaviorSanitizer.

    Such a build is for tests, in a process that has libasan preloaded; see ``make test-sanitize``.
    """
    return list(_SANITIZE) if os.environ.get("LBR_KERNELS_SANITIZE") == "1" else []


def build_is_forced() -> bool:
    """Whether the environment asks for an error where a build would be skipped."""
    return os.environ.get("LBR_KERNELS_FORCE_BUILD") == "1"


def missing_compiler() -> str | None:
    """Says which C++ compiler was looked for in vain; None if there is one."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is not None:
        return None
    named = "which CXX names" if "CXX" in os.environ else "as CXX is not set"
    return f"no C++ compiler found (looked for {compiler!r}, {named})"


def missing_cuda_compiler() -> str | None:
    """Says why CUDA sources cannot be compiled for this torch; None if they can."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return f"no nvcc found (looked in CUDA_HOME = {home}); it compiles the CUDA kernels"
    return missing_compiler()


# Of GPUs that have what the kernels use: compute capability 8.0 and later. What nvcc does not know is left out.
_ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)


def cuda_architectures() -> list[int]:
    """What the CUDA kernels are compiled for where ``TORCH_CUDA_ARCH_LIST`` is not set: the GPUs of this machine.

    Where there is none, as when a package is built for others, all that this nvcc knows.
    """
    import torch

    here = {
        major * 10 + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    }
    if found := sorted(arch for arch in here if arch >= _ARCHITECTURES[0]):
        return found
    from torch.utils import cpp_extension

    nvcc = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    known = ""
    if nvcc.exists():
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return [arch for arch in _ARCHITECTURES if f"sm_{arch}" in known.split()] or [_ARCHITECTURES[0]]


class BuildUnavailableError(Exception):
    """The extension cannot be built here; the message says why."""


class Extension:
    """A library of kernels: ``kernels`` is what it is called in messages, ``missing`` says what its build lacks."""

    def __init__(
        self, stem: str, kernels: str, sources: Sequence[str], *, cuda: bool, missing: Callable[[], str | None]
    ) -> None:
        self._stem, self._kernels, self._sources, self._cuda, self._missing = stem, kernels, sources, cuda, missing
        self._lock = threading.Lock()
        self._loaded: list[str | None] = []  # what load() has found, once it has

    def sources(self) -> list[Path]:
        """The files to compile."""
        return [source_dir() / name for name in self._sources]

    def cxx_flags(self) -> list[str]:
        """What the C++ compiler is given."""
        cuda = ["-DUSE_CUDA"] if self._cuda else []
        return [*_COMMON_FLAGS, *_CXX_FLAGS, *cuda, *link_flags(), *(["-O1", "-g1"] if link_flags() else [])]

    def nvcc_flags(self) -> list[str]:
        """What nvcc is given, but for :meth:`architecture_flags`."""
        return list(_COMMON_FLAGS)

    def architecture_flags(self) -> list[str]:
        """Which GPUs nvcc compiles for: code for each, and PTX for later ones. None where torch is to say so."""
        if not self._cuda or os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return []
        found = cuda_architectures()
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in found]
        return [*code, f"-gencode=arch=compute_{found[-1]},code=compute_{found[-1]}"]

    def name(self) -> str:
        """``<stem>_<hash>``: another source or flag is another extension, so a stale binary is never loaded."""
        digest = hashlib.sha256(" ".join(self.cxx_flags() + (self.nvcc_flags() if self._cuda else [])).encode())
        for path in sorted(source_dir().rglob("*")):
            of_another = path.parent.name == ("cpu" if self._cuda else "cuda")
            if path.suffix in (".cpp", ".h", ".cu", ".cuh") and not of_another:
                digest.update(path.relative_to(source_dir()).as_posix().encode() + path.read_bytes())
        return f"{self._stem}_{digest.hexdigest()[:12]}"

    def library_path(self) -> Path | None:
        """The compiled library that :meth:`load` takes, None if there is none."""
        built = self._build_directory() / f"{self.name()}.so"
        return self._installed() or (built if built.exists() else None)

    def load(self) -> str | None:
        """Make the kernels available. Returns None if they are, else the reason why not; the first call decides.

        Raises ``RuntimeError`` in the place of a reason if ``LBR_KERNELS_FORCE_BUILD=1``.
        """
        with self._lock:
            if not self._loaded:
                self._loaded.append(self._load())
            return self._loaded[0]

    def _load(self) -> str | None:
        import torch

        try:
            library = self._installed() or self._build()
        except BuildUnavailableError as error:
            if build_is_forced():
                raise RuntimeError(f"LBR_KERNELS_FORCE_BUILD=1, but {error}") from error
            warnings.warn(
                f"lbr_kernels: {error}. The plain PyTorch reference runs in its place; it gives the same results, "
                "slower.",
                stacklevel=2,
            )
            return str(error)
        try:
            torch.ops.load_library(library)
        except OSError as error:  # built for another torch, or a library that it needs is missing
            return f"{library} cannot be loaded ({error})"
        return None

    def _installed(self) -> Path | None:
        """The extension that an install with ``--no-build-isolation`` has compiled."""
        return next(_PACKAGE.glob(f"{self.name()}.*"), None)

    def _build_directory(self) -> Path:
        """A folder for this extension and this torch inside torch's own cache of extensions."""
        import torch
        from torch.utils import cpp_extension

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
        directory = root / f"lbr_kernels-torch{torch.__version__}" / self.name()
        if not self._cuda:
            return directory
        # Machines with other GPUs may share the cache.
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(map(str, cuda_architectures()))
        return directory / re.sub(r"[^\w.+]+", "-", listed)

    def _build(self) -> Path:
        import torch

        name, directory = self.name(), self._build_directory()
        library, complete = directory / f"{name}.so", directory / "complete"
        if complete.exists():
            return library  # also from a cache that this process may not write to
        if (missing := self._missing()) is not None:
            raise BuildUnavailableError(missing)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._building_alone(directory.with_suffix(".lock")):
                if complete.exists():
                    return library
                start = time.monotonic()
                print(
                    f"lbr_kernels: compiling the {self._kernels} kernels for torch {torch.__version__}, once ...",
                    file=sys.stderr,
                )
                (directory / "lock").unlink(missing_ok=True)  # torch's own, left behind by a build that was killed
                self._compile(name, directory)
                complete.touch()
                print(f"lbr_kernels: compiled in {time.monotonic() - start:.0f} s into {directory}", file=sys.stderr)
        except OSError as error:
            raise BuildUnavailableError(f"cannot write the kernels to {directory} ({error})") from error
        return library

    @contextmanager
    def _building_alone(self, path: Path) -> Iterator[None]:
        """Holds the lock in ``path``, and says so if another process has to be waited for."""
        from filelock import FileLock, Timeout

        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(
                f"lbr_kernels: waiting for another process that is compiling the {self._kernels} kernels ...",
                file=sys.stderr,
            )
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _compile(self, name: str, directory: Path) -> None:
        from torch.utils import cpp_extension

        try:
            cpp_extension.load(
                name,
                [str(path) for path in self.sources()],
                extra_cflags=self.cxx_flags(),
                extra_cuda_cflags=[*self.nvcc_flags(), *self.architecture_flags()],
                extra_ldflags=link_flags(),
                build_directory=str(directory),
                with_cuda=self._cuda,
                is_python_module=False,
            )
        except Exception as error:  # whatever torch, ninja or the compiler have to say
            log = directory / "build.log"
            log.write_text(str(error), encoding="utf-8")
            raise BuildUnavailableError(f"compiling the kernels failed, see {log}") from error


CPU = Extension(
    "_kernels",
    "CPU",
    (
        "bindings.cpp",
        "cpu/commit.cpp",
        "cpu/isa_avx2.cpp",
        "cpu/isa_avx512.cpp",
        "cpu/isa_avx512_bf16.cpp",
        "cpu/isa_portable.cpp",
        "cpu/kernels.cpp",
    ),
    cuda=False,
    missing=missing_compiler,
)
CUDA = Extension(
    "_cuda_kernels",
    "CUDA",
    (
        "cuda/bindings.cpp",
        "cuda/commit.cu",
        "cuda/route.cu",
        "cuda/sample_children.cu",
        "cuda/tree_attention.cu",
        "cuda/tree_attention_64.cu",
        "cuda/tree_attention_128.cu",
        "cuda/tree_attention_256.cu",
    ),
    cuda=True,
    missing=missing_cuda_compiler,
)
