"""commit_ against slice copies of the moved rows, and against gathering what is kept, as transformers' caches do.

The slots are cold, as those of a model whose weights were read since.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch
from compare import Cost, compare
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter
from torch import Tensor

from lbr_kernels import ops

LAYERS, HEADS, DIM = 32, 8, 64
# The winner alone (K=3, L=1), and the winner with its three children (K=3, L=2).
SOURCES = {1: [2], 2: [2, 9, 10, 11]}


@pytest.mark.parametrize("prefix", [pytest.param(1024), pytest.param(8192, marks=pytest.mark.quick), 16384])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stored", ["one tensor", "a tensor per layer"])
def bench_commit_against_slices(
    benchmark: BenchmarkFixture, meter: Meter, prefix: int, depth: int, stored: str
) -> None:
    """``one tensor`` is how ``TreeCache`` keeps layers of one shape: heads side by side."""
    sources = torch.tensor([SOURCES[depth]], dtype=torch.int32)
    moved, nodes = sources.shape[1], 12
    # Each run commits behind another prefix, so that the slots it touches have left the caches.
    arena = torch.randn(1, 2 * LAYERS * HEADS, prefix + nodes, DIM)
    buffers = list(arena.split(HEADS, dim=1))
    given = [arena] if stored == "one tensor" else buffers
    lens = torch.zeros(1, dtype=torch.int32)
    turn = count()

    def next_prefix() -> int:
        # Steps of 16 slots from the end, for as long as there are any.
        return prefix - 16 * (next(turn) % (min(prefix, 1024) // 16))

    def ours() -> Tensor:
        lens.fill_(next_prefix())
        ops.commit_(given, lens, sources, advance=0)
        return arena

    def slices() -> Tensor:
        start = next_prefix()
        for buffer in buffers:
            if depth == 1:
                buffer[:, :, start] = buffer[:, :, start + 2]
            else:
                buffer[:, :, start : start + moved] = buffer[:, :, start + sources[0]]
        return arena

    before = arena.clone()
    ours()
    mine = arena.clone()
    arena.copy_(before)
    turn = count()
    slices()
    assert torch.equal(arena, mine)
    assert not torch.equal(arena, before)
    compare(
        benchmark,
        ours,
        {"a slice copy of the moved rows per tensor": slices},
        op="commit_",
        shape={"layers": LAYERS, "heads": HEADS, "head size": DIM, "prefix": prefix, "depth": depth, "stored": stored},
        dtype=torch.float32,
        check=lambda a, b: None if a is b else pytest.fail("another tensor"),
        cost=Cost(2 * LAYERS * HEADS * DIM * 4 * 2 * moved, 0),
        meter=meter,
        rounds=31,
        cold=True,
    )


@pytest.mark.quick
def bench_commit_against_gather(benchmark: BenchmarkFixture, meter: Meter) -> None:
    prefix = 8192
    arena = torch.randn(1, 2 * LAYERS * HEADS, prefix + 16, DIM)
    buffers = list(arena.split(HEADS, dim=1))
    lens = torch.tensor([prefix], dtype=torch.int32)
    sources = torch.tensor([[2]], dtype=torch.int32)
    index = torch.cat([torch.arange(prefix), torch.tensor([prefix + 2])])

    def ours() -> list[Tensor]:
        ops.commit_(buffers, lens, sources, advance=0)
        return [buffer[:, :, : prefix + 1] for buffer in buffers]

    def check(a: list[Tensor], b: list[Tensor]) -> None:
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    compare(
        benchmark,
        ours,
        {"index_select of what is kept": lambda: [buffer.index_select(2, index) for buffer in buffers]},
        op="commit_",
        shape={"layers": LAYERS, "heads": HEADS, "head size": DIM, "prefix": prefix, "depth": 1, "stored": "gathered"},
        dtype=torch.float32,
        check=check,
        cost=Cost(2 * LAYERS * HEADS * DIM * 4 * 2, 0),
        meter=meter,
        rounds=5,
        cold=True,  # the gathers in between leave nothing in the caches
    )
