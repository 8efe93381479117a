"""commit_ against slice copies of the moved rows, and against gathering the whole cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lbr_kernels import ops

LAYERS, HEADS, DIM = 32, 8, 64


def caches(prefix: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, prefix + 16, DIM) for _ in range(2 * LAYERS)]


@pytest.mark.parametrize("prefix", [1024, 8192])
def bench_commit_against_slices(benchmark: BenchmarkFixture, prefix: int) -> None:
    buffers = caches(prefix)
    lens = torch.tensor([prefix], dtype=torch.int32)
    sources = torch.tensor([[2, 9, 10, 11]], dtype=torch.int32)

    def ours() -> list[Tensor]:
        lens.fill_(prefix)
        ops.commit_(buffers, lens, sources)
        return buffers

    def slices() -> list[Tensor]:
        for buffer in buffers:
            buffer[:, :, prefix : prefix + 4] = buffer[:, :, prefix + sources[0]]
        return buffers

    def check(a: Any, b: Any) -> None:
        mine = [torch.arange(prefix + 16.0).view(1, 1, -1, 1).expand(1, 1, -1, 8).clone()]
        lens.fill_(prefix)
        ops.commit_(mine, lens, sources)
        assert mine[0][0, 0, prefix : prefix + 4, 0].tolist() == [prefix + s for s in sources[0].tolist()]

    compare(
        benchmark, ours, slices, check=check, group=f"commit_ 32 layers, prefix {prefix}",
        baseline="a slice copy of the moved rows per tensor",
    )  # fmt: skip


def bench_commit_against_gather(benchmark: BenchmarkFixture) -> None:
    prefix = 8192
    buffers = caches(prefix)
    lens = torch.tensor([prefix], dtype=torch.int32)
    sources = torch.tensor([[2]], dtype=torch.int32)
    kept = torch.cat([torch.arange(prefix), torch.tensor([prefix + 2])])

    def ours() -> list[Tensor]:
        lens.fill_(prefix)
        ops.commit_(buffers, lens, sources)
        return [buffer[:, :, : prefix + 1] for buffer in buffers]

    compare(
        benchmark,
        ours,
        lambda: [buffer.index_select(2, kept) for buffer in buffers],
        check=lambda a, b: None if a[0].shape == b[0].shape else pytest.fail("shapes differ"),
        group=f"commit_ 32 layers, prefix {prefix}, whole cache",
        rounds=5,
        baseline="index_select of what is kept, as caches that cannot move rows do",
    )
