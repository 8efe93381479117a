"""The synthetic study: its forests, what every method learns, its ways of decoding, its probes, and all of it once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import arms
import decode
import numpy as np
import probes
import pytest
import results
import synthetic
import torch
from forest import Forest
from model import DEPTHS, PRESETS, build_model, build_routers
from muon import Muon
from packs import make_pack
from typer.testing import CliRunner

import lbr_kernels
from lbr_kernels import Router
from lbr_kernels.evaluation.reachability import (
    ARROW,
    EOS,
    PAD,
    Problem,
    answer_ids,
    check_answer,
    evaluation_problems,
    legal_tokens,
    parse_answer,
    prompt_ids,
)

PRESET = PRESETS["smoke"]
OPTIONS = PRESET.options
PROGRAM = Path(arms.__file__).with_name("synthetic.py")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(PRESET).eval()


@pytest.fixture(scope="module")
def pack():
    return make_pack(OPTIONS, (1, 2, 3), graphs=2, pairs=2, walks=1, rng=np.random.default_rng(0))


def path_of(forest: Forest, row: int, slot: int) -> list[int]:
    """The tokens from the root to a slot, read from the parents."""
    tokens = []
    while slot >= 0:
        tokens.insert(0, int(forest.tokens[row, slot]))
        slot = int(forest.parents[row, slot])
    return tokens


def question_of(forest: Forest, pack, row: int, slot: int) -> int:
    """The branch that a slot is in."""
    while (place := (pack.answers[row] == slot).nonzero()).numel() == 0:
        slot = int(forest.parents[row, slot])
    return int(place) // OPTIONS.max_answer_length


def chains_of(forest: Forest, row: int) -> list[list[int]]:
    """The slots along every path from the root to a leaf."""
    inner = set(forest.parents[row].tolist())
    chains = []
    for leaf in sorted(set(range(forest.tokens.shape[1])) - inner):
        chain = [leaf]
        while (above := int(forest.parents[row, chain[0]])) >= 0:
            chain.insert(0, above)
        chains.append(chain)
    return chains


def test_forest_is_the_model(model, pack):
    """Every node has the state of a plain forward of its path, and the gradient is the plain forwards' too."""
    forest, slots = pack.forest.grow(torch.tensor([[110, 5], [112, 112]]), torch.tensor([[7, 8], [9, 9]]))
    forest, _ = forest.grow(slots, torch.tensor([[12, 13], [12, 14]]))
    parameters = [p for p in model.base_model.parameters() if p.requires_grad]
    hidden = forest.hidden(model)
    weights = torch.randn(hidden.shape)
    mine = torch.autograd.grad((hidden * weights).sum(), parameters)
    total, counted = torch.zeros(()), set()
    for row in range(2):
        for chain in chains_of(forest, row):
            states = model.base_model(forest.tokens[row, chain][None]).last_hidden_state[0]
            torch.testing.assert_close(hidden[row, chain], states, rtol=1e-4, atol=1e-5)
            new = [index for index, slot in enumerate(chain) if (row, slot) not in counted]
            total = total + (states * weights[row, chain])[new].sum()
            counted |= {(row, slot) for slot in chain}
    for one, other in zip(mine, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_legal_twigs(model, pack):
    """Sets of candidates are what ``legal_tokens`` says, the gold one first, and hang where they belong."""
    forest, twigs = arms.legal_twigs(pack)
    told = 0
    for row in range(2):
        for place, valid, right in zip(twigs.slots[row], twigs.valid[row], twigs.right[row], strict=True):
            if not valid.any():
                continue
            tokens = forest.tokens[row, place[valid]].tolist()
            gold = int(place[0])
            assert gold in pack.answers[row]
            text = path_of(forest, row, int(forest.parents[row, gold]))
            for slot in place[valid].tolist():
                assert path_of(forest, row, slot)[:-1] == text
            # Legal digits and arrows go on along an edge of the graph's text; 3 of 2 digits each and an arrow.
            assert len(set(tokens)) == len(tokens) > 1
            at_answer = (pack.answers[row] == gold).nonzero().item()
            assert set(tokens) == set(pack.legal[row, at_answer].nonzero()[:, 0].tolist())
            assert right[0]
            assert {t for t, r in zip(tokens, right[valid].tolist(), strict=True) if r} == set(
                pack.right[row, at_answer].nonzero()[:, 0].tolist()
            )
            told += 1
    assert told == int(((pack.legal.sum(-1) > 1) & pack.right.any(-1)).sum()) > 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twigs_are_read_behind_what_was_kept(pack, stage):
    """States and gradients of a forest that was grown ``stage`` times, as of a forward over all of it."""
    torch.manual_seed(9)
    model = build_model(PRESET)
    nodes = pack.forest.tokens.shape[1]
    grown, parents = pack.forest, torch.randint(nodes, (2, 7))
    for _ in range(stage):
        grown, slots = grown.grow(parents, torch.randint(OPTIONS.vocab_size, parents.shape))
        parents = torch.cat([slots.repeat_interleave(2, dim=1), torch.randint(nodes, (2, 3))], dim=1)
    weights = torch.randn(2, grown.tokens.shape[1], PRESET.dim)

    def gradients(hidden):
        model.zero_grad()
        (hidden * weights).sum().backward()
        return [p.grad.clone() for p in model.base_model.parameters()]

    reading = pack.forest.read(model)
    twigs = reading.twigs(model, grown.parents[:, nodes:], grown.tokens[:, nodes:])
    hidden, want = torch.cat([reading.hidden, twigs], dim=1), grown.hidden(model)
    torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(hidden), gradients(want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_drawn_trees(model, pack):
    """Two layers below answers' positions; nothing grows behind an end; right is what leads to the target."""
    torch.manual_seed(3)
    _, forest, trees = arms.drawn_trees(model, pack, 5)
    width, (first, second) = max(arms.WIDTHS), trees.layers
    assert first.shape == (2, 5 * width)
    assert second.shape == (2, 5 * width**2)
    for row in range(2):
        for index, slot in enumerate(first[row].tolist()):
            above = int(forest.parents[row, slot])
            at_answer = int((pack.answers[row] - 1 == above).nonzero()[0, 0])
            token = int(forest.tokens[row, slot])
            assert bool(trees.right.view(2, -1)[row, index]) == bool(pack.right[row, at_answer, token])
            children = second[row, index * width : (index + 1) * width]
            assert (forest.parents[row, children] == slot).all()
            exists = trees.exists[1][row, index * width : (index + 1) * width]
            assert exists.all() if token != EOS else not exists.any()
        positions = forest.parents[row, first[row]].view(-1, width)
        assert (positions == positions[:, :1]).all()


@pytest.mark.parametrize(("width", "depth"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_drawn_decisions_are_the_router_s(model, pack, width, depth):
    """Trees of the first K children of every node, in the router's order of slots."""
    torch.manual_seed(4)
    routers = build_routers(model, PRESET, depths=DEPTHS, independent=False).eval()
    for parameter in routers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, forest, trees = arms.drawn_trees(model, pack, 5)
    torch.testing.assert_close(hidden, forest.hidden(model), rtol=1e-4, atol=1e-5)
    decisions = arms.drawn_decisions(hidden, trees, routers[str(depth)], width=width, depth=depth)
    want = []
    widest = max(arms.WIDTHS)
    for row in range(2):
        for number in range(5):
            candidates = trees.layers[0][row].view(5, widest)[number, :width].tolist()
            right = trees.right.view(2, 5, widest)[row, number, :width]
            slots = list(candidates)
            if depth == 2:
                slots += [
                    child for slot in candidates for child in range(forest.tokens.shape[1])
                    if forest.parents[row, child] == slot and child in trees.layers[1][row]
                    and child in trees.layers[1][row].view(-1, widest)[:, :width]
                ]  # fmt: skip
            valid = torch.tensor([[
                slot in candidates or int(forest.tokens[row, forest.parents[row, slot]]) != EOS for slot in slots
            ]])  # fmt: skip
            if right.any() and not right.all():
                want.append(routers[str(depth)](hidden[row, slots][None], width, valid=valid)[0])
    torch.testing.assert_close(decisions.log_probs, torch.stack(want), rtol=1e-4, atol=1e-5)


def test_what_is_said_of_decisions():
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.75, 0.0]]).log()
    right = torch.tensor([[True, False, True], [True, False, False], [False, True, False]])
    decisions = arms.Decisions(log_probs, right)
    assert decisions.loss().item() == pytest.approx(-np.log([0.7, 0.1, 0.75]).mean(), rel=1e-6)
    assert decisions.accuracy() == pytest.approx(2 / 3)
    divergences = [0.5 * np.log(0.5 / 0.5) + 0.5 * np.log(0.5 / 0.2), np.log(10), np.log(4 / 3)]
    assert decisions.divergence() == pytest.approx(np.mean(divergences), rel=1e-6)
    nothing = arms.Decisions(log_probs[:0], right[:0])
    assert nothing.loss().item() == 0


def test_mixtures(model, pack):
    """The model's own proportions among the legal tokens, behind mixtures; hard tokens everywhere else."""
    table = model.get_input_embeddings().weight
    answers = set(pack.answers[0].tolist())

    def mixed_once(inputs):
        logits = model.lm_head(pack.forest.hidden(model, inputs))[0]
        mixed = table[pack.forest.tokens]
        for slot in answers:
            legal = pack.legal[0, (pack.answers[0] == slot).nonzero()[0, 0]]
            if legal.any():
                mixed[0, slot] = logits[int(pack.forest.parents[0, slot])][legal].softmax(0) @ table[legal]
        return mixed

    with torch.no_grad():
        want = mixed_once(mixed_once(None))
        hard = table[pack.forest.tokens]
    mixed = arms.mixtures(model, pack)
    torch.testing.assert_close(mixed[0], want[0], rtol=1e-4, atol=1e-5)
    others = [slot for slot in range(mixed.shape[1]) if slot not in answers]
    assert torch.equal(mixed[0, others], hard[0, others])
    assert not torch.allclose(mixed[0], hard[0])
    assert mixed.requires_grad


@pytest.mark.parametrize("arm", arms.ARMS)
def test_everything_learns(model, pack, arm):
    """Each loss is finite and reaches the model, the multi-token maps and every router."""
    torch.manual_seed(5)
    learner, ahead = build_model(PRESET), arms.MultiToken(PRESET.dim)
    routers = build_routers(learner, PRESET, depths=arms.DEPTHS_OF[arm], independent=arm == "independent")
    for router in routers.values():
        torch.nn.init.normal_(next(router.score.parameters()), std=0.2)
    terms = arms.losses(arm, learner, ahead, routers, pack, PRESET)
    assert set(terms) == ({"next", "later", "router"} if len(routers) else {"next", "later"})
    torch.stack(list(terms.values())).sum().backward()
    for part in (learner, ahead, *routers.values()):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert sum(float(p.grad.abs().sum()) for p in part.parameters()) > 0
    quality = arms.router_quality(arm, learner, routers, pack, PRESET)
    assert len(quality) == 2 * {"cot": 0, "soft": 0, "oracle": 1}.get(arm, 4)


def test_losses_are_those_of_plain_forwards(model, pack):
    """Next token and the ones after it, token by token from each branch alone."""
    ahead = arms.MultiToken(PRESET.dim)
    for parameter in ahead.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    terms = arms.losses("cot", model, ahead, torch.nn.ModuleDict(), pack, PRESET)
    losses: list[list[float]] = [[] for _ in range(arms.AHEAD)]
    length = OPTIONS.max_answer_length
    for row in range(2):
        for branch in range(pack.branches):
            slots = pack.answers[row, branch * length : (branch + 1) * length]
            answer = [token for token in pack.forest.tokens[row, slots].tolist() if token != PAD]
            text = path_of(pack.forest, row, int(slots[0]))[:-1]
            states = model.base_model(torch.tensor([[*text, *answer]])).last_hidden_state[0]
            for offset in range(arms.AHEAD):
                for index in range(len(answer) - offset):
                    state = states[len(text) + index - 1]
                    if offset:
                        state = state + ahead.later[offset - 1](state)
                    log_probs = model.lm_head(state).log_softmax(-1)
                    losses[offset].append(-log_probs[answer[index + offset]].item())
    assert float(terms["next"]) == pytest.approx(np.mean(losses[0]), rel=1e-4)
    assert float(terms["later"]) == pytest.approx(
        arms.AHEAD_WEIGHT * np.mean([np.mean(part) for part in losses[1:]]), rel=1e-4
    )


def test_oracle_decoding_is_legal(model):
    """With an oracle every answer is a path, whoever chooses; without one a random model's is not."""
    problems = evaluation_problems(OPTIONS, 20, hops=(1, 2, 3), seed=1)
    router = Router.for_model(model, depth=1, dim=16, num_heads=4)
    for way in (
        decode.lbr("routed", router, width=OPTIONS.radix, do_sample=False, oracle=True),
        decode.lbr("uniform", None, width=OPTIONS.radix, oracle=True),
        decode.plain("greedy", do_sample=False, oracle=True),
        decode.soft("soft", oracle=True, top_n=OPTIONS.radix),
    ):
        outcome = decode.evaluate(way, model, problems, OPTIONS, 0)
        assert all(outcome.legal), way.name
        assert outcome.nodes >= outcome.tokens - 20 > 0
    free = decode.evaluate(decode.plain("greedy", do_sample=False), model, problems, OPTIONS, 0)
    assert free.accuracy == 0
    assert set(free.by_hops(problems)) == {1, 2, 3}


def test_legal_tokens_rule_out(model):
    problems = evaluation_problems(OPTIONS, 4, hops=(2,), seed=2)
    prompts = torch.tensor([prompt_ids(problem, OPTIONS) for problem in problems])
    scores = torch.randn(4, OPTIONS.vocab_size)
    left = decode.LegalTokens(problems, OPTIONS)(prompts, scores)
    for row, problem in enumerate(problems):
        assert set(left[row].isfinite().nonzero()[:, 0].tolist()) == legal_tokens(problem, [], OPTIONS)
        assert torch.equal(left[row][left[row].isfinite()], scores[row][left[row].isfinite()])
    blind = decode.LegalTokens(problems, OPTIONS, blind=True)(prompts, scores)
    assert torch.equal(blind.isfinite(), left.isfinite())
    assert set(blind.flatten().tolist()) == {0.0, -torch.inf}
    ended = torch.cat([prompts, torch.full((4, 1), EOS)], dim=1)
    over = decode.LegalTokens(problems, OPTIONS)(ended, scores).isfinite()
    assert over.nonzero()[:, 1].tolist() == [EOS] * 4


def test_uniform_choice_among_legal_tokens_is_a_random_walk(model):
    """Width by width the oracle's candidates are all legal tokens: every one of them is chosen equally often."""
    problem = evaluation_problems(OPTIONS, 2, hops=(3,), seed=3)[0]
    legal = sorted(legal_tokens(problem, [], OPTIONS))
    prompts = torch.tensor([prompt_ids(problem, OPTIONS)]).repeat(400, 1)
    processors = [decode.LegalTokens([problem] * 400, OPTIONS)]
    out = lbr_kernels.generate(
        model, prompts, width=OPTIONS.radix, do_sample=False, router_do_sample=True, logits_processor=processors,
        candidate_min_p=0.0, max_new_tokens=1, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    counts = [int((out[:, -1] == token).sum()) for token in legal]
    assert sum(counts) == 400
    assert all(abs(count - 400 / len(legal)) < 5 * (400 / len(legal)) ** 0.5 for count in counts)


def test_majority_votes():
    """For one of the two targets of the prompt; whatever else an answer is, it does not vote."""
    problem = Problem(edges=(), root=0, targets=(6, 11), answer=6, hops=1)
    long, short, other = (answer_ids(path, OPTIONS) for path in ((1, 6), (6,), (11,)))
    elsewhere, unfinished, garbled = answer_ids([3], OPTIONS), long[:-1], [ARROW, ARROW, EOS]
    assert decode.elected([other, long, short], problem, OPTIONS) == long
    assert decode.elected([short, other, other], problem, OPTIONS) == other
    assert decode.elected([garbled, garbled, other, elsewhere, elsewhere, unfinished], problem, OPTIONS) == other
    assert decode.elected([elsewhere, garbled], problem, OPTIONS) == elsewhere


def test_probe_accuracy():
    """All of what is linear is told, and of noise as much as chance."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 8, generator=generator)
    labels = states[:, :3].argmax(dim=1)
    halves = [probes.Labelled(states[part], labels[part]) for part in (slice(400), slice(400, None))]
    assert probes.probe_accuracy(*halves) > 0.93
    noise = torch.randint(3, (600,), generator=generator)
    halves = [probes.Labelled(states[part], noise[part]) for part in (slice(400), slice(400, None))]
    assert abs(probes.probe_accuracy(*halves) - 1 / 3) < 0.13


@torch.no_grad()
def test_what_probes_are_asked(model, monkeypatch):
    """Names and order of the targets as the text has them; the states are those of the places named."""
    pack = make_pack(OPTIONS, (1, 2, 3), graphs=3, pairs=3, walks=0, rng=np.random.default_rng(6), split="test")
    monkeypatch.setattr(probes, "_packs", lambda *_: [pack])
    length, digits = OPTIONS.max_answer_length, OPTIONS.digits
    want: dict[tuple[int, str], list[tuple[list[torch.Tensor], int, int]]] = {}
    nodes: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def state(text: list[int]) -> torch.Tensor:
        return model.base_model(torch.tensor([text])).last_hidden_state[0, -1]

    for row in range(len(pack.targets)):
        for question in range(pack.branches):
            part = slice(question * length, (question + 1) * length)
            slots = pack.answers[row, part]
            answer = [token for token in pack.forest.tokens[row, slots].tolist() if token != PAD]
            text = path_of(pack.forest, row, int(slots[0]) - 1)
            tail = text[OPTIONS.graph_length :]
            shown = [parse_answer([*tail[place : place + 2], EOS], OPTIONS)[0] for place in (1, 4)]
            path = parse_answer(answer, OPTIONS)
            if len(path) > 1:
                nodes.append((state(text + answer[:digits]), state(text + answer[: digits + 1]), path[0]))
            seen = 0
            for place, token in enumerate(answer):
                legal, right = (mask[row, part][place].nonzero()[:, 0].tolist() for mask in (pack.legal, pack.right))
                wrong = set(legal) - set(right)
                if place // (digits + 1) == len(path) - 1 or place % (digits + 1) == digits or not wrong:
                    continue
                seen += 1
                ahead = text + answer[:place]
                for name, texts in (
                    ("before", [ahead]), ("right", [[*ahead, token]]), ("wrong", [[*ahead, other] for other in wrong])
                ):  # fmt: skip
                    states = [state(each) for each in texts]
                    want.setdefault((seen, name), []).append((states, path[-1], shown.index(path[-1])))
    found = probes.target_states(model, PRESET, 18, split="test", seed=0)
    assert set(found) == {(which, place) for which in (1, 2) for place in probes.PLACES}
    for key, (names, order) in found.items():
        assert torch.equal(names.states, order.states)
        assert names.labels.tolist() == [name for _, name, _ in want[key]]
        assert order.labels.tolist() == [second for _, _, second in want[key]]
        for got, (states, _, _) in zip(names.states, want[key], strict=True):
            assert min(float((got - each).abs().max()) for each in states) < 1e-4
    told = probes.identity_states(model, PRESET, 18, "cot", split="test", seed=0)
    for name, place in (("last digit", 0), ("arrow", 1)):
        assert told[name].labels.tolist() == [node for *_, node in nodes]
        torch.testing.assert_close(
            told[name].states, torch.stack([each[place] for each in nodes]), rtol=1e-4, atol=1e-5
        )


def test_soft_states_are_those_of_its_decoding(model):
    """What the head makes of them is what decoding saw."""
    found = probes.identity_states(model, PRESET, 24, "soft", split="train", seed=3)
    hops = [most for most in PRESET.curriculum[-1].hops if most > 1]
    problems = evaluation_problems(OPTIONS, 24, hops=hops, seed=3, split="train")
    prompts = torch.tensor([prompt_ids(problem, OPTIONS) for problem in problems])
    out = lbr_kernels.baselines.soft_thinking(
        model, prompts, top_n=OPTIONS.radix, top_k=0, max_new_tokens=OPTIONS.digits + 2, output_scores=True,
        logits_processor=[decode.LegalTokens(problems, OPTIONS)], return_dict_in_generate=True,
    )  # fmt: skip
    answers = out.sequences[:, OPTIONS.prompt_length :]
    rows = (answers[:, OPTIONS.digits] == ARROW).nonzero()[:, 0]
    assert len(rows) > 8
    nodes = [parse_answer([*answers[row, : OPTIONS.digits].tolist(), EOS], OPTIONS)[0] for row in rows]
    for name, step in (("last digit", OPTIONS.digits), ("arrow", OPTIONS.digits + 1)):
        assert found[name].labels.tolist() == nodes
        seen, logits = out.scores[step][rows], model.lm_head(found[name].states)
        told = seen.isfinite()
        expected = logits.masked_fill(~told, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(expected[told], seen.log_softmax(-1)[told], rtol=1e-3, atol=1e-4)


def test_smoke(tmp_path: Path):
    """The whole study at its smallest: run, figures, tables and the demo's checkpoint; a second run does nothing."""
    work, page = tmp_path / "work", tmp_path / "study.md"
    marks = "\n".join(f"<!-- {name} -->\n\n<!-- /{name} -->" for name in results.TABLES)
    page.write_text(f"before\n{marks}\nafter\n", encoding="utf-8")

    def call(*arguments: str) -> None:
        subprocess.run([sys.executable, str(PROGRAM), *arguments], check=True, capture_output=True)

    call("run", str(work), "--preset", "smoke", "--jobs", "1")
    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    call("run", str(work), "--preset", "smoke", "--jobs", "1")
    assert stamps == {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    call("report", str(work), "--results", str(tmp_path))
    (data,) = tmp_path.glob("*-study-smoke.json")
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert len(first) == 3
    call("figures", str(data))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == first
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    study = results.Study(data)
    assert f"{study.decoded('cot', 'greedy', 'accuracy').mean():.3f}" in text
    rows = len(results.HEADLINE) + len(results.PAPER) + len(study.ways()) + len(results.PAIRS) + 4
    assert text.count("\n|") == 2 * len(results.TABLES) + rows
    recorded = json.loads(data.read_text(encoding="utf-8"))
    assert [point["step"] for point in recorded["seeds"]["0"]["arms"]["lbr"]["curve"]] == [4, 8]
    call("demo", str(work), "--out", str(tmp_path / "checkpoint"))
    shipped = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    # Again in its place, over a link and what a killed run has left; not over what is somebody's, nor the package's.
    (tmp_path / "link").symlink_to("checkpoint")
    (tmp_path / "checkpoint.new").mkdir()
    call("demo", str(work), "--out", str(tmp_path / "link"))
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == shipped
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "checkpoint" / "thesis.txt").touch()
    for arguments in (["--out", str(tmp_path / "checkpoint")], []):
        assert CliRunner().invoke(synthetic.app, ["demo", str(work), *arguments]).exit_code == 2
    assert (tmp_path / "checkpoint" / "thesis.txt").exists()
    assert {"config.json", "model.safetensors", "tokenizer.json", "router-depth1", "router-depth2"} <= shipped
    problem = evaluation_problems(OPTIONS, 2, hops=(1,), seed=0)[0]
    assert not check_answer(problem, [EOS], OPTIONS).correct


def test_tables_of_a_study_by_hand(tmp_path: Path):
    """Means, differences seed by seed, shares of nodes, and what is left out."""

    def run(nodes: float, **accuracy: float) -> dict[str, object]:
        told = {"legal": 0.5, "by_hops": {"1": 0.25}, "nodes_per_problem": nodes}
        ways = {way.replace("_", " "): {kind: told | {"accuracy": value} for kind in ("last", "best")}
                for way, value in accuracy.items()}  # fmt: skip
        return {"decoded": ways, "probes": {}, "curve": []}

    seeds = {
        "0": {"cot": run(6, greedy=0.5), "lbr": run(9, **{"K=3_L=2": 0.75}), "soft": run(6, greedy=0.125)},
        "1": {"cot": run(6, greedy=0.25), "lbr": run(9, **{"K=3_L=2": 0.375})},
        "2": {"cot": run(6, greedy=0.75)},
    }
    path = tmp_path / "study.json"
    times = {"seconds_per_problem": {"cot": {"greedy": [0.002, 0.001, 0.004]}}}
    path.write_text(json.dumps({"seeds": {s: {"arms": arms} for s, arms in seeds.items()}, "times": times}), "utf-8")
    study = results.Study(path)
    assert study.differences(("lbr", "K=3 L=2"), results.GREEDY).tolist() == [0.25, 0.125]
    assert study.differences(results.GREEDY, ("soft", "greedy")).tolist() == [0.375]
    headline = results.headline_table(study).splitlines()[2:]
    assert headline == [
        "| plain decoding, greedy | 0.500 (0.250 to 0.750) | 6.0 | 2.0 |",
        "| **LBR, K=3, L=2** | 0.562 (0.375 to 0.750) | 9.0 |  |",
    ]
    half = 12.7062 * 0.0625  # Student's t of two seeds; their mean's deviation
    (pair,) = results.pairs_table(study).splitlines()[2:]
    names = "LBR, drawn candidates, K=3 L=2 | Discrete CoT, greedy"
    assert pair == f"| {names} | 0.188 ± {half:.3f} | +0.125 to +0.250 | 1.50 times |"
    ways = results.ways_table(study).splitlines()[2:]
    assert ways[0].startswith("| Discrete CoT | greedy | 0.500 ± ")
    assert ways[0].endswith("| 0.250 | 0.500 | 6.0 | 2.0 (1.5 to 3.0) |")
    assert ways[1] == "| Soft Thinking | greedy | 0.125 | 0.125 | 0.250 | 0.500 | 6.0 |  |"
    assert results.paper_table(study).splitlines()[2:] == [
        f"| 4a | target accuracy, CoT | 0.914 | 0.500 ± {4.30265 * 0.25 / 3**0.5:.3f} |"
    ]


def test_refusals(tmp_path: Path):
    """What is missing or mixed up is said by name, and nothing is lost by it."""
    work, kept = tmp_path / "work", tmp_path / "kept"
    seed = work / "seed-0"
    seed.mkdir(parents=True)
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine", encoding="utf-8")

    def refused(*arguments: object) -> str:
        result = CliRunner().invoke(synthetic.app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.replace("│", " ").split())

    assert "seed-0/cot.json" in refused("report", work)
    assert "no base" in refused("train", work, "cot")
    assert "no base" in refused("judge", work, "cot")
    (seed / "base.json").write_text('{"preset": "gpu"}', encoding="utf-8")
    assert "'gpu', not 'smoke'" in refused("run", work, "--preset", "smoke")
    assert "'gpu', not 'smoke'" in refused("train", work, "cot", "--preset", "smoke")
    assert "no cot: " in refused("judge", work, "cot")
    assert "--preset cpu" in refused("demo", work, "--out", tmp_path / "new")
    assert "is no checkpoint" in refused("demo", work, "--out", kept)
    other = work / "seed-1"
    other.mkdir()
    (other / "base.json").write_text('{"preset": "cpu"}', encoding="utf-8")
    assert "'gpu', not 'cpu'" in refused("run", work, "--preset", "cpu", "--seed", "2")
    shutil.rmtree(other)
    assert "--seed" in refused("judge", work, "cot", "--seed", "-1")
    for text in ("{}", "[", "[]", "1", '{"seeds": {}}'):
        (seed / "other.json").write_text(text, encoding="utf-8")
        assert "is no JSON of" in refused("figures", seed / "other.json")
    assert (kept / "thesis.txt").read_text(encoding="utf-8") == "mine"
    assert {path.name for path in work.rglob("*")} == {"seed-0", "base.json", "other.json"}


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_is_torchs_without_its_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bf16 keeps 8 bits
    assert moved > 0.01
