"""The oracle's own tests: its random numbers and filters against known answers, its decoding against plain decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import (
    NO_NODE,
    WORD,
    OracleRow,
    decode_row,
    draw,
    filtered_log_probs,
    most_likely,
    philox4x32_10,
    uniform_number,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lbr_kernels.router import Router

VOCAB = 40
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random model whose distributions are neither flat nor certain."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def read_last(model: PreTrainedModel, text: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden state and logits of a text's last position, by the model's own output of hidden states."""
    output = model(input_ids=torch.tensor([text]), output_hidden_states=True)
    return output.hidden_states[-1][0, -1], output.logits[0, -1]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32_10(counter, key) == expected


def test_uniform_number_takes_all_words() -> None:
    words = philox4x32_10((7, 5, 2, 1), (4, 3))
    number = uniform_number((3 << 32) | 4, (1 << 32) | 2, 5, 7)
    assert number == ((words[0] << 32) | words[1]) // 2**11 / 2**53
    # Negative seeds and streams are the 64-bit words that represent them.
    assert uniform_number(-1, -2, 0, 0) == uniform_number(2**64 - 1, 2**64 - 2, 0, 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("top_k", [0, 1, 6, 2 * VOCAB])
@pytest.mark.parametrize("top_p", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.13, 1.0])
def test_filters_are_those_of_transformers(
    ties: bool, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    for _ in range(10):
        logits = 2 * torch.randn(VOCAB, generator=generator)
        if ties:
            logits = logits.round()
        expected = warpers(None, logits.double().unsqueeze(0))[0].log_softmax(dim=0)
        got = filtered_log_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if ties and top_p < 1:
            # The warper's sort is not stable: which of equal tokens stay at the edge of its nucleus is left open.
            got, expected = got.sort().values, expected.sort().values
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_filters_at_ties() -> None:
    def kept(logits: list[float], **filters: Any) -> list[int]:
        return filtered_log_probs(torch.tensor(logits), **filters).isfinite().nonzero().flatten().tolist()

    assert kept([1.0, 2.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2, 3, 4]
    assert kept([0.0] * 8, top_p=0.5) == [4, 5, 6, 7]
    assert kept([0.0] * 8, top_p=0.51) == [3, 4, 5, 6, 7]
    assert kept([0.0] * 8, top_p=0.0) == [7]
    assert kept([5.0, 0.0, 0.0, 5.0], top_p=0.4) == [3]
    assert kept([5.0, 0.0, 0.0, 5.0], top_p=0.6) == [0, 3]


def test_draw_is_the_inverse_cdf() -> None:
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).double().log()
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53]
    assert [draw(log_probs, uniform) for uniform in uniforms] == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("depth", [1, 3])
def test_sampled_width_1_is_ancestral_sampling(model: PreTrainedModel, depth: int) -> None:
    count, seed, stream = 8, 11, 5
    row = decode_row(
        model, PROMPT, width=1, depth=depth, max_new_tokens=count, temperature=0.9, top_p=0.9, seed=seed, stream=stream
    )
    text: list[int] = []
    log_probs: list[float] = []
    for number in range(count):
        # The warm-up grows the first `depth` tokens in its slots 0, 1, ...; every later one is the deepest slot.
        slot, step = min(number, depth - 1), max(number - depth + 1, 0)
        scores = TopPLogitsWarper(0.9)(None, read_last(model, PROMPT + text)[1].double().unsqueeze(0) / 0.9)[0]
        probs = scores.softmax(dim=0)
        uniform = uniform_number(seed, stream, step, slot)
        text.append(int((probs.cumsum(dim=0) > uniform).nonzero()[0]))
        log_probs.append(probs[text[-1]].log().item())
    assert row.tokens == text
    assert row.node_tokens == text + [NO_NODE] * (depth - 1)
    assert row.node_log_probs == pytest.approx(log_probs + [0.0] * (depth - 1), rel=1e-5, abs=1e-6)
    assert row.choices == [0] * count
    assert row.router_log_probs == [0.0] * count


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (1, 3), (3, 2)])
def test_greedy_is_generate(model: PreTrainedModel, width: int, depth: int) -> None:
    """At any width too: without a router the first of the most likely tokens is chosen."""
    row = decode_row(model, PROMPT, width=width, depth=depth, max_new_tokens=12, do_sample=False)
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert row.tokens == expected[0, len(PROMPT) :].tolist()


def test_most_likely_at_ties() -> None:
    log_probs = filtered_log_probs(torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0]), top_k=3)
    assert most_likely(log_probs, 3) == [1, 3, 0]
    assert most_likely(log_probs, 6) == [1, 3, 0, 4, NO_NODE, NO_NODE]


def test_most_likely_children_are_distinct_and_floored(model: PreTrainedModel) -> None:
    row = decode_row(
        model, PROMPT, width=VOCAB, depth=1, max_new_tokens=1, do_sample=False, min_p=0.1, candidate_min_p=0.02
    )
    probs = read_last(model, PROMPT)[1].double().softmax(dim=0)
    kept = [token for token in probs.argsort(descending=True).tolist() if probs[token] >= 0.1 * probs.max()]
    assert 1 < len(kept) < VOCAB
    assert row.node_tokens == kept + [NO_NODE] * (VOCAB - len(kept))
    expected = (probs[kept] / probs[kept].sum()).log().tolist() + [0.0] * (VOCAB - len(kept))
    assert row.node_log_probs == pytest.approx(expected, rel=1e-5, abs=1e-6)


@dataclass
class Node:
    """A node of the tree that a trajectory is read back into, with the step and slot in which it grew."""

    token: int
    log_prob: float = 0.0
    step: int = 0
    slot: int = -1
    children: list[Node] = field(default_factory=list)


def read_back(row: OracleRow, width: int, depth: int) -> list[Node]:
    """The root of every step's tree, from the trajectory alone; each tree hangs below the one before."""
    nodes = zip(row.node_tokens, row.node_log_probs, strict=True)
    root = Node(NO_NODE)
    frontier = [root]
    roots: list[Node] = []

    def extend(step: int, layer: int) -> list[Node]:
        slot = sum(width**above for above in range(1, layer))
        for parent in frontier:
            for _ in range(width):
                parent.children.append(Node(*next(nodes), step, slot))
                slot += 1
        return [child for parent in frontier for child in parent.children]

    for layer in range(1, depth):
        frontier = extend(0, layer)
    for step, choice in enumerate(row.choices):
        deepest = extend(step, depth)
        roots.append(root)
        root = root.children[choice]
        frontier = deepest[choice * width ** (depth - 1) : (choice + 1) * width ** (depth - 1)]
    assert next(nodes, None) is None
    return roots


def trained_router(model: PreTrainedModel, depth: int) -> Router:
    torch.manual_seed(2)
    router = Router.for_model(model, depth=depth, dim=16).eval()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.4)
    return router


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("with_router", [False, True])
@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 3), (3, 2)])
def test_trajectory_replays(model: PreTrainedModel, width: int, depth: int, with_router: bool, do_sample: bool) -> None:
    """Every node is where it should be: its log-probability is that of the path that leads to it, and so on."""
    count, eos_ids = 5, set(range(0, VOCAB, 6))
    filters: dict[str, Any] = {"temperature": 1.3, "top_k": 20, "min_p": 0.02}
    router = trained_router(model, depth) if with_router else None
    row = decode_row(
        model, PROMPT, width=width, depth=depth, max_new_tokens=count, do_sample=do_sample, router=router,
        router_temperature=0.8, eos_ids=eos_ids, seed=4, **filters,
    )  # fmt: skip
    if not do_sample:
        filters["min_p"] = 0.05
    roots = read_back(row, width, depth)
    choices = [root.children[choice] for root, choice in zip(roots, row.choices, strict=True)]
    assert row.tokens == [node.token for node in choices]
    assert not eos_ids & set(row.tokens[:-1])
    assert len(row.tokens) == count or row.tokens[-1] in eos_ids

    def check(node: Node, text: list[int], height: int) -> None:
        if height == 0:
            return
        tokens = [child.token for child in node.children]
        ends = len(text) >= count or (bool(text) and text[-1] in eos_ids)
        if node.token == NO_NODE and text:
            assert all((child.token, child.log_prob) == (NO_NODE, 0.0) for child in node.children)
            return
        if ends:
            assert tokens == [NO_NODE] * width
            return
        log_probs = filtered_log_probs(read_last(model, PROMPT + text)[1], **filters)
        if do_sample:
            assert tokens == [draw(log_probs, uniform_number(4, 0, child.step, child.slot)) for child in node.children]
        else:
            assert tokens == most_likely(log_probs, width)
        for child in node.children:
            if child.token != NO_NODE:
                assert child.log_prob == pytest.approx(log_probs[child.token].item(), rel=1e-4, abs=1e-6)
                check(child, [*text, child.token], height - 1)

    for step, root in enumerate(roots):
        text = row.tokens[:step]
        check(root, text, depth)
        layer, hidden, valid = [(root, text)], [], []
        for _ in range(depth):
            layer = [(child, [*path, child.token]) for node, path in layer for child in node.children]
            for node, path in layer:
                valid.append(node.token != NO_NODE)
                hidden.append(read_last(model, PROMPT + path)[0] if valid[-1] else torch.zeros(32))
        if router is None:
            expected = torch.tensor(valid[:width]).double().log().log_softmax(dim=0)
        else:
            with torch.no_grad():
                expected = router(torch.stack(hidden)[None], width, valid=torch.tensor(valid)[None], temperature=0.8)[0]
        assert row.router_log_probs[step] == pytest.approx(expected[row.choices[step]].item(), rel=1e-4, abs=1e-6)
        if not do_sample:
            assert row.choices[step] == int(expected.argmax())
        else:
            slots = sum(width**layer for layer in range(1, depth + 1))
            running = expected.double().exp().cumsum(dim=0)
            assert row.choices[step] == int((running > uniform_number(4, 0, step, slots)).nonzero()[0])


def test_router_choice_may_be_greedy_over_drawn_children(model: PreTrainedModel) -> None:
    untrained = Router.for_model(model, depth=2, dim=16).eval()
    rows = {
        (router, router_do_sample): decode_row(
            model, PROMPT, width=3, depth=2, max_new_tokens=6, router=router, router_do_sample=router_do_sample, seed=8
        )
        for router in (None, untrained)
        for router_do_sample in (None, False)
    }
    # An untrained router is uniform, and the argmax of equals is the first.
    for router_do_sample in (None, False):
        assert rows[None, router_do_sample].tokens == rows[untrained, router_do_sample].tokens
    assert rows[None, False].choices == [0] * 6
    assert len(set(rows[None, None].choices)) > 1


def test_end_of_text_ends_the_row_and_its_branches(model: PreTrainedModel) -> None:
    arguments: dict[str, Any] = {"width": 2, "depth": 2, "max_new_tokens": 6, "seed": 3}
    free = decode_row(model, PROMPT, **arguments)
    eos = free.tokens[2]
    assert eos not in free.tokens[:2]
    row = decode_row(model, PROMPT, **arguments, eos_ids=(eos,))
    assert row.tokens == free.tokens[:3]
    assert row.choices == free.choices[:3]
    # Layer 1, then one block of four per step: growth before the end is the same, but nothing hangs below the end.
    assert len(row.node_tokens) == len(row.node_log_probs) == 2 + 3 * 4
    for parent, first in ((0, 2), (1, 4)):
        below = [NO_NODE] * 2 if free.node_tokens[parent] == eos else free.node_tokens[first : first + 2]
        assert row.node_tokens[first : first + 2] == below
    chosen = row.choices[2] * 2
    assert row.node_tokens[-4:][chosen : chosen + 2] == [NO_NODE] * 2
    assert row.node_log_probs[-4:][chosen : chosen + 2] == [0.0] * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_last_position_is_a_length_cap(model: PreTrainedModel, depth: int) -> None:
    capped = decode_row(model, PROMPT, width=2, depth=depth, max_new_tokens=3, seed=6)
    last = len(PROMPT) + 2
    row = decode_row(model, PROMPT, width=2, depth=depth, max_new_tokens=9, seed=6, last_position=last)
    assert row == capped
    assert len(row.tokens) == 3
    nothing = decode_row(model, PROMPT, width=2, depth=depth, max_new_tokens=9, last_position=len(PROMPT) - 1)
    assert nothing == OracleRow(node_tokens=[NO_NODE] * (depth - 1) * 2, node_log_probs=[0.0] * (depth - 1) * 2)


class Pairs(nn.Module):
    """A language model of three tokens, a table: the next token depends on the last two. Fast enough for statistics."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 3, bias=False)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(5))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(3 * before + input_ids, 9).float()))


def test_uniform_router_is_ancestral_sampling() -> None:
    """The sequences' distribution, at a width and a depth, against the exact one."""
    model, count, rows = Pairs(), 3, 1500
    seen = Counter(
        tuple(decode_row(model, [1, 2], width=2, depth=2, max_new_tokens=count, seed=9, stream=stream).tokens)  # type: ignore[arg-type]
        for stream in range(rows)
    )
    table = model.head.weight.detach().T.double().softmax(dim=1)
    distance = 0.0
    for code in range(3**count):
        tokens = (code // 9, code // 3 % 3, code % 3)
        prob, text = 1.0, [1, 2]
        for token in tokens:
            prob *= table[3 * text[-2] + text[-1], token].item()
            text.append(token)
        distance += abs(seen[tokens] / rows - prob) / 2
    # The expected distance of 1500 draws is below sqrt(27 / (2 * pi * 1500)) = 0.054.
    assert distance < 0.075
