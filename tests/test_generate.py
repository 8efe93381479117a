"""generate() as a drop-in for model.generate: what it takes and what it returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import letters_tokenizer, tiny_llama, tiny_model
from oracle import decode_row
from test_invariants import padded, random_prompts, seeded, trained_looking_router
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from lbr_kernels import LBRConfig, LBRGenerateOutput, Router, check_model, generate
from lbr_kernels.decoding.cache import CACHE_NAME

INF = float("inf")
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


class DoneOnce(StoppingCriteria):
    """Row r is done at one step, r + 9 tokens into the text, and not before or after."""

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.arange(len(input_ids)) == input_ids.shape[1] - 9


def test_rows_without_an_end_token_are_done_one_by_one(llama):
    """As with model.generate: the call ends when each row has been done at some step, not all at the same one."""
    inputs = padded(random_prompts([4, 7, 2]))
    settings = {"max_new_tokens": 40, "stopping_criteria": [DoneOnce()], "do_sample": False}
    want = llama.generate(**inputs, **settings)
    assert want.shape == (3, 11)
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
    with pytest.raises(ValueError, match=f"{CACHE_NAME} needs an attention_mask whose padding is on the left"):
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


def test_a_router_may_exclude_candidates(llama):
    def second_only(hidden: Tensor, valid: Tensor) -> Tensor:
        return torch.tensor([-INF, 0.0, -INF]).expand(len(hidden), 3)

    choices = []
    settings = {"router_temperature": 1e-40, "generator": seeded(0), "on_step": lambda s: choices.append(s.choice)}
    generate(llama, IDS, router=second_only, max_new_tokens=9, **settings, **SAMPLED)
    assert (torch.stack(choices) == 1).all()


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


@pytest.mark.parametrize("trie", [False, True])
def test_on_step_sees_what_the_router_saw(llama, trie):
    """Log-probabilities are the trajectory's, states lead to the same choices, and moves are the cache's."""
    steps = []
    router = trained_looking_router(llama, 2)
    out = generate(
        llama, IDS, width=3, depth=2, router=router, max_new_tokens=6, on_step=steps.append, trie=trie,
        generator=seeded(0), return_dict_in_generate=True, **SAMPLED,
    )  # fmt: skip
    trajectory = out.trajectory
    for number, (step, after) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        nodes = trajectory.step_nodes(number)
        assert torch.equal(step.tokens[:, 3:], trajectory.node_tokens[:, nodes])
        assert torch.equal(step.log_probs[:, 3:], trajectory.node_log_probs[:, nodes])
        valid = step.tokens >= 0
        again = router(step.hidden, 3, valid=valid).log_softmax(-1)
        torch.testing.assert_close(again, step.router_log_probs, rtol=1e-4, atol=1e-5)
        for row, choice in enumerate(step.choice.tolist()):
            winner = step.node_of[row, choice]
            kept = step.node_of[row, 3 + 3 * choice : 6 + 3 * choice][valid[row, 3 + 3 * choice : 6 + 3 * choice]]
            moved = [source for source in step.moves[row].tolist() if source >= 0]
            if trie or bool(valid[row].all()):
                assert moved == [int(winner), *sorted(set(kept.tolist()))]
            if after is not None:
                assert torch.equal(after.log_probs[row, :3], step.log_probs[row, 3 + 3 * choice : 6 + 3 * choice])
                assert torch.equal(after.hidden[row, :3], step.hidden[row, 3 + 3 * choice : 6 + 3 * choice])
                assert [moved[1 + node] for node in after.node_of[row, :3].tolist()] == kept.tolist()
