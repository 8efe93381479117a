"""Graph reachability: follow the edges from a root to the one of two targets that can be reached.

Contract
--------
The radix-translated task of the paper's section 4 (after ProsQA), at a size that a small model learns on a CPU. A
problem lists the edges of a directed graph in random order, two targets in random order, and a root from which exactly
one of the targets can be reached; the answer is a legal path to that target, node by node::

    12 -> 30 , 02 -> 11 , ... 33 -> 12 , [Q] 30 [OR] 21 [R] 33 ->   12 -> 30 [EOS]

A node is a number of ``digits`` digits in base ``radix``, one token per digit. As in WordPiece, a digit that begins a
node and one that continues it are different tokens (``3`` and ``##3``), which spares a small model the work of finding
out where nodes begin; the text shows plain digits. :func:`token_strings` is the vocabulary.

Graphs are layered: every edge leads from one layer to the next, so that all paths between two nodes are equally long,
every node beyond the first layer has a parent, and the remaining edges are drawn uniformly. Names are a random
permutation and say nothing about layers.

Two properties hold by construction:

* *Targets give nothing away.* Problems come in twin pairs: the same graph, the same two targets, the same number of
  hops, and another root, from which the other target is the reachable one. Whatever looks at the graph and the
  targets and not at the root is right in exactly half of the problems. Every root has at least two children.
* *Splits are disjoint.* The split of a graph is a function of :func:`graph_fingerprint`, which does not depend on
  the names of its nodes: no test graph occurs in training, nor does a relabelled one.

Everything is drawn from a numpy ``Generator`` that the caller gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lbr_kernels.evaluation.digits import digit_ids, digit_tokens, joined

Split: TypeAlias = Literal["train", "test"]
Edge: TypeAlias = tuple[int, int]

SPECIAL_TOKENS = ("[PAD]", "[EOS]", "->", ",", "[Q]", "[OR]", "[R]")
PAD, EOS, ARROW, COMMA, QUERY, OR, ROOT = range(len(SPECIAL_TOKENS))
FIRST_DIGIT = len(SPECIAL_TOKENS)

_TEST_SHARE = 8  # one graph in eight belongs to the test split
_MAX_DRAWS = 100_000


@dataclass(frozen=True)
class ReachabilityOptions:
    """The size of the problems; defaults are the demo's.

    ``layers`` layers of ``layer_size`` nodes, ``num_edges`` edges, and names of ``digits`` digits in base ``radix``.
    """

    layers: int = 4
    layer_size: int = 4
    num_edges: int = 18
    radix: int = 4
    digits: int = 2

    def __post_init__(self) -> None:
        for name, least in (("layers", 2), ("layer_size", 2), ("num_edges", 1), ("radix", 2), ("digits", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"ReachabilityOptions: {name} is {value!r}, expected an integer >= {least}")
        fewest, most = self.num_nodes - self.layer_size, (self.layers - 1) * self.layer_size**2
        if not fewest <= self.num_edges <= most:
            raise ValueError(
                f"ReachabilityOptions: num_edges is {self.num_edges}, expected {fewest} to {most} for {self.layers} "
                f"layers of {self.layer_size} nodes"
            )
        if self.radix > 10:
            raise ValueError(f"ReachabilityOptions: radix is {self.radix}, expected at most 10")
        if self.radix**self.digits < self.num_nodes:
            raise ValueError(
                f"ReachabilityOptions: {self.digits} digits in base {self.radix} name {self.radix**self.digits} "
                f"nodes, expected at least {self.num_nodes}"
            )

    @property
    def num_nodes(self) -> int:
        return self.layers * self.layer_size

    @property
    def max_hops(self) -> int:
        return self.layers - 1

    @property
    def vocab_size(self) -> int:
        return FIRST_DIGIT + 2 * self.radix

    @property
    def graph_length(self) -> int:
        """The number of tokens of a graph's text, with which every prompt begins."""
        return self.num_edges * (2 * self.digits + 2)

    @property
    def prompt_length(self) -> int:
        """The number of tokens of every prompt."""
        return self.graph_length + 3 * (self.digits + 1) + 1

    @property
    def max_answer_length(self) -> int:
        """The number of tokens of the longest answer, its end included."""
        return self.max_hops * (self.digits + 1)


@dataclass(frozen=True)
class Problem:
    """One problem. Nodes are integers below ``radix ** digits``; ``edges`` and ``targets`` are in the order shown.

    ``answer`` is the reachable one of the two targets, ``hops`` the number of edges from the root to it.
    """

    edges: tuple[Edge, ...]
    root: int
    targets: tuple[int, int]
    answer: int
    hops: int

    def children(self, node: int) -> tuple[int, ...]:
        return tuple(v for u, v in self.edges if u == node)

    def on_the_way(self) -> frozenset[int]:
        """The nodes from which ``answer`` can be reached, itself included."""
        found = {self.answer}
        for _ in self.edges:
            found |= {u for u, v in self.edges if v in found}
        return frozenset(found)

    def random_path(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A legal path from the root (left out) to the answer: at each node a random child that is on the way."""
        way, path = self.on_the_way(), [self.root]
        while path[-1] != self.answer:
            path.append(int(rng.choice([child for child in self.children(path[-1]) if child in way])))
        return tuple(path[1:])


@dataclass(frozen=True)
class Verdict:
    """What :func:`check_answer` found. ``correct`` means ended, legal and at the reachable target."""

    ended: bool
    legal: bool
    correct: bool


def twin_problems(
    options: ReachabilityOptions, hops: Sequence[int], *, split: Split, rng: np.random.Generator
) -> list[Problem]:
    """Twin problems on one new graph.

    Args:
        options: the size of the graph.
        hops: one number of hops per pair of twins, each in ``1 .. options.max_hops``. Graphs are drawn until one
            offers all of them; pairs may repeat if the graph has fewer.
        split: which side of the split the graph is on.
        rng: the source of everything random.

    Returns:
        ``2 * len(hops)`` problems, twins side by side.

    Raises:
        ValueError: for a number of hops outside the range, or if no suitable graph turns up.
    """
    for count in hops:
        if not 1 <= count <= options.max_hops:
            raise ValueError(f"twin_problems: hops holds {count}, expected 1 to {options.max_hops}")
    if split not in ("train", "test"):
        raise ValueError(f"twin_problems: split is {split!r}, expected 'train' or 'test'")
    for _ in range(_MAX_DRAWS):
        adjacency = _random_graph(options, rng)
        reach = _reachability(adjacency)
        pairs = {count: _target_pairs(adjacency, reach, options, count) for count in set(hops)}
        if all(len(found) for found in pairs.values()) and split_of(np.argwhere(adjacency)) == split:
            break
    else:
        raise ValueError(f"twin_problems: no graph of {options} offers hops {list(hops)} in {_MAX_DRAWS} draws")
    names = rng.choice(options.radix**options.digits, options.num_nodes, replace=False)
    edges = tuple((int(names[u]), int(names[v])) for u, v in rng.permutation(np.argwhere(adjacency)))

    problems = []
    for count in hops:
        targets = pairs[count][rng.integers(len(pairs[count]))]
        for answer, other in (targets, targets[::-1]):
            roots = np.flatnonzero(_roots(adjacency, reach, options, count)[:, answer, other])
            root, shown = names[rng.choice(roots)], names[rng.permutation(targets)]
            problems.append(Problem(edges, int(root), (int(shown[0]), int(shown[1])), int(names[answer]), count))
    return problems


def evaluation_problems(options: ReachabilityOptions, count: int, *, hops: Sequence[int], seed: int) -> list[Problem]:
    """``count`` problems of the test split, a new graph for every pair of twins, ``hops`` in turn.

    Raises ``ValueError`` for an odd or non-positive ``count``, and as :func:`twin_problems` does.
    """
    if count < 1 or count % 2:
        raise ValueError(f"evaluation_problems: count is {count}, expected a positive even number")
    rng = np.random.default_rng(seed)
    pairs = (twin_problems(options, [hops[i % len(hops)]], split="test", rng=rng) for i in range(count // 2))
    return [problem for pair in pairs for problem in pair]


def graph_fingerprint(edges: Iterable[Sequence[int]] | NDArray[np.integer]) -> int:
    """A 64-bit number that is equal for isomorphic graphs, whatever their nodes are called.

    Weisfeiler-Lehman colour refinement with as many rounds as nodes: nodes are told apart by the colours of their
    parents and children. Two graphs that it cannot tell apart share a split, which is the safe side.
    """
    pairs = np.asarray([tuple(edge) for edge in edges])
    nodes, index = np.unique(pairs, return_inverse=True)
    heads, tails = index.reshape(pairs.shape).T
    colours = np.ones(len(nodes), np.uint64)
    for _ in nodes:
        below, above = np.zeros_like(colours), np.zeros_like(colours)
        np.add.at(below, heads, _mix(colours, 1)[tails])
        np.add.at(above, tails, _mix(colours, 2)[heads])
        colours = _mix(colours + _mix(below, 3) + _mix(above, 4), 5)
    return int(_mix(colours, 6).sum())


def split_of(edges: Iterable[Sequence[int]] | NDArray[np.integer]) -> Split:
    """The split a graph belongs to."""
    return "test" if graph_fingerprint(edges) % _TEST_SHARE == 0 else "train"


def token_strings(options: ReachabilityOptions) -> list[str]:
    """The vocabulary in the order of its ids, in WordPiece's spelling."""
    return [*SPECIAL_TOKENS, *digit_tokens(options.radix)]


def node_ids(node: int, options: ReachabilityOptions) -> list[int]:
    """The tokens of one node, the most significant digit first."""
    if not 0 <= node < options.radix**options.digits:
        raise ValueError(f"node_ids: node is {node}, expected 0 to {options.radix**options.digits - 1}")
    return digit_ids(node, radix=options.radix, digits=options.digits, first=FIRST_DIGIT)


def prompt_ids(problem: Problem, options: ReachabilityOptions) -> list[int]:
    """The tokens of a problem, ``options.prompt_length`` of them, up to the arrow that asks for the first node."""
    ids: list[int] = []
    for u, v in problem.edges:
        ids += [*node_ids(u, options), ARROW, *node_ids(v, options), COMMA]
    first, second = problem.targets
    ids += [QUERY, *node_ids(first, options), OR, *node_ids(second, options)]
    return [*ids, ROOT, *node_ids(problem.root, options), ARROW]


def answer_ids(path: Sequence[int], options: ReachabilityOptions) -> list[int]:
    """The tokens of an answer: the path's nodes with arrows between them, and the end of text."""
    ids: list[int] = []
    for node in path:
        ids += [*node_ids(node, options), ARROW]
    return [*ids[:-1], EOS]


def parse_answer(ids: Sequence[int], options: ReachabilityOptions) -> tuple[int, ...] | None:
    """The path that tokens spell, or None if they are no list of nodes; what follows the first end is ignored."""
    tokens = list(ids)
    tokens = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    path = []
    for start in range(0, max(len(tokens), 1), options.digits + 1):
        word, arrow = tokens[start : start + options.digits], tokens[start + options.digits :][:1]
        digits = [token - FIRST_DIGIT - options.radix * (place > 0) for place, token in enumerate(word)]
        if len(word) < options.digits or not all(0 <= digit < options.radix for digit in digits):
            return None
        if arrow not in ([], [ARROW]) or (arrow and start + options.digits + 1 == len(tokens)):
            return None
        path.append(sum(digit * options.radix**place for place, digit in enumerate(reversed(digits))))
    return tuple(path)


def check_answer(problem: Problem, ids: Sequence[int], options: ReachabilityOptions) -> Verdict:
    """Judge the tokens of an answer: do they end, are they a path of the graph from the root, where does it lead?"""
    path, ended = parse_answer(ids, options), EOS in ids
    if path is None:
        return Verdict(ended, legal=False, correct=False)
    legal = set(zip((problem.root, *path), path, strict=False)) <= set(problem.edges)
    return Verdict(ended, legal, correct=ended and legal and path[-1] == problem.answer)


def right_tokens(problem: Problem, answer: Sequence[int], options: ReachabilityOptions) -> list[frozenset[int]]:
    """For every token of a right answer, the set of tokens that would be right in its place.

    A token is right if some path to the reachable target goes on with it, given the tokens before it.

    Args:
        answer: tokens as :func:`answer_ids` writes them, a legal path to ``problem.answer``.

    Returns:
        One set per token of ``answer``; each contains that token.
    """
    way, digits = problem.on_the_way(), options.digits
    path = parse_answer(answer, options)
    if path is None or not check_answer(problem, answer, options).correct:
        raise ValueError(f"right_tokens: answer is {list(answer)}, expected a path to {problem.answer} and its end")
    right: list[frozenset[int]] = []
    for parent, node in zip((problem.root, *path), path, strict=False):
        words = [node_ids(child, options) for child in problem.children(parent) if child in way]
        chosen = node_ids(node, options)
        right += [frozenset(w[place] for w in words if w[:place] == chosen[:place]) for place in range(digits)]
        right.append(frozenset({EOS if node == problem.answer else ARROW}))
    return right


def to_text(ids: Iterable[int], options: ReachabilityOptions) -> str:
    """Tokens as text: words separated by spaces, a node's digits written together."""
    return joined(ids, token_strings(options))


def _random_graph(options: ReachabilityOptions, rng: np.random.Generator) -> NDArray[np.bool_]:
    """An adjacency matrix ``[num_nodes, num_nodes]``: one random parent each, and further edges uniformly."""
    size, nodes = options.layer_size, options.num_nodes
    layer = np.arange(nodes) // size
    adjacency = np.zeros((nodes, nodes), np.bool_)
    later = np.arange(size, nodes)
    adjacency[(layer[later] - 1) * size + rng.integers(size, size=len(later)), later] = True
    free = np.flatnonzero((layer[None, :] - layer[:, None] == 1) & ~adjacency)
    adjacency.flat[rng.choice(free, options.num_edges - len(later), replace=False)] = True
    return adjacency


def _reachability(adjacency: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``[num_nodes, num_nodes]``: whether a path of any length, zero included, leads from row to column."""
    reach = adjacency | np.eye(len(adjacency), dtype=np.bool_)
    for _ in range(len(adjacency).bit_length()):
        reach = reach @ reach
    return reach


def _roots(
    adjacency: NDArray[np.bool_], reach: NDArray[np.bool_], options: ReachabilityOptions, hops: int
) -> NDArray[np.bool_]:
    """``[root, answer, other]``: may the root be asked for these targets? Both lie ``hops`` layers below it."""
    layer = np.arange(options.num_nodes) // options.layer_size
    below = layer[None, :] - layer[:, None] == hops
    branching = adjacency.sum(axis=1) >= 2
    allowed: NDArray[np.bool_] = (reach & below)[:, :, None] & (~reach & below)[:, None, :] & branching[:, None, None]
    return allowed


def _target_pairs(
    adjacency: NDArray[np.bool_], reach: NDArray[np.bool_], options: ReachabilityOptions, hops: int
) -> NDArray[np.intp]:
    """``[pairs, 2]``: the targets for which there are twins, a root for either one."""
    asked = _roots(adjacency, reach, options, hops).any(axis=0)
    return np.argwhere(asked & asked.T)


def _mix(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers one by one (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15 * salt & 0xFFFFFFFFFFFFFFFF)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
