"""The GPU benchmark of packed trees, without a GPU: its dry run, shapes, checks, and the results page."""

from __future__ import annotations

import json
from functools import partial

import gpu
import gpu_packed
import gpu_packed_report
import gpu_report
import pytest
import torch
from gpu_packed import DRY, SHAPES, make_problem, sides_for
from typer.testing import CliRunner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run, kept elsewhere."""
    out = tmp_path_factory.mktemp("gpu")
    before = sorted(path.name for path in gpu.RESULTS.iterdir())
    result = CliRunner().invoke(gpu.app, ["packed", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in gpu.RESULTS.iterdir()) == before
    (path,) = out.glob("*.json")
    return path, result.output


def test_a_dry_run_goes_through_everything(dry):
    path, output = dry
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["dry_run"]
    assert data["complete"]
    assert path.name.endswith("-dry-run-on-a-cpu-packed.json")
    assert [entry["shape"]["nodes"] for entry in data["shapes"]] == [shape.nodes for shape in DRY]
    for entry in data["shapes"]:
        assert list(entry["sides"]) == list(sides_for(CPU))
        for name, side in entry["sides"].items():
            assert side["status"] == "timed", (name, side)
            assert max(side["error"], side["small_error"]) <= side["tolerance"]
            assert len(side["seconds"]) == gpu.DryRun.rounds[0]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == gpu_packed_report.tables(gpu_packed_report.PackedRun.load(path))
    assert "Dry run" in text
    assert text.strip() in output
    assert gpu_packed_report.PackedRun.kept(path.parent) == gpu_report.Run.kept(path.parent) == []


def test_trajectories():
    """Of K^L nodes per committed token, on which all that follows stands."""
    assert gpu_packed.trajectory(2, 3, 1).tolist() == [1, 2, 6, 4, 5, 6]
    assert gpu_packed.trajectory(2, 3, 2).tolist() == [
        4, 2, 3, 4, 8, 6, 7, 8, 18, 13, 11, 12, 13, 17, 15, 16, 17, 18,
    ]  # fmt: skip
    for shape in (*SHAPES, *DRY):
        ends, bounds = shape.trees()
        assert len(ends) == shape.nodes == bounds[-1]
    small = DRY[1]
    problem = make_problem(small, CPU, torch.float32, 0)
    node = torch.arange(small.nodes)
    assert small.pairs() == int(((node <= node[:, None]) & (node[:, None] < problem.ends)).sum())


def test_the_time_is_kept_by_design():
    assert len(SHAPES) * gpu_packed.SECTION <= 4.5 * 60
    data = {"dry_run": False, "complete": False, "aborted": None}
    gpu_packed.measure(gpu.DryRun(), SHAPES, {}, 0, data, keep=lambda known: None)
    assert [one["why"] for one in data["skipped"]] == ["the time was used up"] * len(SHAPES)


def test_what_is_wrong_is_not_timed():
    right = sides_for(CPU)["ours"]

    def off(problem, index, factor):
        return tuple(t * factor if i == index else t for i, t in enumerate(right(problem)))

    def fails(problem):
        raise NotImplementedError("it has no such heads")

    sides = {"ours": right, "NaN": partial(off, index=0, factor=torch.nan), "fails": fails}
    sides |= {f"{name} off": partial(off, index=i, factor=1.01) for i, name in enumerate(gpu_packed.TENSORS)}
    records = gpu_packed.time_shape(gpu.DryRun(), DRY[0], sides, 0, 0)
    assert records["ours"]["status"] == "timed"
    assert records["fails"]["status"] == "failed"
    for name in sides.keys() - {"ours", "fails"}:
        assert records[name]["status"] == "wrong"
        assert "seconds" not in records[name]
    data = {"aborted": None, "shapes": [{"shape": {"name": "x"}, "sides": records}]}
    assert len(gpu_packed.troubles(data)) == 5


def test_the_page_says_what_is_not_measured(dry):
    text = gpu_packed_report.results_part([])
    assert "No GPU has run this yet" in text
    assert text.count("not measured") == len(SHAPES) + 2
    assert text.strip() in gpu.page_text()
    data = json.loads(dry[0].read_text(encoding="utf-8"))
    data["dry_run"] = False
    data["device"]["name"] = "A Test"
    for entry, shape in zip(data["shapes"], SHAPES, strict=False):
        entry["shape"]["name"] = str(shape)
        entry["sides"] = {
            name: {"status": "timed", "graph": True, "seconds": [value * step for step in (1, 1.1, 1.2, 1.3, 1.4)]}
            for name, value in (("ours, triton", 1e-3), (gpu_packed.FLEX, 3e-3))
        }
    text = gpu_packed_report.results_part([gpu_packed_report.PackedRun(data, "x")])
    assert f"| {gpu_packed.FLEX}: times as long as ours | > 1 | 3; 2 of 2 shapes pass |" in text
    assert "1.2 ms" in text
