"""The readable GRPO loop: it can be killed at any moment, and goes on as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpo
import pytest
import start
import typer
from checkpoint import checkpoints

import lbr_kernels

UPDATES = 11
TIMES = ("seconds", "cpu_seconds")
# A server that has imported everything once makes the processes that are killed.
PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer that is right in three of ten cases."""
    paths = [Path(grpo.__file__).parent, Path(lbr_kernels.__file__).parents[1]]
    PROCESSES.set_forkserver_preload(["grpo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        patch.setenv("OMP_NUM_THREADS", "1")
        warm_up = PROCESSES.Process(target=os.getpid)
        warm_up.start()
        warm_up.join()
    out = tmp_path_factory.mktemp("start") / "model"
    start.main("bits", out, dim=16, layers=1, accuracy=0.3)
    return out


def settings(model: Path, out: Path, width: int, **more: Any) -> dict[str, Any]:
    return {
        "task": "bits", "start": model, "out": out, "width": width, "updates": UPDATES, "questions": 4, "group": 4,
        "router_dim": 16, "model_lr": 3e-3, "router_lr": 1e-2, "checkpoint_every": 3, "eval_every": 4,
        "eval_questions": 4, "eval_samples": 2, **more,
    }  # fmt: skip


def run(**arguments: Any) -> BaseProcess:
    process = PROCESSES.Process(target=grpo.main, kwargs=arguments)
    process.start()
    return process


def finish(**arguments: Any) -> None:
    process = run(**arguments)
    process.join()
    assert process.exitcode == 0


def kill(after: int, **arguments: Any) -> None:
    """Start, and send SIGKILL once so many updates have been logged; fails if the process ends by itself."""
    log, process = arguments["out"] / "log.jsonl", run(**arguments)
    until = time.monotonic() + 60
    while not log.exists() or log.read_text(encoding="utf-8").count("\n") <= after:
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def curve(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


@pytest.mark.parametrize("width", [3, 1])
def test_killed_and_resumed_is_the_same_run(model, tmp_path, width):
    """At a random update, then in the resumed run at another; what is left must be the run that was never killed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(**settings(model, whole, width))
    expected = curve(whole)
    assert [record["update"] for record in expected] == list(range(UPDATES + 1))
    assert any(0 < record["reward"] < 1 for record in expected[1:]), "there was something to learn from"
    assert ("router_entropy" in expected[0]["held_out"]) == (width > 1)

    first = random.randrange(UPDATES - 3)
    kill(first, **settings(model, broken, width))
    kill(random.randrange(first + 1, UPDATES - 1), **settings(model, broken, width, resume=True))
    finish(**settings(model, broken, width, resume=True))
    assert curve(broken) == expected
    ends = [checkpoints(out)[-1] for out in (whole, broken)]
    assert {path.name for path in ends} == {f"checkpoint-{UPDATES:06d}"}
    for name in ["model/model.safetensors", *(["router/router.safetensors"] if width > 1 else [])]:
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()

    with pytest.raises(typer.BadParameter, match="--resume goes on with it"):
        grpo.main(**settings(model, broken, width))
    with pytest.raises(typer.BadParameter, match="other settings"):
        grpo.main(**settings(model, broken, width, seed=5, resume=True))


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    for name in ("checkpoint-000003", "checkpoint-000012.partial", "checkpoint-000009"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000003", "checkpoint-000009"]
