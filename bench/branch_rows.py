"""The likelihood of a trajectory without tree attention: the trunk once, then every branch as a row on a copied cache.

The best that plain transformers and PyTorch do for depth 1: one causal forward of the committed text, whose cache every
candidate that was not chosen then continues as a row of the batch, some decisions at a time. Each of these parts is
differentiated at once, into the gradients of the trunk's keys, values and states, so that one part's copies are alive
at a time; the trunk is differentiated last. This is what ``training.trajectory_log_probs`` is measured against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lbr_kernels import Router
from lbr_kernels.decoding.cache import CACHE_NAME
from lbr_kernels.decoding.trajectory import DecodingSettings, TreeTrajectory


def random_trajectory(model: PreTrainedModel, *, prompt: int, steps: int, width: int, depth: int) -> TreeTrajectory:
    """One row of random tokens and choices, every node of the full tree there; nobody drew it."""
    vocabulary = model.config.vocab_size
    nodes = sum(width**layer for layer in range(1, depth)) + steps * width**depth
    settings = DecodingSettings(
        width=width, depth=depth, mode="sampled", filters={}, router_temperature=1.0, router_do_sample=True,
        eos_token_ids=[], seed=0, model_fingerprint="", router_fingerprint="",
    )  # fmt: skip
    return TreeTrajectory(
        prompt_ids=torch.randint(vocabulary, (1, prompt)),
        prompt_mask=torch.ones((1, prompt), dtype=torch.bool),
        node_tokens=torch.randint(vocabulary, (1, nodes)),
        node_log_probs=torch.zeros((1, nodes)),
        choices=torch.randint(width, (1, steps)),
        router_log_probs=torch.zeros((1, steps)),
        num_committed=torch.tensor([steps]),
        streams=torch.zeros(1, dtype=torch.int64),
        settings=settings,
    )


class BranchRows:
    """Log-likelihood and gradients of one row of depth 1; ``decisions_each`` steps' branches are forwarded together."""

    def __init__(self, model: PreTrainedModel, router: Router, *, decisions_each: int) -> None:
        self.model, self.router, self.decisions_each = model, router, decisions_each

    def __call__(self, trajectory: TreeTrajectory) -> tuple[Tensor, Tensor]:
        """The two sums of Eq. 1; the gradients of their sum are added to the parameters'."""
        K, steps, prompt = trajectory.settings.width, trajectory.num_steps, trajectory.prompt_ids.shape[1]
        tokens, choices = trajectory.node_tokens[0].view(steps, K), trajectory.choices[0]
        text = torch.cat([trajectory.prompt_ids[0], tokens.gather(1, choices[:, None])[:, 0]])
        cache = DynamicCache(config=self.model.config)
        out = self.model.base_model(input_ids=text[None], use_cache=True, **{CACHE_NAME: cache})
        states = out.last_hidden_state[0]
        logits = self.model.get_output_embeddings()(states[prompt - 1 : -1])
        nodes = logits.float().log_softmax(-1).gather(1, tokens).sum()

        tensors = [states, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        decided = torch.zeros(())
        for first in range(0, steps, self.decisions_each):
            part = slice(first, first + self.decisions_each)
            log_prob = self._decisions(leaves, tokens[part], choices[part], prompt + first)
            log_prob.backward()
            decided = decided + log_prob.detach()
        torch.autograd.backward([nodes, *tensors], [torch.ones(()), *(leaf.grad for leaf in leaves)])
        return nodes.detach(), decided

    def _decisions(self, leaves: list[Tensor], tokens: Tensor, choices: Tensor, start: int) -> Tensor:
        """The router's part for some steps, the first of which stands behind ``start`` tokens of text."""
        steps, K = tokens.shape
        trunk, *past = leaves
        others = torch.ones_like(tokens, dtype=torch.bool).scatter_(1, choices[:, None], False)
        rows, longest = steps * (K - 1), start + steps - 1
        lens = (start + torch.arange(steps)).repeat_interleave(K - 1)
        cache = DynamicCache(config=self.model.config)
        for number in range(len(past) // 2):
            keys, values = (tensor[:, :, :longest].expand(rows, -1, -1, -1) for tensor in past[2 * number :][:2])
            cache.update(keys, values, number)
        visible = torch.cat([torch.arange(longest) < lens[:, None], torch.ones((rows, 1), dtype=torch.bool)], dim=1)
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        inputs: dict[str, Any] = {CACHE_NAME: cache, "attention_mask": mask[:, None, None], "use_cache": True}
        side = self.model.base_model(
            input_ids=tokens[others][:, None], position_ids=lens[:, None], **inputs
        ).last_hidden_state[:, 0]
        hidden = trunk[start : start + steps, None].expand(-1, K, -1).masked_scatter(others[..., None], side)
        log_probs: Tensor = self.router(hidden, K)
        return log_probs.gather(1, choices[:, None]).sum()
