"""All that a training run is, and how it survives being killed at any moment.

Contract
--------
A checkpoint is a directory that appears under its name when it is complete, and not before: it is written beside and
renamed. It holds model, router, optimiser, both sources of randomness (of the questions, and of the draws) and the
counters. What comes after it is a function of it, so that a run that was resumed has the curve of one that was not, to
the last bit: on the same machine, with the same number of threads.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lbr_kernels import Router


@dataclass
class State:
    """A run after ``update`` updates; ``router`` is None at width 1. ``nodes`` and ``seconds`` are totals."""

    model: PreTrainedModel
    router: Router | None
    optimizer: torch.optim.AdamW
    questions_rng: np.random.Generator
    generator: torch.Generator
    update: int = 0
    nodes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def save(self, out: Path) -> None:
        """Write ``out/checkpoint-NNNNNN`` and remove earlier ones."""
        final = out / f"checkpoint-{self.update:06d}"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial / "model")
        if self.router is not None:
            self.router.save_pretrained(partial / "router")
        torch.save(
            {
                "optimizer": self.optimizer.state_dict(),
                "questions_rng": self.questions_rng.bit_generator.state,
                "generator": self.generator.get_state(),
                "counters": {name: getattr(self, name) for name in ("update", "nodes", "seconds", "cpu_seconds")},
            },
            partial / "state.pt",
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for path in set(checkpoints(out)) - {final}:
            shutil.rmtree(path)

    def load(self, checkpoint: Path) -> None:
        """Become what was saved."""
        model = AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32)
        self.model.load_state_dict(model.state_dict())
        if self.router is not None:
            self.router.load_state_dict(Router.from_pretrained(checkpoint / "router").state_dict())
        saved = torch.load(checkpoint / "state.pt", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.questions_rng.bit_generator.state = saved["questions_rng"]
        self.generator.set_state(saved["generator"])
        for name, value in saved["counters"].items():
            setattr(self, name, value)


def checkpoints(out: Path) -> list[Path]:
    """The complete ones, the latest last."""
    return sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".partial")
