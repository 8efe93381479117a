"""The demo's task, its checkpoint, and the script that trains it.

The checks of the task are written from its definition alone: a breadth-first search on the edges as they stand in the
prompt's text, not the functions that made them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import packs
import pytest
import torch
import train as training
from token_tree import TokenTree
from token_tree import decode as plain_lbr
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lbr_kernels
from lbr_kernels import Router, check_model
from lbr_kernels.evaluation.demo import CHECKPOINT
from lbr_kernels.evaluation.reachability import (
    EOS,
    PAD,
    Problem,
    ReachabilityOptions,
    answer_ids,
    check_answer,
    evaluation_problems,
    graph_fingerprint,
    node_ids,
    parse_answer,
    prompt_ids,
    right_tokens,
    split_of,
    to_text,
    token_strings,
    twin_problems,
)

OPTIONS = ReachabilityOptions()
SIZES = [
    OPTIONS,
    ReachabilityOptions(layers=2, layer_size=5, num_edges=12),
    ReachabilityOptions(layers=5, layer_size=4, num_edges=24, radix=3, digits=3),
    ReachabilityOptions(layers=3, layer_size=3, num_edges=8, radix=10, digits=1),
]


def distances(problem: Problem) -> dict[int, int]:
    """How many edges each node is away from the root, by breadth-first search."""
    children = defaultdict(list)
    for u, v in problem.edges:
        children[u].append(v)
    found, layer, steps = {}, [problem.root], 0
    while layer:
        found |= {node: steps for node in layer if node not in found}
        layer, steps = [child for node in layer for child in children[node] if child not in found], steps + 1
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_exactly_one_target_can_be_reached(options):
    problems = evaluation_problems(options, 60, hops=range(1, options.max_hops + 1), seed=3)
    for problem in problems:
        away = distances(problem)
        other = next(target for target in problem.targets if target != problem.answer)
        assert problem.answer in problem.targets
        assert away[problem.answer] == problem.hops
        assert other not in away
        assert len(problem.edges) == len(set(problem.edges)) == options.num_edges
        assert len(problem.children(problem.root)) >= 2


def test_twins_differ_in_the_root_alone():
    """Whoever does not look at the root is right in half of the problems, exactly."""
    problems = evaluation_problems(OPTIONS, 60, hops=(1, 2, 3), seed=4)
    for one, two in zip(problems[::2], problems[1::2], strict=True):
        assert one.edges == two.edges
        assert set(one.targets) == set(two.targets)
        assert one.hops == two.hops
        assert one.answer != two.answer
        assert one.root != two.root


def test_order_of_targets_and_answers_is_random():
    problems = evaluation_problems(OPTIONS, 1000, hops=(2,), seed=5)
    first = sum(problem.targets[0] == problem.answer for problem in problems)
    assert 420 < first < 580  # five standard deviations around 500


def test_splits_are_disjoint_up_to_renaming():
    rng = np.random.default_rng(6)
    for split in ("train", "test"):
        problem = twin_problems(OPTIONS, [2], split=split, rng=rng)[0]
        assert split_of(problem.edges) == split
        for _ in range(20):
            names = rng.permutation(OPTIONS.num_nodes)
            renamed = [(names[u], names[v]) for u, v in rng.permutation(problem.edges)]
            assert graph_fingerprint(renamed) == graph_fingerprint(problem.edges)


def test_fingerprints_tell_graphs_apart():
    """A directed path, a star out, a star in, and a path with one edge turned: four edges each."""
    graphs = (
        [(0, 1), (1, 2), (2, 3), (3, 4)],
        [(0, 1), (0, 2), (0, 3), (0, 4)],
        [(1, 0), (2, 0), (3, 0), (4, 0)],
        [(0, 1), (2, 1), (2, 3), (3, 4)],
    )
    assert len({graph_fingerprint(graph) for graph in graphs}) == len(graphs)
    rng = np.random.default_rng(7)
    drawn = [twin_problems(OPTIONS, [1], split="train", rng=rng)[0].edges for _ in range(200)]
    assert len({graph_fingerprint(edges) for edges in drawn}) == len(drawn)


def test_one_seed_one_list_of_problems():
    again = evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=8)
    assert again == evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=8)
    assert again != evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=9)
    assert [problem.hops for problem in again] == [1, 1, 3, 3, 1, 1, 3, 3]


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_paths_are_answers(options):
    rng = np.random.default_rng(10)
    for problem in evaluation_problems(options, 30, hops=range(1, options.max_hops + 1), seed=10):
        path = problem.random_path(rng)
        ids = answer_ids(path, options)
        assert len(path) == problem.hops
        assert len(ids) <= options.max_answer_length
        assert parse_answer(ids, options) == path
        assert check_answer(problem, ids, options) == check_answer(problem, [*ids, PAD, 9], options)
        assert check_answer(problem, ids, options).correct


def test_what_is_no_right_answer():
    # 5 -> 6 -> 7 and 5 -> 8; the targets are 7 and 9.
    problem = Problem(edges=((5, 6), (6, 7), (5, 8), (9, 6)), root=5, targets=(9, 7), answer=7, hops=2)

    def judge(ids: list[int]) -> tuple[bool, bool, bool]:
        verdict = check_answer(problem, ids, OPTIONS)
        return verdict.ended, verdict.legal, verdict.correct

    right = answer_ids((6, 7), OPTIONS)
    assert judge(right) == (True, True, True)
    assert judge(right[:-1]) == (False, True, False), "not ended"
    assert judge(answer_ids((7,), OPTIONS)) == (True, False, False), "an edge that is not there"
    assert judge(answer_ids((8,), OPTIONS)) == (True, True, False), "not a target"
    assert judge(answer_ids((6,), OPTIONS)) == (True, True, False), "stops on the way"
    assert judge(right[1:]) == (True, False, False), "begins inside a node"
    assert judge([*right[:-1], right[2], EOS]) == (True, False, False), "ends with an arrow"
    assert judge([EOS]) == (True, False, False)
    assert judge([]) == (False, False, False)


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_right_tokens_by_trying_all(options):
    """A token is right where some path to the target goes on with it: enumerate the paths."""
    rng = np.random.default_rng(11)
    for problem in evaluation_problems(options, 10, hops=range(1, options.max_hops + 1), seed=11):
        paths: list[tuple[int, ...]] = [()]
        for _ in range(problem.hops):
            paths = [(*p, child) for p in paths for child in problem.children((problem.root, *p)[-1])]
        texts = [answer_ids(path, options) for path in paths if path[-1] == problem.answer]
        answer = answer_ids(problem.random_path(rng), options)
        right = right_tokens(problem, answer, options)
        for place, allowed in enumerate(right):
            assert allowed == {text[place] for text in texts if text[:place] == answer[:place]}
    with pytest.raises(ValueError, match="right_tokens: answer is"):
        right_tokens(problem, [EOS], options)


def test_bad_sizes_are_refused():
    for change, message in (
        ({"layers": 1}, "layers is 1, expected an integer >= 2"),
        ({"digits": True}, "digits is True"),
        ({"num_edges": 11}, "num_edges is 11, expected 12 to 48"),
        ({"radix": 3}, "2 digits in base 3 name 9 nodes, expected at least 16"),
        ({"radix": 11}, "radix is 11, expected at most 10"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(OPTIONS, **change)
    with pytest.raises(ValueError, match="count is 3"):
        evaluation_problems(OPTIONS, 3, hops=(1,), seed=0)
    with pytest.raises(ValueError, match="hops holds 4, expected 1 to 3"):
        evaluation_problems(OPTIONS, 2, hops=(4,), seed=0)
    with pytest.raises(ValueError, match="node is 16, expected 0 to 15"):
        node_ids(16, OPTIONS)


def test_checkpoint_is_small_and_half_precision():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_checkpoint_has_a_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    problem = evaluation_problems(OPTIONS, 2, hops=(3,), seed=12)[0]
    ids = prompt_ids(problem, OPTIONS)
    text = to_text(ids, OPTIONS)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(range(OPTIONS.vocab_size)) == token_strings(OPTIONS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)


def test_checkpoint_holds_trees(model):
    assert check_model(model).reason is None
    assert model.config.model_type == "qwen3"


def accuracy(sequences: torch.Tensor, problems: list[Problem]) -> float:
    answers = sequences[:, OPTIONS.prompt_length :].tolist()
    verdicts = [check_answer(p, answer, OPTIONS) for p, answer in zip(problems, answers, strict=True)]
    return sum(verdict.correct for verdict in verdicts) / len(problems)


def test_the_router_helps(model):
    """On the same 400 unseen problems LBR is better than sampling, and a uniform router is not."""
    problems = evaluation_problems(OPTIONS, 400, hops=(1, 2, 3), seed=13)
    prompts = torch.tensor([prompt_ids(problem, OPTIONS) for problem in problems])
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": OPTIONS.max_answer_length}
    torch.manual_seed(13)
    plain = accuracy(model.generate(prompts, **settings), problems)
    router = Router.from_pretrained(CHECKPOINT / "router-depth2")
    share = {
        name: accuracy(
            lbr_kernels.generate(
                model,
                prompts,
                width=3,
                depth=2,
                router=chooser,
                generator=torch.Generator().manual_seed(13),
                **settings,
            ),
            problems,
        )
        for name, chooser in (("trained", router), ("uniform", None))
    }
    assert share["trained"] > plain + 0.05
    assert abs(share["uniform"] - plain) < 0.08  # two and a half standard deviations of the difference


def test_training_tree_is_the_model(model):
    """Nodes of a token tree have the hidden states of plain forwards of their paths."""
    prompt = torch.tensor([prompt_ids(evaluation_problems(OPTIONS, 2, hops=(2,), seed=14)[0], OPTIONS)])
    with torch.no_grad():
        tree = TokenTree.from_prompts(model, prompt)
        root = torch.full((1, 3), prompt.shape[1] - 1)
        first = tree.grow(root, torch.tensor([[7, 8, 9]]))
        second = tree.grow(first[:, [2, 0]], torch.tensor([[11, 12]]))
        for path, slot in (([9, 11], second[0, 0]), ([7, 12], second[0, 1]), ([8], first[0, 1])):
            full = torch.cat([prompt, torch.tensor([path])], dim=1)
            expected = model.base_model(full).last_hidden_state[0, -1]
            torch.testing.assert_close(tree.hidden[0, slot], expected, rtol=1e-4, atol=1e-4)


def test_training_decoder_and_generate_agree(model):
    """Two decoders with nothing in common but the model: equally right on the same problems."""
    problems = evaluation_problems(OPTIONS, 400, hops=(1, 2, 3), seed=15)
    prompts = torch.tensor([prompt_ids(problem, OPTIONS) for problem in problems])
    router, length = Router.from_pretrained(CHECKPOINT / "router-depth1"), OPTIONS.max_answer_length
    generator = torch.Generator().manual_seed(15)
    ours = lbr_kernels.generate(
        model, prompts, width=2, depth=1, router=router, do_sample=True, top_k=0, max_new_tokens=length,
        generator=generator,
    )  # fmt: skip
    plain = plain_lbr(model, prompts, max_new_tokens=length, end=EOS, width=2, router=router, generator=generator)
    difference = accuracy(ours, problems) - accuracy(torch.cat([prompts, plain], dim=1), problems)
    assert abs(difference) < 0.08


def test_training_packs_hold_whole_problems():
    """Every branch of a pack, read along its mask, is a prompt with a right answer, or a walk."""
    pack = packs.training_pack(OPTIONS, (1, 2, 3), graphs=2, pairs=2, walks=1, rng=np.random.default_rng(16))
    branches = pack.answers.shape[1] // OPTIONS.max_answer_length
    assert branches == 5
    for row in range(2):
        for branch in range(branches):
            places = slice(branch * OPTIONS.max_answer_length, (branch + 1) * OPTIONS.max_answer_length)
            slots, targets = pack.answers[row, places], pack.targets[row, places]
            path = pack.visible[row, slots[-1]].nonzero()[:, 0]
            assert pack.positions[row, path].tolist() == list(range(len(path)))
            ids = pack.tokens[row, path].tolist()
            answer = targets[targets != PAD].tolist()
            assert ids[-OPTIONS.max_answer_length :][: len(answer)] == answer
            assert answer[-1] == EOS
            right = pack.right[row, places]
            if branch < 4:
                assert len(path) == OPTIONS.prompt_length + OPTIONS.max_answer_length
                assert right[torch.arange(len(answer)), answer].all()
                assert not right[len(answer) :].any()
            else:
                assert not right.any()
            edges = {tuple(ids[i : i + 5]) for i in range(0, OPTIONS.graph_length, 6)}
            root = ids[-OPTIONS.max_answer_length - 3 :][:2]
            walk = [*root, ids[2], *answer[:-1]]
            assert all(tuple(walk[i : i + 5]) in edges for i in range(0, len(walk) - 3, 3))


def test_training_runs(tmp_path: Path):
    """One step of every stage, saved and read back: losses are finite, everything has learned, the layout is right."""
    torch.manual_seed(17)
    model = training.build_model()
    routers = {depth: Router.for_model(model, depth=depth, dim=16, num_heads=2) for depth in training.DEPTHS}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stages = [replace(stage, steps=2) for stage in training.curriculum(2)]
    reports = list(training.train(model, routers, stages, np.random.default_rng(17), 1.0))
    assert len(reports) == 2 * len(stages)
    assert all("nan" not in report and "inf" not in report for report in reports)
    assert "K3 L2" in reports[-1]
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    training.save(model, routers, tmp_path)
    table = training.evaluate(tmp_path, evaluation_problems(OPTIONS, 4, hops=(1,), seed=17), seed=17)
    assert table.row_count == 7
