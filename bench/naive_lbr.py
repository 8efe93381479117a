"""Local Branch Routing as one would first write it: every path of the tree is a row of the batch.

K^L copies of the cache stand beside each other; after a choice the survivors' rows are gathered, each as often as it
has children, and their new tokens are forwarded. This is the baseline that ``lbr_kernels.generate`` is measured
against: plain transformers and PyTorch, with the module for a router and transformers' warpers, no kernel of this
package. One text at a time, without an end token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from lbr_kernels import Router
from lbr_kernels.decoding.cache import CACHE_NAME
from lbr_kernels.ops.tree_shape import layer_offset, num_slots, path_slots


class NaiveDecoder:
    """Decodes one prompt. ``do_sample=False`` takes the most likely tokens and choices, so that it can be checked."""

    def __init__(
        self,
        model: PreTrainedModel,
        router: Router,
        *,
        width: int,
        depth: int,
        warpers: LogitsProcessorList,
        do_sample: bool = True,
    ) -> None:
        self.model, self.router, self.warpers = model, router, warpers
        self.width, self.depth, self.do_sample = width, depth, do_sample

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """The ids ``[1, P + max_new_tokens]``."""
        K, L = self.width, self.depth
        cache = DynamicCache(config=self.model.config)
        logits, _ = self._forward(input_ids, cache)
        text = input_ids
        # Of every slot of the tree, in level order.
        tokens = input_ids.new_zeros(num_slots(K, L))
        hidden = logits.new_zeros((num_slots(K, L), self.router.config.hidden_size))
        paths = path_slots(K, L, input_ids.device).flatten(0, 1)
        for layer in range(1, L):
            logits = self._grow(layer, logits, cache, tokens, hidden)
        for _ in range(max_new_tokens):
            logits = self._grow(L, logits, cache, tokens, hidden)
            log_probs = self.router(hidden[None], K)[0]
            choice = int(torch.multinomial(log_probs.exp(), 1) if self.do_sample else log_probs.argmax())
            text = torch.cat([text, tokens[choice].view(1, 1)], dim=1)
            # The rows whose paths begin with the choice survive; their inner nodes move up a layer.
            rows = (paths[:, 0] == choice).nonzero()[:, 0]
            cache.batch_select_indices(rows)
            logits = logits[rows]
            for layer in range(1, L):
                here = slice(layer_offset(K, layer), layer_offset(K, layer + 1))
                first = layer_offset(K, layer + 1) + choice * K**layer
                tokens[here], hidden[here] = tokens[first : first + K**layer], hidden[first : first + K**layer]
        return text

    def _grow(self, layer: int, logits: Tensor, cache: DynamicCache, tokens: Tensor, hidden: Tensor) -> Tensor:
        """K children for every row, each in a row of its own from now on."""
        processed = self.warpers(tokens.new_zeros((len(logits), 1)), logits.float())
        if self.do_sample:
            drawn = torch.multinomial(processed.softmax(-1), self.width, replacement=True)
        else:
            drawn = processed.topk(self.width).indices
        cache.batch_repeat_interleave(self.width)
        here = slice(layer_offset(self.width, layer), layer_offset(self.width, layer + 1))
        tokens[here] = drawn.flatten()
        logits, hidden[here] = self._forward(drawn.view(-1, 1), cache)
        return logits

    def _forward(self, input_ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
        try:
            out = self.model(input_ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        finally:
            handle.remove()
        return out.logits[:, -1], seen[0]
