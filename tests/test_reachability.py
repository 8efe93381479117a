"""The demo's task and its checkpoint.

The checks of the task are written from its definition alone: a breadth-first search on the edges as they stand in the
prompt's text, not the functions that made them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import networkx
import numpy as np
import packs
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lbr_kernels
from lbr_kernels import Router, check_model
from lbr_kernels.evaluation.demo import CHECKPOINT
from lbr_kernels.evaluation.reachability import (
    ARROW,
    EOS,
    PAD,
    Problem,
    ProblemBatch,
    ReachabilityOptions,
    answer_ids,
    answer_tokens,
    check_answer,
    evaluation_problems,
    graph_fingerprint,
    legal_masks,
    legal_tokens,
    node_ids,
    parse_answer,
    prompt_ids,
    prompt_tokens,
    right_masks,
    split_of,
    to_text,
    token_strings,
    twin_batch,
    twin_problems,
)

OPTIONS = ReachabilityOptions()
SIZES = [
    OPTIONS,
    ReachabilityOptions(layers=2, layer_size=5, num_edges=12),
    ReachabilityOptions(layers=5, layer_size=4, num_edges=24, radix=3, digits=3),
    ReachabilityOptions(layers=2, layer_size=5, num_edges=13, radix=10, digits=1),
    ReachabilityOptions(radix=2, digits=4),
]
FEW_GRAPHS = ReachabilityOptions(layers=3, layer_size=3, num_edges=11, radix=10, digits=1)


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


def hops_of(options: ReachabilityOptions, graphs: int) -> np.ndarray:
    """Every number of hops once on every graph."""
    return np.tile(np.arange(1, options.max_hops + 1), (graphs, 1))


def test_twins_differ_in_the_root_alone():
    """Whoever does not look at the root, or at its degrees only, is right in half of the problems, exactly."""
    problems = evaluation_problems(OPTIONS, 60, hops=(1, 2, 3), seed=4)
    for one, two in zip(problems[::2], problems[1::2], strict=True):
        assert one.edges == two.edges
        assert set(one.targets) == set(two.targets)
        assert one.hops == two.hops
        assert one.answer != two.answer
        assert one.root != two.root
        for end in (0, 1):
            degrees = [[edge[end] for edge in problem.edges].count(problem.root) for problem in (one, two)]
            assert degrees[0] == degrees[1]


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


def test_splits_do_not_move():
    """The shipped checkpoint has learned from graphs of the train split as it was: what is new to it must stay so."""
    assert graph_fingerprint([(0, 1), (1, 2), (2, 3), (3, 4)]) == 13355473353151159670


def test_no_graph_twice_in_an_evaluation():
    """Of a size that has so few test graphs that they repeat if nothing is done about it."""

    def graphs(distinct: bool, split: str, count: int) -> list[int]:
        rng = np.random.default_rng(20)
        batch = twin_batch(FEW_GRAPHS, np.ones((count, 1), int), split=split, rng=rng, distinct=distinct)
        return [graph_fingerprint(edges) for edges in batch.edges]

    problems = evaluation_problems(FEW_GRAPHS, 24, hops=(1,), seed=20)
    test = {graph_fingerprint(problem.edges) for problem in problems}
    assert len(test) == 12
    assert len(set(graphs(True, "test", 12))) == 12
    assert len(set(graphs(False, "test", 12))) < 12
    assert not test & set(graphs(False, "train", 2000))
    with pytest.raises(ValueError, match=r"no new test graph of .* offers hops \[2\] in .* of 100 were found"):
        evaluation_problems(FEW_GRAPHS, 200, hops=(2,), seed=20)


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
    alike = defaultdict(list)
    for edges in twin_batch(OPTIONS, np.ones((2000, 1), int), split="train", rng=rng).edges.tolist():
        alike[graph_fingerprint(edges)].append(networkx.DiGraph(edges))
    assert len(alike) > 1990
    assert all(networkx.is_isomorphic(same[0], graph) for same in alike.values() for graph in same[1:])


def test_one_seed_one_list_of_problems():
    again = evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=8)
    assert again == evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=8)
    assert again != evaluation_problems(OPTIONS, 8, hops=(1, 3), seed=9)
    assert [problem.hops for problem in again] == [1, 1, 3, 3, 1, 1, 3, 3]


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_paths_are_answers(options):
    rng = np.random.default_rng(10)
    batch = twin_batch(options, hops_of(options, 10), split="test", rng=rng)
    paths = batch.random_paths(rng)
    rows = zip(batch.problems(), paths.reshape(-1, options.max_hops).tolist(), strict=True)
    for problem, padded in rows:
        path = tuple(padded[: problem.hops])
        ids = answer_ids(path, options)
        assert padded[problem.hops :] == [-1] * (options.max_hops - problem.hops)
        assert len(ids) <= options.max_answer_length
        assert parse_answer(ids, options) == path
        assert check_answer(problem, ids, options) == check_answer(problem, [*ids, PAD, 9], options)
        assert check_answer(problem, ids, options).correct


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_batches_are_their_problems(options):
    """Arrays of tokens hold what the functions for one problem write, and the matrix holds the edges."""
    rng = np.random.default_rng(18)
    batch = twin_batch(options, hops_of(options, 5), split="train", rng=rng)
    problems = batch.problems()
    tokens = prompt_tokens(batch, options)
    assert tokens.shape == (5, 2 * options.max_hops, options.prompt_length)
    assert tokens.reshape(len(problems), -1).tolist() == [prompt_ids(problem, options) for problem in problems]
    paths = batch.random_paths(rng)
    answers = answer_tokens(paths, options).reshape(len(problems), -1).tolist()
    for path, answer in zip(paths.reshape(len(problems), -1).tolist(), answers, strict=True):
        expected = answer_ids([node for node in path if node >= 0], options)
        assert answer == expected + [PAD] * (options.max_answer_length - len(expected))
    for adjacency, edges in zip(batch.adjacency, batch.edges.tolist(), strict=True):
        assert sorted(edges) == np.argwhere(adjacency).tolist()


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


def every_path(problem: Problem) -> list[tuple[int, ...]]:
    """All paths from the root, the root left out."""
    found, last = [], [(problem.root,)]
    while last:
        last = [(*path, child) for path in last for child in problem.children(path[-1])]
        found += [path[1:] for path in last]
    return found


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_next_tokens_by_trying_all(options):
    """A token is legal where some path goes on with it, and right if that one leads to the target: enumerate them."""
    rng = np.random.default_rng(11)
    batch = twin_batch(options, hops_of(options, 3), split="test", rng=rng)
    paths = batch.random_paths(rng)
    shape = -1, options.max_answer_length, options.vocab_size
    right, legal = (masks(batch, paths, options).reshape(shape) for masks in (right_masks, legal_masks))
    answers = answer_tokens(paths, options).reshape(shape[:2]).tolist()
    for index, problem in enumerate(batch.problems()):
        texts = [answer_ids(path, options) for path in every_path(problem)]
        to_answer = [text for text in texts if check_answer(problem, text, options).correct]
        # An end is legal at targets alone; where a path goes on, a longer one has the arrow.
        ended = [text for text in texts if parse_answer(text, options)[-1] in problem.targets]
        texts = [text[:-1] for text in texts] + ended
        length = answers[index].index(EOS) + 1
        for place in range(length):
            before = answers[index][:place]
            expected = {text[place] for text in texts if text[:place] == before and len(text) > place}
            assert set(np.flatnonzero(legal[index, place])) == expected
            assert legal_tokens(problem, before, options) == expected
            expected = {text[place] for text in to_answer if text[:place] == before}
            assert set(np.flatnonzero(right[index, place])) == expected
        assert not right[index, length:].any()
        assert not legal[index, length:].any()


def test_what_is_legal():
    # 5 -> 6 -> 7 -> 4 and 5 -> 8; the targets are 7 and 9. In base 4: 11 -> 12 -> 13 -> 10 and 11 -> 20.
    problem = Problem(edges=((5, 6), (6, 7), (5, 8), (9, 6), (7, 4)), root=5, targets=(9, 7), answer=7, hops=2)

    def after(text: str) -> set[str]:
        ids = [token_strings(OPTIONS).index(word) for word in text.split()]
        return {token_strings(OPTIONS)[token] for token in legal_tokens(problem, ids, OPTIONS)}

    assert after("") == {"1", "2"}
    assert after("1") == {"##2"}
    assert after("1 ##2") == {"->"}, "no target"
    assert after("1 ##2 -> 1 ##3") == {"->", "[EOS]"}, "a target with a child"
    assert after("2 ##0") == set(), "no target, no children"
    assert after("1 ##2 -> 1 ##3 [EOS]") == set(), "after the end"
    assert after("3") == after("1 ##3") == after("1 ##2 [EOS]") == after("->") == after("##1") == set(), "not legal"


def surface(batch: ProblemBatch, leak: bool) -> torch.Tensor:
    """What shows without following edges: degrees of root and targets, and where the targets stand in the text.

    ``[problems, features]``; with ``leak`` also which targets are the root's children.
    """
    nodes = np.concatenate([batch.targets, batch.roots[..., None]], axis=-1)
    graph = np.arange(len(nodes))[:, None, None]
    degrees = [batch.adjacency.sum(axis=axis)[graph, nodes] for axis in (1, 2)]
    places = batch.edges[:, None, None] == batch.targets[..., None, None]
    parts = [*degrees, places.reshape(*nodes.shape[:2], -1), batch.hops[..., None]]
    if leak:
        parts.append(batch.adjacency[graph, batch.roots[..., None], batch.targets])
    return torch.from_numpy(np.concatenate(parts, axis=-1)).flatten(0, 1).float()


def share_right(classifier: nn.Module, batches: list[ProblemBatch], leak: bool) -> float:
    """Train a classifier of the answer's place on the first batch; how often is it right on the second?"""
    (seen, told), (unseen, wanted) = (
        (surface(batch, leak), torch.from_numpy(batch.answers == batch.targets[..., 1]).flatten().float())
        for batch in batches
    )
    mean, scale = seen.mean(dim=0), seen.std(dim=0) + 1e-6
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(150):
        loss = nn.functional.binary_cross_entropy_with_logits(classifier((seen - mean) / scale)[:, 0], told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(((classifier((unseen - mean) / scale)[:, 0] > 0) == wanted).float().mean())


@pytest.mark.parametrize("options", [OPTIONS, ReachabilityOptions(radix=2, digits=4)], ids=str)
def test_no_shortcut(options):
    """Degrees, positions and the order of targets tell nothing; the same classifiers learn from what does tell."""
    torch.manual_seed(19)
    rng = np.random.default_rng(19)
    batches = [twin_batch(options, hops_of(options, 700), split=split, rng=rng) for split in ("train", "test")]
    chance = 4 * 0.5 / batches[1].answers.size ** 0.5  # four standard errors
    for leak in (False, True):
        features = surface(batches[0], leak).shape[1]
        linear = nn.Linear(features, 1)
        mlp = nn.Sequential(nn.Linear(features, 32), nn.GELU(), nn.Linear(32, 1))
        for classifier in (linear, mlp):
            right = share_right(classifier, batches, leak)
            assert right > 0.6 if leak else abs(right - 0.5) < chance


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_no_shortcut_in_a_table(hops):
    """The most that degrees can tell: for every combination of them, the place that was more often right."""
    rng = np.random.default_rng(21)
    rows = []
    for split in ("train", "test"):
        batch = twin_batch(OPTIONS, np.full((1500, 1), hops), split=split, rng=rng)
        degrees = surface(batch, leak=False)[:, :6].int().tolist()
        second = (batch.answers == batch.targets[..., 1]).flatten().tolist()
        rows.append([(tuple(row), 1 if place else -1) for row, place in zip(degrees, second, strict=True)])
    votes: dict[tuple[int, ...], int] = defaultdict(int)
    for row, place in rows[0]:
        votes[row] += place
    decided = [votes[row] * place > 0 for row, place in rows[1] if votes[row]]
    assert len(decided) > 1000
    assert abs(np.mean(decided) - 0.5) < 4 * 0.5 / len(decided) ** 0.5


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
    with pytest.raises(ValueError, match="split is 'dev', expected 'train', 'validation' or 'test'"):
        twin_batch(OPTIONS, [[1]], split="dev", rng=np.random.default_rng(0))
    for hops, given in (
        ([1], r"int64 \[1\]"),
        (np.zeros((0, 1), int), r"int64 \[0, 1\]"),
        ([[1.5]], r"float64 \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"hops is {given}, expected integers"):
            twin_batch(OPTIONS, hops, split="train", rng=np.random.default_rng(0))
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


def test_training_packs_hold_whole_problems():
    """Every branch of a pack, read from its end up, is a prompt with a right answer, or a walk."""
    pack = packs.make_pack(OPTIONS, (1, 2, 3), graphs=2, pairs=2, walks=1, rng=np.random.default_rng(16))
    assert pack.branches == 5
    for row in range(2):
        for branch in range(pack.branches):
            places = slice(branch * OPTIONS.max_answer_length, (branch + 1) * OPTIONS.max_answer_length)
            slots, targets = pack.answers[row, places], pack.targets[row, places]
            path = [int(slots[-1])]
            while path[0] >= 0:
                path.insert(0, int(pack.forest.parents[row, path[0]]))
            path = path[1:]
            ids = pack.forest.tokens[row, path].tolist()
            answer = targets[targets != PAD].tolist()
            assert ids[-OPTIONS.max_answer_length :][: len(answer)] == answer
            assert answer[-1] == EOS
            right, legal = pack.right[row, places], pack.legal[row, places]
            assert legal[torch.arange(len(answer)), answer].all()
            assert not (right & ~legal).any()
            assert not legal[len(answer) :].any()
            if branch < 4:
                assert len(path) == OPTIONS.prompt_length + OPTIONS.max_answer_length
                assert right[torch.arange(len(answer)), answer].all()
                assert not right[len(answer) :].any()
            else:
                assert not right.any()
                assert not legal[:, EOS].logical_and(legal[:, ARROW]).any()
            edges = {tuple(ids[i : i + 5]) for i in range(0, OPTIONS.graph_length, 6)}
            root = ids[-OPTIONS.max_answer_length - 3 :][:2]
            walk = [*root, ids[2], *answer[:-1]]
            assert all(tuple(walk[i : i + 5]) in edges for i in range(0, len(walk) - 3, 3))


@pytest.mark.parametrize(("pairs", "walks"), [(0, 2), (1, 0)])
def test_packs_of_walks_or_questions_alone(pairs, walks):
    pack = packs.make_pack(OPTIONS, (1,), graphs=2, pairs=pairs, walks=walks, rng=np.random.default_rng(22))
    assert pack.targets.shape == (2, (2 * pairs + walks) * OPTIONS.max_answer_length)
    assert pack.right.shape == pack.legal.shape == (*pack.targets.shape, OPTIONS.vocab_size)
    told = pack.targets != PAD
    assert pack.legal[told].gather(1, pack.targets[told][:, None]).all()
