"""The page that ``lbr-kernels trace --html`` writes, as someone in a browser meets it."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import run
from traces import embedded, hostile, traced

from lbr_kernels.trace import write_page

PHASES = ("grow", "route", "prune", "shift")
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


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    result = run("trace", "--html", str(path))
    assert result.exit_code == 0, result.output
    return path


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


def test_a_prompt_s_direction_ends_with_it(browser, llama, tmp_path):
    """A right-to-left override that is never closed leaves the text behind the prompt where it is."""
    document, path = traced(llama, steps=4)[0], tmp_path / "t.html"
    write_page(path, {**document, "prompt": "abc \u202edef "})
    with Visit(browser, path, "#step-4-grow") as visit:
        prompt, committed = (visit.page.locator(part).bounding_box() for part in ("#prompt", "#committed"))
        assert committed["x"] >= prompt["x"] + prompt["width"] - 1


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
