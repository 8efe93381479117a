"""generate() as a drop-in for model.generate: what it takes, returns and refuses, and how it leaves a model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import tiny_llama, tiny_model
from oracle import decode_row
from test_invariants import padded, random_prompts, seeded, trained_looking_router
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    T5Config,
)
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import LBRConfig, LBRGenerateOutput, Router, UnsupportedModelError, check_model, generate
from lbr_kernels.decoding import adapter

NAN, INF = float("nan"), float("inf")
SAMPLED = {"do_sample": True, "top_k": 0}
IDS = torch.tensor([[7, 3, 9, 4], [1, 8, 8, 2]])


# --- what it takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_return_sequences_share_one_prefill(llama, depth):
    """Two texts for each prompt: those of the repeated prompts, from one forward of each prompt."""
    check_model(llama)
    shapes = []
    handle = llama.model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True
    )
    out = generate(llama, IDS, depth=depth, max_new_tokens=9, num_return_sequences=2, generator=seeded(1), **SAMPLED)
    handle.remove()
    assert shapes[0] == (2, 4)
    assert out.shape == (4, 13)
    repeated = IDS.repeat_interleave(2, 0)
    assert torch.equal(generate(llama, repeated, depth=depth, max_new_tokens=9, generator=seeded(1), **SAMPLED), out)


def test_seeds_and_generators(llama):
    first = generate(llama, IDS, max_new_tokens=12, generator=seeded(1), **SAMPLED)
    assert torch.equal(generate(llama, IDS, max_new_tokens=12, generator=seeded(1), **SAMPLED), first)
    assert not torch.equal(generate(llama, IDS, max_new_tokens=12, generator=seeded(2), **SAMPLED), first)
    torch.manual_seed(5)
    default = generate(llama, IDS, max_new_tokens=12, **SAMPLED)
    assert not torch.equal(generate(llama, IDS, max_new_tokens=12, **SAMPLED), default)
    torch.manual_seed(5)
    assert torch.equal(generate(llama, IDS, max_new_tokens=12, **SAMPLED), default)


def test_end_of_text_and_lengths(llama):
    """EOS lists end rows one by one, the rest is padding; max_length counts the prompt; min_new_tokens forbids EOS."""
    ends = {"eos_token_id": list(range(0, 53, 5)), "pad_token_id": 51}
    out = generate(llama, IDS, max_new_tokens=30, generator=seeded(0), **ends, **SAMPLED)
    for row in out[:, 4:].tolist():
        end = next((i for i, token in enumerate(row) if token % 5 == 0), len(row) - 1)
        assert set(row[end + 1 :]) <= {51}
    assert generate(llama, IDS, max_length=11, **SAMPLED).shape == (2, 11)
    longer = generate(llama, IDS, max_new_tokens=20, min_new_tokens=9, eos_token_id=list(range(0, 53, 2)), **SAMPLED)
    assert (longer[:, 4:12] % 2 == 1).all()


def test_generation_config_and_lbr_config(llama):
    want = generate(llama, IDS, width=2, depth=2, max_new_tokens=8, temperature=0.7, generator=seeded(3), **SAMPLED)
    config = GenerationConfig(max_new_tokens=8, temperature=0.7, pad_token_id=0, **SAMPLED)
    lbr = LBRConfig(width=2, depth=2)
    assert torch.equal(generate(llama, IDS, generation_config=config, config=lbr, generator=seeded(3)), want)
    with pytest.raises(ValueError, match="width is 3 and config says 2; give one"):
        generate(llama, IDS, width=3, config=lbr)


class SeesItsOwnIds(LogitsProcessor):
    """Forbids every token that already stands in the ids it is shown, and notes their lengths."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 2
        self.lengths.append(input_ids.shape[1])
        return scores.scatter(1, input_ids, -torch.inf)


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("do_sample", [True, False])
def test_processors_see_each_nodes_own_ids(llama, width, depth, do_sample):
    """No token twice, neither in the text nor along any path of any tree."""
    processor, trees = SeesItsOwnIds(), []
    out = generate(
        llama, IDS, width=width, depth=depth, max_new_tokens=12, do_sample=do_sample, top_k=0,
        router=trained_looking_router(llama, depth), logits_processor=[processor], generator=seeded(0),
        on_step=lambda step: trees.append(step.tokens),
    )  # fmt: skip
    for row in out.tolist():
        assert len(set(row[4:])) == 12
        assert not set(row[:4]) & set(row[4:])
    from lbr_kernels.ops.tree_shape import path_slots

    for step, tree in enumerate(trees):
        for path in path_slots(width, depth).flatten(0, 1):
            for row in range(2):
                tokens = [t for t in tree[row, path].tolist() if t >= 0]
                assert not set(tokens) & set(out[row, : 4 + step].tolist())
                assert len(set(tokens)) == len(tokens)
    assert set(processor.lengths) == set(range(4, 4 + 12))


def test_transformers_own_processors(llama):
    """Settings that become processors work at every node; K = 1 greedy is model.generate with them."""
    for settings in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [4, 5]]},
        {"suppress_tokens": [7, 8, 9]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [batch + 1, 2 * batch + 5, 40]},
        {"sequence_bias": {(9,): 5.0}},
        {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": 6},
        {"forced_eos_token_id": 6, "eos_token_id": 6},
    ):
        inputs = padded(random_prompts([4, 7]))
        want = llama.generate(**inputs, max_new_tokens=15, do_sample=False, **settings)
        got = generate(llama, **inputs, width=1, depth=2, max_new_tokens=15, do_sample=False, **settings)
        assert torch.equal(got, want), settings
        generate(llama, **inputs, width=3, depth=2, max_new_tokens=6, **SAMPLED, **settings)


def test_sampling_settings_reach_the_distribution(llama):
    """top_k=1 leaves nothing to draw; the default top_k of model.generate means the same here."""
    greedy = llama.generate(IDS, max_new_tokens=10, do_sample=False)
    assert torch.equal(generate(llama, IDS, max_new_tokens=10, do_sample=True, top_k=1), greedy)
    out = generate(
        llama, IDS, max_new_tokens=3, do_sample=True, temperature=0.9, top_p=0.8, return_dict_in_generate=True
    )
    assert out.trajectory.settings.filters == {"temperature": 0.9, "top_k": 50, "top_p": 0.8}


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_streamer(llama):
    streamer = Recorder()
    out = generate(llama, IDS[:1], max_new_tokens=7, streamer=streamer, generator=seeded(0), **SAMPLED)
    assert streamer.ended
    assert torch.equal(streamer.values[0], IDS[:1])
    assert torch.cat([value.view(-1) for value in streamer.values]).tolist() == out[0].tolist()


class StopsAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length
        self.calls: list[int] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        self.calls.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("depth", [1, 3])
def test_stopping_criteria_are_asked_once_per_token(llama, depth):
    criterion = StopsAt(10)
    out = generate(llama, IDS, width=2, depth=depth, max_new_tokens=50, stopping_criteria=[criterion], **SAMPLED)
    assert criterion.calls == list(range(5, 11))
    assert out.shape == (2, 10)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One letter per id."""
    vocabulary = {chr(97 + i): i for i in range(26)} | {f"<{i}>": i for i in range(26, 53)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<26>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class EndsAtToken(StoppingCriteria):
    """A row is done at the step at which it commits an odd token."""

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return input_ids[:, -1] % 2 == 1


def test_rows_without_an_end_token_are_done_one_by_one(llama):
    """As with model.generate: the call ends when each row has been done at some step, not all at the same one."""
    inputs = padded(random_prompts([4, 7, 2]))
    settings = {"max_new_tokens": 40, "stopping_criteria": [EndsAtToken()], "do_sample": False}
    want = llama.generate(**inputs, **settings)
    assert want.shape[1] < 47
    assert torch.equal(generate(llama, **inputs, width=1, **settings), want)


def test_stop_strings(llama):
    plain = generate(
        llama, IDS[:1], max_new_tokens=40, generator=seeded(4), suppress_tokens=list(range(26, 53)), **SAMPLED
    )
    letters = [chr(97 + i) for i in plain[0, 4:].tolist()]
    stop = "".join(letters[5:7])
    end = "".join(letters).index(stop) + 2
    for config in (
        {"stop_strings": [stop]},
        {"generation_config": GenerationConfig(stop_strings=[stop], pad_token_id=0)},
    ):
        out = generate(
            llama, IDS[:1], max_new_tokens=40, generator=seeded(4), suppress_tokens=list(range(26, 53)), **SAMPLED,
            tokenizer=letters_tokenizer(), **config,
        )  # fmt: skip
        assert out[0].tolist() == plain[0, : 4 + end].tolist()
    with pytest.raises(ValueError, match="stop_strings need the model's tokenizer"):
        generate(llama, IDS[:1], stop_strings=["a"])
    assert llama.generation_config.stop_strings is None


def test_prompts_as_embeddings(llama):
    embeds = llama.get_input_embeddings()(IDS).detach()
    want = generate(llama, IDS, depth=2, max_new_tokens=9, generator=seeded(0), **SAMPLED)
    out = generate(llama, inputs_embeds=embeds, depth=2, max_new_tokens=9, generator=seeded(0), **SAMPLED,
                   return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(out.sequences, want[:, 4:])
    assert torch.equal(out.trajectory.prompt_embeds, embeds)


def test_masks_of_any_shape(llama):
    """Padding on the right, or holes: the same tokens count, the text is the same, prompts come back as given."""
    inputs = {
        "input_ids": torch.tensor([[7, 0, 3, 9, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 0, 0]]),
    }
    want = generate(llama, IDS[:1], max_new_tokens=9, generator=seeded(0), **SAMPLED)
    out = generate(llama, **inputs, max_new_tokens=9, generator=seeded(0), **SAMPLED)
    assert out[0].tolist() == [7, 0, 3, 9, 4, 0, 0, *want[0, 4:].tolist()]


def test_right_padding_without_a_mask(llama):
    """model.generate infers the mask from the padding token; so it is here."""
    ids = torch.tensor([[7, 3, 9, 4, 0, 0], [7, 3, 9, 4, 1, 2]])
    out = generate(llama, ids, max_new_tokens=9, generator=seeded(0), **SAMPLED)
    want = generate(llama, ids[:1, :4], max_new_tokens=9, generator=seeded(0), **SAMPLED)
    assert out[0].tolist() == [*ids[0].tolist(), *want[0, 4:].tolist()]


@pytest.mark.parametrize("chunk", [3, 5])
def test_chunked_prefill(llama, chunk):
    inputs = padded(random_prompts([13, 9]))
    want = generate(llama, **inputs, max_new_tokens=9, generator=seeded(0), **SAMPLED)
    got = generate(llama, **inputs, max_new_tokens=9, generator=seeded(0), prefill_chunk_size=chunk, **SAMPLED)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_returned_cache_can_be_continued(family):
    """Five tokens and eleven more are sixteen, as with model.generate; the caller's own cache object holds the text."""
    model = tiny_model(family)
    prompt = torch.tensor(random_prompts([9])[:1])
    want = model.generate(prompt, max_new_tokens=16, do_sample=False)
    greedy = {"width": 2, "depth": 2, "do_sample": False, "return_dict_in_generate": True}
    first = generate(model, prompt, max_new_tokens=5, **greedy)
    assert first.past_key_values.get_seq_length() == 13
    second = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=11, **greedy)
    assert torch.equal(second.sequences, want)
    cache = DynamicCache(config=model.config)
    generate(model, prompt, max_new_tokens=5, past_key_values=cache, **greedy)
    assert cache.get_seq_length() == 13
    again = model.generate(first.sequences, past_key_values=cache, max_new_tokens=11, do_sample=False)
    assert torch.equal(again, want)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("sequences", [1, 2])
def test_the_callers_cache_holds_the_text(llama, return_dict, sequences):
    """Whatever is returned, and also if all prompts are padded: the next turn goes on from the caller's cache."""
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [0, 0, 0, 6, 9]]), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    cache = DynamicCache()
    out = generate(
        llama, ids, attention_mask=mask, past_key_values=cache, width=2, max_new_tokens=5, generator=seeded(0),
        num_return_sequences=sequences, return_dict_in_generate=return_dict, **SAMPLED,
    )  # fmt: skip
    text = out.sequences if return_dict else out
    assert cache.get_seq_length() == 9
    mask = torch.cat([mask.repeat_interleave(sequences, 0), torch.ones(2 * sequences, 5, dtype=torch.int64)], dim=1)
    fresh = llama.generate(text, attention_mask=mask, max_new_tokens=6, do_sample=False)
    again = llama.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, fresh)


def test_a_cache_needs_left_padding(llama):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match="past_key_values needs an attention_mask whose padding is on the left"):
        generate(llama, IDS, attention_mask=mask, past_key_values=DynamicCache(), max_new_tokens=2)


def test_returned_cache_of_a_ragged_batch(llama):
    """Column by column what model.generate leaves: padding in front, then prompt and text."""
    inputs = padded(random_prompts([9, 4]))
    mine = generate(llama, **inputs, width=1, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    theirs = llama.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    for a, b in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        torch.testing.assert_close(a.keys[0], b.keys[0])
        torch.testing.assert_close(a.values[1, :, 5:], b.values[1, :, 5:])
        assert (a.keys[1, :, :5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [1, 2])
def test_half_precision(dtype, depth):
    model = tiny_llama().to(dtype)
    out = generate(
        model, **padded(random_prompts([9, 4])), depth=depth, router=Router.for_model(model, depth=depth),
        max_new_tokens=12, generator=seeded(0), return_dict_in_generate=True, **SAMPLED,
    )  # fmt: skip
    assert out.sequences.shape == (2, 21)
    assert torch.isfinite(out.trajectory.node_log_probs).all()
    assert out.past_key_values.layers[0].keys.dtype == dtype


def test_wide_and_deep_trees(llama):
    """More than 64 nodes: masks of several words."""
    out = generate(llama, IDS[:1], width=4, depth=3, trie=False, max_new_tokens=6, generator=seeded(0), **SAMPLED)
    want = decode_row(
        llama, IDS[0].tolist(), width=4, depth=3, max_new_tokens=6, seed=int(seeded_value(0)), stream=0
    )  # fmt: skip
    assert out[0, 4:].tolist() == want.tokens


def seeded_value(seed: int) -> Tensor:
    """The 64-bit seed that a call draws from a generator."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=seeded(seed))


# --- what it returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 2), (2, 3)])
def test_scores_belong_to_the_committed_tokens(llama, width, depth):
    """Raw and processed logits of each committed token's position, as model.generate would give them."""
    out = generate(
        llama, IDS, width=width, depth=depth, max_new_tokens=7, do_sample=True, temperature=0.5, top_k=9,
        router=trained_looking_router(llama, depth), generator=seeded(0), return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = llama(input_ids=out.sequences).logits
    assert len(out.logits) == len(out.scores) == 7
    for step in range(7):
        torch.testing.assert_close(out.logits[step], logits[:, 3 + step], rtol=1e-4, atol=1e-4)
        assert ((out.scores[step] > -torch.inf).sum(1) == 9).all()
        chosen = out.scores[step].gather(1, out.sequences[:, 4 + step, None])
        assert torch.isfinite(chosen).all()


def test_output_and_stats(llama):
    out = generate(llama, IDS, width=3, depth=2, max_new_tokens=10, return_dict_in_generate=True, trie=False, **SAMPLED)
    assert isinstance(out, LBRGenerateOutput)
    assert out.scores is None
    assert out.stats.committed_tokens == 20
    # Warm-up 3 + 9, then 9 for every commit but the last; the last tree's second layer would pass the length limit.
    assert out.stats.forwarded_nodes == 2 * (3 + 9 * 9)
    assert out.stats.nodes_per_token == pytest.approx(8.4)
    assert out.stats.model_calls == 1 + 10
    assert set(out.stats.seconds) == {"prefill", "sample", "forward", "route", "commit"}
    trie = generate(llama, IDS, width=3, depth=2, max_new_tokens=10, return_dict_in_generate=True, **SAMPLED)
    assert trie.stats.forwarded_nodes < out.stats.forwarded_nodes


def test_on_step_sees_every_decision(llama):
    steps = []
    out = generate(llama, IDS, width=3, max_new_tokens=6, on_step=steps.append, **SAMPLED)
    assert [step.step for step in steps] == list(range(6))
    for step in steps:
        committed = step.tokens.gather(1, step.choice[:, None])[:, 0]
        assert torch.equal(committed, out[:, 4 + step.step])
        torch.testing.assert_close(step.router_log_probs.exp().sum(1), torch.ones(2))


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
    ({"streams": [1, 2, 3]}, ValueError, r"streams has shape \[3\], expected \[2\]: one per row"),
    ({"temprature": 0.5}, TypeError, "unknown argument 'temprature'; did you mean 'temperature'?"),
    ({"widht": 3}, TypeError, "unknown argument 'widht'; did you mean 'width'?"),
    ({"zzz": 3}, TypeError, "unknown argument 'zzz'$"),
    ({"token_type_ids": torch.zeros(2, 4)}, (TypeError, ValueError), "token_type_ids"),
    ({"position_ids": torch.zeros(3, 2, 4, dtype=torch.int64)}, ValueError, r"position_ids has shape \[3, 2, 4\]"),
    ({"past_key_values": StaticCache(tiny_llama().config, 20)}, ValueError, "past_key_values is a StaticCache"),
    ({"width": 1000, "depth": 5}, ValueError, "make a tree of 1001001001001000 nodes, expected at most 1048576"),
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


def test_a_router_may_exclude_candidates(llama):
    def second_only(hidden: Tensor, valid: Tensor) -> Tensor:
        return torch.tensor([-INF, 0.0, -INF]).expand(len(hidden), 3)

    choices = []
    settings = {"router_temperature": 1e-40, "generator": seeded(0), "on_step": lambda s: choices.append(s.choice)}
    generate(llama, IDS, router=second_only, max_new_tokens=9, **settings, **SAMPLED)
    assert (torch.stack(choices) == 1).all()


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


def test_the_default_dtype_changes_nothing(llama):
    def run() -> LBRGenerateOutput:
        return generate(llama, IDS, max_new_tokens=5, generator=seeded(0), return_dict_in_generate=True, **SAMPLED)

    want = run()
    torch.set_default_dtype(torch.float64)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.sequences, want.sequences)
    assert got.trajectory.node_log_probs.dtype == got.trajectory.router_log_probs.dtype == torch.float32


def test_numpys_integers_are_integers(llama):
    want = generate(llama, IDS, width=2, depth=2, max_new_tokens=4, generator=seeded(0), **SAMPLED)
    got = generate(llama, IDS, width=np.int64(2), depth=np.int32(2), max_new_tokens=4, generator=seeded(0), **SAMPLED)
    assert torch.equal(got, want)


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
