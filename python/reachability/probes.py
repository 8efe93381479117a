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
from arms import Arm, at, mixtures
from model import Preset
from packs import Pack, make_pack
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lbr_kernels.evaluation.reachability import FIRST_DIGIT, PAD, Split

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

    A branching is a place where some legal token leads to the target and some other does not. The labels are the
    target's name, and whether it was the first or the second of those shown. Of ``count`` questions.
    """
    found: dict[tuple[int, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for pack in _packs(preset, count, split, seed, model.device):
        wrong = pack.legal & ~pack.right & pack.right.any(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(seed)
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

    Of a gold path; of Soft Thinking's mixtures along it for the model that has learned those.
    """
    options = preset.options
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"last digit": [], "arrow": []}
    for pack in _packs(preset, count, split, seed, model.device):
        embeds = mixtures(model, pack) if arm == "soft" else None
        hidden = pack.forest.hidden(model, embeds)
        slots = pack.answers.view(len(pack.answers), -1, options.max_answer_length)
        tokens = pack.targets.view(slots.shape)
        longer = tokens[..., options.digits + 1] != PAD  # than one node
        node = _node(tokens[..., : options.digits], options.radix)
        for name, place in (("last digit", options.digits - 1), ("arrow", options.digits)):
            states = at(hidden, slots[..., place])
            found[name].append((states[longer], node[longer]))
    return {
        name: Labelled(torch.cat([s for s, _ in several]), torch.cat([n for _, n in several]))
        for name, several in found.items()
    }


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
        return float(value)

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
