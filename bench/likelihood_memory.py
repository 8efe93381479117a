"""The peak memory of one step of training: ``python bench/likelihood_memory.py ours|plain|rows STEPS``.

``plain`` is causal training on one text of as many tokens as ``ours`` has nodes. A process measures one side, from its
resident size before the step to the largest that it ever had. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from branch_rows import BranchRows, random_trajectory
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lbr_kernels import Router
from lbr_kernels.training import trajectory_log_probs

PROMPT, WIDTH = 64, 3


def small_model() -> PreTrainedModel:
    """A random-weight Qwen2 of 34 M parameters."""
    config = Qwen2Config(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def resident() -> float:
    """Megabytes that the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def step(side: str, model: PreTrainedModel, steps: int) -> None:
    """One forward and backward; of the smallest size that touches everything when ``steps`` is 1."""
    router = Router.for_model(model)
    trajectory = random_trajectory(model, prompt=PROMPT, steps=steps, width=WIDTH, depth=1)
    if side == "ours":
        result = trajectory_log_probs(model, router, trajectory, on_policy=False)
        (result.node_log_probs.sum() + result.router_log_probs.sum()).backward()
    elif side == "rows":
        BranchRows(model, router, decisions_each=32)(trajectory)
    else:
        ids = torch.randint(model.config.vocab_size, (1, PROMPT + steps * WIDTH))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def main(side: str, steps: int) -> None:
    """Measure."""
    model = small_model()
    step(side, model, 1)  # gradients, kernels, and the check of the model are there before
    before = resident()
    step(side, model, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps({"side": side, "steps": steps, "megabytes": round(peak - before, 1)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
