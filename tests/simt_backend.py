"""The CUDA kernels on the SIMT shim as one more backend of the ops: ``"cuda-simt"``, for tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import simt_build
import torch

from lbr_kernels.ops import _extension, _flags, _registry
from lbr_kernels.ops._backends import BACKENDS, GPU_OPS, HALF, Backend

NAME = "cuda-simt"
_libraries: list[torch.library.Library] = []  # what they define lasts as long as they do


def compile_kernels(sources: Sequence[Path], namespace: str) -> ModuleType:
    """Build the kernels, which then are ``torch.ops.<namespace>.<op>``; ``configure`` sets seed and device."""
    flags = [flag for flag in _extension.CUDA.cxx_flags() if flag.startswith("-DTORCH_TARGET")]
    module = simt_build.build(sources, name=namespace, flags=[*flags, f"-DLBR_LIBRARY={namespace}"])
    library = torch.library.Library(namespace, "DEF")
    library.define("prepare(Tensor(a!) word) -> ()")
    for op in GPU_OPS:
        arguments, result = _registry.SCHEMAS[op].rsplit(" -> ", 1)
        library.define(f"{op}{arguments[:-1]}, int isa=0) -> {result}", tags=torch.Tag.pt2_compliant_tag)
        fake = _registry.FAKES[op]
        torch.library.register_fake(f"{namespace}::{op}", lambda *a, isa=0, f=fake, **k: f(*a, **k), lib=library)
    _libraries.append(library)
    getattr(torch.ops, namespace).prepare(_flags.word(torch.device("cpu")))
    return module


MODULE: list[ModuleType] = []  # filled at first use
SEED = 0  # pytest --simt-seed


def _load(device: torch.device) -> str | None:
    MODULE.append(compile_kernels([*_extension.CUDA.sources(), simt_build.SIMT / "plan.cpp"], "lbr_kernels_simt"))
    MODULE[0].configure(seed=SEED)
    return None


BACKENDS[NAME] = Backend(
    NAME,
    device="cpu",
    fewer_dtypes={"tree_attention": HALF},
    ops=frozenset(GPU_OPS),
    namespace="lbr_kernels_simt",
    extra={"isa": 0},
    load=_load,
)
