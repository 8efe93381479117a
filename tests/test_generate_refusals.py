"""What generate() refuses, and how it leaves a model: after an error, an interrupt, or beside other threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from models import tiny_llama, tiny_model
from test_generate import IDS, SAMPLED
from test_invariants import seeded, trained_looking_router
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    StoppingCriteria,
    T5Config,
)
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import Router, UnsupportedModelError, check_model, generate
from lbr_kernels.decoding import adapter
from lbr_kernels.decoding.cache import CACHE_NAME

NAN, INF = float("nan"), float("inf")


# --- what it refuses ------------------------------------------------------------------------------------------------

REFUSED = [
    ({"num_beams": 3}, ValueError, "num_beams is 3, which a tree cannot honour; expected None or 1"),
    ({"assistant_model": tiny_llama()}, ValueError, "is a LlamaForCausalLM, which a tree cannot honour"),
    ({"prompt_lookup_num_tokens": 3}, ValueError, "prompt_lookup_num_tokens is 3"),
    ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "penalty_alpha is 0.6"),
    ({"guidance_scale": 1.5}, ValueError, "guidance_scale is 1.5"),
    ({"use_cache": False}, ValueError, "use_cache is False, which a tree cannot honour; expected None or True"),
    ({"cache_implementation": "static"}, ValueError, "cache_implementation is 'static'"),
    ({"output_attentions": True}, ValueError, "output_attentions is True"),
    ({"synced_gpus": True}, ValueError, "synced_gpus is True"),
    ({"custom_generate": "a/b"}, ValueError, "custom_generate is 'a/b'"),
    ({"generation_config": GenerationConfig(num_beams=2)}, ValueError, "num_beams is 2"),
    ({"width": 0}, ValueError, "width is 0, expected an integer >= 1"),
    ({"width": 2.5}, ValueError, "width is 2.5, expected an integer >= 1"),
    ({"depth": -1}, ValueError, "depth is -1, expected an integer >= 1"),
    ({"router_temperature": 0.0}, ValueError, "router_temperature is 0.0, expected a finite number > 0"),
    ({"candidate_min_p": 2.0}, ValueError, "candidate_min_p is 2.0, expected 0 <= candidate_min_p <= 1"),
    ({"backend": "gpu"}, RuntimeError, "backend 'gpu' cannot run: there is no such backend, known are reference"),
    ({"streams": "ab"}, ValueError, "streams is 'ab', expected 2 integers: one per row"),
    ({"streams": [1, None]}, ValueError, r"streams is \[1, None\], expected 2 integers: one per row"),
    ({"streams": [1, 2, 3]}, ValueError, r"streams has shape \[3\], expected \[2\]: one per row"),
    ({"temprature": 0.5}, TypeError, "unknown argument 'temprature'; did you mean 'temperature'?"),
    ({"widht": 3}, TypeError, "unknown argument 'widht'; did you mean 'width'?"),
    ({"zzz": 3}, TypeError, "unknown argument 'zzz'$"),
    ({"token_type_ids": torch.zeros(2, 4)}, (TypeError, ValueError), "token_type_ids"),
    ({"position_ids": torch.zeros(3, 2, 4, dtype=torch.int64)}, ValueError, r"position_ids has shape \[3, 2, 4\]"),
    ({"width": 1000, "depth": 5}, ValueError, "width 1000 and depth 5 make a tree of more than 1048576 nodes"),
    ({"width": 2, "depth": 10**9}, ValueError, "width 2 and depth 1000000000 make a tree of more than 1048576 nodes"),
    ({"trie": "yes"}, ValueError, "trie is 'yes', expected True, False or None"),
    ({"router_do_sample": 1}, ValueError, "router_do_sample is 1, expected True, False or None"),
    ({"config": {"width": 2}}, TypeError, "config is a dict, expected a LBRConfig or None"),
    ({"generator": 3}, TypeError, "generator is a int, expected a Generator or None"),
    ({"on_step": 3}, TypeError, "on_step is a int, expected a callable or None"),
    ({"streams": [0.5, 1.5], **SAMPLED}, ValueError, r"streams has dtype torch\.float32, expected integers"),
    ({"num_return_sequences": -1}, ValueError, "num_return_sequences is -1, expected an integer >= 1"),
    ({"attention_mask": torch.ones(2, 3)}, ValueError, r"has shape \[2, 3\], expected the prompts' \[2, 4\]"),
    ({"attention_mask": torch.ones(2, 7)}, ValueError, r"has shape \[2, 7\], expected the prompts' \[2, 4\]"),
    ({"attention_mask": torch.ones(3, 4)}, ValueError, r"has shape \[3, 4\], expected the prompts' \[2, 4\]"),
    ({"router": lambda h, v: None}, TypeError, r"router returned a NoneType, expected a tensor \[B, K\]"),
    ({"router": "./no/such/router"}, FileNotFoundError, "./no/such/router is neither a directory nor a Hub id"),
    ({"router": 3}, TypeError, "router is a int, expected a Router, a path or Hub id, a callable or None"),
    (
        {"router": lambda hidden, valid: torch.zeros(2)},
        ValueError,
        r"router returned shape \[2\], expected \[B, K\] = \[2, 3\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_refused(llama, arguments, kind, message):
    with pytest.raises(kind, match=message):
        generate(llama, IDS, max_new_tokens=3, **arguments)


def test_a_router_for_something_else_is_refused(llama):
    with pytest.raises(ValueError, match="router was made for hidden size 64, this call has hidden size 32"):
        generate(llama, IDS, router=Router.for_model(tiny_llama(hidden_size=64)), max_new_tokens=3)
    with pytest.raises(ValueError, match="router was made for depth 2, this call has depth 1"):
        generate(llama, IDS, router=Router.for_model(llama, depth=2), max_new_tokens=3)


SHORT = {"family": "gpt2", "n_positions": 4}
CACHE_LEFT_ALONE = [
    ({}, DynamicCache, {"router": lambda: Router.for_model(tiny_llama(), depth=2)}, "router was made for depth 2"),
    ({}, DynamicCache, {"streams": lambda: [1, 2, 3]}, "streams has shape"),
    ({}, lambda: StaticCache(tiny_llama().config, 20), {}, f"^generate: {CACHE_NAME} is a StaticCache, which a tree"),
    (SHORT, DynamicCache, {}, "a prompt ends at position 3, expected less than the model's last position, 3"),
    (SHORT, DynamicCache, {"attention_mask": lambda: MASK}, "a prompt ends at position 3, expected less"),
    (SHORT, DynamicCache, {"position_ids": lambda: torch.arange(3, 7)[None]}, "a prompt ends at position 6, expected"),
    (SHORT, lambda: half_read(tiny_model("gpt2")), {}, "a prompt ends at position 3, expected less"),
]  # fmt: skip
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def half_read(model) -> DynamicCache:
    """A cache that holds the first two tokens of each prompt."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS[:, :2], use_cache=True, **{CACHE_NAME: cache})
    return cache


@pytest.mark.parametrize(("family", "cache", "wrong", "message"), CACHE_LEFT_ALONE)
def test_a_refusal_leaves_the_callers_cache_alone(llama, family, cache, wrong, message):
    model, given = tiny_model(**family) if family else llama, cache()
    before = int(given.get_seq_length())
    with pytest.raises(ValueError, match=message):
        generate(model, IDS, past_key_values=given, max_new_tokens=3, **{name: of() for name, of in wrong.items()})
    assert given.get_seq_length() == before


def test_models_that_hold_no_tree_are_refused():
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder model"):
        generate(t5, IDS)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        generate(mamba, IDS)
    with pytest.raises(TypeError, match="model is a LlamaModel, which generates no text; AutoModelForCausalLM loads"):
        generate(tiny_llama().model, IDS, max_new_tokens=3)
    with pytest.raises(TypeError, match="model is a Linear, expected a transformers PreTrainedModel"):
        generate(torch.nn.Linear(2, 2), IDS)


class Poisons(LogitsProcessor):
    def __init__(self, value: float, *, everywhere: bool) -> None:
        self.value, self.everywhere = value, everywhere

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 6:
            scores[1, slice(None) if self.everywhere else 3] = self.value
        return scores


@pytest.mark.parametrize("scores", [[NAN, NAN, NAN], [NAN, 1.0, 1.0], [-INF, -INF, -INF], [INF, 0.0, 0.0]], ids=str)
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_router_that_decides_nothing_is_refused(llama, scores, do_sample):
    with pytest.raises(ValueError, match=r"generate: router returned the scores .* for row 0, expected numbers below"):
        generate(
            llama, IDS, router=lambda h, v: torch.tensor(scores).expand(len(h), 3), max_new_tokens=4,
            do_sample=do_sample, candidate_min_p=0.0,
        )  # fmt: skip


def test_a_broken_router_is_refused(llama):
    router = trained_looking_router(llama, 1)
    with torch.no_grad():
        router.cls[0] = NAN
    for backend in (None, "reference"):
        with pytest.raises(RuntimeError, match="route: hidden row 0 has a score that is not finite"):
            generate(llama, IDS, router=router, max_new_tokens=4, backend=backend, **SAMPLED)


def test_checkpointing_in_training_is_refused():
    model = tiny_llama(seed=8).train()
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="in training mode with gradient checkpointing"):
        generate(model, IDS, max_new_tokens=2)
    assert generate(model.eval(), IDS, max_new_tokens=2).shape == (2, 6)


@pytest.mark.parametrize("do_sample", [True, False])
def test_impossible_distributions_are_refused(llama, do_sample):
    with pytest.raises(RuntimeError, match="logits row 1 holds NaN"):
        generate(
            llama, IDS, max_new_tokens=9, do_sample=do_sample, logits_processor=[Poisons(torch.nan, everywhere=False)]
        )
    with pytest.raises(RuntimeError, match="logits row 1 is -inf everywhere"):
        generate(
            llama, IDS, max_new_tokens=9, do_sample=do_sample, logits_processor=[Poisons(-torch.inf, everywhere=True)]
        )


def test_a_prompt_past_the_last_position_is_refused():
    model = tiny_model("gpt2", n_positions=16)
    with pytest.raises(
        ValueError, match="a prompt ends at position 15, expected less than the model's last position, 15"
    ):
        generate(model, torch.ones(1, 16, dtype=torch.int64), max_new_tokens=3)


# --- how it leaves the model ----------------------------------------------------------------------------------------


def fingerprint_of(model) -> tuple:
    hooks = [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    return hooks, model.config._attn_implementation, model.training, model.generation_config.to_dict()


class RaisesAt(StoppingCriteria):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if input_ids.shape[1] == 8:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_no_prompt_is_refused(llama):
    for empty in (IDS[:, :0], IDS[:0]):
        with pytest.raises(ValueError, match=r"input_ids has shape .*, expected at least one row and one token"):
            generate(llama, empty, max_new_tokens=3)
    for strange in (IDS[0], IDS.float()):
        with pytest.raises(ValueError, match=r"input_ids has shape .* and dtype .*, expected integers \[B, P\]"):
            generate(llama, strange, max_new_tokens=3)
    with pytest.raises(TypeError, match=r"input_ids is a list, expected an integer tensor \[B, P\]"):
        generate(llama, [[1, 2]], max_new_tokens=3)


def test_texts_that_reach_the_last_position_are_announced():
    model = tiny_model("gpt2", n_positions=12)
    with pytest.warns(UserWarning, match="20 new tokens go past the model's last position, 11; texts end there"):
        assert generate(model, IDS, max_new_tokens=20, **SAMPLED).shape[1] == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, IDS, max_new_tokens=8, **SAMPLED).shape == (2, 12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_as_it_was(llama, error):
    before = fingerprint_of(llama)
    want = llama.generate(IDS, max_new_tokens=9, do_sample=False)
    with pytest.raises(error):
        generate(llama, IDS, depth=2, max_new_tokens=30, stopping_criteria=[RaisesAt(error)], **SAMPLED)
    assert fingerprint_of(llama) == before
    assert torch.equal(llama.generate(IDS, max_new_tokens=9, do_sample=False), want)
    assert torch.equal(generate(llama, IDS, width=1, max_new_tokens=9, do_sample=False), want)


def test_an_interrupt_inside_a_layer(llama):
    """The hardest place: in the middle of a forward of the tree."""
    before = fingerprint_of(llama)
    calls = 0

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt

    handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(llama, IDS, max_new_tokens=30, **SAMPLED)
    handle.remove()
    assert fingerprint_of(llama) == before
    generate(llama, IDS, max_new_tokens=3, **SAMPLED)


def run_threads(*functions: Callable[[], object]) -> list[object]:
    results: list[object] = [None] * len(functions)

    def run(index: int, function: Callable[[], object]) -> None:
        results[index] = function()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_model(llama):
    """Two calls of generate and plain forwards at the same time: each gets what it gets alone."""
    alone = [generate(llama, IDS, depth=2, max_new_tokens=25, generator=seeded(s), **SAMPLED) for s in (0, 1)]
    with torch.no_grad():
        logits = llama(input_ids=IDS).logits

    def plain() -> Tensor:
        with torch.no_grad():
            return torch.stack([llama(input_ids=IDS).logits for _ in range(60)])

    first, second, third = run_threads(
        lambda: generate(llama, IDS, depth=2, max_new_tokens=25, generator=seeded(0), **SAMPLED),
        lambda: generate(llama, IDS, depth=2, max_new_tokens=25, generator=seeded(1), **SAMPLED),
        plain,
    )
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])
    torch.testing.assert_close(third, logits.expand(60, -1, -1, -1))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "llama"])
def test_forwards_beside_a_tree_are_the_models_own(family):
    """Criteria, streamers, routers, observers and other threads may use the model: sinks and soft-caps are theirs."""
    model = tiny_model(family, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, 2.0)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    seen: dict[str, list[Tensor]] = {}

    def look(who: str) -> None:
        with torch.no_grad():
            seen.setdefault(who, []).append(model(input_ids=IDS).logits)

    class Looks(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            look("criterion")
            generate(model, IDS[:1], width=2, max_new_tokens=2, **SAMPLED)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    class Shows(BaseStreamer):
        def put(self, value: Tensor) -> None:
            look("streamer")

        def end(self) -> None: ...

    def router(hidden: Tensor, valid: Tensor) -> Tensor:
        look("router")
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
        return hidden[:, :3, 0]

    def observe(step: object) -> None:
        look("observer")

    prompt = {"inputs": IDS[:1], "max_new_tokens": 4, "depth": 2}
    alone = generate(model, **prompt, router=lambda h, v: h[:, :3, 0], generator=seeded(0), **SAMPLED)
    got = generate(
        model, **prompt, router=router, generator=seeded(0), on_step=observe, streamer=Shows(),
        stopping_criteria=[Looks()], **SAMPLED,
    )  # fmt: skip
    assert torch.equal(got, alone)
    assert set(seen) == {"criterion", "streamer", "router", "thread", "observer"}
    for who, logits in seen.items():
        for one in logits:
            assert torch.equal(one, want), who


def test_two_models_with_one_config():
    """What is set on a config for one of them is not taken for the other's, nor left behind."""
    first = tiny_llama(seed=7)
    second = type(first)(first.config).eval()
    models = (first, second)
    alone = [generate(m, IDS, depth=2, max_new_tokens=20, generator=seeded(0), **SAMPLED) for m in models]
    for _ in range(3):
        got = run_threads(
            *(lambda m=m: generate(m, IDS, depth=2, max_new_tokens=20, generator=seeded(0), **SAMPLED) for m in models)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
        assert first.config._attn_implementation == "sdpa"


def test_training_mode_is_kept():
    model = tiny_llama(attention_dropout=0.0).train()
    assert check_model(model).reason is None
    assert model.training


def test_the_check_runs_once(llama, monkeypatch):
    check_model(llama)
    monkeypatch.setattr(adapter, "_check", lambda model: pytest.fail("checked again"))
    generate(llama, IDS, max_new_tokens=2, **SAMPLED)
