"""What is made of a benchmark run: tables, plots, the README's section, and the comparison with a stored run."""

from __future__ import annotations

import copy
import json
import re

import pytest
import report
from report import README, Run, app, performance_section, regressions, tables, with_section
from typer.testing import CliRunner

KEPT = report.named_run(README.read_text(encoding="utf-8"))


@pytest.fixture
def run():
    return Run(KEPT)


def changed(path, change):
    """The kept run with something else in it."""
    data = json.loads(KEPT.read_text(encoding="utf-8"))
    for bench in data["benchmarks"]:
        change(bench["extra_info"])
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_the_readme_says_what_was_measured(run):
    """The section between the marks is made of the run that it names, and was not edited by hand."""
    text = README.read_text(encoding="utf-8")
    assert with_section(text, run) == text
    for target in re.findall(r"\]\((bench/[^)]+)\)", performance_section(run)):
        assert (report.ROOT / target).exists(), target


def test_every_record_says_where_and_what(run):
    for record in run.records:
        for name in ("op", "shape", "dtype", "cpu", "threads", "torch", "transformers", "python", "seconds", "cold"):
            assert name in record
        if record["op"] in ("tree_attention", "linear", "commit_", "sample_children", "route"):
            assert record["percent_of_roof"] == pytest.approx(
                100 * record["roof_seconds"] / record["seconds"]["ours"]["median"]
            )
            assert record["bytes"] > 0
            assert record["flops"] >= 0


def test_tables_hold_every_record(run):
    text = tables(run)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| shape", "|---"))]
    assert len(rows) == len(run.records)
    assert (KEPT.with_suffix(".md")).read_text(encoding="utf-8") == text


def test_a_slowdown_of_more_than_a_tenth_is_found(run, tmp_path):
    assert regressions(run, run) == []

    def slower(factor):
        def change(record):
            for values in record["times_as_long"].values():
                values["median"] /= factor
            for name in record.get("times_per_token", {}):
                record["times_per_token"][name] /= factor

        return change

    a_little, too_much = changed(tmp_path / "a.json", slower(1.08)), changed(tmp_path / "b.json", slower(1.2))
    cli = CliRunner()
    assert cli.invoke(app, ["compare", str(a_little), str(KEPT)]).exit_code == 0
    failed = cli.invoke(app, ["compare", str(too_much), str(KEPT)])
    assert failed.exit_code == 1
    assert failed.output.count(", was ") == sum(len(report.ratios(record)) for record in run.records)
    # Records that the other run lacks are not held against it.
    fewer = copy.copy(run)
    fewer.records = run.records[:3]
    assert regressions(fewer, run) == regressions(run, fewer) == []


def test_publish_writes_everything(tmp_path, monkeypatch):
    """Into another place: JSON, tables, plots that depend on the run alone, and the section."""
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("# head\n\n<!-- performance: x -->\nold\n<!-- /performance -->\n\ntail\n", encoding="utf-8")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    result = CliRunner().invoke(app, ["publish", str(KEPT), "--name", KEPT.stem])
    assert result.exit_code == 0, result.output
    made = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert set(made) == {
        f"{KEPT.stem}{end}" for end in (".json", ".md", "-attention.svg", "-generate.svg", "-sweeps.svg")
    }
    for name, content in made.items():
        if not name.endswith(".svg"):
            assert content == (KEPT.parent / name).read_bytes(), name
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# head\n")
    assert text.endswith("tail\n")
    assert "old" not in text


def test_show(run):
    shown = CliRunner().invoke(app, ["show", str(KEPT)])
    assert shown.exit_code == 0
    assert "tree_attention" in shown.output
