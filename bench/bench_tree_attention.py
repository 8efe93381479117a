"""tree_attention against PyTorch: scaled_dot_product_attention in all its forms, FlexAttention, and eager products.

Caches are cold, as in a model whose weights are read between two uses of a layer's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch._inductor.config
from compare import Cost, Work, compare, rotating
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lbr_kernels import ops

# FlexAttention is compiled here and now: workers in the background would disturb what is timed.
torch._inductor.config.compile_threads = 1

DTYPES = [torch.float32, torch.bfloat16]


def _case(heads: str, nodes: int, prefix: int, dim: int, dtype: torch.dtype, batch: int = 1, *, quick: bool) -> Any:
    name = f"{heads.replace('/', '-')}-n{nodes}-p{prefix}-d{dim}-b{batch}-{str(dtype)[6:]}"
    marks = [pytest.mark.quick] if quick else []
    return pytest.param(heads, nodes, prefix, dim, batch, dtype, id=name, marks=marks)


GRID = [
    _case(heads, nodes, prefix, dim, dtype, quick=prefix == 8192 and dim == 64 and nodes != 9)
    for heads, nodes, prefix, dim, dtype in product(["32/8", "14/2"], [3, 9, 12], [1024, 8192], [64, 128], DTYPES)
]
SWEEPS = [
    *(_case("32/8", 3, prefix, 64, dtype, quick=False) for prefix in (256, 4096, 16384, 32768) for dtype in DTYPES),
    *(_case("32/8", nodes, 8192, 64, dtype, quick=False) for nodes in (1, 6, 27, 39) for dtype in DTYPES),
    *(_case("32/8", 3, 2048, 64, dtype, batch, quick=False) for batch in (1, 2, 4, 8) for dtype in DTYPES),
]
# Compiling takes seconds for each shape.
FLEX = [(heads, nodes, 8192, 64, 1) for heads, nodes in product(["32/8", "14/2"], [3, 9, 12])]


@pytest.mark.parametrize(("heads", "nodes", "prefix", "dim", "batch", "dtype"), [*GRID, *SWEEPS])
def bench_tree_attention(
    benchmark: BenchmarkFixture,
    meter: Meter,
    request: pytest.FixtureRequest,
    heads: str,
    nodes: int,
    prefix: int,
    dim: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    q_heads, kv_heads = map(int, heads.split("/"))
    slots = prefix + nodes
    query = torch.randn(batch, q_heads, nodes, dim).to(dtype)

    def part() -> Tensor:
        return torch.randn(batch, kv_heads, slots, dim).to(dtype)

    bytes_read = 2 * batch * kv_heads * slots * dim * dtype.itemsize
    caches = rotating(lambda: (part(), part()), bytes_read)
    group = q_heads // kv_heads

    def wide(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)

    expanded = rotating(lambda: wide(part(), part()), group * bytes_read, most=8)
    lens = torch.full((batch,), prefix, dtype=torch.int32)
    ancestors = (1 << torch.arange(nodes)).view(1, nodes, 1)
    mask = torch.zeros(nodes, slots, dtype=torch.bool)
    mask[:, :prefix] = True
    mask[:, prefix:] = torch.eye(nodes, dtype=torch.bool)
    bias = torch.where(mask, 0.0, -torch.inf).to(dtype)

    def eager(keys: Tensor, values: Tensor) -> Tensor:
        grouped = query.view(batch, kv_heads, group, nodes, dim)
        scores = grouped @ keys.unsqueeze(2).mT * dim**-0.5 + bias
        out: Tensor = scores.softmax(-1) @ values.unsqueeze(2)
        return out.flatten(1, 2)

    # First what leaves the caches full of things to write back, so that it does not disturb the one after it.
    others: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": eager,
        "SDPA, boolean mask, enable_gqa": lambda k, v: scaled_dot_product_attention(query, k, v, mask, enable_gqa=True),
        "SDPA, float mask, enable_gqa": lambda k, v: scaled_dot_product_attention(query, k, v, bias, enable_gqa=True),
    }
    if (heads, nodes, prefix, dim, batch) in FLEX and not request.config.getoption("--quick"):
        block_mask = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, nodes, slots, device="cpu")
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=False)
        others["FlexAttention, compiled"] = lambda k, v: flex(query, k, v, block_mask=block_mask, enable_gqa=True)

    def ours(keys: Tensor, values: Tensor) -> Tensor:
        out = ops.tree_attention(query, keys, values, lens, ancestors)
        assert isinstance(out, Tensor)
        return out

    def on_wide(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, keys, values, bias)

    def on(side: Callable[[Tensor, Tensor], Tensor], copies: Callable[[], tuple[Tensor, Tensor]]) -> Work:
        return lambda: side(*copies())

    # What is checked reads one cache, what is timed the next one in turn.
    keys, values = caches()
    want, tolerance = ours(keys, values), 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, other in others.items():
        torch.testing.assert_close(want, other(keys, values), rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(want, on_wide(*wide(keys, values)), rtol=0, atol=tolerance)
    sides = {name: on(other, caches) for name, other in others.items()}
    compare(
        benchmark,
        on(ours, caches),
        {**sides, "SDPA, float mask, expanded": on(on_wide, expanded)},
        op="tree_attention",
        shape={"batch": batch, "heads": heads, "nodes": nodes, "prefix": prefix, "head size": dim},
        dtype=dtype,
        check=lambda a, b: None if a.shape == b.shape else pytest.fail("shapes differ"),
        cost=Cost(bytes_read, 4 * batch * q_heads * nodes * slots * dim),
        meter=meter,
        rounds=9,
        cold=True,
    )
