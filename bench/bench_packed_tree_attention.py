"""packed_tree_attention, forward and backward, against SDPA with a dense mask and compiled FlexAttention.

The trees are trajectories: a prompt, then K children at every step, of which one goes on; with L = 2 the others have K
children of their own, so that a third or a ninth of the nodes lies on the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch._inductor.config
from compare import Cost, Work, compare
from gpu_packed import trajectory
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lbr_kernels import ops

# FlexAttention is compiled here and now: workers in the background would disturb what is timed.
torch._inductor.config.compile_threads = 1

WIDTH, PROMPT = 3, 64
HEADS = [("14/2", 64), ("8/8", 32), ("8/8", 64), ("8/8", 128)]
QUICK = ("8/8", 32, 1, 1536, torch.float32)


def prompted(nodes: int, depth: int) -> Tensor:
    """Subtree ends, int32 ``[1, about nodes]``, of a trajectory behind a prompt."""
    ends = trajectory((nodes - PROMPT) // WIDTH**depth, WIDTH, depth) + PROMPT
    return torch.cat([torch.full((PROMPT,), int(ends.max())), ends])[None].int()


@pytest.mark.parametrize(
    ("heads", "dim", "depth", "nodes", "dtype"),
    [
        pytest.param(*case, id="-".join(map(str, case)).replace("/", "-"), marks=[pytest.mark.quick] * (case == QUICK))
        for case in (
            *((*shape, depth, 1536, torch.float32) for shape, depth in product(HEADS, (1, 2))),
            *(("8/8", 64, depth, 1536, torch.bfloat16) for depth in (1, 2)),
            *(("8/8", 64, 1, nodes, torch.float32) for nodes in (384, 768, 3072)),
        )
    ],
)
def bench_packed_tree_attention(
    benchmark: BenchmarkFixture,
    meter: Meter,
    request: pytest.FixtureRequest,
    heads: str,
    dim: int,
    depth: int,
    nodes: int,
    dtype: torch.dtype,
) -> None:
    q_heads, kv_heads = map(int, heads.split("/"))
    ends = prompted(nodes, depth)
    nodes = ends.shape[1]
    query, key, value = (
        torch.randn(1, count, nodes, dim).to(dtype).requires_grad_() for count in (q_heads, kv_heads, kv_heads)
    )
    grad = torch.randn(1, q_heads, nodes, dim).to(dtype)
    node = torch.arange(nodes)
    mask = (node <= node[:, None]) & (node[:, None] < ends[0])

    def both(attend: Callable[[], Any]) -> Work:
        def work() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                out = attend()
                return (out, *torch.autograd.grad(out, (query, key, value), grad))

        return work

    def dense() -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, enable_gqa=q_heads != kv_heads)

    others = {"SDPA, boolean mask": both(dense)}
    if not request.config.getoption("--quick"):
        block_mask = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, nodes, nodes, device="cpu")
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=False)
        try:  # on CPUs it has a forward pass; where it has no backward pass either, the comparison is left out
            work = both(lambda: flex(query, key, value, block_mask=block_mask, enable_gqa=q_heads != kv_heads))
            work()
            others["FlexAttention, compiled"] = work
        except (NotImplementedError, RuntimeError):
            pass
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2

    def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            largest = float(other.abs().max())
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * max(1.0, largest))

    elements = nodes * dim * (4 * q_heads + 4 * kv_heads) * dtype.itemsize
    compare(
        benchmark,
        both(lambda: ops.packed_tree_attention(query, key, value, ends)),
        others,
        op="packed_tree_attention",
        shape={"heads": heads, "head size": dim, "L": depth, "nodes": nodes},
        dtype=dtype,
        check=check,
        cost=Cost(elements, 2 * 7 * q_heads * int(mask.sum()) * dim),
        meter=meter,
        rounds=9,
    )
