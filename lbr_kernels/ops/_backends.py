"""Where an op can run: the backends, what each takes, and why one cannot run here.

* ``"reference"``: plain PyTorch, on any device, also in fp64, with gradients;
* ``"cpu"``: the C++ kernels with the best instruction set of this processor; ``"cpu-portable"``, ``"cpu-avx2"``,
  ``"cpu-avx512"`` and ``"cpu-avx512-bf16"`` name one;
* ``"cuda"``: the CUDA C++ kernels on GPUs of compute capability 8.0 and later; tree attention in fp16 and bf16;
* ``"triton"``: the Triton kernels, on GPUs that Triton knows; under Triton's interpreter (``TRITON_INTERPRET=1``, for
  tests) they take tensors on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lbr_kernels.ops import _extension, _flags
from lbr_kernels.ops._checks import FLOATING

HALF = (torch.float16, torch.bfloat16)
GPU_OPS = ("commit_", "route", "sample_children", "top_children", "tree_attention")
TRITON_OPS = (*GPU_OPS, "packed_tree_attention", "packed_tree_attention_backward")
OLDEST_GPU = (8, 0)


@dataclass(frozen=True)
class Backend:
    """A way to run ops: ``torch.ops.<namespace>.<op><suffix>`` with the arguments ``extra``.

    ``ops`` names those that it has, ``device`` the type of device and ``dtypes`` the types of the tensors it takes;
    None stands for all. ``fewer_dtypes`` has the ops that take fewer of them. ``load`` is asked once per device: it
    makes the backend ready, or says why it cannot run. ``nearest`` is what a message recommends in its place.
    """

    name: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = FLOATING
    fewer_dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    ops: frozenset[str] | None = None
    nearest: str = "reference"
    namespace: str = "lbr_kernels"
    suffix: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    load: Callable[[torch.device], str | None] = lambda device: None

    def unavailable(self, op: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
        """Why this cannot run ``op`` for tensors on ``device`` with ``dtype``; None if it can."""
        if self.ops is not None and op not in self.ops:
            return f"it has no {op}; the nearest accepted backend is 'reference'"
        if self.device is not None and device.type != self.device:
            nearest = "cpu" if device.type == "cpu" else "reference"
            return f"it takes tensors on {self.device}, got {device}; the nearest accepted backend is {nearest!r}"
        dtypes = self.fewer_dtypes.get(op, self.dtypes)
        if dtypes is not None and dtype is not None and dtype not in dtypes:
            *others, last = (str(accepted).removeprefix("torch.") for accepted in dtypes)
            nearest = self.nearest if dtype in FLOATING else "reference"
            return f"it takes {', '.join(others)} or {last}, got {dtype}; the nearest accepted backend is {nearest!r}"
        reason: str | None = _load(self.name, str(device))
        return reason

    def overload(self, op: str) -> Callable[..., Any]:
        """What runs ``op``, once it is known to be available."""
        overload: Callable[..., Any] = getattr(getattr(torch.ops, self.namespace), op + self.suffix).default
        return overload


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load(name: str, device: str) -> str | None:
    if (name, device) not in _loaded:
        _loaded[name, device] = BACKENDS[name].load(torch.device(device))
    return _loaded[name, device]


_loaded: dict[tuple[str, str], str | None] = {}


def _load_cpu(isa: int) -> Callable[[torch.device], str | None]:
    def load(device: torch.device) -> str | None:
        if (reason := _extension.CPU.load()) is not None:
            return reason
        if isa and not torch.ops.lbr_kernels.has_isa(isa):
            return "this processor lacks the instruction set; the nearest accepted backend is 'cpu'"
        return None

    return load


def _missing_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        return f"torch finds no CUDA device here{built}; the nearest accepted backend is 'reference'"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return (
            f"it takes GPUs of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or later, and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; "
            "the nearest accepted backend is 'reference'"
        )
    return None


def _load_cuda(device: torch.device) -> str | None:
    if (reason := _missing_gpu(device) or _extension.CUDA.load()) is not None:
        return reason
    word = _flags.word(device)
    try:
        torch.ops.lbr_kernels.prepare(word)
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        return f"its kernels do not run on {name} ({error}); the nearest accepted backend is 'triton'"
    return None


def _load_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed (pip install 'lbr-kernels[triton]'); the nearest accepted backend is 'reference'"
        )
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting):
        nearest = "cpu" if device.type == "cpu" else "reference"
        return f"it takes tensors on cuda, got {device}; the nearest accepted backend is {nearest!r}"
    if device.type == "cuda" and (reason := _missing_gpu(device)) is not None:
        return reason
    try:
        from lbr_kernels.ops import _triton

        _triton.register()
    except Exception as error:  # whatever an import that is only half there has to say
        return f"triton cannot be used ({error}); the nearest accepted backend is 'reference'"
    return None


_CPU_ISAS = {"cpu": 0, "cpu-portable": 1, "cpu-avx2": 2, "cpu-avx512": 3, "cpu-avx512-bf16": 4}  # of the C++ enum Isa

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("reference", dtypes=None),
        *(Backend(name, device="cpu", extra={"isa": isa}, load=_load_cpu(isa)) for name, isa in _CPU_ISAS.items()),
        Backend(
            "cuda",
            device="cuda",
            fewer_dtypes={"tree_attention": HALF},
            ops=frozenset(GPU_OPS),
            nearest="triton",
            load=_load_cuda,
        ),
        Backend("triton", ops=frozenset(TRITON_OPS), suffix="_triton", load=_load_triton),
    )
}


def unavailable(backend: str, op: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` cannot run ``op`` for tensors on ``device`` with ``dtype``; None if it can."""
    if backend not in BACKENDS:
        return f"there is no such backend, known are {', '.join(BACKENDS)}"
    return BACKENDS[backend].unavailable(op, _flags.with_index(device), dtype)
