"""Fixtures: memory that is poisoned when it is fresh, and a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

import simt_backend
import transformers
from models import letters_tokenizer, tiny_llama
from transformers import PreTrainedModel

from lbr_kernels import Router

transformers.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also what only `make test-full` runs: more of the same kind")
    parser.addoption("--simt-seed", type=int, default=0, help="of the schedules that the CUDA kernels meet on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    simt_backend.SEED = config.getoption("--simt-seed")
    # The same examples each time, so that a change is what turns a test red; with --full new ones.
    hypothesis.settings.register_profile("lbr", derandomize=not config.getoption("--full"))
    hypothesis.settings.load_profile("lbr")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full") is not None]
        items[:] = [item for item in items if item.get_closest_marker("full") is None]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch fills uninitialised tensors with NaN (or the largest integer) in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    assert not torch.is_autocast_enabled("cpu"), "the test has left autocast on"


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and a router of depth 2 in ``router``."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llama()
    model.save_pretrained(path)
    letters_tokenizer().save_pretrained(path)
    Router.for_model(model, depth=2).save_pretrained(path / "router")
    return path
