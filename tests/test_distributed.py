"""More than one process: the curve of one with the same global batch, and no process waits for another's rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl_support import history, trainer

from lbr_kernels import Router
from lbr_kernels.training.trl import ROUTER, LBRGRPOTrainer

CONFIGS = Path(__file__).parents[1] / "python" / "configs"
SUPPORT = Path(__file__).with_name("trl_support.py")
# SGD: Adam makes a step of the learning rate out of a gradient that is nothing but rounding.
RUN = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "router_learning_rate": 0.05, "depth": 2,
    "gradient_accumulation_steps": 2, "max_completion_length": 30, "max_grad_norm": 1.0, "optim_args": "momentum=0.5",
}  # fmt: skip


def launch(tmp_path: Path, **options: object) -> None:
    """Two processes on the CPU, talking over gloo; a deadlock ends in a time-out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SUPPORT)]
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [*command, json.dumps(options)], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process with the batch of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = trainer(tmp_path_factory.mktemp("one"), per_device_train_batch_size=8, **RUN)
        made.train()
    finally:
        torch.set_num_threads(threads)
    yield made
    AcceleratorState._reset_state(True)  # other tests ask accelerate for something else


def assert_same(tmp_path: Path, one: LBRGRPOTrainer, log: str = "log") -> None:
    """The curve of two processes and what they have saved are those of one."""
    two = json.loads((tmp_path / log).read_text(encoding="utf-8"))
    assert len(two) == 3
    for mine, other in zip(history(one), two, strict=True):
        assert set(mine) == set(other)
        for name, value in mine.items():
            # Means over micro-batches depend a little on which rows are in which.
            loose = name.removeprefix("router_").split("/")[0] in ("entropy", "kl", "ratio", "clip")
            assert other[name] == pytest.approx(value, rel=0.05 if loose else 1e-4, abs=1e-5), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, one.model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)
    router = Router.from_pretrained(tmp_path / "saved" / "router")
    for name, tensor in router.state_dict().items():
        torch.testing.assert_close(tensor, one.router.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


def assert_unequal_calls(tmp_path: Path) -> None:
    calls = [json.loads((tmp_path / f"calls{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert len(calls[0]) == len(calls[1]) == 3
    assert calls[0] != calls[1], "rows should end at different steps on the two, or this test shows little"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_processes_train_as_one(tmp_path, one):
    launch(
        tmp_path, args={**RUN, "output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 4},
        log=str(tmp_path / "log"), calls=str(tmp_path / "calls"), save=str(tmp_path / "saved"),
    )  # fmt: skip
    assert_unequal_calls(tmp_path)
    assert_same(tmp_path, one)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_sharded_processes_train_as_one(tmp_path, one):
    """FSDP2, on CPUs by the support's shim; the last two steps are taken twice, the second time from a checkpoint.

    Small chunks of logits, whose number differs between the processes, are what sharding is in the way of.
    """
    args = {
        **RUN, "per_device_train_batch_size": 4, "gradient_checkpointing": True, "fsdp": True,
        "fsdp_config": {"version": 2}, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    checkpoint = tmp_path / "two" / "checkpoint-1"
    again = {
        "args": {**args, "output_dir": str(tmp_path / "again"), "save_strategy": "no"}, "resume": str(checkpoint),
        "log": str(tmp_path / "log-again"), "save": str(tmp_path / "saved"),
    }  # fmt: skip
    launch(
        tmp_path, args={**args, "output_dir": str(tmp_path / "two")}, chunk_size=16, log=str(tmp_path / "log"),
        calls=str(tmp_path / "calls"), again=again,
    )  # fmt: skip
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file(), "accelerate has not run FSDP"
    assert_unequal_calls(tmp_path)
    assert_same(tmp_path, one)
    assert_same(tmp_path, one, "log-again")
    # What others load from a checkpoint is whole, the router beside the model.
    model = load_file(checkpoint / "model.safetensors")
    assert {name: tensor.shape for name, tensor in model.items()} == {
        name: tensor.shape for name, tensor in one.model.state_dict().items() if not name.startswith(ROUTER)
    }
    assert Router.from_pretrained(checkpoint / "router").config == one.router.config


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configurations_are_accelerate_s(name):
    """accelerate reads them, and knows every entry."""
    found = load_config_from_file(str(CONFIGS / name))
    assert found.num_processes > 1
    if name == "fsdp2.yaml":
        assert found.fsdp_config["fsdp_version"] == 2
        assert found.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "zero3.yaml":
        assert found.deepspeed_config["zero_stage"] == 3
        assert found.deepspeed_config["zero3_save_16bit_model"]
