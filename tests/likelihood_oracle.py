"""The likelihood of a trajectory by brute force: what the packed forward is compared with, node by node.

Contract
--------
Every hidden state and every distribution comes from a fresh batch-1 forward ``model(input_ids=...)`` of prompt +
committed tokens + path, without masks, caches or anything left from another forward; the hidden state is what the
output head is given. Which node stands where is read off the trajectory by its own contract (``test_packing.walk``).
Differentiable.
"""

from __future__ import annotations

import torch
from test_packing import walk
from torch import Tensor


class FreshForwards:
    """The model's answers to token sequences, each computed once."""

    def __init__(self, model) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Hidden state ``[D]`` and log-probabilities ``[V]`` behind ``ids``."""
        if ids not in self._known:
            seen = []
            handle = self.model.get_output_embeddings().register_forward_pre_hook(
                lambda module, args: seen.append(args[0])
            )
            try:
                logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            finally:
                handle.remove()
            log_probs = logits.double().log_softmax(-1)
            self._known[ids] = (seen[0][0, -1], log_probs if logits.dtype == torch.float64 else log_probs.float())
        return self._known[ids]


def likelihood(model, router, trajectory, *, detach_router_input=False):
    """Node log-probabilities ``[rows, nodes]``, router log-probabilities ``[rows, steps]``, and both entropies."""
    forward = FreshForwards(model)
    K = trajectory.settings.width
    results = []
    for row in range(len(trajectory)):
        prompt = tuple(trajectory.prompt_ids[row][trajectory.prompt_mask[row]].tolist())
        nodes, decisions = walk(trajectory, row)
        zero = torch.zeros(())
        log_probs, entropies = [zero] * trajectory.node_tokens.shape[1], [zero] * trajectory.node_tokens.shape[1]
        for place, path in nodes:
            before = forward((*prompt, *path[:-1]))[1]
            log_probs[place] = before[path[-1]]
            entropies[place] = -(before.exp() * before).sum()
        router_log_probs, router_entropies = [zero] * trajectory.num_steps, [zero] * trajectory.num_steps
        for step, slots in enumerate(decisions):
            size = forward(prompt)[0].shape[0]
            states = [forward((*prompt, *node[1]))[0] if node else torch.zeros(size) for node in slots]
            hidden, valid = torch.stack(states)[None], torch.tensor([[node is not None for node in slots]])
            if router is None:
                among = (valid[:, :K].float() / valid[:, :K].sum()).log()
            else:
                among = router(
                    hidden.detach() if detach_router_input else hidden, K, valid=valid,
                    temperature=trajectory.settings.router_temperature,
                )  # fmt: skip
            router_log_probs[step] = among[0, int(trajectory.choices[row, step])]
            there = among[0][valid[0, :K]]
            router_entropies[step] = -(there.exp() * there).sum()
        results.append(tuple(map(torch.stack, (log_probs, router_log_probs, entropies, router_entropies))))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]
