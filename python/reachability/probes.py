"""Linear probes: what a hidden state says of the target and of the node that was just generated (the paper's Figures
4b and 7).

A probe is a logistic regression on standardised states, fitted on graphs of the training split and judged on graphs of
the test split, both unseen by their models' last batches as all others are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from arms import Arm, at
from decode import BATCH, LegalTokens
from model import Preset
from packs import Pack, make_pack
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessorList, PreTrainedModel

from lbr_kernels.baselines import ThinkingGenerateOutput, soft_thinking
from lbr_kernels.evaluation.reachability import ARROW, FIRST_DIGIT, PAD, Split, evaluation_problems, prompt_ids

PLACES = ("before", "right", "wrong")  # a branching's state, and those after its gold candidate and after a wrong one
GRAPHS = 20  # per forward


@dataclass(frozen=True)
class Labelled:
    """States ``[n, D]`` and what they shall tell, ``[n]``."""

    states: Tensor
    labels: Tensor


@torch.no_grad()
def target_states(
    model: PreTrainedModel, preset: Preset, count: int, *, split: Split, seed: int
) -> dict[tuple[int, str], tuple[Labelled, Labelled]]:
    """States at the first and the second branching of each question: by number and place, with two kinds of labels.

    A branching is a digit of a node on the way, before the target's own name is spelled, in whose place some legal
    token leads to the target and some other does not. The labels are the target's name, and whether it was the first or
    the second of those shown. Of ``count`` questions.
    """
    found: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    generator = torch.Generator().manual_seed(seed)
    for pack in _packs(preset, count, split, seed, model.device):
        wrong = pack.legal & ~pack.right & (pack.right.any(dim=-1) & _on_the_way(pack, preset)).unsqueeze(-1)
        noise = torch.rand(wrong.shape, generator=generator).to(wrong.device)
        forest, slots = pack.forest.grow(pack.answers - 1, (wrong * (1 + noise)).argmax(dim=-1))
        hidden = forest.hidden(model)
        names, second = _targets(pack, preset)
        length = preset.options.max_answer_length
        branching = wrong.any(dim=-1).view(len(wrong), -1, length)
        number = (branching.cumsum(dim=-1) * branching).flatten(1)
        for which in (1, 2):
            rows, columns = (number == which).nonzero(as_tuple=True)
            name, order = (side[rows, columns // length] for side in (names, second))
            for place, where in zip(PLACES, (pack.answers - 1, pack.answers, slots), strict=True):
                found.setdefault((which, place), []).append((hidden[rows, where[rows, columns]], name, order))
    parts = {key: [torch.cat(part) for part in zip(*several, strict=True)] for key, several in found.items()}
    return {key: (Labelled(states, names), Labelled(states, second)) for key, (states, names, second) in parts.items()}


@torch.no_grad()
def identity_states(
    model: PreTrainedModel, preset: Preset, count: int, arm: Arm, *, split: Split, seed: int
) -> dict[str, Labelled]:
    """States at the last digit of the first generated node and at the arrow behind it, labelled with that node.

    Of gold paths of two nodes or more; of the model that has learned to read mixtures, of its own decoding, with the
    node that it committed.
    """
    states, nodes = (_softly if arm == "soft" else _on_gold)(model, preset, count, split, seed)
    digits = preset.options.digits
    return {name: Labelled(states[:, place], nodes) for name, place in (("last digit", digits - 1), ("arrow", digits))}


def _on_gold(model: PreTrainedModel, preset: Preset, count: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """States at the tokens of first nodes and the arrow ``[n, digits + 1, D]``, and those nodes ``[n]``."""
    options, found = preset.options, []
    for pack in _packs(preset, count, split, seed, model.device):
        tokens = pack.targets.view(len(pack.targets), -1, options.max_answer_length)
        slots = pack.answers.view(tokens.shape)[..., : options.digits + 1]
        longer = tokens[..., options.digits + 1] != PAD  # than one node
        states = at(pack.forest.hidden(model), slots.flatten(1)).view(*slots.shape, -1)
        found.append((states[longer], _node(tokens[..., : options.digits], options.radix)[longer]))
    states, nodes = (torch.cat(part) for part in zip(*found, strict=True))
    return states, nodes


def _softly(model: PreTrainedModel, preset: Preset, count: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """The same of Soft Thinking as it is decoded, an oracle ruling out what is illegal."""
    options, found = preset.options, []
    hops = [most for most in preset.curriculum[-1].hops if most > 1]
    problems = evaluation_problems(options, count + count % 2, hops=hops, seed=seed, split=split)
    table = model.get_input_embeddings().weight
    for first in range(0, len(problems), BATCH):
        part = problems[first : first + BATCH]
        prompts = torch.tensor([prompt_ids(problem, options) for problem in part], device=model.device)
        out = soft_thinking(
            model, prompts, top_n=options.radix, top_k=0, temperature=1.0, max_new_tokens=options.digits + 1,
            logits_processor=LogitsProcessorList([LegalTokens(part, options)]), return_dict_in_generate=True,
        )  # fmt: skip
        assert isinstance(out, ThinkingGenerateOutput)
        assert out.mixtures is not None
        mixed = (out.mixtures.weights.unsqueeze(-1) * table[out.mixtures.tokens.clamp(min=0)]).sum(dim=2)
        read = model.base_model(inputs_embeds=torch.cat([table[prompts], mixed], dim=1)).last_hidden_state
        committed = out.sequences[:, options.prompt_length :]
        longer = committed[:, options.digits] == ARROW
        found.append((
            read[longer, options.prompt_length :], _node(committed[longer, : options.digits], options.radix)
        ))  # fmt: skip
    states, nodes = (torch.cat(part) for part in zip(*found, strict=True))
    return states, nodes


def probe_accuracy(train: Labelled, test: Labelled, *, steps: int = 60, decay: float = 1e-3) -> float:
    """Fit a probe and judge it: the share of test states whose label it tells."""
    mean, spread = train.states.mean(dim=0), train.states.std(dim=0) + 1e-6
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    probe = nn.Linear(train.states.shape[1], classes).to(train.states.device)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")
    states = (train.states - mean) / spread

    def loss() -> float:
        optimizer.zero_grad()
        value = cross_entropy(probe(states), train.labels) + decay * probe.weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    with torch.no_grad():
        told = probe((test.states - mean) / spread).argmax(dim=1)
    return float((told == test.labels).float().mean())


def _packs(preset: Preset, count: int, split: Split, seed: int, device: torch.device) -> list[Pack]:
    """Questions alone, ``count`` of them or a few more."""
    stage, rng = preset.curriculum[-1], np.random.default_rng([seed, 2])
    graphs = min(GRAPHS, math.ceil(count / (2 * stage.pairs)))
    several = range(math.ceil(count / (2 * stage.pairs * graphs)))
    packs = (
        make_pack(stage.options, stage.hops, graphs=graphs, pairs=stage.pairs, walks=0, rng=rng, split=split)
        for _ in several
    )
    return [pack.to(device) for pack in packs]


def _on_the_way(pack: Pack, preset: Preset) -> Tensor:
    """Which of the answers' tokens are digits of a node before the last, bool ``[B, S]``."""
    options = preset.options
    tokens = pack.targets.view(len(pack.targets), -1, options.max_answer_length)
    place = torch.arange(options.max_answer_length, device=tokens.device)
    last = (tokens != PAD).sum(dim=-1, keepdim=True) - (options.digits + 1)  # where the last node begins
    on_the_way = (place < last) & (place % (options.digits + 1) < options.digits)
    return on_the_way.flatten(1)


def _targets(pack: Pack, preset: Preset) -> tuple[Tensor, Tensor]:
    """For each question the target that can be reached, as a name, and whether it is the second of those shown."""
    options = preset.options
    digits, length = options.digits, options.max_answer_length
    first_answer = pack.answers[:, ::length]
    # [Q] first [OR] second [R] root ->
    begin = first_answer - (3 * (digits + 1) + 1)
    shown = [
        _node(torch.stack([_read(pack, begin + offset + 1 + place) for place in range(digits)], dim=-1), options.radix)
        for offset in (0, digits + 1)
    ]
    tokens = pack.targets.view(len(pack.targets), -1, length)
    nodes = tokens.view(*tokens.shape[:2], -1, digits + 1)
    count = (nodes[..., 0] != PAD).sum(dim=-1, keepdim=True)
    last = nodes.gather(2, (count - 1).unsqueeze(-1).expand(-1, -1, -1, digits + 1)).squeeze(2)
    name = _node(last[..., :digits], options.radix)
    return name, (name == shown[1]).long()


def _read(pack: Pack, slots: Tensor) -> Tensor:
    return pack.forest.tokens.gather(1, slots)


def _node(tokens: Tensor, radix: int) -> Tensor:
    """The nodes that digits ``[..., digits]`` spell."""
    digits = tokens.shape[-1]
    place = torch.arange(digits, device=tokens.device)
    values = tokens - FIRST_DIGIT - radix * (place > 0)
    return (values * radix ** (digits - 1 - place)).sum(dim=-1)
