"""The Python of docs/embedding.md runs as it stands, its links lead somewhere, and its micro-batches add up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama

import lbr_kernels
from lbr_kernels.training.likelihood import trajectory_log_probs
from lbr_kernels.training.loss import group_advantages, grpo_loss, policy_loss

PAGE = Path(__file__).parent.parent / "docs" / "embedding.md"


def test_python_blocks_run():
    torch.manual_seed(0)
    model = tiny_llama()
    seen: list[torch.Tensor] = []

    def judge(sequences: torch.Tensor) -> torch.Tensor:
        seen.append(sequences)
        return (sequences[:, 5:].sum(dim=1) % 3 == 0).float()

    ids = torch.randint(1, model.config.vocab_size, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = [p.clone() for p in model.parameters()]
    namespace: dict[str, Any] = {"model": model, "batches": [batch, batch], "judge": judge}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        shorter = block.replace("max_new_tokens=64", "max_new_tokens=8")
        exec(compile(shorter, PAGE.name, "exec"), namespace)
        # The other blocks stand in the place of the first one's last lines: before the step.
        out = lbr_kernels.generate(
            model, **batch, width=3, router=namespace["router"], num_return_sequences=8, max_new_tokens=8,
            do_sample=True, top_k=0, return_dict_in_generate=True,
        )  # fmt: skip
        namespace |= {"out": out, "rewards": judge(out.sequences)}
    assert [len(sequences) for sequences in seen] == [16] * 5
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    moved = torch.cat([p.grad.flatten() for p in namespace["router"].parameters() if p.grad is not None])
    assert moved.abs().sum() > 0


@pytest.mark.parametrize("rows", [4, 8])
def test_parts_add_up_to_the_whole(rows):
    """Across and along the groups, gradients of model and router."""
    torch.manual_seed(1)
    model = tiny_llama()
    router = lbr_kernels.Router.for_model(model, dim=16)
    torch.nn.init.normal_(router.score.weight)
    prompts = torch.randint(1, model.config.vocab_size, (2, 5))
    out = lbr_kernels.generate(
        model, prompts, width=3, router=router, num_return_sequences=8, max_new_tokens=6, do_sample=True, top_k=0,
        return_dict_in_generate=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    rewards = torch.rand(16)
    parameters = [*model.parameters(), *router.parameters()]

    def gradients() -> list[torch.Tensor]:
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    grpo_loss(model, router, out.trajectory, rewards, group_size=8).loss.backward()
    whole = gradients()
    advantages = group_advantages(rewards, group_size=8).values
    positions = int(out.trajectory.num_committed.sum())
    for part, weights in zip(out.trajectory.split(rows), advantages.split(rows), strict=True):
        policy_loss(trajectory_log_probs(model, router, part), part, weights, normaliser=positions).loss.backward()
    for expected, found in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_links_and_paths_exist():
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGE.parent / target).exists(), target
