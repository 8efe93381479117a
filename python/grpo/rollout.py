"""Answers to questions, judged; used by the loop for training and by the study for what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tasks import Question, Task
from torch import Tensor
from transformers import PreTrainedModel

import lbr_kernels
from lbr_kernels import LBRGenerateOutput, Router, TreeTrajectory
from lbr_kernels.training import trajectory_log_probs

AT_ONCE = 16  # rows of one forward for entropies


@dataclass(frozen=True)
class Rollout:
    """``rewards`` fp32 ``[questions * samples]``, 1 or 0, the samples of a question side by side.

    ``nodes`` is the number of nodes that the model was run on, each prompt once.
    """

    trajectory: TreeTrajectory
    rewards: Tensor
    nodes: int


def answer(
    model: PreTrainedModel,
    router: Router | None,
    task: Task,
    questions: Sequence[Question],
    *,
    samples: int,
    width: int,
    depth: int,
    generator: torch.Generator,
) -> Rollout:
    """Decode every question ``samples`` times at temperature 1 without filters, as training wants it, and judge."""
    prompts = torch.tensor([question.prompt for question in questions])
    out = lbr_kernels.generate(
        model, prompts, width=width, depth=depth, router=router, generator=generator, num_return_sequences=samples,
        do_sample=True, top_k=0, max_new_tokens=task.max_new_tokens, return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out, LBRGenerateOutput)
    assert out.trajectory is not None
    assert out.stats is not None
    answers = out.sequences[:, prompts.shape[1] :].tolist()
    right = [questions[row // samples].is_right(ids) for row, ids in enumerate(answers)]
    return Rollout(
        out.trajectory, torch.tensor(right, dtype=torch.float32), out.stats.forwarded_nodes + prompts.numel()
    )


@torch.no_grad()
def entropies(model: PreTrainedModel, router: Router | None, trajectory: TreeTrajectory) -> dict[str, float]:
    """Mean entropies in nats: of the model where a node was drawn, of the router, and of the router where candidates
    differ, with the share of such decisions (equal candidates have equal scores: there is nothing to decide).
    """
    width, depth = trajectory.settings.width, trajectory.settings.depth
    found: dict[str, list[Tensor]] = {}
    for part in trajectory.split(AT_ONCE):
        log_probs = trajectory_log_probs(model, router, part, entropies=True)
        assert log_probs.node_entropies is not None
        found.setdefault("node_entropy", []).append(log_probs.node_entropies[part.node_tokens >= 0])
        if width > 1 and log_probs.router_entropies is not None:
            decided = part.choices >= 0
            found.setdefault("router_entropy", []).append(log_probs.router_entropies[decided])
            if depth == 1:
                candidates = part.node_tokens.view(*decided.shape, width)
                contested = (candidates != candidates[..., :1]).any(dim=-1)
                found.setdefault("router_entropy_contested", []).append(log_probs.router_entropies[decided & contested])
                found.setdefault("contested", []).append(contested[decided].float())
    return {name: torch.cat(values).mean().item() for name, values in found.items()}
