"""Trees of tokens over a causal language model, with gradients; and a plain LBR decoder on top of them.

A training batch is a tree: a graph's text is the trunk, every question about it is a branch, and the candidates that
decoding would draw are twigs on its answer. So is everything that LBR forwards while it decodes one prompt. Both are
a :class:`TokenTree`: new nodes are forwarded against the cache of all earlier ones with a 4-D mask, nothing is ever
removed, and autograd sees through the cache. This is the short way to write it, not the fast one; the library's own
``generate`` prunes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lbr_kernels.decoding.cache import CACHE_NAME
from lbr_kernels.router import Router


class TokenTree:
    """A batch of growing token trees. Nodes are named by their slot, the order in which they were forwarded.

    ``tokens``, ``positions`` and ``hidden`` (the input of the output head) are ``[B, T, ...]`` over all slots so far.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, positions: Tensor, visible: Tensor) -> None:
        """Forward the first nodes: ``tokens`` and ``positions`` ``[B, T]``, ``visible`` bool ``[B, T, T]``."""
        self.model = model
        self.tokens, self.positions, self.visible = tokens, positions, visible
        self._cache = DynamicCache(config=model.config)
        self.hidden = self._forward(tokens, positions, visible)

    @classmethod
    def from_prompts(cls, model: PreTrainedModel, tokens: Tensor) -> TokenTree:
        """The trees of prompts of one length, ``[B, T]``, without branches."""
        batch, length = tokens.shape
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        return cls(model, tokens, torch.arange(length).expand(batch, -1), visible.expand(batch, -1, -1))

    def grow(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Forward ``tokens [B, N]`` as children of the slots ``parents [B, N]``; returns their slots ``[B, N]``."""
        batch, known = self.tokens.shape
        new = parents.shape[1]
        ancestors = self.visible.gather(1, parents.unsqueeze(-1).expand(-1, -1, known))
        rows = torch.cat([ancestors, torch.eye(new, dtype=torch.bool).expand(batch, -1, -1)], dim=2)
        positions = self.positions.gather(1, parents) + 1
        hidden = self._forward(tokens, positions, rows)
        self.visible = torch.cat([torch.nn.functional.pad(self.visible, (0, new)), rows], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        self.hidden = torch.cat([self.hidden, hidden], dim=1)
        return torch.arange(known, known + new).expand(batch, -1)

    def logits(self, slots: Tensor) -> Tensor:
        """Next-token logits ``[B, N, vocabulary]`` (fp32) after the slots ``[B, N]``."""
        logits: Tensor = self.model.get_output_embeddings()(self.hidden_at(slots)).float()
        return logits

    def hidden_at(self, slots: Tensor) -> Tensor:
        """Hidden states ``[B, N, hidden_size]`` of the slots ``[B, N]``."""
        return self.hidden.gather(1, slots.unsqueeze(-1).expand(-1, -1, self.hidden.shape[2]))

    def _forward(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        hidden: Tensor = self.model.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=mask.unsqueeze(1), **{CACHE_NAME: self._cache}
        ).last_hidden_state
        return hidden


def draw(logits: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` independent draws with replacement from the softmax of ``[..., V]``, ``[..., count]``."""
    probs = logits.softmax(dim=-1).flatten(0, -2)
    return torch.multinomial(probs, count, replacement=True, generator=generator).view(*logits.shape[:-1], count)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    end: int,
    width: int = 1,
    depth: int = 1,
    router: Router | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rolling LBR on prompts ``[B, T]`` of one length: grow, route, commit, shift; at width 1 plain decoding.

    Children are drawn at temperature 1 and the route from the router; ``greedy`` takes the most likely token and needs
    width 1. ``router=None`` is the uniform router. Returns ``[B, max_new_tokens]``; what follows ``end`` in a row is
    meaningless.
    """
    if greedy and width != 1:
        raise ValueError(f"decode: width is {width}, expected 1 with greedy=True")
    batch = len(prompts)
    rows = torch.arange(batch)
    tree = TokenTree.from_prompts(model, prompts)
    exists = torch.ones_like(prompts, dtype=torch.bool)

    def grow(frontier: Tensor) -> Tensor:
        nonlocal exists
        logits = tree.logits(frontier)
        tokens = logits.argmax(dim=-1, keepdim=True) if greedy else draw(logits, width, generator)
        parents = frontier.repeat_interleave(width, dim=1)
        expandable = exists.gather(1, parents) & (tree.tokens.gather(1, parents) != end)
        exists = torch.cat([exists, expandable], dim=1)
        return tree.grow(parents, tokens.flatten(1))

    frontier = torch.full((batch, 1), prompts.shape[1] - 1)
    layers: list[Tensor] = []
    committed: list[Tensor] = []
    for _ in range(max_new_tokens):
        while len(layers) < depth:
            layers.append(grow(layers[-1] if layers else frontier))
        slots = torch.cat(layers, dim=1)
        if router is None:
            choice = torch.randint(width, (batch,), generator=generator)
        else:
            log_probs = router(tree.hidden_at(slots).float(), width, valid=exists.gather(1, slots))
            choice = draw(log_probs, 1, generator)[:, 0]
        frontier, *layers = (layer.view(batch, width, -1)[rows, choice] for layer in layers)
        committed.append(tree.tokens.gather(1, frontier))
    return torch.cat(committed, dim=1)
