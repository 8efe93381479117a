"""A tiny model, a tokenizer, rewards and a trainer for the tests of ``lbr_kernels.training.trl``.

As a program it trains in a process of its own, to be killed or to be one of several:
``python tests/trl_support.py OPTIONS``, where OPTIONS is JSON: ``args`` for the configuration, ``model`` changes,
``resume``, ``log`` (where the history is written), ``calls`` (where each process writes how often its rollouts called
the model), ``save`` (where the model goes), ``pause`` (a step at whose end it waits to be killed, after ``sign``),
``chunk_size`` of the likelihood, ``again`` (options of a second run in the same processes, which have cost most).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
from datasets import Dataset
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from lbr_kernels import Router, generate
from lbr_kernels.training import trl as module
from lbr_kernels.training.likelihood import trajectory_log_probs
from lbr_kernels.training.trl import LBRGRPOConfig, LBRGRPOTrainer

WORDS = ["[PAD]", "[EOS]", *(f"w{index}" for index in range(38))]
GOOD = {f"w{index}" for index in range(16)}
ENDS = [1, 36, 37, 38, 39]  # so that rows end at different steps


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", padding_side="left", model_max_length=64
    )


def tiny_policy(**change: Any):
    """Two layers; random, but its tokens are neither all alike nor all sure."""
    shape = {"num_hidden_layers": 2, "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    model = tiny_model("qwen3", **{**shape, **change})
    model.generation_config.eos_token_id = ENDS
    return model


def tiny_router(model, depth: int = 1, *, scale: float = 0.3) -> Router:
    """A router that is not uniform, so that its gradient reaches all of it."""
    torch.manual_seed(1)
    router = Router.for_model(model, depth=depth, dim=16, num_heads=2)
    with torch.no_grad():
        for parameter in router.score.parameters():
            parameter.normal_(std=scale)
    return router


def prompts(count: int = 8) -> Dataset:
    """Of different lengths."""
    return Dataset.from_dict(
        {"prompt": [" ".join(f"w{(3 * i + j) % 38}" for j in range(2 + i % 3)) for i in range(count)]}
    )


def share_of_good(completions: list[str], **_: Any) -> list[float]:
    return [sum(word in GOOD for word in text.split()) / max(len(text.split()), 1) for text in completions]


def config(directory: str | Path, **change: Any) -> LBRGRPOConfig:
    settings = {
        "output_dir": str(directory), "width": 2, "depth": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 5, "max_steps": 3, "learning_rate": 1e-2, "router_learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "gradient_checkpointing": False, "bf16": False, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 5,
    }  # fmt: skip
    return LBRGRPOConfig(**{**settings, **change})


def trainer(
    directory: str | Path, *, model: Any = None, router: Any = "tiny", reward: Any = share_of_good,
    trainer_args: dict[str, Any] | None = None, policy: dict[str, Any] | None = None, **change: Any,
):  # fmt: skip
    args = config(directory, **change)
    model = tiny_policy(**(policy or {})) if model is None else model
    if router == "tiny":
        router = tiny_router(model, args.depth) if args.width > 1 else None
    return LBRGRPOTrainer(
        model, router, reward, args, train_dataset=prompts(), processing_class=tiny_tokenizer(), **(trainer_args or {})
    )


def history(made: LBRGRPOTrainer) -> list[dict[str, float]]:
    """What was logged at every step, without what depends on the clock."""
    timed = ("step_time", "train_", "total_flos")
    return [
        {name: value for name, value in entry.items() if not name.startswith(timed)}
        for entry in made.state.log_history
        if "loss" in entry
    ]


class Pause(TrainerCallback):
    """Says that a step has ended, and waits."""

    def __init__(self, step: int, sign: Path) -> None:
        self.step, self.sign = step, sign

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.sign.touch()
            time.sleep(600)


def allow_fsdp_on_cpus() -> None:
    """For these tests only: let accelerate shard on CPUs.

    It falls back to DDP there, in silence, though torch's ``fully_shard`` works on them.
    """
    state = accelerate.state.AcceleratorState
    original = state.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == accelerate.DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    state.__init__ = init


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if "chunk_size" in options:
        module.trajectory_log_probs = functools.partial(trajectory_log_probs, chunk_size=options["chunk_size"])
    train(options)
    if "again" in options:
        train(options["again"])
    if torch.distributed.is_initialized():
        # All is written. Threads of gloo that still run while a process is taken down may abort it, once in a while.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def train(options: dict[str, Any]) -> None:
    made = trainer(options["args"].pop("output_dir"), policy=options.get("model"), **options["args"])
    decode, calls = generate, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = decode(*args, **kwargs)
        calls.append(out.stats.model_calls)
        return out

    module.generate = counted
    if "pause" in options:
        made.add_callback(Pause(options["pause"], Path(options["sign"])))
    made.train(resume_from_checkpoint=options.get("resume"))
    if "calls" in options:
        Path(f"{options['calls']}{made.accelerator.process_index}").write_text(json.dumps(calls), encoding="utf-8")
    if made.is_world_process_zero():
        Path(options["log"]).write_text(json.dumps(history(made)), encoding="utf-8")
    if options.get("save"):
        made.save_model(options["save"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
