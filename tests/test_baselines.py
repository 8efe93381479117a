"""Multiplex Thinking and Soft Thinking against a plain loop of fresh forwards, and as drop-ins for model.generate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from models import tiny_llama, tiny_model
from oracle import draw, filtered_log_probs, most_likely, uniform_number
from test_generate import IDS, DoneOnce, Recorder, SeesItsOwnIds, StopsAt, letters_tokenizer, seeded_value
from test_generate_refusals import Poisons, RaisesAt, fingerprint_of
from test_invariants import padded, random_prompts, seeded
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache

from lbr_kernels import UnsupportedModelError, generate
from lbr_kernels.baselines import PAPER_FILTERS, ThinkingGenerateOutput, continuous, multiplex_thinking, soft_thinking

SAMPLED = {"do_sample": True, "top_k": 0}
PROMPTS = random_prompts([9, 4, 14])
METHODS = [multiplex_thinking, soft_thinking]
FAMILIES = ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss"]


def settings_of(method) -> dict[str, object]:
    """For tests that run both: one samples, the other need not."""
    return SAMPLED if method is multiplex_thinking else {}


@dataclass
class Row:
    """What the oracle decoded: per step the committed token, and what it was chosen among."""

    tokens: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    num_thinking: int = 0


@torch.no_grad()
def think_row(
    model, prompt: list[int], *, method: str, n: int, steps: int, end: int | None = None, eos: tuple[int, ...] = (),
    weighting: str = "uniform", ends_by: str = "first", do_sample: bool = True, seed: int = 0, stream: int = 0,
    cold_stop_entropy: float = 0.0, cold_stop_steps: int = 256, temperature: float = 1.0, **filters: float,
) -> Row:  # fmt: skip
    """One row, one fresh forward of all embeddings per step, in plain Python; shares no code with the package."""
    embed, row, sure, thinking = model.get_input_embeddings(), Row(), 0, True
    inputs = embed(torch.tensor([prompt]))[0]
    for step in range(steps):
        logits = model(inputs_embeds=inputs[None]).logits[0, -1]
        log_probs = filtered_log_probs(logits, temperature=temperature, **filters)
        row.num_thinking += thinking
        uniforms = [uniform_number(seed, stream, step, slot) for slot in range(n)]
        if not thinking:
            slots = [draw(log_probs, uniforms[0]) if do_sample else most_likely(log_probs, 1)[0]]
            weights = [1.0]
        elif method == "multiplex":
            slots = [draw(log_probs, uniform) for uniform in uniforms]
            if ends_by == "any" and end in slots:
                place = slots.index(end)
                slots[0], slots[place] = slots[place], slots[0]
            raw = [1.0 if weighting == "uniform" else math.exp(log_probs[token]) for token in slots]
            weights = [weight / sum(raw) for weight in raw]
        else:
            slots = [token for token in most_likely(log_probs, n) if token >= 0]
            raw = [math.exp(log_probs[token]) for token in slots]
            weights = [weight / sum(raw) for weight in raw]
            p = (logits.double() / temperature).softmax(-1)
            sure = sure + 1 if float(-(p * p.log()).sum()) < cold_stop_entropy else 0
        chosen = [float(log_probs[token]) for token in slots]
        if thinking and sure >= cold_stop_steps:
            slots, chosen = [end], [0.0]
        if thinking and slots[0] == end:
            thinking, weights = False, [1.0] + [0.0] * (len(slots) - 1)
        row.tokens.append(slots[0])
        row.slots.append(slots + [-1] * (n - len(slots)))
        row.weights.append(weights + [0.0] * (n - len(weights)))
        row.log_probs.append(chosen + [0.0] * (n - len(chosen)))
        if slots[0] in eos:
            break
        mixed = sum(w * e for w, e in zip(weights, embed(torch.tensor(slots)), strict=True))
        inputs = torch.cat([inputs, mixed[None]])
    return row


def assert_rows(out: ThinkingGenerateOutput, want: list[Row], prompt_columns: int) -> None:
    for b, row in enumerate(want):
        length = len(row.tokens)
        assert out.sequences[b, prompt_columns : prompt_columns + length].tolist() == row.tokens, b
        assert out.mixtures.tokens[b, :length].tolist() == row.slots, b
        assert int(out.mixtures.num_committed[b]) == length
        assert int(out.num_thinking[b]) == row.num_thinking
        # Mixtures carry rounding on from step to step, and these models amplify it.
        for got, value, exact in (
            (out.mixtures.weights, row.weights, 1e-5), (out.mixtures.log_probs, row.log_probs, 1e-4)
        ):  # fmt: skip
            torch.testing.assert_close(got[b, :1], torch.tensor(value[:1]), rtol=0, atol=exact)
            torch.testing.assert_close(got[b, :length], torch.tensor(value), rtol=1e-2, atol=1e-3)
        assert (out.mixtures.tokens[b, length:] == -1).all()
        assert (out.mixtures.weights[b, length:] == 0).all()
        assert (out.mixtures.log_probs[b, length:] == 0).all()


# --- against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighting", ["uniform", "probability"])
def test_multiplex_thinking_is_the_oracles(family, weighting):
    """Ragged prompts in one batch; thinking ends at different steps, and then texts are sampled plainly."""
    model, streams, end = tiny_model(family), [4, 0, 11], 44
    filters = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    out = multiplex_thinking(
        model, **padded(PROMPTS), width=3, weighting=weighting, end_of_thinking=end, do_sample=True, max_new_tokens=13,
        generator=seeded(2), streams=streams, return_dict_in_generate=True, **filters,
    )  # fmt: skip
    oracle = {"method": "multiplex", "n": 3, "steps": 13, "weighting": weighting, "end": end, **filters}
    seed = int(seeded_value(2))
    want = [think_row(model, p, seed=seed, stream=s, **oracle) for p, s in zip(PROMPTS, streams, strict=True)]
    assert_rows(out, want, 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_thinking_is_the_oracles(family):
    """With a window of temperature and filters that leaves fewer than n tokens at some steps."""
    model = tiny_model(family)
    filters = {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.05}
    out = soft_thinking(
        model, **padded(PROMPTS), top_n=4, max_new_tokens=13, return_dict_in_generate=True, **filters
    )  # fmt: skip
    want = [think_row(model, p, method="soft", n=4, steps=13, **filters) for p in PROMPTS]
    assert_rows(out, want, 14)
    assert (out.mixtures.tokens == -1).any()


def test_the_end_of_thinking(llama):
    """It is read alone, thinking is what stands before it, and a later one ends nothing; all rows at their own step."""
    inputs, seed = padded(PROMPTS), int(seeded_value(5))
    free = multiplex_thinking(llama, **inputs, max_new_tokens=20, generator=seeded(5), **SAMPLED)
    end = int(free[0, 14 + 4])
    out = multiplex_thinking(
        llama, **inputs, end_of_thinking=end, max_new_tokens=20, generator=seeded(5), return_dict_in_generate=True,
        **SAMPLED,
    )  # fmt: skip
    want = [
        think_row(llama, p, method="multiplex", n=3, steps=20, end=end, seed=seed, stream=s)
        for s, p in enumerate(PROMPTS)
    ]
    assert_rows(out, want, 14)
    assert int(out.num_thinking[0]) == 5
    assert len(set(out.num_thinking.tolist())) > 1
    assert torch.equal(out.sequences[0, :19], free[0, :19])
    assert (out.mixtures.tokens[0, 4] >= 0).all()  # all draws of that step count
    assert out.mixtures.weights[0, 4].tolist() == [1, 0, 0]
    assert (out.mixtures.tokens[0, 5:, 1:] == -1).all()
    torch.testing.assert_close(out.mixtures.log_prob, out.mixtures.log_probs.sum((1, 2)))


def test_any_draw_may_end_thinking(llama):
    """By option: the draw comes first then; it ends thinking earlier than first draws do."""
    settings = {"width": 4, "max_new_tokens": 12, "return_dict_in_generate": True, **SAMPLED}
    free = multiplex_thinking(llama, **padded(PROMPTS), generator=seeded(0), **settings)
    end = int(free.mixtures.tokens[0, 5, 2])
    assert end not in free.sequences[0, 14:20].tolist()
    out = multiplex_thinking(
        llama, **padded(PROMPTS), generator=seeded(0), end_of_thinking=end, ends_by="any", **settings
    )
    oracle = {"method": "multiplex", "n": 4, "steps": 12, "end": end, "ends_by": "any", "seed": int(seeded_value(0))}
    assert_rows(out, [think_row(llama, p, stream=s, **oracle) for s, p in enumerate(PROMPTS)], 14)
    assert int(out.num_thinking[0]) <= 6
    assert int(out.sequences[0, 14 + int(out.num_thinking[0]) - 1]) == end


@pytest.mark.parametrize("do_sample", [True, False])
def test_text_after_soft_thinking(llama, do_sample):
    """Greedy or drawn, by the draws of the row's own stream; filters shape thinking in both cases."""
    free = soft_thinking(llama, IDS, max_new_tokens=20, temperature=0.8)
    end = int(free[0, 4 + 3])
    out = soft_thinking(
        llama, IDS, top_n=3, end_of_thinking=end, max_new_tokens=20, temperature=0.8, top_k=10, do_sample=do_sample,
        generator=seeded(1), streams=[3, 9], return_dict_in_generate=True,
    )  # fmt: skip
    want = [
        think_row(
            llama, ids, method="soft", n=3, steps=20, end=end, temperature=0.8, top_k=10, do_sample=do_sample,
            seed=int(seeded_value(1)), stream=stream,
        )
        for ids, stream in zip(IDS.tolist(), [3, 9], strict=True)
    ]  # fmt: skip
    assert_rows(out, want, 4)
    assert min(out.num_thinking.tolist()) < 20


class Passes(LogitsProcessor):
    """Changes nothing, and is no filter that an op knows."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    "more", [{}, {"logits_processor": [Passes()]}, {"output_scores": True}], ids=["plain", "a processor", "scores"]
)
def test_cold_stop(llama, more):
    """The third step in a row below the threshold commits the end of thinking; the entropy is that before top-p."""
    filters = {"temperature": 0.3, "top_p": 0.8}
    kinds = set()
    for threshold in (0.7, 1.3, 2.0):
        out = soft_thinking(
            llama, **padded(PROMPTS), top_n=4, end_of_thinking=51, cold_stop_entropy=threshold, cold_stop_steps=3,
            max_new_tokens=20, top_k=0, return_dict_in_generate=True, **filters, **more,
        )  # fmt: skip
        want = [
            think_row(
                llama, p, method="soft", n=4, steps=20, end=51, do_sample=False, cold_stop_entropy=threshold,
                cold_stop_steps=3, **filters,
            )
            for p in PROMPTS
        ]  # fmt: skip
        assert_rows(out, want, 14)
        kinds |= {row.num_thinking for row in want}
    assert len(kinds) > 3, kinds


def test_cold_stop_needs_an_end(llama):
    """Without an end-of-thinking token, or with a threshold of 0, nothing is inserted."""
    free = soft_thinking(llama, IDS, max_new_tokens=9)
    assert torch.equal(soft_thinking(llama, IDS, max_new_tokens=9, cold_stop_entropy=9.0, cold_stop_steps=1), free)
    off = soft_thinking(llama, IDS, max_new_tokens=9, end_of_thinking=51, cold_stop_entropy=0, cold_stop_steps=1)
    assert torch.equal(off, free)


@pytest.mark.parametrize("method", METHODS)
def test_the_end_of_a_text(llama, method):
    """A committed EOS ends a row, thinking or not; the rest of the row is padding, also while others go on."""
    ends = {"eos_token_id": list(range(0, 53, 7)), "pad_token_id": 50}
    out = method(
        llama, **padded(PROMPTS), max_new_tokens=30, generator=seeded(3), return_dict_in_generate=True,
        **ends, **settings_of(method),
    )  # fmt: skip
    oracle = {"method": method.__name__.removesuffix("_thinking"), "n": out.mixtures.tokens.shape[2], "steps": 30}
    oracle |= {"eos": tuple(ends["eos_token_id"]), "seed": int(seeded_value(3))}
    if method is soft_thinking:
        oracle["top_k"] = 50  # model.generate's default
    assert_rows(out, [think_row(llama, p, stream=s, **oracle) for s, p in enumerate(PROMPTS)], 14)
    lengths = out.mixtures.num_committed.tolist()
    assert len(set(lengths)) > 1
    for row, length in zip(out.sequences[:, 14:].tolist(), lengths, strict=True):
        assert set(row[length:]) <= {50}


# --- the simplest cases are what is known ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("weighting", ["uniform", "probability"])
def test_width_one_is_plain_sampling(family, weighting):
    """Token for token what generate draws with width 1, for the same seed and streams, and with the same likelihood."""
    model = tiny_model(family)
    settings = {"max_new_tokens": 20, "eos_token_id": 9, "streams": [7, 1, 30], "return_dict_in_generate": True}
    want = generate(model, **padded(PROMPTS), width=1, generator=seeded(1), **settings, **SAMPLED)
    for end in (None, 44):
        got = multiplex_thinking(
            model, **padded(PROMPTS), width=1, weighting=weighting, end_of_thinking=end, generator=seeded(1),
            **settings, **SAMPLED,
        )  # fmt: skip
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(got.mixtures.log_prob, want.trajectory.node_log_probs.sum(1))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_top_one_is_greedy(family):
    model, settings = tiny_model(family), {"max_new_tokens": 20, "eos_token_id": [9, 10]}
    want = model.generate(**padded(PROMPTS), do_sample=False, **settings)
    for end in (None, int(want[0, 14 + 3])):
        for filters in ({}, PAPER_FILTERS):
            got = soft_thinking(model, **padded(PROMPTS), top_n=1, end_of_thinking=end, **settings, **filters)
            assert torch.equal(got, want)


def test_equal_draws_are_their_token(llama):
    """With one token left, all draws agree, and mixtures are that token: greedy decoding at any width."""
    want = llama.generate(IDS, max_new_tokens=12, do_sample=False)
    for weighting in ("uniform", "probability"):
        got = multiplex_thinking(llama, IDS, width=4, weighting=weighting, max_new_tokens=12, do_sample=True, top_k=1)
        assert torch.equal(got, want)


def test_mixtures_by_hand(llama):
    """The second step's distribution is the model's own behind the mean of the first draws, duplicates counted."""
    out = multiplex_thinking(
        llama, IDS[:1], width=4, max_new_tokens=2, generator=seeded(1), do_sample=True, temperature=0.5, top_k=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    drawn = out.mixtures.tokens[0, 0]
    assert len(drawn.unique()) in (2, 3)
    embed = llama.get_input_embeddings()
    with torch.no_grad():
        inputs = torch.cat([embed(IDS[0]), embed(drawn).mean(0, keepdim=True)])
        first, second = llama(inputs_embeds=inputs[None]).logits[0, -2:]
    torch.testing.assert_close(out.logits[1][0], second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.mixtures.log_probs[0, 0], (first / 0.5).log_softmax(-1)[drawn], rtol=1e-4, atol=1e-4)
    assert out.mixtures.weights[0, 0].tolist() == [0.25] * 4


# --- drop-ins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_rows_text_does_not_depend_on_its_batch(llama, method):
    """Rows alone, unpadded, with their own streams; padding on the right, or holes, change nothing either."""
    free = method(llama, **padded(PROMPTS), max_new_tokens=16, generator=seeded(6), **settings_of(method))
    settings = {"end_of_thinking": int(free[1, 14 + 5]), "eos_token_id": int(free[2, 14 + 9]), "max_new_tokens": 16}
    settings |= {"do_sample": True, "top_k": 30}
    batch = method(llama, **padded(PROMPTS), generator=seeded(6), return_dict_in_generate=True, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = method(
            llama, torch.tensor([prompt]), generator=seeded(6), streams=[row], return_dict_in_generate=True, **settings
        )
        length = int(alone.mixtures.num_committed[0])
        assert torch.equal(alone.mixtures.tokens[0], batch.mixtures.tokens[row, :length])
        assert int(batch.mixtures.num_committed[row]) == length
    longest = max(map(len, PROMPTS))
    right = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in PROMPTS])
    moved = method(llama, right, attention_mask=mask, generator=seeded(6), **settings)
    assert torch.equal(moved[:, :longest], right)
    assert torch.equal(moved[:, longest:], batch.sequences[:, longest:])


@pytest.mark.parametrize("method", METHODS)
def test_return_sequences_share_one_prefill(llama, method):
    shapes, settings = [], {"max_new_tokens": 9, "end_of_thinking": 44, **SAMPLED}
    method(llama, IDS, max_new_tokens=1, **SAMPLED)  # whatever is checked once has been
    handle = llama.model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(kw["input_ids"].shape if kw.get("input_ids") is not None else None),
        with_kwargs=True,
    )
    out = method(llama, IDS, num_return_sequences=2, generator=seeded(1), **settings)
    handle.remove()
    assert shapes[0] == (2, 4)
    assert out.shape == (4, 13)
    assert torch.equal(method(llama, IDS.repeat_interleave(2, 0), generator=seeded(1), **settings), out)
    assert method is soft_thinking or not torch.equal(out[0], out[1])


@pytest.mark.parametrize("method", METHODS)
def test_streamers_criteria_and_limits(llama, method):
    settings = settings_of(method)
    streamer, criterion = Recorder(), StopsAt(10)
    out = method(llama, IDS[:1], max_new_tokens=30, streamer=streamer, stopping_criteria=[criterion], **settings)
    assert criterion.calls == list(range(5, 11))
    assert streamer.ended
    assert torch.cat([value.view(-1) for value in streamer.values]).tolist() == out[0].tolist()
    assert method(llama, IDS, max_length=11, **settings).shape == (2, 11)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=0, **settings)
    assert method(llama, IDS, generation_config=config).shape == (2, 12)
    out = method(
        llama, **padded(random_prompts([4, 7, 2])), max_new_tokens=40, stopping_criteria=[DoneOnce()], **settings
    )
    assert out.shape == (3, 11)
    letters = method(llama, IDS[:1], max_new_tokens=20, suppress_tokens=list(range(26, 53)), generator=seeded(0),
                     **settings)  # fmt: skip
    stop = "".join(chr(97 + i) for i in letters[0, 7:9].tolist())
    out = method(
        llama, IDS[:1], max_new_tokens=20, suppress_tokens=list(range(26, 53)), generator=seeded(0),
        stop_strings=[stop], tokenizer=letters_tokenizer(), **settings,
    )  # fmt: skip
    assert out[0].tolist() == letters[0, : out.shape[1]].tolist()
    assert out.shape[1] <= 9


@pytest.mark.parametrize("method", METHODS)
def test_processors_see_the_committed_text(llama, method):
    """Once per step, all rows; what they forbid is in no mixture."""
    processor = SeesItsOwnIds()
    out = method(
        llama, IDS, max_new_tokens=12, logits_processor=[processor], generator=seeded(0), end_of_thinking=44,
        return_dict_in_generate=True, **settings_of(method),
    )  # fmt: skip
    assert processor.lengths == list(range(4, 16))
    for row in range(2):
        for step in range(12):
            used = set(out.mixtures.tokens[row, step].tolist()) - {-1}
            assert not used & set(out.sequences[row, : 4 + step].tolist())


class Allows(LogitsProcessor):
    """Nothing but some tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


def test_mixtures_of_allowed_tokens(llama):
    """As for digits of a label: the mixture is the renormalised rest; sure of one token, Cold Stop is too."""
    out = soft_thinking(
        llama, IDS, logits_processor=[Allows([3, 5, 8])], max_new_tokens=5, top_k=0, return_dict_in_generate=True
    )
    assert set(out.mixtures.tokens.flatten().tolist()) == {3, 5, 8, -1}
    torch.testing.assert_close(out.mixtures.weights.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(out.mixtures.log_probs[..., :3].exp().sum(-1), torch.ones(2, 5))
    out = soft_thinking(
        llama, IDS, logits_processor=[Allows([3])], max_new_tokens=5, cold_stop_steps=2, end_of_thinking=7
    )
    assert out[:, 4:].tolist() == [[3, 7, 3, 3, 3]] * 2


def test_what_is_returned(llama):
    out = multiplex_thinking(
        llama, **padded(PROMPTS), width=2, max_new_tokens=6, do_sample=True, temperature=0.5, top_k=9,
        generator=seeded(0), return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert isinstance(out, ThinkingGenerateOutput)
    assert (out.mixtures.tokens.dtype, out.mixtures.weights.dtype, out.mixtures.log_probs.dtype) == (
        torch.int64, torch.float32, torch.float32,
    )  # fmt: skip
    assert out.mixtures.tokens.shape == (3, 6, 2)
    assert torch.equal(out.mixtures.tokens[..., 0], out.sequences[:, 14:])
    assert out.num_thinking.tolist() == [6, 6, 6]
    for step in range(6):
        torch.testing.assert_close(out.scores[step].isfinite().sum(1), torch.full((3,), 9))
        drawn = out.scores[step].log_softmax(-1).gather(1, out.mixtures.tokens[:, step])
        torch.testing.assert_close(drawn, out.mixtures.log_probs[:, step])
    stats = out.stats
    assert (stats.committed_tokens, stats.forwarded_nodes, stats.model_calls) == (18, 15, 6)
    assert set(stats.seconds) == {"prefill", "sample", "forward", "commit"}
    assert stats.engine == "eager"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_the_cache_can_be_continued(family):
    """Column by column what model.generate leaves, of plain rows that have ended too; a caller's holds the text."""
    model, cache = tiny_model(family), DynamicCache()
    inputs = padded(PROMPTS)
    text = model.generate(**inputs, max_new_tokens=9, do_sample=False)[:, 14:]
    settings = {"eos_token_id": int(text[0, 3]), "max_new_tokens": 9, "return_dict_in_generate": True}
    out = soft_thinking(model, **inputs, top_n=1, **settings)
    want = model.generate(**inputs, do_sample=False, **settings)
    lengths = out.mixtures.num_committed.tolist()
    assert lengths[0] <= 4
    steps = max(lengths)
    assert steps > 4
    for a, b in zip(out.past_key_values.layers, want.past_key_values.layers, strict=True):
        first = 14 + steps - 1 - a.keys.shape[2]  # column of the text that the layer begins with
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert x.shape == y.shape
            for row, length in enumerate(lengths):
                low = max(14 - len(PROMPTS[row]) - first, 0)
                high = max(14 + min(length, steps - 1) - first, low)
                torch.testing.assert_close(x[row, :, low:high], y[row, :, low:high], rtol=1e-4, atol=1e-4)
    prompt = torch.tensor(PROMPTS[:1])
    first = soft_thinking(model, prompt, top_n=1, max_new_tokens=5, past_key_values=cache)
    assert cache.get_seq_length() == 13
    again = soft_thinking(model, first, top_n=1, max_new_tokens=7, past_key_values=cache)
    assert torch.equal(again, model.generate(prompt, max_new_tokens=12, do_sample=False))


def test_prompts_as_embeddings_and_the_last_position():
    model = tiny_model("gpt2", n_positions=12)
    want = multiplex_thinking(model, IDS, max_new_tokens=6, generator=seeded(0), **SAMPLED)
    embeds = model.get_input_embeddings()(IDS).detach()
    got = multiplex_thinking(model, inputs_embeds=embeds, max_new_tokens=6, generator=seeded(0), **SAMPLED)
    assert torch.equal(got, want[:, 4:])
    with pytest.warns(UserWarning, match="multiplex_thinking: 20 new tokens go past the model's last position, 11"):
        assert multiplex_thinking(model, IDS, max_new_tokens=20, **SAMPLED).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = tiny_llama().to(dtype)
    for method in METHODS:
        out = method(model, **padded(PROMPTS), max_new_tokens=6, return_dict_in_generate=True, **settings_of(method))
        assert torch.isfinite(out.mixtures.log_probs).all()
        assert out.past_key_values.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_text(llama, method):
    settings = {"max_new_tokens": 12, "end_of_thinking": 44, "temperature": 1.5, **SAMPLED}
    first = method(llama, IDS, generator=seeded(1), **settings)
    assert torch.equal(method(llama, IDS, generator=seeded(1), **settings), first)
    if method is multiplex_thinking:
        assert not torch.equal(method(llama, IDS, generator=seeded(2), **settings), first)
        torch.manual_seed(5)
        default = method(llama, IDS, **settings)
        torch.manual_seed(5)
        assert torch.equal(method(llama, IDS, **settings), default)
    else:
        state = torch.get_rng_state()
        method(llama, IDS, max_new_tokens=3)
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


# --- what they refuse, and how they leave a model -------------------------------------------------------------------

REFUSED_BY_BOTH = [
    ({"num_beams": 3}, ValueError, "num_beams is 3, which {method} cannot honour; expected None or 1"),
    ({"assistant_model": tiny_llama()}, ValueError, "assistant_model is a LlamaForCausalLM, which {method} cannot"),
    ({"custom_generate": "a/b"}, ValueError, "custom_generate is 'a/b'"),
    ({"use_cache": False}, ValueError, "use_cache is False"),
    ({"generation_config": GenerationConfig(num_beams=2)}, ValueError, "num_beams is 2"),
    ({"position_ids": torch.zeros(3, 2, 4, dtype=torch.int64)}, ValueError, r"position_ids has shape \[3, 2, 4\]"),
    ({"attention_mask": torch.ones(2, 3)}, ValueError, r"has shape \[2, 3\], expected the prompts' \[2, 4\]"),
    ({"temprature": 0.5}, TypeError, "unknown argument 'temprature'; did you mean 'temperature'"),
    ({"end_of_thinkin": 5}, TypeError, "unknown argument 'end_of_thinkin'; did you mean 'end_of_thinking'"),
    ({"depth": 2}, TypeError, "unknown argument 'depth'"),
    ({"generator": 3}, TypeError, "generator is a int, expected a Generator or None"),
    ({"streams": [1, 2, 3]}, ValueError, r"streams has shape \[3\], expected \[2\]: one per row"),
    ({"streams": [0.5, 1.5]}, ValueError, r"streams has dtype torch\.float32, expected integers"),
    ({"end_of_thinking": "</think>"}, ValueError, "end_of_thinking is '</think>', expected an integer >= 0"),
    ({"end_of_thinking": 53}, ValueError, "end_of_thinking is 53, expected less than the vocabulary, 53"),
    ({"num_return_sequences": -1}, ValueError, "num_return_sequences is -1, expected an integer >= 1"),
    ({"stop_strings": ["a"]}, ValueError, "stop_strings need the model's tokenizer"),
]
REFUSED = [
    (multiplex_thinking, {"width": 0}, ValueError, "width is 0, expected an integer >= 1"),
    (multiplex_thinking, {"width": True}, ValueError, "width is True, expected an integer >= 1"),
    (multiplex_thinking, {"width": 2.0}, ValueError, r"width is 2\.0, expected an integer >= 1"),
    (multiplex_thinking, {"weighting": "mean"}, ValueError, "weighting is 'mean', expected 'uniform' or 'probability'"),
    (multiplex_thinking, {"ends_by": "all"}, ValueError, "ends_by is 'all', expected 'first' or 'any'"),
    (multiplex_thinking, {"do_sample": False}, ValueError, "do_sample is False, expected True"),
    (multiplex_thinking, {"do_sample": None}, ValueError, "do_sample is None, expected True"),
    (soft_thinking, {"top_n": 0}, ValueError, "top_n is 0, expected an integer >= 1"),
    (soft_thinking, {"cold_stop_steps": 0}, ValueError, "cold_stop_steps is 0, expected an integer >= 1"),
    (soft_thinking, {"cold_stop_entropy": -1.0}, ValueError, r"cold_stop_entropy is -1\.0, expected a finite number"),
    (soft_thinking, {"cold_stop_entropy": "x"}, ValueError, "cold_stop_entropy is 'x', expected a finite number"),
    (soft_thinking, {"cold_stop_entropy": math.nan}, ValueError, "cold_stop_entropy is nan, expected a finite number"),
    (soft_thinking, {"num_return_sequences": 2}, ValueError, "num_return_sequences is 2, expected 1 where do_sample"),
    (
        soft_thinking,
        {"do_sample": False, "generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
        ValueError,
        "num_return_sequences is 3, expected 1 where do_sample is not True",
    ),
    (soft_thinking, {"width": 3}, TypeError, "unknown argument 'width'"),
]


@pytest.mark.parametrize(
    ("method", "arguments", "kind", "message"),
    REFUSED + [(method, *refused) for method in METHODS for refused in REFUSED_BY_BOTH],
)
def test_refused(llama, method, arguments, kind, message):
    name = {"multiplex_thinking": "Multiplex Thinking", "soft_thinking": "Soft Thinking"}[method.__name__]
    with pytest.raises(kind, match=f"^{method.__name__}: .*" + message.replace("{method}", name)):
        method(llama, IDS, max_new_tokens=3, **{**settings_of(method), **arguments})


def test_a_model_with_embeddings_per_layer_is_refused():
    """Gemma 3n reads ids again in its layers. Without the rule the comparison sees it, too."""
    model = tiny_model("gemma3n_text")
    with pytest.raises(
        UnsupportedModelError, match=r"soft_thinking: Gemma3n.* cannot read mixtures of tokens: its lay"
    ):
        soft_thinking(model, IDS, max_new_tokens=3)
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):
            torch.nn.init.constant_(parameter, 1.0)
    config = model.config.get_text_config(decoder=True)
    found, config.hidden_size_per_layer_input = config.hidden_size_per_layer_input, 0
    with torch.no_grad():
        reason = continuous._obstacle(model)
    config.hidden_size_per_layer_input = found
    assert reason is not None
    assert reason.startswith("embeddings differ from their ids: relative error")


def test_a_model_that_reads_no_embeddings_is_refused(monkeypatch):
    model = tiny_llama(seed=9)
    forward = type(model.model).forward

    def ids_only(self, input_ids=None, *args, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            raise NotImplementedError("ids, please")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", ids_only)
    with pytest.raises(UnsupportedModelError, match=r"a forward of embeddings failed \(NotImplementedError: ids, pl"):
        multiplex_thinking(model, IDS, max_new_tokens=3, **SAMPLED)


def test_the_check_runs_once(llama, monkeypatch):
    soft_thinking(llama, IDS, max_new_tokens=2)
    monkeypatch.setattr(continuous, "_obstacle", lambda model: pytest.fail("checked again"))
    soft_thinking(llama, IDS, max_new_tokens=2)


@pytest.mark.parametrize("method", METHODS)
def test_impossible_distributions_are_refused(llama, method):
    for value, everywhere, message in ((torch.nan, False, "row 1 holds NaN"), (-torch.inf, True, "is -inf everywhere")):
        poison = Poisons(value, everywhere=everywhere)
        with pytest.raises(RuntimeError, match=message):
            method(llama, IDS, max_new_tokens=9, logits_processor=[poison], **settings_of(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_model_as_it_was(method, error):
    model = tiny_llama(attention_dropout=0.0).train()
    before = fingerprint_of(model)
    want = method(model, IDS, max_new_tokens=9, generator=seeded(0), **settings_of(method))
    with pytest.raises(error):
        method(model, IDS, max_new_tokens=30, stopping_criteria=[RaisesAt(error)], **settings_of(method))
    assert fingerprint_of(model) == before
    assert torch.equal(method(model, IDS, max_new_tokens=9, generator=seeded(0), **settings_of(method)), want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n_positions", "cache", "wrong", "message"),
    [
        (None, DynamicCache, {"streams": [1]}, "streams has shape"),
        (None, lambda: StaticCache(tiny_llama().config, 20), {}, "is a StaticCache, which .* Thinking cannot honour"),
        (16, DynamicCache, {}, "a prompt ends at position 15, expected less than the model's last position, 15"),
    ],
    ids=["streams", "type", "position"],
)
def test_a_refusal_leaves_the_callers_cache_alone(llama, method, n_positions, cache, wrong, message):
    model, given = tiny_model("gpt2", n_positions=n_positions) if n_positions else llama, cache()
    with pytest.raises(ValueError, match=f"^{method.__name__}: .*{message}"):
        method(model, IDS.repeat(1, 4), past_key_values=given, max_new_tokens=3, **settings_of(method), **wrong)
    assert given.get_seq_length() == 0
