"""sample_children against transformers' warpers and torch.multinomial; logits come fresh from the head, so warm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import Cost, compare
from pytest_benchmark.fixture import BenchmarkFixture
from roof import Meter
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lbr_kernels import ops

VOCABULARY, WIDTH = 151_936, 3
FILTERS: dict[str, dict[str, Any]] = {
    "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
    "temperature 0.6, top-p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top-p 0.95": {"top_p": 0.95},
    "none": {},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", FILTERS)
def bench_sample_children(benchmark: BenchmarkFixture, meter: Meter, name: str) -> None:
    filters = FILTERS[name]
    logits = torch.randn(1, VOCABULARY) * 2.5
    uniforms = torch.rand(1, WIDTH, dtype=torch.float64)
    kinds = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    warpers = LogitsProcessorList([kinds[key](value) for key, value in filters.items()])
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def plain() -> torch.Tensor:
        probabilities = warpers(ids, logits).softmax(-1)
        return torch.multinomial(probabilities, WIDTH, replacement=True)

    def check(ours: Any, drawn: Any) -> None:
        want = warpers(ids, logits).log_softmax(-1)
        torch.testing.assert_close(ours[1], want.gather(1, ours[0]), rtol=1e-5, atol=1e-5)

    compare(
        benchmark,
        lambda: ops.sample_children(logits, uniforms, **filters),
        {"transformers' warpers, softmax, multinomial": plain},
        op="sample_children",
        shape={"vocabulary": VOCABULARY, "width": WIDTH, "filters": name},
        dtype=torch.float32,
        check=check,
        cost=Cost(4 * VOCABULARY, 0),
        meter=meter,
        rounds=21,
    )
