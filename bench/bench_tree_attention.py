"""tree_attention against torch's scaled_dot_product_attention with a dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn.functional import scaled_dot_product_attention

from lbr_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prefix", [1024, 8192])
@pytest.mark.parametrize("nodes", [3, 12])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (14, 2)])
def bench_tree_attention(
    benchmark: BenchmarkFixture, q_heads: int, kv_heads: int, nodes: int, prefix: int, dtype: torch.dtype
) -> None:
    dim, slots = 64, prefix + 64
    query = torch.randn(1, q_heads, nodes, dim).to(dtype)
    keys, values = (torch.randn(1, kv_heads, slots, dim).to(dtype) for _ in range(2))
    lens = torch.tensor([prefix], dtype=torch.int32)
    ancestors = (1 << torch.arange(nodes)).view(1, nodes, 1)
    mask = torch.zeros(1, 1, nodes, slots, dtype=torch.bool)
    mask[..., :prefix] = True
    mask[..., prefix : prefix + nodes] = torch.eye(nodes, dtype=torch.bool)

    def check(ours: Any, plain: Any) -> None:
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)

    compare(
        benchmark,
        lambda: ops.tree_attention(query, keys, values, lens, ancestors),
        lambda: scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True),
        group=f"tree_attention {q_heads}/{kv_heads} heads, {nodes} nodes, prefix {prefix}, {dtype}",
        check=check,
        baseline="scaled_dot_product_attention, dense mask, enable_gqa",
    )
