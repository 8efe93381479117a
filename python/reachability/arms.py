"""What every method of the study learns from a batch. All see the same batches, in the same order.

* ``cot``: next-token cross-entropy on a gold path.
* ``soft``: the same, but what stands in the place of an answer's token is the mixture of the legal tokens' embeddings,
  in the proportions in which the model expects them (Soft Thinking).
* ``oracle``: the legal tokens of every branching are forwarded, and a router is asked for the gold one (the paper's
  LBR); beside ``cot``'s loss, model and router together.
* ``lbr``: the same for candidates that are drawn from the model as decoding draws them, K independent draws at
  temperature 1, illegal and equal ones among them, and for depth 2 K children of each. The router is asked for a
  candidate that leads to the reachable target; where several do they share the credit, and where all or none do there
  is nothing to learn.
* ``independent``: ``lbr`` with routers that judge every candidate alone (the paper's ablation).

Every loss has a part for the tokens after the next one (multi-token prediction), as pre-training on random walks has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from forest import Forest
from model import DEPTHS, Preset
from packs import Pack
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lbr_kernels.evaluation.reachability import EOS, PAD
from lbr_kernels.ops.tree_shape import num_slots
from lbr_kernels.router import Router

Arm: TypeAlias = Literal["cot", "soft", "oracle", "lbr", "independent"]
ARMS: tuple[Arm, ...] = ("cot", "soft", "oracle", "lbr", "independent")
DEPTHS_OF: dict[Arm, tuple[int, ...]] = {"cot": (), "soft": (), "oracle": (1,), "lbr": DEPTHS, "independent": DEPTHS}

WIDTHS = (2, 3)
AHEAD, AHEAD_WEIGHT = 4, 0.3  # tokens that are predicted at once, and the weight of all but the first
REDRAWS = 4  # sets of candidates drawn at every position, from which the trees are taken


class MultiToken(nn.Module):
    """Maps from a hidden state to what the head would see 1, 2, ... tokens later; used in training alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        maps = [nn.Linear(dim, dim, bias=False) for _ in range(AHEAD - 1)]
        for linear in maps:
            nn.init.zeros_(linear.weight)
        self.later = nn.ModuleList(maps)

    def loss(self, states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        """Mean cross-entropy; ``states [n, A, D]`` before each of A tokens of a text, ``targets [n, A]``."""
        losses = []
        for offset, linear in enumerate(self.later[: targets.shape[1] - 1], start=1):
            early = states[:, :-offset]
            logits = head(early + linear(early))
            losses.append(cross_entropy(logits.flatten(0, 1), targets[:, offset:].flatten(), ignore_index=PAD))
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Decisions:
    """What a router said about n sets of candidates.

    ``log_probs [n, K]``, -inf where there is no candidate; ``right`` bool ``[n, K]``, neither all nor none of a row.
    """

    log_probs: Tensor
    right: Tensor

    def loss(self) -> Tensor:
        """Negative log-probability of choosing right, the mean; 0 of no decisions."""
        wrong_out = self.log_probs.masked_fill(~self.right, -torch.inf)
        return -wrong_out.logsumexp(dim=1).sum() / max(len(self.right), 1)

    def accuracy(self) -> float:
        """How often the likeliest candidate is right."""
        return self.right.gather(1, self.log_probs.argmax(dim=1, keepdim=True)).float().mean().item()

    def divergence(self) -> float:
        """KL from the uniform distribution over the right candidates to the router's, in nats, the mean."""
        count = self.right.sum(dim=1)
        cross = -self.log_probs.masked_fill(~self.right, 0).sum(dim=1) / count
        return (cross - count.log()).mean().item()


def language_model_loss(model: PreTrainedModel, ahead: MultiToken, states: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token and of those after it; ``states [B, S, D]`` in front of the answers' tokens."""
    head = model.get_output_embeddings()
    next_token = cross_entropy(head(states).flatten(0, 1), pack.targets.flatten(), ignore_index=PAD)
    texts = len(states) * pack.branches
    return next_token, ahead.loss(states.reshape(texts, -1, states.shape[-1]), pack.targets.reshape(texts, -1), head)


def mixtures(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Soft Thinking's inputs ``[B, N, D]``: an answer's tokens are mixed with whatever is legal in their place.

    The proportions are the model's own behind mixtures in the proportions that it has on the gold path: decoding, which
    gives each from the ones before it, twice approximated. They have no gradient; the embeddings have.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    there = pack.legal.any(dim=-1, keepdim=True)
    slots = pack.answers.unsqueeze(-1).expand(-1, -1, embeddings.embedding_dim)
    tokens: Tensor = embeddings(pack.forest.tokens)
    inputs = tokens
    for _ in range(2):
        with torch.no_grad():
            logits = model.get_output_embeddings()(at(pack.forest.hidden(model, inputs), pack.answers - 1)).float()
            shares = logits.masked_fill(~pack.legal & there, -torch.inf).softmax(dim=-1)
            shares = torch.where(there, shares, nn.functional.one_hot(pack.targets, shares.shape[-1]).to(shares.dtype))
        inputs = tokens.scatter(1, slots, shares @ embeddings.weight)
    return inputs


@dataclass(frozen=True)
class Twigs:
    """Candidates that hang on a forest's answers, in sets of K: ``slots``, ``valid``, ``right`` are ``[B, M, K]``."""

    slots: Tensor
    valid: Tensor
    right: Tensor


def legal_twigs(pack: Pack) -> tuple[Forest, Twigs]:
    """The legal tokens of every branching on a way to a target, the gold one first: it is on the answer already.

    A router cannot see which is first. M is the most branchings that a row has, K the most tokens that are legal.
    """
    branching = (pack.legal.sum(dim=-1) > 1) & pack.right.any(dim=-1)
    count, width = int(branching.sum(dim=1).max()), int(pack.legal.sum(dim=-1).max())
    there, place = branching.float().topk(count, dim=1)
    legal, right = (at(mask, place) for mask in (pack.legal, pack.right))
    gold = pack.targets.gather(1, place)
    first = torch.zeros_like(legal, dtype=torch.float32).scatter(2, gold.unsqueeze(-1), 1.0)
    valid, tokens = (legal + first).topk(width, dim=2)
    exists = (valid > 0) & (there > 0).unsqueeze(-1)
    parents = (pack.answers.gather(1, place) - 1).repeat_interleave(width - 1, dim=1)
    forest, slots = pack.forest.grow(parents, tokens[..., 1:].flatten(1))
    on_answer = pack.answers.gather(1, place).unsqueeze(-1)
    grown = slots.view(len(slots), count, width - 1)
    return forest, Twigs(torch.cat([on_answer, grown], dim=2), exists, right.gather(2, tokens) & exists)


def oracle_decisions(hidden: Tensor, twigs: Twigs, router: Router, *, gold: bool) -> Decisions:
    """What the router makes of legal candidates. Right is the gold one, or else all that lead to the target."""
    sets = twigs.valid.any(dim=-1)
    states = at(hidden, twigs.slots.flatten(1)).view(*twigs.slots.shape, -1)[sets]
    valid, right = twigs.valid[sets], twigs.right[sets]
    log_probs = router(states, valid.shape[-1], valid=valid)
    if gold:
        return Decisions(log_probs, torch.arange(valid.shape[-1], device=valid.device).expand_as(valid) == 0)
    told = (right != valid).any(dim=1)
    return Decisions(log_probs[told], right[told])


@dataclass(frozen=True)
class DrawnTrees:
    """Lookahead trees of the largest width and depth on a forest's answers; M per row.

    ``layers[l]`` are the slots ``[B, M * K^(l+1)]`` of a layer's nodes, ``exists[l]`` whether they do, ``right`` bool
    ``[B * M, K]`` which candidates are right.
    """

    layers: list[Tensor]
    exists: list[Tensor]
    right: Tensor


def drawn_trees(model: PreTrainedModel, pack: Pack, count: int) -> tuple[Tensor, Forest, DrawnTrees]:
    """Grow lookahead trees at ``count`` positions per row where some candidates are right and some are wrong.

    Children are independent draws at temperature 1, so the first K of each node form a tree of width K. Besides the
    grown forest, its states ``[B, N, D]``.
    """
    head, reading = model.get_output_embeddings(), pack.forest.read(model)
    width, depth = max(WIDTHS), max(DEPTHS)
    with torch.no_grad():
        candidates = draw(head(at(reading.hidden, pack.answers - 1)), REDRAWS * width)
        candidates = candidates.reshape(len(candidates), -1, width)
        right = pack.right.repeat_interleave(REDRAWS, dim=1).gather(2, candidates)
        mixed = right.any(dim=-1) & ~right.all(dim=-1)
        picked = (mixed + torch.rand(mixed.shape, device=mixed.device)).topk(count, dim=1).indices
        right, candidates = at(right, picked), at(candidates, picked)

        parents = (pack.answers - 1).gather(1, picked // REDRAWS).repeat_interleave(width, dim=1)
        forest, slots = pack.forest.grow(parents, candidates.flatten(1))
        layers, exists = [slots], [torch.ones_like(slots, dtype=torch.bool)]
        known = pack.forest.tokens.shape[1]
        for _ in range(1, depth):
            states = reading.twigs(model, forest.parents[:, known:], forest.tokens[:, known:])
            children = draw(head(at(states, layers[-1] - known)), width)
            alive = exists[-1] & (forest.tokens.gather(1, layers[-1]) != EOS)
            forest, slots = forest.grow(layers[-1].repeat_interleave(width, dim=1), children.flatten(1))
            layers.append(slots)
            exists.append(alive.repeat_interleave(width, dim=1))
    states = reading.twigs(model, forest.parents[:, known:], forest.tokens[:, known:])
    return torch.cat([reading.hidden, states], dim=1), forest, DrawnTrees(layers, exists, right.flatten(0, 1))


def drawn_decisions(hidden: Tensor, trees: DrawnTrees, router: Router, *, width: int, depth: int) -> Decisions:
    """What a router of that depth makes of the trees that the first ``width`` children of every node form."""
    sets, widest = trees.right.shape
    states, valid = [], []
    for level in range(1, depth + 1):
        grid, first = (sets, *[widest] * level), (slice(None), *[slice(width)] * level)
        nodes = at(hidden, trees.layers[level - 1])
        states.append(nodes.view(*grid, -1)[first].flatten(1, level))
        valid.append(trees.exists[level - 1].view(grid)[first].flatten(1))
    assert sum(part.shape[1] for part in valid) == num_slots(width, depth)
    log_probs = router(torch.cat(states, dim=1), width, valid=torch.cat(valid, dim=1))
    right = trees.right[:, :width]
    told = right.any(dim=1) & ~right.all(dim=1)
    return Decisions(log_probs[told], right[told])


def losses(
    arm: Arm, model: PreTrainedModel, ahead: MultiToken, routers: nn.ModuleDict, pack: Pack, preset: Preset
) -> dict[str, Tensor]:
    """All terms of a method's loss by name; their sum is what it learns from."""
    trees, twigs = None, None
    if arm == "cot":
        hidden = pack.forest.hidden(model)
    elif arm == "soft":
        hidden = pack.forest.hidden(model, mixtures(model, pack))
    elif arm == "oracle":
        forest, twigs = legal_twigs(pack)
        hidden = forest.hidden(model)
    else:
        hidden, _, trees = drawn_trees(model, pack, preset.trees)
    next_token, later = language_model_loss(model, ahead, at(hidden, pack.answers - 1), pack)
    terms = {"next": next_token, "later": AHEAD_WEIGHT * later}
    if twigs is not None:
        terms["router"] = oracle_decisions(hidden, twigs, cast(Router, routers["1"]), gold=True).loss()
    if trees is not None:
        told = [
            drawn_decisions(hidden, trees, cast(Router, routers[str(depth)]), width=width, depth=depth).loss()
            for width in WIDTHS
            for depth in DEPTHS
        ]
        terms["router"] = torch.stack(told).mean()
    return terms


@torch.no_grad()
def router_quality(
    arm: Arm, model: PreTrainedModel, routers: nn.ModuleDict, pack: Pack, preset: Preset
) -> dict[str, float]:
    """Accuracy and divergence at branchings (``oracle``), or where drawn candidates differ in being right."""
    if arm == "oracle":
        forest, twigs = legal_twigs(pack)
        told = {"": oracle_decisions(forest.hidden(model), twigs, cast(Router, routers["1"]), gold=False)}
    elif arm in ("lbr", "independent"):
        hidden, _, trees = drawn_trees(model, pack, preset.trees)
        told = {
            f" K={width} L={depth}": drawn_decisions(
                hidden, trees, cast(Router, routers[str(depth)]), width=width, depth=depth
            )
            for width in WIDTHS
            for depth in DEPTHS
        }
    else:
        told = {}
    quality = {f"router accuracy{name}": decisions.accuracy() for name, decisions in told.items()}
    return quality | {f"router divergence{name}": decisions.divergence() for name, decisions in told.items()}


def at(values: Tensor, slots: Tensor) -> Tensor:
    """``values [B, N, D]`` at the slots ``[B, n]``: ``[B, n, D]``."""
    return values.gather(1, slots.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def draw(logits: Tensor, count: int) -> Tensor:
    """``count`` independent draws from the softmax of ``[B, n, V]``: ``[B, n, count]``."""
    probs = logits.float().softmax(dim=-1)
    drawn = torch.multinomial(probs.flatten(0, 1), count, replacement=True)
    return drawn.view(*logits.shape[:-1], count)
