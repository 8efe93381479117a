"""The command line as a person would use it: what it prints, on a terminal and into a pipe, and what it refuses."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from lbr_kernels import StepView, cli
from lbr_kernels.display import TreeView
from lbr_kernels.ops.tree_shape import num_slots


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_info():
    result = run("info")
    assert result.exit_code == 0
    for expected in ("lbr-kernels", torch.__version__, "tree_attention", "sample_children", "compiled kernels:"):
        assert expected in result.output


def test_build():
    result = run("build")
    assert result.exit_code == 0
    assert re.search(r"compiled kernels: \S+_kernels_[0-9a-f]{12}", result.output)


def test_demo():
    """One decision per line, the verdict, and a row for every way of decoding with what it cost."""
    result = run("demo", "--problems", "20", "--pause", "0")
    assert result.exit_code == 0, result.output
    steps = re.findall(r"^ +(\d+)  .*\*", result.stdout, flags=re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    assert re.search(r"answer: (correct|legal, wrong target|not a path of the graph) ", result.output)
    rows = dict(re.findall(r"│ ((?:plain|LBR)[^│]*?) +│ (.*) │", result.stdout))
    assert list(rows) == ["plain, sampled", "plain, greedy", *(f"LBR K={k} L={d}" for k in (2, 3) for d in (1, 2))]
    for name, row in rows.items():
        accuracy, _, speed, nodes = (cell.strip().replace(",", "") for cell in row.split("│"))
        assert 0 <= float(accuracy) <= 1
        assert float(speed) > 0
        # The plain rows forward each token once; a tree adds at most one layer of nodes per token, plus its first.
        assert float(nodes) == 1 if name.startswith("plain") else 1 < float(nodes) <= 13
    assert (
        run("demo", "--problems", "20", "--pause", "0").stdout.split("each way")[0]
        == result.stdout.split("each way")[0]
    )


def test_demo_refuses_half_a_pair():
    result = run("demo", "--problems", "7")
    assert result.exit_code == 1
    assert "--problems is 7, expected an even number" in result.output


def test_generate(checkpoint):
    arguments = ["generate", "--model", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "5", "--seed", "3"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    steps = re.findall(r"^ +(\d+)  .*\*", result.stdout, flags=re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]
    assert "LBR K=3 L=1" in result.output
    assert "plain" in result.output
    assert run(*arguments).stdout.split("decoding")[0] == result.stdout.split("decoding")[0]


def test_generate_with_a_router_and_without_comparison(checkpoint):
    result = run(
        "generate", "--model", str(checkpoint), "--prompt", "hello", "--router", str(checkpoint / "router"),
        "--depth", "2", "--width", "2", "--greedy", "--max-new-tokens", "4", "--no-compare",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "LBR K=2 L=2" in result.output
    assert "plain" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model", "--prompt", "a"], "error: cannot load '/no/such/model'"),
        (["--model", "CHECKPOINT", "--prompt", "a", "--router", "CHECKPOINT/router"], "router was made for depth 2"),
        (["--model", "CHECKPOINT", "--prompt", "a", "--router", "CHECKPOINT"], "error: --router is '"),
        (["--model", "CHECKPOINT", "--prompt", "a", "--router", "/no/router"], "error: --router is '/no/router', exp"),
        (["--model", "CHECKPOINT", "--prompt", "a", "--dtype", "int8"], "--dtype is 'int8', expected auto, float32"),
        (["--model", "CHECKPOINT", "--prompt", "a", "--chat"], "has no chat template"),
    ],
)
def test_generate_refuses(checkpoint, arguments, message):
    result = run("generate", *(part.replace("CHECKPOINT", str(checkpoint)) for part in arguments))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["generate", "trace"])
@pytest.mark.parametrize("option", ["--temperature", "--top-k", "--top-p"])
def test_nothing_is_drawn_greedily(command, option):
    result = run(command, "--model", "/no/such", "--prompt", "a", "--greedy", option, "1")
    assert result.exit_code == 2
    assert f"{option} is given with --greedy" in result.output


def test_missing_options_are_named():
    result = run("generate")
    assert result.exit_code == 2
    assert "--model" in result.output


@pytest.mark.parametrize("terminal", [True, False])
def test_tree_view(terminal):
    """Candidates with their children and probabilities, winner and losers; missing nodes are left out."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=90, color_system=None)
    tokens = torch.full((1, num_slots(3, 2)), -1)
    tokens[0, :3] = torch.tensor([4, 7, 7])
    tokens[0, 3:5] = torch.tensor([8, 9])
    unseen = torch.zeros(1, 12), torch.zeros(1, 12, 4), torch.zeros(1, 12, dtype=torch.int64), torch.zeros(1, 1)
    step = StepView(0, tokens, torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([1]), *unseen)
    with TreeView(console, lambda ids: "".join(f"<{i}>" for i in ids), "text: ", width=3, depth=2) as view:
        view(step)
        view(StepView(1, tokens, torch.zeros(1, 3), torch.tensor([-1]), *unseen))
    shown = out.getvalue()
    assert view.committed == [7]
    if terminal:
        for expected in ("text: <7>", "▶ <7>", "✕ <4>", "<8>", "<9>", "██████████           0.50", "commit", "prune"):
            assert expected in shown, expected
    else:
        legend = "step  candidates with their probabilities; * is committed\n"
        assert shown == legend + "   1   <4> 0.20   *<7> 0.50    <7> 0.30   \n"


def test_module_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "lbr_kernels", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: lbr-kernels" in shown.stdout


def test_brackets_are_text(checkpoint):
    """Nothing that comes from outside is read as markup."""
    result = run("generate", "--model", "/nonexistent[/x]", "--prompt", "a")
    assert result.exit_code == 1
    assert "cannot load '/nonexistent[/x]'" in result.output
    result = run("generate", "--model", str(checkpoint), "--prompt", "a[/b]", "--max-new-tokens", "2", "--no-compare")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("device", ["cuda", "nothing"])
def test_a_device_that_is_not_there(checkpoint, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    result = run("generate", "--model", str(checkpoint), "--prompt", "a", "--device", device)
    assert result.exit_code == 1
    assert f"error: --device is '{device}'" in result.output
    assert "Traceback" not in result.output


def test_a_router_without_its_size(checkpoint, tmp_path):
    (tmp_path / "router_config.json").write_text("{}", encoding="utf-8")
    result = run("generate", "--model", str(checkpoint), "--prompt", "a", "--router", str(tmp_path))
    assert result.exit_code == 1
    assert "hidden_size is missing" in result.output


def test_a_terminal_without_unicode():
    """What its encoding lacks becomes a question mark, not a traceback."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lbr_kernels", "demo", "--problems", "2", "--pause", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LBR K=3 L=2" in done.stdout


def test_info_says_each_reason_once(monkeypatch):
    reasons = {"reference": None, "cpu": "no compiler", "cpu-portable": "no compiler", "cpu-avx2": "no avx2"}
    everywhere = {"route": reasons, "tree_attention": {"cuda": "no GPU; the nearest accepted backend is 'reference'"}}
    monkeypatch.setattr(cli.ops, "backends", lambda kind: everywhere)
    lines = [line for line in run("info").output.splitlines() if "no " in line and "│" in line]
    assert any("cpu, cpu-portable: no compiler" in line for line in lines)
    assert any("cpu-avx2: no avx2" in line for line in lines)
    assert "no op runs on cuda: no GPU\n" in run("info").output
