"""Local Branch Routing one row at a time, by brute force: what the decoder is compared with, token for token.

Contract
--------
``decode_row`` says the specification again in the slowest and plainest way. It shares no code with the package; a
router is the one thing that it calls.

* Every hidden state and every distribution comes from a fresh batch-1 forward ``model(input_ids=...)`` of prompt +
  committed tokens + path, without masks and without anything left from another forward. The hidden state is what the
  output head is given, the logits are the model's own, both at the last position.
* The filtered distribution is temperature, top-k, top-p and min-p, each on what the one before left, in fp64.
* ``do_sample=True``: a node's children are ``width`` independent draws, each the first token, in token order, whose
  running probability exceeds its uniform number. ``do_sample=False``: the up to ``width`` most likely distinct tokens
  that the filters and a min-p floor of ``candidate_min_p`` leave, ties to the lowest id.
* A uniform number is Philox4x32-10 of (slot, step, stream) under the seed: ``step`` is the number of tokens committed
  when a child is grown, ``slot`` the child's place in the full tree in level order (layer 1 first; node i of a layer
  has the children i*width .. i*width + width - 1 of the next). The router's draw takes the slot after the last.
* A node has no children if its token ends the text, or if they would be committed tokens past ``max_new_tokens``, or
  if their position would pass ``last_position``. The first new token has the position ``len(prompt)``.
* A row ends with a committed end of text, with ``max_new_tokens`` tokens, or when no candidate can follow. After the
  last commit nothing is grown.

A tree is a list of layers, a layer the list of its ``width**l`` tokens, and ``NO_NODE`` stands where no node exists.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lbr_kernels.router import Router

NO_NODE = -1
WORD = 0xFFFFFFFF


@dataclass
class OracleRow:
    """What one row committed, and its tree in the trajectory's order.

    ``node_tokens`` and ``node_log_probs`` hold the warm-up's layers 1 .. depth - 1 in level order, then the
    ``width**depth`` nodes of the deepest layer for every step; -1 and 0 where no node exists. Log-probabilities are
    those of the filtered distribution. ``choices`` and ``router_log_probs`` hold one entry per step, the latter the
    log-probability of the choice.
    """

    tokens: list[int] = field(default_factory=list)
    node_tokens: list[int] = field(default_factory=list)
    node_log_probs: list[float] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    router_log_probs: list[float] = field(default_factory=list)


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & WORD, (product0 >> 32) ^ c3 ^ k1, product0 & WORD
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform_number(seed: int, stream: int, step: int, slot: int) -> float:
    """The uniform number in [0, 1), of 53 bits, that belongs to one draw."""
    counter = (slot & WORD, step & WORD, stream & WORD, (stream >> 32) & WORD)
    w0, w1, _, _ = philox4x32_10(counter, (seed & WORD, (seed >> 32) & WORD))
    return ((w0 << 21) | (w1 >> 11)) * 2.0**-53


def filtered_log_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """fp64 log-probabilities ``[V]`` of the filtered distribution of ``logits`` ``[V]``; -inf for what is filtered out.

    ``top_k=0``, ``top_p=1`` and ``min_p=0`` are off. Whatever equals the k-th largest logit stays. A token is in the
    nucleus if those before it weigh less than ``top_p``; among equal logits the larger id comes before.
    """
    x = logits.detach().cpu().double() / temperature
    if 0 < top_k < len(x):
        kth = sorted(x.tolist(), reverse=True)[top_k - 1]
        x[x < kth] = -math.inf
    # Weights are relative to the most likely token, which every filter keeps: equal logits have exactly equal weights.
    weights = (x - x.max()).exp()
    if top_p < 1:
        values = x.tolist()
        descending = sorted(range(len(values)), key=lambda token: (values[token], token), reverse=True)
        limit = top_p * weights.sum().item()
        before = 0.0
        for rank, token in enumerate(descending):
            weight = weights[token].item()
            if rank > 0 and before >= limit:
                x[token] = -math.inf
            before += weight
    if min_p > 0:
        x[weights < min_p] = -math.inf
    return x - torch.logsumexp(x, dim=0)


def draw(log_probs: Tensor, uniform: float) -> int:
    """The first index, in order, whose running probability exceeds ``uniform``; one of probability zero never is."""
    probs = log_probs.detach().cpu().double().exp()
    running = probs.cumsum(dim=0)
    exceeding = (running > uniform * running[-1]).nonzero().flatten().tolist()
    # Rounding may leave none for a uniform number next to 1.
    return int(exceeding[0]) if exceeding else int(probs.nonzero()[-1])


def most_likely(log_probs: Tensor, count: int) -> list[int]:
    """The up to ``count`` most likely tokens of positive probability, ties to the lowest id, then ``NO_NODE``."""
    values = log_probs.tolist()
    kept = [token for token, value in enumerate(values) if value > -math.inf]
    best = sorted(kept, key=lambda token: (-values[token], token))[:count]
    return best + [NO_NODE] * (count - len(best))


class FreshForward:
    """The last position's (hidden state, logits), fp32, of a text; a text met before is looked up."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, text: list[int]) -> tuple[Tensor, Tensor]:
        if tuple(text) not in self.known:
            self.known[tuple(text)] = self._forward(text)
        return self.known[tuple(text)]

    def _forward(self, text: list[int]) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])

        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(catch)
        try:
            logits = self.model(input_ids=torch.tensor([text], device=self.model.device)).logits
        finally:
            handle.remove()
        (hidden,) = caught
        return hidden[0, -1].float(), logits[0, -1].float()


@torch.no_grad()
def decode_row(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    width: int,
    depth: int,
    max_new_tokens: int,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    router: Router | None = None,
    router_temperature: float = 1.0,
    router_do_sample: bool | None = None,
    candidate_min_p: float = 0.05,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    stream: int = 0,
    last_position: int | None = None,
) -> OracleRow:
    """Decode one row; the module's docstring has the rules.

    Args:
        model: a causal language model in eval mode.
        prompt: its tokens, at least one.
        width, depth: the tree's K and L.
        max_new_tokens: how many tokens are committed at most.
        do_sample: draw the children, or take the most likely tokens.
        temperature, top_k, top_p, min_p: the filters; they hold in both modes.
        router: None is uniform over the candidates that exist.
        router_temperature: the routing temperature.
        router_do_sample: draw the choice, or take the argmax (ties to the first); ``do_sample`` by default.
        candidate_min_p: the min-p floor of the children where they are not drawn.
        eos_ids: the tokens that end a text.
        seed, stream: 64-bit integers, the key of the draws and the row's own number.
        last_position: the last position id that a node may have; None is no limit.
    """
    if not do_sample:
        min_p = max(min_p, candidate_min_p)
    if router_do_sample is None:
        router_do_sample = do_sample
    layer_sizes = [width ** (layer + 1) for layer in range(depth)]
    forward = FreshForward(model)
    row = OracleRow()
    tree: list[list[int]] = []

    def path_to(layer: int, index: int) -> list[int]:
        """The tokens from the root's child to a node; ``layer`` counts from 0, and the root itself is layer -1."""
        return [tree[above][index // width ** (layer - above)] for above in range(layer + 1)]

    def has_children(text: list[int]) -> bool:
        """Whether tokens may follow ``text``, which is committed tokens and a path."""
        if text and text[-1] in eos_ids:
            return False
        position = len(prompt) + len(text)
        return len(text) + 1 <= max_new_tokens and (last_position is None or position <= last_position)

    def children_of(text: list[int], first_slot: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of ``width`` children, the first of which has the slot ``first_slot``."""
        _, logits = forward(prompt + text)
        log_probs = filtered_log_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if do_sample:
            step = len(row.tokens)
            slots = range(first_slot, first_slot + width)
            children = [draw(log_probs, uniform_number(seed, stream, step, slot)) for slot in slots]
        else:
            children = most_likely(log_probs, width)
        return children, [0.0 if child == NO_NODE else log_probs[child].item() for child in children]

    def grow() -> None:
        """Add one layer to the tree, and its nodes to the trajectory."""
        layer = len(tree)
        tokens: list[int] = []
        for parent in range(width**layer):
            path = path_to(layer - 1, parent)
            if NO_NODE not in path and has_children(row.tokens + path):
                first_slot = sum(layer_sizes[:layer]) + parent * width
                children, log_probs = children_of(row.tokens + path, first_slot)
            else:
                children, log_probs = [NO_NODE] * width, [0.0] * width
            tokens += children
            row.node_tokens += children
            row.node_log_probs += log_probs
        tree.append(tokens)

    def candidate_log_probs() -> Tensor:
        """The router's log-probabilities ``[width]`` of the tree's candidates, -inf for those that do not exist."""
        valid = torch.tensor([token != NO_NODE for layer in tree for token in layer])
        if router is None:
            return torch.log(valid[:width].double() / valid[:width].sum())
        root_hidden, _ = forward(prompt + row.tokens)
        states = [
            forward(prompt + row.tokens + path_to(layer, index))[0]
            if tree[layer][index] != NO_NODE
            else torch.zeros_like(root_hidden)
            for layer in range(depth)
            for index in range(layer_sizes[layer])
        ]
        hidden = torch.stack(states).unsqueeze(0)
        log_probs: Tensor = router(
            hidden, width, valid=valid.unsqueeze(0).to(hidden.device), temperature=router_temperature
        )
        return log_probs[0]

    def commit(choice: int) -> None:
        """Make the chosen candidate the new root: what is below it moves up one layer, the rest is dropped."""
        row.tokens.append(tree[0][choice])
        below = [layer[choice * size : (choice + 1) * size] for layer, size in zip(tree[1:], layer_sizes, strict=False)]
        tree[:] = below

    while has_children(row.tokens):
        while len(tree) < depth:
            grow()
        log_probs = candidate_log_probs()
        if router_do_sample:
            choice = draw(log_probs, uniform_number(seed, stream, len(row.tokens), sum(layer_sizes)))
        else:
            choice = max(range(width), key=log_probs.tolist().__getitem__)
        row.choices.append(choice)
        row.router_log_probs.append(log_probs[choice].item())
        commit(choice)

    if not row.choices:
        # No step was taken: the warm-up's layers are there, and empty.
        row.node_tokens = [NO_NODE] * sum(layer_sizes[:-1])
        row.node_log_probs = [0.0] * sum(layer_sizes[:-1])
    return row
