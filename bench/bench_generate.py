"""generate against model.generate, and against itself at width 1: milliseconds per committed token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import compare
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lbr_kernels import Router, generate

PROMPT, NEW = 256, 24


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random-weight Qwen2 of 236 M parameters: the time does not depend on what it says."""
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (3, 1), (3, 2)])
def bench_generate(
    benchmark: BenchmarkFixture, model: PreTrainedModel, width: int, depth: int, dtype: torch.dtype
) -> None:
    model.to(dtype)
    ids = torch.randint(32_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    router = Router.for_model(model, depth=depth)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "top_k": 50, "top_p": 0.95}

    def check(ours: Any, plain: Any) -> None:
        assert ours.shape == plain.shape == (1, PROMPT + NEW)
        greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        if dtype == torch.float32:
            assert torch.equal(generate(model, ids, width=1, **greedy), model.generate(ids, **greedy))

    compare(
        benchmark,
        lambda: generate(model, ids, width=width, depth=depth, router=router, **settings),
        lambda: model.generate(ids, **settings),
        check=check,
        group=f"generate, 236 M parameters, K={width}, L={depth}, {dtype}",
        rounds=5,
        baseline="model.generate, sampling",
        parameters=model.num_parameters(),
        tokens=NEW,
    )
