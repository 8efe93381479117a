"""The GPU benchmark of the decoding step and its ops, without a GPU: dry run, checks, verdicts, the results page."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import gpu
import gpu_attention
import gpu_ops
import gpu_report
import gpu_step
import gpu_step_report
import pytest
import torch
from typer.testing import CliRunner

CPU = torch.device("cpu")
SDPA = "SDPA, dense mask, enable_gqa"


@pytest.fixture(scope="module")
def dry_step(tmp_path_factory):
    """A dry run, kept elsewhere."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("gpu")
    before = sorted(path.name for path in gpu.RESULTS.iterdir())
    result = CliRunner().invoke(gpu.app, ["step", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in gpu.RESULTS.iterdir()) == before
    (path,) = out.glob("*.json")
    return path, result.output


def test_a_dry_step_goes_through_everything(dry_step):
    path, output = dry_step
    data = json.loads(path.read_text(encoding="utf-8"))
    scale = gpu_step.DRY
    assert data["dry_run"]
    assert data["complete"]
    assert path.name.endswith("-dry-run-on-a-cpu-step.json")
    assert list(data["sections"]) == list(gpu_step.SECTIONS)
    assert data["skipped"] == []
    assert gpu_step.troubles(data) == []
    assert {one["engine"] for one in data["checks"]} == set(scale.engines)
    assert [entry["case"] for entry in data["ops"]] == [case.name for case in gpu_ops.cases(dry_run=True)]
    for entry in data["ops"]:
        assert {name: side["status"] for name, side in entry["sides"].items()} == {"cpu": "timed", "reference": "timed"}
        assert all(len(side["seconds"]) == gpu.DryRun.rounds[0] for side in entry["sides"].values())
    settings = [gpu_step.setting_name(*setting) for setting in gpu_step.SETTINGS]
    ours = [f"{setting}, {scale.engine}" for setting in settings]
    for entry in data["steps"]:
        compared = entry["batch"] in scale.batches
        assert list(entry["sides"]) == ([*ours, gpu_step.PLAIN] if compared else ours)
        for side in entry["sides"].values():
            assert len(side["short"]) == len(side["long"]) == scale.rounds[0]
    assert [entry["batch"] for entry in data["steps"]] == [*scale.batches, *scale.more_batches]
    assert len(data["engines"]) == len(scale.batches) * len(settings)
    for entry in data["phases"]:
        for record in entry["settings"].values():
            assert set(record["seconds"]) == {"sample", "forward", "route", "commit"}
            assert all(seconds > 0 for seconds in record["seconds"].values())
    run = gpu_step_report.StepRun.load(path)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == gpu_step_report.tables(run)
    assert "Dry run" in text
    assert text.strip() in output
    assert "DRY RUN" in path.with_suffix(".svg").read_text(encoding="utf-8")
    gpu_step_report.draw(run, path.with_suffix(".again.svg"))
    assert path.with_suffix(".again.svg").read_bytes() == path.with_suffix(".svg").read_bytes()
    assert gpu_step_report.StepRun.kept(path.parent) == gpu_report.Run.kept(path.parent) == []


def test_a_step_takes_at_most_ten_minutes_by_design():
    assert sum(gpu_step.SECTIONS.values()) + gpu_step.RESERVE < 60 * 9
    plan = gpu_step.Plan(100, {"a": 1, "b": 3})
    assert plan.begin("a") - time.monotonic() == pytest.approx(22.5, abs=0.1)
    assert plan.begin("b") - time.monotonic() == pytest.approx(90, abs=0.1)  # what was left over is the next one's


def test_a_step_without_time_says_what_it_left_out():
    data = {"aborted": None, "complete": False}
    cases = gpu_ops.cases(dry_run=True)
    gpu_step.measure(gpu.DryRun(), gpu_step.quick(gpu_step.DRY), cases, 0, data, keep=lambda known: None)
    assert data["complete"]
    assert data["checks"] != []
    assert data["ops"] == data["steps"] == data["phases"] == data["engines"] == []
    assert {one["why"] for one in data["skipped"]} == {"the time was used up"}
    assert len(data["skipped"]) == len(cases) + 3 + len(gpu_step.SETTINGS)  # of one batch


def test_the_cases_are_those_of_the_goals():
    cases = gpu_ops.cases(dry_run=False)
    bars = {str(case): case.bar for case in cases if case.bar is not None}
    commits = [f"32 layers, {stored}, batch 8, K=3, L={depth}, cold" for stored in ("64 tensors", "one arena")
               for depth in (1, 2)]  # fmt: skip
    for name in commits:
        assert bars.pop(f"commit_: {name}") == 10e-6
    for name in gpu_ops.FILTERS:
        assert bars.pop(f"sample_children: V=151936, R=8, K=3, {name}, warm") == 20e-6
    for depth in (1, 2):
        assert bars.pop(f"route: D=3584, batch 8, K=3, L={depth}, warm") == 20e-6
    assert bars == {}
    l2 = 60_000_000
    for case in cases:
        assert (case.sets(l2) * case.set_bytes > 3 * l2) if case.cold else case.sets(l2) == 1
    moved = next(case for case in cases if case.op == "commit_")
    assert moved.bytes == 2 * 64 * 8 * 8 * 128 * 2  # a slot of every head is read and written


def small(op, index=0):
    case = [case for case in gpu_ops.cases(dry_run=True) if case.op == op][index]
    return case.make(CPU, torch.float32, 2)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_commits_are_checked_slot_by_slot(index):
    problem = small("commit_", index)

    def run(turns):
        for turn in turns:
            problem.call("reference", turn)

    assert "status" not in problem.checked(lambda: run([1, 0, 1, 0]), [1, 0, 1, 0])
    assert problem.checked(lambda: run([0]), [1])["status"] == "wrong"
    assert problem.checked(lambda: None, [0])["status"] == "wrong"

    def one_number_too_many():
        run([0])
        problem.memory[0, 0, 0, -1, 0] += 1

    assert problem.checked(one_number_too_many, [0])["why"].startswith("1 numbers are not where")

    def lengths_too():
        run([0])
        problem.lens[1] += 1

    assert problem.checked(lengths_too, [0])["why"] == "lengths have changed"


@pytest.mark.parametrize(("op", "index"), [("sample_children", 0), ("sample_children", 3), ("top_children", 1),
                                           ("route", 0), ("route", 1)])  # fmt: skip
def test_results_of_ops_are_checked(op, index):
    problem = small(op, index)
    right = problem.call("reference", 0)
    tokens, log_probs = (1, 0) if op == "route" else (0, 1)
    assert problem.checked(lambda: right, [0])["error"] <= gpu_ops.LOG_PROB_TOLERANCE[op]
    for place, change in ((tokens, 1), (log_probs, 0.01), (log_probs, torch.nan)):
        wrong = [tensor.clone() for tensor in right]
        wrong[place].view(-1)[0] += change
        assert problem.checked(lambda wrong=wrong: tuple(wrong), [0])["status"] == "wrong"
    poisoned = tuple(tensor.clone() for tensor in right)
    gpu.gpu_machine.poison(poisoned)
    assert problem.checked(lambda: poisoned, [0])["status"] == "wrong"


def test_a_router_is_checked_on_different_choices():
    """An untrained one, or one of small weights, would give every candidate the same score."""
    large = gpu_ops.Route(CPU, torch.bfloat16, 1, rows=8, hidden_size=3584, depth=1)
    for problem in (small("route", 0), small("route", 1), large):
        _, choice = problem.call("reference", 0)
        log_probs = problem.wanted[1]
        assert len(set(choice.tolist())) > 1
        assert 0.1 < float((log_probs - math.log(1 / 3)).abs().mean()) < 3


def test_an_op_that_is_wrong_is_not_timed(monkeypatch):
    case = next(case for case in gpu_ops.cases(dry_run=True) if case.op == "top_children")
    call = gpu_ops.Children.call

    def off_on_one_backend(self, backend, turn):
        tokens, log_probs = call(self, backend, turn)
        return (tokens + 1, log_probs) if backend == "cpu" else (tokens, log_probs)

    monkeypatch.setattr(gpu_ops.Children, "call", off_on_one_backend)
    entry = gpu_ops.time_case(gpu.DryRun(), case, 0)
    assert entry["sides"]["cpu"]["status"] == "wrong"
    assert "seconds" not in entry["sides"]["cpu"]
    assert entry["sides"]["reference"]["status"] == "timed"


def test_a_replay_of_an_op_that_writes_nothing_is_found():
    class Forgets(gpu.DryRun):
        def capture(self, work):
            out = work()
            return (lambda: None), out

    for case in gpu_ops.cases(dry_run=True)[::5]:
        entry = gpu_ops.time_case(Forgets(), case, 0)
        assert {side["status"] for side in entry["sides"].values()} == {"wrong"}, case
        assert all(side["why"].startswith("replayed: ") for side in entry["sides"].values())


@pytest.fixture
def decoding():
    machine = gpu.DryRun()
    return gpu_step.Decoding(machine, gpu_step.make_model(gpu_step.DRY.model, CPU, torch.float32), gpu_step.DRY.prompt)


def told_with(monkeypatch, change):
    """Calls of engine static tell something else than what they did."""
    told = gpu_step.Decoding.told

    def changed(self, batch, width, depth, engine, count, **settings):
        out = told(self, batch, width, depth, engine, count, **settings)
        return change(out, width, depth) if engine == "static" else out

    monkeypatch.setattr(gpu_step.Decoding, "told", changed)


@pytest.mark.parametrize("setting", gpu_step.SETTINGS)
def test_an_engine_whose_texts_are_wrong_is_refused(monkeypatch, setting):
    def last_token_off(out, width, depth):
        if (width, depth) != setting:
            return out
        sequences = out.sequences.clone()
        sequences[:, -1] += 1
        return out._replace(sequences=sequences)

    told_with(monkeypatch, last_token_off)
    checks = gpu_step.check_engines(gpu.DryRun(), ("static", "eager"))
    name = gpu_step.setting_name(*setting)
    wrong = [one for one in checks if one["status"] != "passed"]
    assert [(one["engine"], one["what"], one["status"]) for one in wrong] == [
        ("static", f"{name}, greedy", "wrong"), ("static", f"{name}, sampled", "wrong"),
    ]  # fmt: skip
    assert wrong[0]["why"] == "texts differ from token 11 on"
    assert list(gpu_step.refused(checks)) == ["static"]


def test_log_probabilities_that_are_not_the_texts_are_refused(monkeypatch, decoding):
    assert gpu_step.check_model_forward(decoding, "static", 4)["status"] == "passed"

    def off(out, width, depth):
        log_probs = out.trajectory.node_log_probs - 0.1
        return out._replace(trajectory=replace(out.trajectory, node_log_probs=log_probs))

    told_with(monkeypatch, off)
    found = gpu_step.check_model_forward(decoding, "static", 4)
    assert found["status"] == "wrong"
    assert found["why"] == "log-probabilities differ by 0.1 in the mean, allowed 0.05"


def test_a_refused_engine_is_not_timed(decoding):
    sides = [gpu_step.Side(3, 1, "static"), gpu_step.Side(3, 1, "eager"), gpu_step.Side(1, 1, None)]
    bad = {"static": "its texts are wrong"}
    entry = gpu_step.time_sides(decoding, 1, sides, (2, 4), bad, (3, 3), 0)
    refused = entry["sides"]["K=3, L=1, static"]
    assert (refused["status"], refused["why"]) == ("wrong", bad["static"])
    assert "long" not in refused
    assert entry["sides"]["K=3, L=1, eager"]["status"] == entry["sides"][gpu_step.PLAIN]["status"] == "timed"
    for part in (
        gpu_step.peak_memory(decoding, 1, sides[:1], 3, bad)["sides"],
        gpu_step.phases(decoding, 1, bad, 3)["settings"],
    ):
        assert {one["status"] for one in part.values()} == {"wrong"}


def test_an_engine_that_cannot_run_is_a_failure(decoding):
    """A graph on a CPU, for example."""
    entry = gpu_step.time_sides(decoding, 1, [gpu_step.Side(3, 1, "graph")], (2, 4), {}, (3, 3), 0)
    (side,) = entry["sides"].values()
    assert side["status"] == "failed"
    assert "graph" in side["why"]
    data = {"aborted": None, "checks": [], "skipped": [], "ops": [], "steps": [entry], "memory": [], "phases": [],
            "engines": []}  # fmt: skip
    assert gpu_step.troubles(data) == [f"steps, batch 1; K=3, L=1, graph: failed: {side['why']}"]


def test_a_step_that_each_call_makes_anew_is_not_a_figure(monkeypatch, decoding):
    """A model keeps few fixed steps; with more sides in turns each would be made in what is timed."""
    monkeypatch.setattr("lbr_kernels.decoding.engine._MOST_KEPT", 1)
    sides = [gpu_step.Side(1, 1, "static"), gpu_step.Side(3, 1, "static")]
    entry = gpu_step.time_sides(decoding, 1, sides, (2, 4), {}, (3, 3), 0)
    assert {side["status"] for side in entry["sides"].values()} == {"failed"}
    alone = gpu_step.time_sides(decoding, 1, sides[:1], (2, 4), {}, (3, 3), 0)
    assert {side["status"] for side in alone["sides"].values()} == {"timed"}


def test_the_benchmark_keeps_no_more_steps_than_a_model_does():
    from lbr_kernels.decoding import engine

    assert len(gpu_step.SETTINGS) <= engine._MOST_KEPT
    for few, many in (gpu_step.FULL.lengths, gpu_step.FULL.batch_lengths, gpu_step.FULL.engine_lengths):
        for width, depth in gpu_step.SETTINGS:
            slots = [gpu_step.FULL.prompt + count + gpu_attention.num_slots(width, depth) for count in (few, many)]
            assert engine.capacity_class(slots[0]) == engine.capacity_class(slots[1])


def test_time_within_a_phase_is_the_innermost_ones():
    class Ticks(gpu.DryRun):
        now, ahead = 0.0, 0

        def mark(self):
            return self.now

        def let_host_run_ahead(self):
            self.ahead += 1
            self.now += 1000

    machine = Ticks()
    clock = gpu_step.PhaseClock(machine)

    def spend(seconds):
        machine.now += seconds

    for step in range(3):
        with clock("sample"):
            spend(1 + step)
        spend(50)
        with clock("forward"):
            spend(10)
            with clock("route"):
                spend(3)
            with clock("commit"):
                spend(2)
            spend(20)
    assert clock.seconds() == {"sample": 2, "forward": 30, "route": 3, "commit": 2}
    assert machine.ahead == 3


def test_a_broken_device_ends_the_step_and_keeps_what_is_known(monkeypatch):
    class Breaks(gpu.DryRun):
        def healthy(self):
            return False

    def fails(*args, **settings):
        raise RuntimeError("an illegal memory access\nand more")

    kept = []
    monkeypatch.setattr(gpu_step, "time_sides", fails)
    data = {"aborted": None, "complete": False}
    gpu_step.measure(
        Breaks(), gpu_step.DRY, gpu_ops.cases(dry_run=True)[:1], 600, data, lambda known: kept.append(len(known["ops"]))
    )
    assert data["aborted"] == "RuntimeError: an illegal memory access"
    assert not data["complete"]
    assert kept[-1] == 1
    assert gpu_step.troubles(data) == [f"aborted: {data['aborted']}"]


def step_as_if_measured(data):
    """The JSON of a dry run as a GPU's, with made-up times; they are of this test and mean nothing."""
    data = json.loads(json.dumps(data).replace(", static", ", graph"))
    data |= {"dry_run": False, "engine": "graph"}
    data["device"]["name"] = "A Test"
    drift = (1, 1.1, 1.2, 1.3, 1.4)
    for entry, case in zip(data["ops"], gpu_ops.cases(dry_run=False), strict=True):
        entry |= {"case": case.name, "bar": case.bar}
        entry["sides"] = {
            name: {"status": "timed", "graph": True, "seconds": [value * step for step in drift]}
            for name, value in (("cuda", 8e-6), ("triton", 16e-6), ("reference", 1e-3))
        }
    data["preference"] = gpu_ops.preference(data["ops"])
    for entry, batch in zip(data["steps"], (1, 8, 64), strict=True):
        entry |= {"batch": batch, "new": [16, 116]}
        # A step of K=3, L=2 takes 1.5 times as long as a plain one, K=3, L=1 1.05 times.
        for side, taken in zip(entry["sides"].values(), (0.004, 0.0042, 0.006, 0.030), strict=False):
            side |= {"short": [0.1 * step for step in drift], "long": [(0.1 + 100 * taken) * step for step in drift]}
    for kind in ("memory", "phases", "engines"):
        for entry in data[kind]:
            entry["batch"] = {1: 1, 2: 8}[entry["batch"]]
    return data


def test_verdicts_of_a_step(dry_step):
    run = gpu_step_report.StepRun(step_as_if_measured(json.loads(dry_step[0].read_text(encoding="utf-8"))), "x")
    figures = {figure: value for figure, _, value in gpu_step_report.figures(run)}
    assert gpu_step_report.NOT_MEASURED not in figures.values()
    for batch in (1, 8):
        plain = f"batch {batch}: times plain decoding's"
        assert figures[f"time per committed token, K=3, L=1, {plain}"] == "1.05 (1.05 to 1.05); pass"
        assert figures[f"time per committed token, K=3, L=2, {plain}"] == "1.5 (1.5 to 1.5); FAIL"
        faster = f"batch {batch}: times `model.generate`'s"
        assert figures[f"tokens/s, K=3, L=1, {faster}"] == "5.96 (5.96 to 5.96); pass"  # 3.1 s / 0.52 s
        assert figures[f"tokens/s, K=3, L=2, {faster}"] == "4.43 (4.43 to 4.43); FAIL"  # 3.1 s / 0.7 s
    assert figures["tokens/s of steps, K=1, L=1, by batch"] == "1: 208, 8: 1667, 64: 13333"  # the median step: 4.8 ms
    commit = "`commit_`, 32 layers, 64 tensors, batch 8, K=3, L=1, cold"
    assert figures[commit] == "cuda 9.6 µs, triton 19.2 µs, reference 1200 µs; pass"
    run.entries[0]["sides"]["cuda"]["seconds"] = [11e-6] * 5
    assert gpu_step_report.meets_bar(run.entries[0]) is False
    run.entries[0]["sides"]["cuda"] = run.entries[0]["sides"]["triton"] = {"status": "failed", "why": "x"}
    assert gpu_step_report.meets_bar(run.entries[0]) is None
    assert gpu_step_report.times_plain(run, run.steps(64), 3, 1) is not None
    assert gpu_step_report.times_generate(run.steps(64), run.side(3, 1)) is None
    shares = gpu_step_report.shares({"forward": 3.0, "route": 1.0})
    assert shares == {"forward": 75, "route": 25}


def test_preference_of_ops(dry_step):
    data = step_as_if_measured(json.loads(dry_step[0].read_text(encoding="utf-8")))
    assert {op: one["backend"] for op, one in data["preference"].items()} == {
        "commit_": "cuda", "sample_children": "cuda", "top_children": "cuda", "route": "cuda"
    }  # fmt: skip
    for entry in data["ops"]:
        if entry["op"] == "route":
            sides = entry["sides"]
            sides["cuda"], sides["triton"] = sides["triton"], sides["cuda"]
        if entry["op"] == "top_children":
            del entry["sides"]["triton"]
    data["preference"] = gpu_ops.preference(data["ops"])
    names: dict[str, object] = {}
    exec(gpu_step_report.preference_literal(gpu_step_report.StepRun(data, "a-run")), names)
    assert names["OPS_SOURCE"] == "a-run.json"
    assert names["OPS"] == {"commit_": "cuda", "sample_children": "cuda", "route": "triton"}


def test_the_results_page_has_the_step(dry_step, monkeypatch, tmp_path):
    empty = gpu_step_report.results_part([])
    assert empty.count(gpu_step_report.NOT_MEASURED) == len(gpu_step_report.figures(None))
    data = step_as_if_measured(json.loads(dry_step[0].read_text(encoding="utf-8")))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    gpu.write_json(data, tmp_path)
    gpu.write_json({**data, "quick": True}, tmp_path)
    assert CliRunner().invoke(gpu.app, ["results"]).exit_code == 0
    text = (tmp_path / gpu.PAGE).read_text(encoding="utf-8")
    assert text.count("### A Test") == 1
    assert "batch 8: times plain decoding's | ≤ 1.10 | 1.05 (1.05 to 1.05); pass |" in text
    assert gpu_report.results_part([]).rstrip() in text  # the attention benchmark has not run
