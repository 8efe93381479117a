"""The whole step: generate against model.generate, and against naive branch routing; K = 1 is a shape like others.

All sides decode the same number of tokens behind the same prompt. What reading the prompt takes is measured apart and
taken off, so a record's ``milliseconds_per_token`` is the time of a decoding step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Work, compare, seconds
from naive_lbr import NaiveDecoder
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LogitsProcessorList, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, TopKLogitsWarper

from lbr_kernels import Router, generate
from lbr_kernels.decoding.generate import LBRGenerateOutput

PROMPT = 256
TOP_K = 50  # the default of model.generate
NAIVE = [(3, 1), (3, 2)]
QUICK = [(3, 1)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random-weight Qwen2 of 246 M parameters: the time does not depend on what it says."""
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("width", "depth"),
    [
        pytest.param(*shape, marks=[pytest.mark.quick] if shape in QUICK else [])
        for shape in [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)]
    ],
)
def bench_generate(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    model: PreTrainedModel,
    width: int,
    depth: int,
    dtype: torch.dtype,
) -> None:
    quick = request.config.getoption("--quick")
    new, rounds, readings = (8, 2, 1) if quick else (16, 3, 2)
    model.to(dtype)
    ids = torch.randint(32_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    router = Router.for_model(model, depth=depth)
    settings: dict[str, Any] = {"do_sample": True, "top_k": TOP_K}

    def ours(count: int) -> LBRGenerateOutput:
        out = generate(
            model, ids, width=width, depth=depth, router=router, max_new_tokens=count, return_dict_in_generate=True,
            **settings,
        )  # fmt: skip
        assert isinstance(out, LBRGenerateOutput)
        return out

    naive = NaiveDecoder(
        model, router, width=width, depth=depth, warpers=LogitsProcessorList([TopKLogitsWarper(TOP_K)])
    )
    sides: dict[str, Callable[[int], Any]] = {
        "model.generate": lambda n: model.generate(ids, max_new_tokens=n, **settings)
    }
    if (width, depth) in NAIVE:
        sides["naive LBR"] = lambda n: naive(ids, n)

    if dtype == torch.float32:
        greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(generate(model, ids, width=1, **greedy), model.generate(ids, **greedy))
        if (width, depth) in NAIVE:
            torch.nn.init.normal_(router.score.weight)  # type: ignore[arg-type]
            naive.do_sample = False
            mine = generate(model, ids, width=width, depth=depth, router=router, candidate_min_p=0.0, **greedy)
            assert torch.equal(naive(ids, 6), mine)
            naive.do_sample = True

    def check(a: LBRGenerateOutput, b: Any) -> None:
        assert a.sequences.shape[1] == b.shape[1] == PROMPT + new + 1

    def run(side: Callable[[int], Any], count: int) -> Work:
        return lambda: side(count)

    compare(
        benchmark,
        run(ours, new + 1),
        {name: run(side, new + 1) for name, side in sides.items()},
        op="generate",
        shape={"parameters": model.num_parameters(), "prompt": PROMPT, "K": width, "L": depth},
        dtype=dtype,
        check=check,
        rounds=rounds,
        tokens=new,
    )
    if benchmark.disabled:
        return
    info = benchmark.extra_info
    prompt = {
        name: statistics.median(seconds(run(side, 1)) for _ in range(readings))
        for name, side in {"ours": ours, **sides}.items()
    }
    per_token = {name: 1e3 * (info["seconds"][name]["median"] - prompt[name]) / new for name in prompt}
    stats = ours(new).stats
    assert stats is not None
    info |= {
        "milliseconds_per_token": per_token,
        "times_per_token": {name: per_token[name] / per_token["ours"] for name in per_token if name != "ours"},
        "nodes_per_token": stats.nodes_per_token,
        "phases": {phase: 1e3 * spent / new for phase, spent in stats.seconds.items() if phase != "prefill"},
    }
