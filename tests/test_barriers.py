"""Every synchronisation of the CUDA kernels is needed: without one of them a result is wrong or a fault is reported.

For each place in csrc/cuda where threads wait for each other or for data, a copy of the sources without that line is
built on the SIMT shim and has to fail on problems which the real sources pass.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import simt_backend
import torch
from support import assert_within_budget
from test_tree_attention import problem

from lbr_kernels import ops
from lbr_kernels.ops import _extension

KERNEL = "cuda/tree_attention.cuh"
WAITS = re.compile(r"^ *(block_barrier|copy_async_wait<.*>|copy_async_commit)\(\);.*$", re.MULTILINE)
SITES = [match.span() for match in WAITS.finditer((_extension.source_dir() / KERNEL).read_text())]

# Head sizes up to 64 alone, which compile fast; the code is the same for all.
SOURCES = ("cuda/bindings.cpp", "cuda/tree_attention.cu", "cuda/tree_attention_64.cu")
OTHERS = """
#include "cuda/tree_attention.h"
namespace lbr::gpu {
void launch_tree_attention_128(const TreeAttentionLaunch&, const TileShape&, Stream) { throw 0; }
void launch_tree_attention_256(const TreeAttentionLaunch&, const TileShape&, Stream) { throw 0; }
}  // namespace lbr::gpu
"""


def build(folder: Path, namespace: str, site: tuple[int, int] | None):
    """The kernels as a module; without the line at ``site``, if there is one."""
    shutil.copytree(_extension.source_dir(), folder)
    if site is not None:
        text = (folder / KERNEL).read_text()
        (folder / KERNEL).write_text(text[: site[0]] + text[site[1] :])
    (folder / "others.cpp").write_text(OTHERS)
    return simt_backend.compile_kernels([folder / name for name in (*SOURCES, "others.cpp")], namespace)


def first_failure(module, namespace: str, seeds: int) -> str | None:
    """What goes wrong first, over trees in several tiles, windows, one and many parts, and schedules."""
    cases = []
    for extras in ({}, {"window": 70}):
        for shape in ({"N": 3, "T": 9, "group": 4}, {"N": 9, "T": 70, "group": 7}):
            p = problem(B=2, Hk=1, D=64, Dv=64, longest=420, dtype=torch.float16, **shape)
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
            cases.append(
                (p, extras, ops.tree_attention_ref(**wide, **extras)[0], ops.tree_attention_ref(**p, **extras)[0])
            )
    for seed in range(seeds):
        for p, extras, want, plain in cases:
            for multiprocessors in (1, 20):
                module.configure(seed=1000 * simt_backend.SEED + seed, multiprocessors=multiprocessors)
                try:
                    out, _ = getattr(torch.ops, namespace).tree_attention(**p, **extras)
                    assert_within_budget(out, want, plain, roundings=8)
                except (AssertionError, RuntimeError) as error:
                    return f"seed {seed}: {error}"
    return None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))


def test_the_kernel_as_it_is(tmp_path):
    module = build(tmp_path / "csrc", "lbr_kernels_whole", None)
    assert first_failure(module, "lbr_kernels_whole", 100) is None


@pytest.mark.parametrize("number", range(len(SITES)))
def test_without(number, tmp_path):
    namespace = f"lbr_kernels_without_{number}"
    module = build(tmp_path / "csrc", namespace, SITES[number])
    failure = first_failure(module, namespace, 500)
    print(failure)
    assert failure is not None
