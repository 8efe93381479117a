"""TreeTrajectory: saved, moved, cut up and put together again."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file
from test_invariants import padded, random_prompts, seeded

from lbr_kernels import Router, TreeTrajectory, generate
from lbr_kernels.decoding.trajectory import fingerprint


@pytest.fixture(scope="module")
def trajectories(llama) -> list[TreeTrajectory]:
    out = []
    for lengths, new, seed in (([4, 7], 6, 0), ([9], 11, 1)):
        out.append(
            generate(
                llama, **padded(random_prompts(lengths)), width=2, depth=2, max_new_tokens=new, do_sample=True, top_k=0,
                eos_token_id=[3, 17], generator=seeded(seed), return_dict_in_generate=True,
            ).trajectory
        )  # fmt: skip
    return out


def assert_same(a: TreeTrajectory, b: TreeTrajectory) -> None:
    for field in fields(TreeTrajectory):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def test_shapes(trajectories):
    first = trajectories[0]
    steps = first.num_steps
    assert len(first) == 2
    assert first.node_tokens.shape == first.node_log_probs.shape == (2, 2 + 4 * steps)
    assert first.step_nodes(0) == slice(2, 6)
    assert first.step_nodes(steps - 1).stop == first.node_tokens.shape[1]
    for row in range(2):
        assert (first.choices[row] >= 0).sum() == first.num_committed[row]
    assert ((first.node_tokens == -1) <= (first.node_log_probs == 0)).all()
    assert first.prompt_mask.sum(1).tolist() == [4, 7]
    assert first.settings.eos_token_ids == [3, 17]
    assert first.settings.mode == "sampled"


def test_save_and_load(trajectories, tmp_path):
    for index, trajectory in enumerate(trajectories):
        trajectory.save(tmp_path / f"{index}.safetensors")
        assert_same(TreeTrajectory.load(tmp_path / f"{index}.safetensors"), trajectory)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a saved TreeTrajectory"):
        TreeTrajectory.load(tmp_path / "other.safetensors")


def test_concatenate_and_split(trajectories):
    both = TreeTrajectory.concatenate(trajectories)
    assert len(both) == 3
    assert both.settings.seed is None  # two calls, two seeds
    pieces = both.split(2)
    assert [len(piece) for piece in pieces] == [2, 1]
    assert_same(TreeTrajectory.concatenate(pieces), both)
    first = trajectories[0]
    cut = both[[0, 1]]
    assert torch.equal(cut.prompt_ids[:, -7:], first.prompt_ids)
    assert not cut.prompt_mask[:, :-7].any()
    assert torch.equal(cut.node_tokens[:, : first.node_tokens.shape[1]], first.node_tokens)
    assert (cut.node_tokens[:, first.node_tokens.shape[1] :] == -1).all()
    assert (cut.choices[:, first.num_steps :] == -1).all()
    assert_same(both.to("cpu"), both)


def test_refused(trajectories):
    other = replace(trajectories[1], settings=replace(trajectories[1].settings, width=3))
    with pytest.raises(ValueError, match="differ from the first part's"):
        TreeTrajectory.concatenate([trajectories[0], other])
    with pytest.raises(ValueError, match="parts is empty"):
        TreeTrajectory.concatenate([])
    with pytest.raises(ValueError, match="rows_each is 0"):
        trajectories[0].split(0)


def test_fingerprints(llama, trajectories):
    assert trajectories[0].settings.model_fingerprint == fingerprint(llama)
    assert trajectories[0].settings.router_fingerprint == fingerprint(None) == "none"
    router = Router.for_model(llama)
    before = fingerprint(router)
    with torch.no_grad():
        router.cls += 1
    assert fingerprint(router) != before


def test_a_deterministic_call_says_so(llama):
    out = generate(llama, torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.trajectory.settings.mode == "deterministic"
    assert out.trajectory.settings.seed is None
