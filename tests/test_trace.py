"""``lbr-kernels trace``: what is recorded, the file that holds it, and the page as someone in a browser meets it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from test_invariants import seeded, trained_looking_router
from torch.utils._python_dispatch import TorchDispatchMode
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

PROMPT = [5, 9, 2, 7]
GREEDY = DecodingSettings(
    width=2, depth=1, mode="deterministic", filters={}, router_temperature=1.0, router_do_sample=False,
    eos_token_ids=[], seed=None, model_fingerprint="", router_fingerprint="",
)  # fmt: skip
PHASES = ("grow", "route", "prune", "shift")
HOSTILE = (
    "</script><script>window.hacked=1</script>", "<!--<script>", "<img src=x onerror=window.hacked=1>", "&lt;b&gt;",
    "\"'`\\", "\n", " ", "", "\u2028", "\u202eabc", "\u200b", "\x00", "😀", "{{document}}", "${alert(1)}", "\ufffd",
    "]]>",
)  # fmt: skip


def letters(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def hostile(ids: list[int]) -> str:
    return "".join(HOSTILE[token % len(HOSTILE)] for token in ids)


def traced(
    model: Any,
    decode: Any = letters,
    *,
    prompt: Any = PROMPT,
    width: int = 3,
    depth: int = 2,
    steps: int = 6,
    **kwargs: Any,
) -> Any:
    """The document of one decode and ``generate``'s own account of it."""
    kwargs = {"do_sample": True, "top_k": 0, **kwargs}
    recorded = Trace(model, decode, prompt, width=width, depth=depth, max_new_tokens=steps)
    out = generate(
        model, torch.tensor([prompt]), width=width, depth=depth, router=trained_looking_router(model, depth),
        on_step=recorded, max_new_tokens=steps, generator=seeded(1), return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    facts, settings = [("model", "tiny")], out.trajectory.settings
    return recorded.document(decode(prompt), facts=facts, routed=True, settings=settings, note="a note"), out


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


def embedded(html: str) -> Any:
    """The data of a page."""
    (data,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(data)


def test_hostile_tokens_stay_data(llama):
    document, _ = traced(llama, hostile, steps=10)
    html = page(document)
    assert embedded(html) == json.loads(json.dumps(document))
    data = html.split('id="document">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    assert html.count("<script") == page({}).count("<script") == 2
    assert html.encode("ascii", "ignore").decode().count("hacked") == data.count("hacked") > 0


def test_the_page_asks_for_nothing(llama):
    html = page(traced(llama, steps=2)[0])
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|\bsrc=|srcset|<link(?! rel=\"icon\" href=\"data:,\")", html)
    assert "default-src 'none'" in html


def test_the_file_is_whole_or_as_it_was(llama, tmp_path):
    path = tmp_path / "trace.html"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON"):
        write_page(path, {"x": math.nan})
    assert path.read_text() == "before"
    write_page(path, {"x": 1})
    assert embedded(path.read_text()) == {"x": 1}
    with pytest.raises(OSError, match="nowhere"):
        write_page(tmp_path / "nowhere" / "trace.html", {})
    assert list(tmp_path.iterdir()) == [path]
    # A link leads to the page, before and after.
    link, dangling = tmp_path / "link.html", tmp_path / "dangling.html"
    link.symlink_to(path)
    dangling.symlink_to("new.html")
    for number, name in enumerate((link, dangling)):
        write_page(name, {"x": number})
        assert name.is_symlink()
    assert embedded(path.read_text()) == {"x": 0}
    assert embedded((tmp_path / "new.html").read_text()) == {"x": 1}
    assert len(list(tmp_path.iterdir())) == 4
    # What is no regular file is left as it is.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_page(pipe, {})
    assert pipe.is_fifo()


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


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    result = run("trace", "--html", str(path))
    assert result.exit_code == 0, result.output
    assert re.search(rf"written: {path} \(\d+ KiB, \d+ steps\)", result.output.replace("\n", ""))
    assert "Open it in a browser" in result.output
    return path


def test_demo(demo_page):
    document = embedded(demo_page.read_text())
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


# ---- in a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as driver:
        # Its sandbox needs what root in a container does not have.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """One page in a browser; every complaint and every request is kept."""

    def __init__(self, browser: Any, path: Path, where: str = "", **settings: Any) -> None:
        settings = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **settings}
        self.page = browser.new_page(**settings)
        self.path, self.complaints, self.requests = path, [], []
        self.document = embedded(path.read_text(encoding="utf-8"))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message) or dialog.dismiss())
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + where)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.page.close()
        if kind is None:
            assert self.complaints == []
            assert [url.split("#")[0] for url in self.requests] == [self.path.as_uri()]

    def text(self, selector: str) -> str:
        return self.page.locator(selector).text_content()

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def until(self, condition: str) -> None:
        """Wait for a condition; the driver's own way would evaluate a string in the page, which its policy forbids."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"not so in time: {condition}")

    def position(self) -> tuple[int, str]:
        """Step and phase, as the hash, the timeline and the phases say in one voice."""
        step, phase = re.fullmatch(r"#step-(\d+)-(\w+)", self.page.evaluate("location.hash")).groups()
        assert self.text("#phases [aria-current]") == phase
        assert self.text("#timeline [aria-current] small") == step
        return int(step) - 1, phase

    def nodes(self, kind: str = "") -> dict[int, Any]:
        """The nodes that are seen, by slot; of one standing if it is named."""
        found = self.page.locator(f".node{kind}").all()
        return {int(node.get_attribute("data-slot")): node for node in found if node.is_enabled()}


def percent(p: float) -> str:
    return "1.000" if p >= 0.9995 else "<.001" if p < 0.0005 else f"{p:.3f}"[1:]


def committed(document: Any, steps: int) -> str:
    text = ""
    for step in document["steps"][:steps]:
        text = text[: step["keep"]] + step["add"]
    return text


def expect_phase(visit: Visit, number: int, phase: str) -> None:
    """What is seen is what the data says."""
    document, step = visit.document, visit.document["steps"][number]
    names = [None if node is None else document["nodes"][node] for node in step["slots"]]
    width, choice = document["width"], step["choice"]
    assert visit.position() == (number, phase)
    assert visit.text("#caption").startswith(phase.capitalize() + ".")
    shown = document["prompt"] + committed(document, number + (phase == "shift"))
    assert "".join(visit.text(part) for part in ("#prompt", "#committed", "#joined")) == shown
    existing = {slot for slot, node in enumerate(names) if node is not None}

    def candidate(slot: int) -> int:
        return slot if slot < width else candidate(slot // width - 1)

    kept = {slot for slot in existing if candidate(slot) == choice} - {choice}
    seen = visit.nodes()
    if phase == "shift":
        assert set(seen) == kept
        assert visit.page.locator("#after").is_visible()
        first = visit.page.locator("#after .cell.chosen")
        assert first.text_content() == names[choice]["token"]
        return
    # Equal leaves of one parent lie on one stack.
    stacks = {(slot if slot < width else (slot // width, names[slot]["id"])) for slot in existing}
    assert len(seen) == len(stacks)
    for slot, node in seen.items():
        assert node.locator(".token").text_content() == names[slot]["token"]
        assert node.locator(".drawn").text_content() == "p " + percent(math.exp(names[slot]["log_prob"]))
    assert visit.page.locator("#after").is_hidden()
    if phase == "grow":
        newest = {slot for slot in existing if number == 0 or slot >= len(names) - width ** document["depth"]}
        assert set(visit.nodes(".fresh")) == newest & set(seen)
        return
    assert set(visit.nodes(".chosen")) == {choice}
    for slot in set(range(width)) & existing:
        assert seen[slot].locator(".share").text_content() == percent(math.exp(step["router"][slot]))
    assert set(visit.nodes(".cut")) == (set() if phase == "route" else (existing - kept - {choice}) & set(seen))


def test_keys(browser, demo_page):
    with Visit(browser, demo_page) as visit:
        steps = len(visit.document["steps"])
        for number in range(steps):
            for phase in PHASES:
                expect_phase(visit, number, phase)
                visit.press("ArrowRight")
        assert visit.position() == (steps - 1, "shift")
        for key, where in (
            ("ArrowLeft", (steps - 1, "prune")), ("ArrowUp", (steps - 2, "prune")), ("ArrowUp", (steps - 3, "prune")),
            ("ArrowDown", (steps - 2, "prune")), ("Home", (0, "grow")), ("ArrowLeft", (0, "grow")),
            ("ArrowDown", (1, "grow")), ("ArrowLeft", (0, "shift")), ("End", (steps - 1, "shift")),
        ):  # fmt: skip
            visit.press(key)
            assert visit.position() == where, key
        expect_phase(visit, *where)


def test_keys_scroll(browser, demo_page):
    """In a small window: the page by the browser's own keys, and a panel with the focus by arrows."""
    with Visit(browser, demo_page, "#step-4-grow", viewport={"width": 300, "height": 500}) as visit:
        for key in ("PageDown", " "):
            visit.page.evaluate("scrollTo(0, 0)")
            visit.press(key)
            visit.until("scrollY > 100")
        for panel, key, side in (("#text", "ArrowUp", "scrollTop"), ("#scroller", "ArrowRight", "scrollLeft")):
            visit.page.focus(panel)
            before = visit.page.evaluate(f"document.querySelector('{panel}').{side}")
            visit.press(key)
            visit.until(f"document.querySelector('{panel}').{side} !== {before}")
        assert visit.position() == (3, "grow")
        # A panel that has nothing to scroll leaves the keys to the steps.
        visit.page.set_viewport_size({"width": 1280, "height": 800})
        visit.page.focus("#scroller")
        visit.press("ArrowRight")
        assert visit.position() == (3, "route")


def test_mouse(browser, demo_page):
    with Visit(browser, demo_page) as visit:
        assert visit.page.locator("#back").is_disabled()
        for number in range(3):
            for phase in PHASES:
                expect_phase(visit, number, phase)
                visit.page.click("#forth")
        visit.page.click("#back")
        assert visit.position() == (2, "shift")
        visit.page.click("#timeline button:nth-child(4)")
        assert visit.position() == (3, "grow")
        visit.page.click("#phases [data-phase=route]")
        expect_phase(visit, 3, "route")
        # Pointing shows a node's evidence for a moment, choosing it for longer.
        step, nodes = visit.document["steps"][3], visit.document["nodes"]
        other = next(slot for slot in range(3) if slot != step["choice"])
        # What a node's evidence does not change is not drawn again: a trace may have thousands of states.
        visit.page.evaluate("kept = ['#map circle', '#alike td'].map(one => document.querySelector(one))")
        visit.nodes()[other].hover()
        assert visit.page.evaluate("kept.map(one => one.isConnected)") == [True, True]
        assert visit.page.locator("#map circle:not(.here)").count() == len(nodes)
        assert f"candidate {other + 1} of 3" in visit.text("#who")
        expected = [text for text, _, _ in nodes[step["slots"][other]]["next"]]
        assert visit.page.locator("#next bdi").all_text_contents() == expected
        values = visit.page.locator("#next .number").all_text_contents()
        assert values == [percent(p) if p else "0" for _, p, _ in nodes[step["slots"][other]]["next"]]
        visit.page.mouse.move(5, 5)
        assert f"candidate {step['choice'] + 1} of 3" in visit.text("#who")
        visit.nodes()[other].click()
        visit.page.mouse.move(5, 5)
        assert f"candidate {other + 1} of 3" in visit.text("#who")
        visit.press("ArrowRight")
        assert visit.position() == (3, "prune")
        assert f"candidate {other + 1} of 3" in visit.text("#who")
        cells = [row.locator("td").all_text_contents() for row in visit.page.locator("#alike tbody tr").all()]
        shown = [[float(value.replace("\N{MINUS SIGN}", "-")) for value in row] for row in cells]
        assert shown == [pytest.approx(row, abs=0.0051) for row in step["alike"]]
        assert visit.page.locator("#map circle.here").count() == len(
            {node for node in step["slots"] if node is not None}
        )


def told(browser: Any, document: Any, path: Path) -> list[Any]:
    """Of every step its title, and of its phases the caption and the texts about the tree."""
    write_page(path, document)
    with Visit(browser, path) as visit:
        texts: list[Any] = visit.page.evaluate(
            "STEPS.map((_, step) => [$('timeline').children[step].title, ...PHASES.map((_, phase) => { go(step, phase);"
            " return [$('caption').textContent, $('numbers').textContent + $('columns').textContent]; })])"
        )
    return texts


def test_equal_paths_are_equal_without_a_trie(browser, llama, tmp_path):
    """Each has a node of its own then; what the page says of them is the same."""
    with_trie, without = (
        told(browser, traced(llama, steps=5, temperature=0.3, trie=trie)[0], tmp_path / "t.html")
        for trie in (True, False)
    )
    assert [title for title, *_ in without] == [title for title, *_ in with_trie]
    assert [grow[0] for _, grow, *_ in without] == [grow[0] for _, grow, *_ in with_trie]
    assert [route[0].split(" (")[0] for _, _, route, *_ in without] == [
        route[0].split(" (")[0] for _, _, route, *_ in with_trie
    ]
    assert {title.split(": ")[1] for title, *_ in without} == {"all candidates are equal", "the candidates differ"}
    assert any("of them are different" in grow[0] for _, grow, *_ in without)


@pytest.mark.parametrize("width", [1, 3])
def test_the_page_says_whether_anything_was_drawn(browser, llama, tmp_path, width):
    for do_sample in (True, False):
        document, _ = traced(llama, width=width, steps=3, do_sample=do_sample)
        for title, grow, route, *others in told(browser, document, tmp_path / "t.html"):
            texts = " ".join(text for pair in (grow, route, *others) for text in pair)
            assert ("draw" in texts) == do_sample, texts
            if not grow[0].startswith("Grow. Nothing is left"):
                assert ("The model draws" if do_sample else "taken, the likeliest") in grow[0]
            if width == 1:
                assert title.endswith(": one candidate")
                assert route[0].startswith("Route. There is one candidate, “")
                assert (" 1 token " in grow[0]) == (" It is forwarded" in grow[0])
            else:
                assert ("and draws" in route[0]) == do_sample
                assert ("takes the likeliest" in route[0]) == (not do_sample)


def test_a_prompt_of_one_token(browser, llama, tmp_path):
    path = tmp_path / "one.html"
    write_page(path, traced(llama, prompt=[5], steps=4)[0])
    with Visit(browser, path, "#step-1-shift") as visit:
        for length in (1, 2, 3):
            titles = [cell.get_attribute("title") for cell in visit.page.locator("#now .cell").all()]
            assert [one for one in titles if one.endswith(": text")] == [f"slot {i}: text" for i in range(length)]
            chosen = visit.page.locator("#now .chosen").bounding_box()
            left = visit.page.locator("#arrows").bounding_box()["x"]
            middle = chosen["x"] + chosen["width"] / 2 - left
            assert visit.page.locator("#arrows path").first.get_attribute("d").startswith(f"M{middle:g} ")
            assert not visit.text("#now").startswith("0 slots")
            visit.press("ArrowDown")


@pytest.mark.parametrize("where", ["#step-1-prune", "#step-4-grow", "#step-4-shift"])
def test_edges_join_a_node_and_its_parent(browser, demo_page, where):
    with Visit(browser, demo_page, where) as visit:
        seen = visit.nodes()
        boxes = {slot: node.bounding_box() for slot, node in seen.items()}
        text = visit.page.locator("#root").bounding_box()
        ends = visit.page.evaluate(
            "[...document.querySelectorAll('#edges path')].filter(path => path.style.opacity > 0).map(path => {"
            " const box = document.getElementById('edges').getBoundingClientRect();"
            " return [0, path.getTotalLength()].map(at => path.getPointAtLength(at))"
            " .map(point => [point.x + box.x, point.y + box.y]); })"
        )
        assert len(ends) == len(seen)
        for (x0, y0), (x1, y1) in ends:
            slot = next(
                slot for slot, box in boxes.items()
                if abs(box["x"] - x1) < 1 and abs(box["y"] + box["height"] / 2 - y1) < 1
            )  # fmt: skip
            parent = text if slot < 3 or where.endswith("shift") else boxes[slot // 3 - 1]
            assert abs(parent["x"] + parent["width"] - x0) < 1
            assert abs(parent["y"] + parent["height"] / 2 - y0) < 1


def test_the_hash_is_a_place(browser, demo_page):
    with Visit(browser, demo_page, "#step-3-prune") as visit:
        expect_phase(visit, 2, "prune")
        visit.page.evaluate("location.hash = '#step-2-route'")
        visit.until("document.querySelector('#phases [aria-current]').textContent === 'route'")
        expect_phase(visit, 1, "route")
        visit.page.evaluate("location.hash = '#step-99-nonsense'")
        visit.until("location.hash.endsWith('grow')")
        assert visit.position() == (len(visit.document["steps"]) - 1, "grow")


def test_tab_reaches_everything(browser, demo_page):
    with Visit(browser, demo_page, "#step-1-route") as visit:
        reached = set()
        for _ in range(60):
            visit.press("Tab")
            told = visit.page.evaluate(
                "[document.activeElement.id || document.activeElement.className.split(' ')[0] ||"
                " document.activeElement.parentNode.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
            reached.add(told[0])
            assert told[1] == "solid" or told[0] == "", told
        panels = {"text", "scroller", "strip", "alike", "evidence"}
        assert {"phases", "node", "back", "forth", "timeline", *panels} <= reached
        assert all(node.get_attribute("aria-label") for node in visit.nodes().values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_schemes_and_widths(browser, demo_page, scheme, width):
    """Every phase fits the window's width; ink and paper are as far apart as reading takes."""
    size = {"width": width, "height": 800}
    with Visit(browser, demo_page, viewport=size, color_scheme=scheme) as visit:
        for number in range(2):
            for phase in PHASES:
                expect_phase(visit, number, phase)
                assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                visit.press("ArrowRight")

        def luminance(selector: str, what: str) -> float:
            colour = visit.page.evaluate("([s, w]) => getComputedStyle(document.querySelector(s))[w]", [selector, what])
            parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        paper = luminance(".panel", "backgroundColor")
        assert (paper > 0.5) == (scheme == "light")
        for selector in ("#caption", "#prompt", ".why", ".node .drawn", "#legend", "#columns", "#facts dt", "#joined"):
            ink = luminance(selector, "color")
            ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert ratio >= 4.5, (selector, ratio)
        if width == 1280:
            assert visit.page.evaluate("document.documentElement.scrollHeight") <= 800


def test_motion_ends_where_stillness_is(browser, demo_page):
    """Nodes glide to their places unless less motion is asked for; in the end they stand the same."""
    places = []
    for motion in ("reduce", "no-preference"):
        with Visit(browser, demo_page, reduced_motion=motion) as visit:
            for _ in range(3):
                visit.press("ArrowRight")
            visit.page.wait_for_timeout(20 if motion == "reduce" else 700)
            seen = visit.page.locator(".node").all()
            styles = [node.evaluate("n => [n.style.transform, n.style.opacity]") for node in seen]
            places.append(dict(zip([node.get_attribute("data-key") for node in seen], styles, strict=True)))
    assert places[0] == places[1]


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_the_focus_is_not_lost(browser, demo_page, motion):
    """It goes to the chosen node or the next button where the focused node is pruned."""
    with Visit(browser, demo_page, "#step-1-prune", reduced_motion=motion) as visit:

        def focused() -> str:
            return visit.page.evaluate("document.activeElement.id || document.activeElement.dataset.key || 'nothing'")

        next(iter(visit.nodes(".cut").values())).focus()
        visit.press("ArrowRight")
        assert visit.position() == (0, "shift")
        assert focused() == "forth"
        visit.press("Enter")
        assert visit.position() == (1, "grow")
        visit.press("ArrowRight")
        next(iter(visit.nodes(".old").values())).focus()
        visit.press("ArrowRight")
        visit.press("ArrowDown")
        assert visit.position() == (2, "prune")
        assert focused() == visit.page.locator(".node.chosen:enabled").get_attribute("data-key")
        visit.press("End")
        assert focused() == "back"
        visit.press("Home")
        assert focused() == "forth"


def test_what_leaves_is_pointed_at_in_vain(browser, demo_page):
    """While a node fades it stands for no slot of the step that is shown."""
    with Visit(browser, demo_page, reduced_motion="no-preference") as visit:
        leaving = visit.page.evaluate(
            "STEPS.slice(1).flatMap((_, i) => { go(i, 2); go(i + 1, 2); const who = $('who').textContent;"
            " return [...document.querySelectorAll('.node')].filter(one => !KEYS[at.step].includes(one.dataset.key))"
            " .map(one => { one.dispatchEvent(new MouseEvent('mouseenter'));"
            " return [getComputedStyle(one).pointerEvents, $('who').textContent === who]; }); })"
        )
    assert len(leaving) > 10
    assert all(one == ["none", True] for one in leaving)


@pytest.mark.parametrize(("width", "depth"), [(3, 2), (6, 1), (2, 3)])
def test_hostile_tokens_are_shown_as_text(browser, llama, tmp_path, width, depth):
    document, _ = traced(llama, hostile, width=width, depth=depth, steps=8)
    path = tmp_path / "hostile.html"
    write_page(path, document)
    marks = {
        " ": "␣",
        "\n": "↵",
        "": "∅",
        "\u2028": "\\u{2028}",
        "\u202eabc": "\\u{202e}abc",
        "\u200b": "\\u{200b}",
        "\x00": "\\u{0}",
    }
    seen = set()
    with Visit(browser, path, viewport={"width": 400, "height": 700}) as visit:
        for step in document["steps"]:
            for phase in PHASES:
                for slot, node in visit.nodes().items():
                    token = document["nodes"][step["slots"][slot]]["token"]
                    shown = marks.get(token, token.replace(" ", "␣"))
                    assert node.locator(".token").text_content() == shown
                    seen.add(token)
                assert visit.text("#caption").startswith(phase.capitalize())
                assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert visit.page.evaluate("window.hacked === undefined && document.images.length === 0")
                visit.press("ArrowRight")
        assert visit.text("#prompt") == document["prompt"]
        shown = visit.text("#committed") + visit.text("#joined")
        assert shown == committed(document, len(document["steps"]))
    assert len(seen) > 8
