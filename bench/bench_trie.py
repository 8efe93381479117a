"""The trie on the demo's trained model: each distinct path forwarded once, against the full tree, same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture

from lbr_kernels import generate
from lbr_kernels.decoding.generate import LBRGenerateOutput
from lbr_kernels.evaluation.demo import BATCH, Demo
from lbr_kernels.evaluation.reachability import evaluation_problems


@pytest.mark.parametrize("rows", [1, pytest.param(BATCH, marks=pytest.mark.quick)])
@pytest.mark.parametrize(("width", "depth"), [(3, 1), (3, 2)])
def bench_trie(benchmark: BenchmarkFixture, rows: int, width: int, depth: int) -> None:
    demo = Demo()
    hops = range(1, demo.options.max_hops + 1)
    prompts = demo.prompts(evaluation_problems(demo.options, BATCH, hops=hops, seed=0)[:rows])
    router = demo.routers[depth]

    def decode(trie: bool) -> LBRGenerateOutput:
        out = generate(
            demo.model, prompts, width=width, depth=depth, router=router, trie=trie, do_sample=True, top_k=0,
            generator=torch.Generator().manual_seed(0), return_dict_in_generate=True,
        )  # fmt: skip
        assert isinstance(out, LBRGenerateOutput)
        return out

    def check(a: Any, b: Any) -> None:
        assert torch.equal(a.sequences, b.sequences)

    compare(
        benchmark,
        lambda: decode(True),
        {"the full tree": lambda: decode(False)},
        op="trie",
        shape={"rows": rows, "K": width, "L": depth},
        dtype=torch.float32,
        check=check,
        rounds=7,
        nodes_per_token={str(trie): decode(trie).stats.nodes_per_token for trie in (True, False)},  # type: ignore[union-attr]
    )
