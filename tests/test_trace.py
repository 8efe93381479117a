"""``lbr-kernels trace``: what is recorded, the file that holds it, and the command; test_trace_page.py has the page."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import Any

import pytest
import torch
from test_cli import run
from test_invariants import seeded
from torch.utils._python_dispatch import TorchDispatchMode
from traces import PROMPT, embedded, hostile, letters, traced
from transformers import GenerationConfig

from lbr_kernels import cli, generate
from lbr_kernels.decoding.adapter import ModelAdapter
from lbr_kernels.decoding.trajectory import DecodingSettings
from lbr_kernels.evaluation.demo import Demo
from lbr_kernels.trace import (
    MOST_STEPS,
    NEXT_TOKENS,
    PROMPT_CHARACTERS,
    Trace,
    check_size,
    page,
    principal_plane,
    write_page,
)

GREEDY = DecodingSettings(
    width=2, depth=1, mode="deterministic", filters={}, router_temperature=1.0, router_do_sample=False,
    eos_token_ids=[], seed=None, model_fingerprint="", router_fingerprint="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "depth", "settings"),
    [(3, 1, {}), (3, 2, {}), (2, 3, {}), (3, 2, {"trie": False}), (3, 2, {"do_sample": False})],
)
def test_numbers_are_the_trajectory_s(llama, width, depth, settings):
    document, out = traced(llama, width=width, depth=depth, **settings)
    trajectory, nodes = out.trajectory, document["nodes"]
    assert [step["choice"] for step in document["steps"]] == trajectory.choices[0].tolist()
    first = sum(width**layer for layer in range(1, depth))
    for number, step in enumerate(document["steps"]):
        newest = [nodes[node] if node is not None else {"id": -1, "log_prob": 0} for node in step["slots"][first:]]
        where = trajectory.step_nodes(number)
        assert [node["id"] for node in newest] == trajectory.node_tokens[0, where].tolist()
        log_probs = [node["log_prob"] for node in newest]
        assert log_probs == pytest.approx(trajectory.node_log_probs[0, where].tolist(), abs=1e-6)
        chosen = step["router"][step["choice"]]
        if settings.get("do_sample", True):
            assert chosen == pytest.approx(float(trajectory.router_log_probs[0, number]))
        assert sum(math.exp(value) for value in step["router"] if value is not None) == pytest.approx(1)
        committed = nodes[step["slots"][step["choice"]]]
        assert committed["id"] == out.sequences[0, len(PROMPT) + number]
        assert committed["token"] == letters([committed["id"]])
        # What moved is what the next tree begins with.
        if number + 1 < len(document["steps"]):
            following = document["steps"][number + 1]["cells"]
            moved = [step["cells"][source] for source in step["moves"]]
            assert moved[0] == step["slots"][step["choice"]]
            assert following[: len(moved) - 1] == moved[1:]
    text = ""
    for step in document["steps"]:
        text = text[: step["keep"]] + step["add"]
    assert text == letters(out.sequences[0, len(PROMPT) :].tolist())
    assert document["prompt_end"] == [letters([token]) for token in PROMPT[-3:]]


def test_evidence_is_what_plain_forwards_say(llama):
    """States, next tokens, cosines and places, of every node, from forwards of its path without tree or cache."""
    document, out = traced(llama, steps=4)
    adapter, nodes = ModelAdapter(llama), document["nodes"]
    states: dict[int, torch.Tensor] = {}
    for number, step in enumerate(document["steps"]):
        before = out.sequences[0, : len(PROMPT) + number].tolist()
        for slot, node in enumerate(step["slots"]):
            if node is None:
                continue
            path = [nodes[node]["id"]]
            if slot >= 3:
                path.insert(0, nodes[step["slots"][slot // 3 - 1]]["id"])
            ids = torch.tensor([before + path])
            with torch.no_grad():
                states[node] = adapter.head_inputs(ids)[0, -1]
                top = llama(ids).logits[0, -1].softmax(-1).topk(NEXT_TOKENS)
            assert [p for _, p, _ in nodes[node]["next"]] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert [token for _, _, token in nodes[node]["next"]] == top.indices.tolist()
            assert [text for text, _, _ in nodes[node]["next"]] == [letters([token]) for token in top.indices.tolist()]
    assert sorted(states) == list(range(len(nodes)))
    centred = torch.stack([states[node] for node in range(len(nodes))])
    centred -= centred.mean(0)
    directions = torch.nn.functional.normalize(centred, dim=-1)
    for step in document["steps"]:
        candidates = step["slots"][:3]
        want = directions[candidates] @ directions[candidates].T
        torch.testing.assert_close(torch.tensor(step["alike"]), want, rtol=0, atol=2e-3)
    places = torch.tensor([node["at"] for node in nodes])
    torch.testing.assert_close(places, principal_plane(centred)[0], rtol=0, atol=5e-3)


def test_evidence_takes_few_products(llama):
    """Of a tree's states one product per step, not one for each pair of candidates."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket in (torch.ops.aten.dot, torch.ops.aten.mv, torch.ops.aten.mm)
            return func(*args, **(kwargs or {}))

    recorded = Trace(llama, letters, PROMPT, width=8, depth=1, max_new_tokens=6)
    generate(llama, torch.tensor([PROMPT]), width=8, depth=1, max_new_tokens=6, on_step=recorded)
    with Products() as products:
        recorded.document("", facts=[], routed=False, settings=GREEDY)
    assert 6 <= products.count < 64  # those of the pairs would be 384


def test_children_are_drawn_with_the_probability_that_the_evidence_says(llama):
    document, _ = traced(llama, steps=8)
    nodes, compared = document["nodes"], 0
    for step in document["steps"]:
        for slot in range(3, 12):
            if step["slots"][slot] is None:
                continue
            child, parent = nodes[step["slots"][slot]], nodes[step["slots"][slot // 3 - 1]]
            for _, probability, token in parent["next"]:
                if token == child["id"]:
                    assert math.exp(child["log_prob"]) == pytest.approx(probability, abs=1e-5)
                    compared += 1
    assert compared > 5


@pytest.mark.parametrize("shape", [(40, 5), (5, 40), (1, 4), (7, 1)])
def test_principal_plane(shape):
    """Against torch's singular values, up to the common scale and the axes' signs."""
    states = torch.randn(shape, generator=seeded(0))
    centred = states - states.mean(0)
    places, shares = principal_plane(centred)
    vectors, values, _ = torch.linalg.svd(centred, full_matrices=False)
    want = torch.zeros(shape[0], 2)
    want[:, : min(2, len(values))] = (vectors * values)[:, :2]
    scale = want.abs().max().clamp(min=1e-30)
    torch.testing.assert_close(places.abs(), want.abs() / scale, rtol=1e-3, atol=1e-4)
    total = float(centred.square().sum())
    explained = [float(value) ** 2 / total if total > 0 else 0.0 for value in values[:2]]
    assert shares == pytest.approx([*explained, 0.0][:2], abs=1e-5)
    if shape[0] > 1:
        assert float(places.abs().max()) == pytest.approx(1)
        assert float(places[places.abs()[:, 0].argmax(), 0]) > 0


def test_sizes_are_bounded(llama):
    for width, depth, steps, message in (
        (8, 2, 5, "width is 8 and depth 2, which makes a tree of 72 slots; expected at most 64"),
        (2, 10**9, 5, "a tree of 1000000000 layers"),
        (3, 1, MOST_STEPS + 1, f"max_new_tokens is {MOST_STEPS + 1}, expected at most {MOST_STEPS}"),
    ):
        with pytest.raises(ValueError, match=message):
            check_size(width, depth, steps)
        with pytest.raises(ValueError, match=message):
            Trace(llama, letters, PROMPT, width=width, depth=depth, max_new_tokens=steps)
    recorded = Trace(llama, letters, PROMPT, width=2, depth=1, max_new_tokens=2)
    generate(llama, torch.tensor([PROMPT]), width=2, depth=1, max_new_tokens=2, on_step=recorded)
    shown = recorded.document("x" * 10_000 + "end", facts=[], routed=False, settings=GREEDY)["prompt"]
    assert len(shown) == PROMPT_CHARACTERS + 2
    assert shown.endswith("xend")


@pytest.mark.parametrize(
    ("width", "depth", "steps", "message"),
    [
        (3, 1, 2, "the tree has width 3 and 3 slots, expected width 2 and 6 slots"),
        (6, 1, 2, "the tree has width 6 and 6 slots, expected width 2 and 6 slots"),
        (2, 3, 2, "the tree has width 2 and 14 slots, expected width 2 and 6 slots"),
        (2, 2, 4, "step is 3, expected less than max_new_tokens, 3"),
    ],
)
def test_a_trace_takes_what_it_was_made_for(llama, width, depth, steps, message):
    recorded = Trace(llama, letters, PROMPT, width=2, depth=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="no step is recorded"):
        recorded.document("", facts=[], routed=False, settings=GREEDY)
    with pytest.raises(ValueError, match=message):
        generate(llama, torch.tensor([PROMPT]), width=width, depth=depth, max_new_tokens=steps, on_step=recorded)


def test_a_trace_holds_one_text(llama):
    recorded = Trace(llama, letters, PROMPT, width=2, depth=1, max_new_tokens=3)
    generate(llama, torch.tensor([PROMPT]), width=2, depth=1, max_new_tokens=2, on_step=recorded)
    with pytest.raises(ValueError, match="step is 0, expected 2: a trace holds one text"):
        generate(llama, torch.tensor([PROMPT]), width=2, depth=1, max_new_tokens=2, on_step=recorded)


def test_hostile_tokens_stay_data(llama):
    document, _ = traced(llama, hostile, steps=10)
    html = page(document)
    assert embedded(html) == json.loads(json.dumps(document))
    data = html.split('id="document">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    assert html.count("<script") == page({}).count("<script") == 2
    assert html.encode("ascii", "ignore").decode().count("hacked") == data.count("hacked") > 0


def test_what_is_no_json_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_page(tmp_path / "trace.html", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_the_page_asks_for_nothing(llama):
    html = page(traced(llama, steps=2)[0])
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|\bsrc=|srcset|<link(?! rel=\"icon\" href=\"data:,\")", html)
    assert "default-src 'none'" in html


# ---- the command


def test_the_problem_to_show_is_one_that_the_tree_alone_gets_right():
    """Also at width 1, where nothing is contested."""
    shipped = Demo()
    problem = shipped.problem_to_show(width=1, depth=1, seed=0)
    prompt = shipped.prompts([problem])
    (greedy,) = shipped.answers(shipped.plain(prompt, do_sample=False))
    out = shipped.lbr(prompt, width=1, depth=1, generator=seeded(0))
    assert not shipped.is_right(problem, greedy)
    assert shipped.is_right(problem, shipped.answers(out.sequences)[0])


def test_demo(tmp_path):
    path = tmp_path / "demo.html"
    result = run("trace", "--html", str(path))
    assert result.exit_code == 0, result.output
    assert re.search(rf"written: {path} \(\d+ KiB, \d+ steps\)", result.output.replace("\n", ""))
    assert "Open it in a browser" in result.output
    document = embedded(path.read_text())
    assert "the answer is correct" in document["note"]
    assert document["prompt"].endswith(" -> ")
    assert (document["width"], document["depth"]) == (3, 2)
    assert document["nodes"][document["steps"][-1]["slots"][document["steps"][-1]["choice"]]]["token"] == "[EOS]"


def test_a_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "one.html"
    arguments = (
        "trace", "--model", str(checkpoint), "--prompt", "hello", "--router", str(checkpoint / "router"), "--html",
        str(path), "--max-new-tokens", "5", "--temperature", "0.7", "--top-k", "9", "--seed", "3", "--width", "2",
    )  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    html = path.read_text()
    document = embedded(html)
    assert len(document["steps"]) == 5
    assert dict(document["facts"])["drawn"] == "at temperature 0.7, top-k 9, seed 3"
    assert dict(document["facts"])["router"] == "router"
    assert document["routed"]
    assert str(checkpoint.parent) not in html
    text = "".join(document["nodes"][step["slots"][step["choice"]]]["token"] for step in document["steps"])
    told = run("generate", *arguments[1:7], *arguments[9:], "--depth", "2", "--no-compare")
    assert f"│ {text} " in told.output
    run(*arguments)
    assert path.read_text() == html


@pytest.mark.parametrize(
    ("own", "arguments", "drawn"),
    [
        ({}, (), "at temperature 1, seed 0"),
        ({"do_sample": True, "min_p": 0.25}, ("--top-p", "0.9"), "at temperature 1, top-p 0.9, min-p 0.25, seed 0"),
        ({}, ("--greedy",), "no, likeliest"),
        ({"repetition_penalty": 1.5}, ("--greedy",), "no, likeliest behind RepetitionPenaltyLogitsProcessor"),
        (
            {"repetition_penalty": 1.5}, ("--temperature", "0.5", "--seed", "4"),
            "behind RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, seed 4",
        ),
    ],
)  # fmt: skip
def test_the_page_says_what_shaped_the_draws(checkpoint, tmp_path, monkeypatch, own, arguments, drawn):
    """Also where a model's own settings do, of which the options say nothing."""
    shutil.copytree(checkpoint, tmp_path / "model")
    GenerationConfig(**own).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    html = tmp_path / "t.html"
    result = run(
        "trace", "--model", ".", "--prompt", "hello", "--html", str(html), "--max-new-tokens", "1",
        "--depth", "1", *arguments,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = dict(embedded(html.read_text())["facts"])
    assert facts["drawn"] == drawn
    assert facts["model"] == "model"  # a directory has a name, whatever it was called by


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--prompt is given without --model"),
        (["--router", "r"], "--router is given without --model"),
        (["--device", "cuda"], "--device is given without --model"),
        (["--model", "CHECKPOINT"], "--model is given without --prompt"),
        (["--depth", "3"], "--depth is 3, expected 1 or 2"),
        (["--width", "9"], "expected at most 64 slots"),
        (["--max-new-tokens", "1000"], "max_new_tokens is 1000, expected at most 256"),
        (["--html", "CHECKPOINT"], "CHECKPOINT': not a regular file; expected a regular file, or none yet"),
        (["--html", "/dev/null"], "--html is '/dev/null': not a regular file"),
        (["--html", "CHECKPOINT/no/t.html"], "in a directory that can be written to"),
        (["--html", "/proc/t.html"], "--html is '/proc/t.html': "),
        (["--model", "/no/such", "--prompt", "a"], "cannot load '/no/such'"),
        (
            ["--model", "CHECKPOINT", "--prompt", "a", "--depth", "1", "--router", "CHECKPOINT/router"],
            "made for depth 2",
        ),
        (["--model", "CHECKPOINT", "--prompt", "a", "--chat"], "has no chat template"),
    ],
)
def test_refuses(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "Demo", None)  # refused before anything is decoded
    result = run("trace", *(part.replace("CHECKPOINT", str(checkpoint)) for part in arguments))
    assert result.exit_code == 1
    assert message.replace("CHECKPOINT", str(checkpoint)) in " ".join(result.output.split())
    assert result.stdout.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
