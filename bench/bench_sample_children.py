"""sample_children against transformers' warpers and torch.multinomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from lbr_kernels import ops

FILTERS = {"no filter": {}, "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95}, "top-p 0.95": {"top_p": 0.95}}


@pytest.mark.parametrize("name", FILTERS)
def bench_sample_children(benchmark: BenchmarkFixture, name: str) -> None:
    filters: dict[str, Any] = FILTERS[name]
    logits = torch.randn(1, 151_936) * 2.5
    uniforms = torch.rand(1, 3, dtype=torch.float64)
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    warpers = LogitsProcessorList([kinds[key](value) for key, value in filters.items()])
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def plain() -> torch.Tensor:
        probabilities = warpers(ids, logits).softmax(-1)
        return torch.multinomial(probabilities, 3, replacement=True)

    def check(ours: Any, drawn: Any) -> None:
        want = warpers(ids, logits).log_softmax(-1)
        torch.testing.assert_close(ours[1], want.gather(1, ours[0]), rtol=1e-5, atol=1e-5)

    compare(
        benchmark,
        lambda: ops.sample_children(logits, uniforms, **filters),
        plain,
        check=check,
        group=f"sample_children V=151936, K=3, {name}",
        baseline="transformers' warpers, softmax, multinomial",
    )
