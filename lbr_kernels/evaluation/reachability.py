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

Three properties hold by construction:

* *Targets and degrees give nothing away.* Problems come in twin pairs: the same graph, the same two targets, the same
  number of hops, and another root with as many parents and as many children (two at least), from which the other target
  is the reachable one. Whatever looks at the graph, at the targets and at the root's degrees and not at which node the
  root is, is right in exactly half of the problems.
* *Splits are disjoint.* The split of a graph is a function of :func:`graph_fingerprint`, which does not depend on
  the names of its nodes: no test graph occurs in training, nor does a relabelled one.
* *No test graph occurs twice* in what :func:`evaluation_problems` returns, nor does a relabelled one.

:func:`twin_batch` draws many graphs at once. In its arrays G graphs have Q questions each, and N is
``radix ** digits``, the number of names. Everything is drawn from a numpy ``Generator`` that the caller gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from lbr_kernels.evaluation.digits import digit_ids, digit_tokens, joined

Split: TypeAlias = Literal["train", "validation", "test"]
Edge: TypeAlias = tuple[int, int]

SPECIAL_TOKENS = ("[PAD]", "[EOS]", "->", ",", "[Q]", "[OR]", "[R]")
PAD, EOS, ARROW, COMMA, QUERY, OR, ROOT = range(len(SPECIAL_TOKENS))
FIRST_DIGIT = len(SPECIAL_TOKENS)

_SHARE = 8  # one graph in eight belongs to the test split, another one to validation
_SPLITS: dict[int, Split] = {0: "test", 1: "validation"}  # by the fingerprint's remainder; the others are for training
_MAX_DRAWS = 100_000  # in a row without a suitable graph
_MAX_TRIES = 256  # at once, for one graph
_MAX_CELLS = 2**22  # of the largest array of a draw


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
        if self.num_names < self.num_nodes:
            raise ValueError(
                f"ReachabilityOptions: {self.digits} digits in base {self.radix} name {self.num_names} "
                f"nodes, expected at least {self.num_nodes}"
            )

    @property
    def num_nodes(self) -> int:
        return self.layers * self.layer_size

    @property
    def num_names(self) -> int:
        return int(self.radix**self.digits)

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


@dataclass(frozen=True)
class ProblemBatch:
    """Problems on G graphs, Q on each; nodes, orders and fields are those of :class:`Problem`.

    ``edges [G, E, 2]``, ``roots [G, Q]``, ``targets [G, Q, 2]``, ``answers [G, Q]`` and ``hops [G, Q]``, all int64.
    ``adjacency`` bool ``[G, N, N]`` says whether an edge leads from row to column. Twins are side by side.
    """

    edges: NDArray[np.int64]
    roots: NDArray[np.int64]
    targets: NDArray[np.int64]
    answers: NDArray[np.int64]
    hops: NDArray[np.int64]
    adjacency: NDArray[np.bool_]

    def problems(self) -> list[Problem]:
        """One by one, graph after graph."""
        rows = zip(self.roots.tolist(), self.targets.tolist(), self.answers.tolist(), self.hops.tolist(), strict=True)
        found = []
        for graph, row in zip(self.edges.tolist(), rows, strict=True):
            edges = tuple((u, v) for u, v in graph)
            found += [Problem(edges, r, (a, b), answer, h) for r, (a, b), answer, h in zip(*row, strict=True)]
        return found

    def on_the_way(self) -> NDArray[np.bool_]:
        """``[G, Q, N]``: the nodes from which the answer can be reached, itself included."""
        found = _one_hot(self.answers, self.adjacency.shape[-1])
        parents = self.adjacency.swapaxes(1, 2).astype(np.float32)
        for _ in range(int(self.hops.max(initial=0))):
            found |= found.astype(np.float32) @ parents > 0
        return found

    def random_paths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Legal paths ``[G, Q, most hops]`` from root (left out) to answer: always a random child that is on the way.

        Shorter paths end in -1.
        """
        return random_walks(self.adjacency, self.roots, self.on_the_way(), int(self.hops.max(initial=0)), rng)


@dataclass(frozen=True)
class Verdict:
    """What :func:`check_answer` found. ``correct`` means ended, legal and at the reachable target."""

    ended: bool
    legal: bool
    correct: bool


def twin_batch(
    options: ReachabilityOptions,
    hops: NDArray[np.integer] | Sequence[Sequence[int]],
    *,
    split: Split,
    rng: np.random.Generator,
    distinct: bool = False,
) -> ProblemBatch:
    """Twin problems on many new graphs.

    Args:
        options: the size of the graphs.
        hops: integers ``[G, P]``, one number of hops per pair of twins, each in ``1 .. options.max_hops``. Graphs are
            drawn until every one offers all that its row asks for; pairs may repeat if a graph has fewer.
        split: which side of the split the graphs are on.
        rng: the source of everything random.
        distinct: draw again where two graphs would have the same fingerprint.

    Returns:
        G graphs with Q = 2 P problems each, those of a pair side by side.

    Raises:
        ValueError: for a number of hops outside the range, or if no suitable graph turns up.
    """
    asked = np.asarray(hops)
    if asked.ndim != 2 or not len(asked) or not (asked.size == 0 or np.issubdtype(asked.dtype, np.integer)):
        raise ValueError(
            f"twin_batch: hops is {asked.dtype} {list(asked.shape)}, expected integers [graphs, pairs] with graphs > 0"
        )
    for count in np.unique(asked).tolist():
        if not 1 <= count <= options.max_hops:
            raise ValueError(f"twin_batch: hops holds {count}, expected 1 to {options.max_hops}")
    if split not in get_args(Split):
        raise ValueError(f"twin_batch: split is {split!r}, expected 'train', 'validation' or 'test'")
    steps = _suitable_graphs(options, asked, split, distinct, rng)
    return _named(options, steps, *_chosen_twins(options, steps, asked, rng), rng)


def twin_problems(
    options: ReachabilityOptions, hops: Sequence[int], *, split: Split, rng: np.random.Generator
) -> list[Problem]:
    """Twin problems on one new graph: :func:`twin_batch` with one row of ``hops``.

    Returns:
        ``2 * len(hops)`` problems, twins side by side.
    """
    return twin_batch(options, [hops], split=split, rng=rng).problems()


def evaluation_problems(
    options: ReachabilityOptions, count: int, *, hops: Sequence[int], seed: int, split: Split = "test"
) -> list[Problem]:
    """``count`` problems of a split, a new graph for every pair of twins, ``hops`` in turn.

    No two of the graphs have the same fingerprint. Raises ``ValueError`` for an odd or non-positive ``count``, and as
    :func:`twin_batch` does, which it also does if there are not enough different graphs of this size.
    """
    if count < 1 or count % 2:
        raise ValueError(f"evaluation_problems: count is {count}, expected a positive even number")
    in_turn = np.resize(np.asarray(hops), (count // 2, 1))
    return twin_batch(options, in_turn, split=split, rng=np.random.default_rng(seed), distinct=True).problems()


def random_walks(
    adjacency: NDArray[np.bool_],
    starts: NDArray[np.integer],
    through: NDArray[np.bool_],
    steps: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """From each start to a random child, from there to one of its children, and so on to a node that has none.

    Args:
        adjacency: bool ``[G, N, N]``, as in :class:`ProblemBatch`.
        starts: nodes ``[G, Q]``.
        through: bool ``[G, Q, N]`` (or what broadcasts to it), the children that count.
        steps: the most steps that are taken.

    Returns:
        Nodes ``[G, Q, steps]``, the start left out, -1 after the end.
    """
    graph = np.arange(len(adjacency))[:, None]
    path = np.full((*starts.shape, steps), -1)
    node, going = np.asarray(starts), np.ones(starts.shape, np.bool_)
    for step in range(steps):
        children = adjacency[graph, node] & through
        going = going & children.any(axis=-1)
        node = np.where(going, random_true(children, rng), node)
        path[..., step] = np.where(going, node, -1)
    return path


def random_true(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """The index of a random true element along the last axis, 0 where there is none."""
    counted = mask.cumsum(axis=-1)
    wanted = rng.integers(np.maximum(counted[..., -1], 1))
    found: NDArray[np.int64] = (counted > wanted[..., None]).argmax(axis=-1)
    return found


def graph_fingerprint(edges: Iterable[Sequence[int]] | NDArray[np.integer]) -> int:
    """A 64-bit number that is equal for isomorphic graphs, whatever their nodes are called.

    Weisfeiler-Lehman colour refinement with as many rounds as nodes: nodes are told apart by the colours of their
    parents and children. Two graphs that it cannot tell apart share a split, which is the safe side.
    """
    pairs = np.asarray([tuple(edge) for edge in edges])
    nodes, index = np.unique(pairs, return_inverse=True)
    heads, tails = index.reshape(pairs.shape).T
    adjacency = np.zeros((1, len(nodes), len(nodes)), np.uint64)
    np.add.at(adjacency[0], (heads, tails), np.uint64(1))
    return int(_fingerprints(adjacency)[0])


def split_of(edges: Iterable[Sequence[int]] | NDArray[np.integer]) -> Split:
    """The split a graph belongs to."""
    return _SPLITS.get(graph_fingerprint(edges) % _SHARE, "train")


def token_strings(options: ReachabilityOptions) -> list[str]:
    """The vocabulary in the order of its ids, in WordPiece's spelling."""
    return [*SPECIAL_TOKENS, *digit_tokens(options.radix)]


def node_ids(node: int, options: ReachabilityOptions) -> list[int]:
    """The tokens of one node, the most significant digit first."""
    if not 0 <= node < options.num_names:
        raise ValueError(f"node_ids: node is {node}, expected 0 to {options.num_names - 1}")
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


def legal_tokens(problem: Problem, answer: Sequence[int], options: ReachabilityOptions) -> frozenset[int]:
    """The tokens that may follow the first tokens of an answer, whether or not they lead to the reachable target.

    Inside a node those that go on to a child of the node before it; after a node an arrow if it has children, and the
    end if it is one of the two targets. Empty after the end, and after tokens that are not legal themselves.
    """
    children = {tuple(node_ids(child, options)): child for child in problem.children(problem.root)}
    word: tuple[int, ...] = ()
    for token in [*answer, None]:
        if len(word) < options.digits:
            legal = {ids[len(word)] for ids in children if ids[: len(word)] == word}
        else:
            node = children[word]
            below = {tuple(node_ids(child, options)): child for child in problem.children(node)}
            legal = {ARROW} if below else set()
            legal |= {EOS} if node in problem.targets else set()
        if token is None:
            break
        if token not in legal or token == EOS:
            return frozenset()
        if token == ARROW:
            children, word = below, ()
        else:
            word += (token,)
    return frozenset(legal)


def node_tokens(nodes: NDArray[np.integer], options: ReachabilityOptions) -> NDArray[np.int64]:
    """:func:`node_ids` of every element: ``[..., digits]``."""
    place = np.arange(options.digits)
    digits = np.asarray(nodes, np.int64)[..., None] // options.radix ** place[::-1] % options.radix
    return digits + FIRST_DIGIT + options.radix * (place > 0)


def prompt_tokens(batch: ProblemBatch, options: ReachabilityOptions) -> NDArray[np.int64]:
    """:func:`prompt_ids` of every problem: ``[G, Q, prompt_length]``."""
    graphs, questions = batch.roots.shape
    tokens = np.empty((graphs, questions, options.prompt_length), np.int64)
    tokens[:, :, : options.graph_length] = graph_tokens(batch, options)[:, None]
    ends = np.concatenate([batch.targets, batch.roots[..., None]], axis=-1)
    question = np.empty((*ends.shape, options.digits + 1), np.int64)
    question[..., 0] = QUERY, OR, ROOT
    question[..., 1:] = node_tokens(ends, options)
    tokens[:, :, options.graph_length : -1] = question.reshape(graphs, questions, 3 * (options.digits + 1))
    tokens[:, :, -1] = ARROW
    return tokens


def graph_tokens(batch: ProblemBatch, options: ReachabilityOptions) -> NDArray[np.int64]:
    """The text of every graph, with which its prompts begin: ``[G, graph_length]``."""
    tokens = np.empty((*batch.edges.shape, options.digits + 1), np.int64)
    tokens[..., :-1] = node_tokens(batch.edges, options)
    tokens[..., -1] = ARROW, COMMA
    return tokens.reshape(len(tokens), options.graph_length)


def answer_tokens(paths: NDArray[np.integer], options: ReachabilityOptions) -> NDArray[np.int64]:
    """:func:`answer_ids` of paths ``[..., steps]`` ending in -1: ``[..., steps * (digits + 1)]``, ``PAD`` last."""
    exists = paths >= 0
    last = exists & ~np.concatenate([exists[..., 1:], np.zeros_like(exists[..., :1])], axis=-1)
    tokens = np.full((*paths.shape, options.digits + 1), ARROW, np.int64)
    tokens[..., :-1] = node_tokens(paths, options)
    tokens[last, -1] = EOS
    tokens[~exists] = PAD
    return tokens.reshape(*paths.shape[:-1], paths.shape[-1] * (options.digits + 1))


def next_tokens(
    adjacency: NDArray[np.bool_],
    starts: NDArray[np.integer],
    paths: NDArray[np.integer],
    through: NDArray[np.bool_],
    ends: NDArray[np.bool_],
    options: ReachabilityOptions,
) -> NDArray[np.bool_]:
    """For every token of answers, the tokens that could stand in its place, given the tokens before it.

    Inside a node those that go on to a child that counts, after a node an arrow if it has such children, and the end
    where it may end.

    Args:
        adjacency, starts, through: as for :func:`random_walks`.
        paths: its result, ``[G, Q, steps]``.
        ends: bool ``[G, Q, N]`` (or what broadcasts to it), the nodes at which an answer may end.

    Returns:
        bool ``[G, Q, steps * (digits + 1), vocabulary]``, in the layout of :func:`answer_tokens`; false on padding.
    """
    radix, digits = options.radix, options.digits
    flat, exists = np.maximum(paths, 0), paths >= 0
    before = np.concatenate([starts[..., None], flat[..., :-1]], axis=-1)
    graph = np.arange(len(adjacency))[:, None, None]
    children = adjacency[graph, before] & through[..., None, :]
    further = (adjacency[graph, flat] & through[..., None, :]).any(axis=-1)
    allowed = np.zeros((*paths.shape, digits + 1, options.vocab_size), np.bool_)
    for place in range(digits):
        # The names whose first digits are those of the path's node, by the digit at this place.
        tail = radix ** (digits - place)
        words = children.reshape(*paths.shape, radix**place, radix, tail // radix)
        same = np.take_along_axis(words, (flat // tail)[..., None, None, None], axis=-3).squeeze(-3)
        first = FIRST_DIGIT + radix * (place > 0)
        allowed[..., place, first : first + radix] = same.any(axis=-1)
    allowed[..., digits, ARROW] = further
    may_end = np.broadcast_to(ends, (*paths.shape[:2], ends.shape[-1]))
    allowed[..., digits, EOS] = np.take_along_axis(may_end, flat, axis=-1)
    allowed &= exists[..., None, None]
    return allowed.reshape(*paths.shape[:2], paths.shape[2] * (digits + 1), options.vocab_size)


def right_masks(batch: ProblemBatch, paths: NDArray[np.integer], options: ReachabilityOptions) -> NDArray[np.bool_]:
    """The tokens with which some path to the reachable target goes on: :func:`next_tokens` on right ``paths``."""
    at_answer = _one_hot(batch.answers, options.num_names)
    return next_tokens(batch.adjacency, batch.roots, paths, batch.on_the_way(), at_answer, options)


def legal_masks(batch: ProblemBatch, paths: NDArray[np.integer], options: ReachabilityOptions) -> NDArray[np.bool_]:
    """:func:`legal_tokens` in the place of every token of legal ``paths``, as :func:`next_tokens` returns them."""
    first, second = (_one_hot(batch.targets[..., place], options.num_names) for place in (0, 1))
    at_target = first | second
    return next_tokens(batch.adjacency, batch.roots, paths, np.ones((1, 1, 1), np.bool_), at_target, options)


def to_text(ids: Iterable[int], options: ReachabilityOptions) -> str:
    """Tokens as text: words separated by spaces, a node's digits written together."""
    return joined(ids, token_strings(options))


def _suitable_graphs(
    options: ReachabilityOptions, hops: NDArray[np.integer], split: Split, distinct: bool, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Graphs, as :func:`_random_graphs` draws them, that offer what the rows of ``hops`` ask for."""
    tries = 4 if split == "train" else 2 * _SHARE  # graphs drawn at once for one that is needed
    kept = np.zeros((len(hops), options.layers - 1, options.layer_size, options.layer_size), np.bool_)
    prints = np.zeros(len(hops), np.uint64)
    missing, futile = np.arange(len(hops)), 0
    while len(missing):
        most = _MAX_CELLS // (tries * options.layers * options.layer_size**4)
        rows = missing[: max(1, most)]
        steps = _random_graphs(options, len(rows) * tries, rng)
        found = np.arange(len(steps))
        for count in np.unique(hops[rows])[::-1].tolist():  # the most hops first, which the fewest graphs offer
            offered = ~(hops[rows] == count).any(axis=1)[found // tries]
            unsure = np.flatnonzero(~offered)
            offered[unsure] = _twins(steps[found[unsure]], count).any(axis=(1, 2, 3, 4, 5))
            found = found[offered]
        drawn = _fingerprints(_adjacency(steps[found], options))
        usable = np.isin(
            drawn % np.uint64(_SHARE), [part for part in range(_SHARE) if _SPLITS.get(part, "train") == split]
        )
        if distinct:
            first = np.zeros_like(usable)
            first[np.unique(np.where(usable, drawn, 0), return_index=True)[1]] = True
            usable &= first & ~np.isin(drawn, np.delete(prints, missing))
        found, drawn = found[usable], drawn[usable]
        served, first_of = np.unique(found // tries, return_index=True)
        kept[rows[served]], prints[rows[served]] = steps[found[first_of]], drawn[first_of]
        missing = np.setdiff1d(missing, rows[served])
        tries = min(2 * tries, _MAX_TRIES)  # what is still missing is rare
        futile = 0 if len(served) else futile + len(steps)
        if futile >= _MAX_DRAWS:
            raise ValueError(
                f"twin_batch: no{' new' * distinct} {split} graph of {options} offers hops {hops[missing[0]].tolist()} "
                f"in {futile} draws; {len(hops) - len(missing)} of {len(hops)} were found"
            )
    return kept


def _random_graphs(options: ReachabilityOptions, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """``[count, layers - 1, layer_size, layer_size]``: does an edge lead from a node of a layer to one of the next?

    One random parent for each node beyond the first layer, and further edges uniformly.
    """
    levels, size = options.layers - 1, options.layer_size
    order = rng.random((count, levels, size, size))
    parents = rng.integers(size, size=(count, levels, 1, size))
    np.put_along_axis(order, parents, -1.0, axis=2)
    chosen = order.reshape(count, -1).argpartition(options.num_edges - 1, axis=1)[:, : options.num_edges]
    graphs = np.zeros((count, levels * size * size), np.bool_)
    np.put_along_axis(graphs, chosen, True, axis=1)
    return graphs.reshape(order.shape)


def _adjacency(steps: NDArray[np.bool_], options: ReachabilityOptions) -> NDArray[np.uint64]:
    """Matrices ``[G, n, n]`` of graphs as :func:`_random_graphs` draws them, layer after layer."""
    size, nodes = options.layer_size, options.num_nodes
    matrices = np.zeros((len(steps), nodes, nodes), np.uint64)
    for level in range(options.layers - 1):
        here, below = level * size, (level + 1) * size
        matrices[:, here:below, below : below + size] = steps[:, level]
    return matrices


def _twins(steps: NDArray[np.bool_], hops: int) -> NDArray[np.bool_]:
    """All twins: ``[G, layer of the roots, root, twin's root, answer, twin's answer]``, places within layers.

    The answers lie ``hops`` layers below the roots. Only its own answer can be reached from a root; the roots have
    equally many children, at least two, and equally many parents.
    """
    graphs, levels, size, _ = steps.shape
    tops = levels + 1 - hops
    reach = steps[:, :tops]
    for further in range(1, hops):
        reach = reach.astype(np.float32) @ steps[:, further : further + tops].astype(np.float32) > 0
    children, parents = steps.sum(axis=3), np.zeros((graphs, levels, size), np.int64)
    parents[:, 1:] = steps[:, :-1].sum(axis=2)
    degrees = (children * (size + 1) + parents)[:, :tops]
    equal = (degrees[..., :, None] == degrees[..., None, :]) & (children[:, :tops, :, None] >= 2)
    asked = reach[..., :, None] & ~reach[..., None, :]
    twins: NDArray[np.bool_] = asked[:, :, :, None] & asked.swapaxes(-1, -2)[:, :, None] & equal[..., None, None]
    return twins


def _chosen_twins(
    options: ReachabilityOptions, steps: NDArray[np.bool_], hops: NDArray[np.integer], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Random twins on graphs that offer them: roots ``[G, Q]``, answers ``[G, Q]`` and hops ``[G, Q]``."""
    roots = np.zeros((*hops.shape, 2), np.int64)
    answers = np.zeros_like(roots)
    for count in np.unique(hops).tolist():
        graph, pair = np.nonzero(hops == count)
        found = _twins(steps, count)
        place = random_true(found.reshape(len(steps), -1)[graph], rng)
        layer, *places = np.unravel_index(place, found.shape[1:])
        nodes = np.stack(places, axis=-1) + layer[:, None] * options.layer_size
        roots[graph, pair], answers[graph, pair] = nodes[:, :2], nodes[:, 2:] + count * options.layer_size
    shape = (len(hops), 2 * hops.shape[1])
    return roots.reshape(shape), answers.reshape(shape), np.repeat(hops, 2, axis=1).astype(np.int64)


def _named(
    options: ReachabilityOptions,
    steps: NDArray[np.bool_],
    roots: NDArray[np.int64],
    answers: NDArray[np.int64],
    hops: NDArray[np.int64],
    rng: np.random.Generator,
) -> ProblemBatch:
    """Give the nodes random names, and edges and targets random orders."""
    graphs, questions = roots.shape
    graph = np.arange(graphs)[:, None]
    every = np.broadcast_to(np.arange(options.num_names), (graphs, options.num_names))
    names = rng.permuted(every, axis=1)[:, : options.num_nodes]
    heads, tails = np.nonzero(_adjacency(steps, options))[1:]
    order = rng.permuted(np.broadcast_to(np.arange(options.num_edges), (graphs, options.num_edges)), axis=1)
    edges = np.stack([heads, tails], axis=-1).reshape(graphs, options.num_edges, 2)[graph, order]
    edges = names[graph[..., None], edges]
    adjacency = np.zeros((graphs, options.num_names, options.num_names), np.bool_)
    adjacency[graph, edges[..., 0], edges[..., 1]] = True
    twins = answers.reshape(graphs, questions // 2, 1, 2)
    targets = rng.permuted(np.broadcast_to(twins, (graphs, questions // 2, 2, 2)), axis=-1)
    return ProblemBatch(
        edges=edges,
        roots=names[graph, roots],
        targets=names[graph[..., None], targets.reshape(graphs, questions, 2)],
        answers=names[graph, answers],
        hops=hops,
        adjacency=adjacency,
    )


def _one_hot(nodes: NDArray[np.integer], count: int) -> NDArray[np.bool_]:
    """``[..., count]``: true at the node."""
    found: NDArray[np.bool_] = nodes[..., None] == np.arange(count)
    return found


def _fingerprints(adjacency: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """:func:`graph_fingerprint` of matrices ``[G, n, n]`` that count the edges; nodes without edges do not matter."""
    occurs = adjacency.any(axis=1) | adjacency.any(axis=2)
    rounds = occurs.sum(axis=1, keepdims=True)
    colours = np.ones(occurs.shape, np.uint64)
    upwards = adjacency.swapaxes(1, 2)
    for done in range(int(rounds.max(initial=0))):
        below = (adjacency @ _mix(colours, 1)[..., None])[..., 0]
        above = (upwards @ _mix(colours, 2)[..., None])[..., 0]
        colours = np.where(done < rounds, _mix(colours + _mix(below, 3) + _mix(above, 4), 5), colours)
    total: NDArray[np.uint64] = np.where(occurs, _mix(colours, 6), np.uint64(0)).sum(axis=1, dtype=np.uint64)
    return total


def _mix(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers one by one (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15 * salt & 0xFFFFFFFFFFFFFFFF)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
