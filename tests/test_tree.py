"""The rolling tree's bookkeeping, against a tree of linked nodes that is kept beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_kernels.decoding.tree import LookaheadTree
from lbr_kernels.ops.tree_shape import num_slots


class Node:
    """One slot that exists."""

    def __init__(self, token: int, parent: Node | None) -> None:
        self.token, self.parent = token, parent
        self.children: list[Node | None] = []

    def path(self) -> tuple[int, ...]:
        above = self.parent.path() if self.parent is not None and self.parent.parent is not None else ()
        return (*above, self.token) if self.parent is not None else ()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("trie", [True, False])
def test_rolling(trie, data):
    """Grow and commit at random, with missing children and rows that end; masks and moves checked at every step."""
    draw = data.draw
    width, depth = draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (3, 2), (2, 3), (5, 2), (3, 4)]))
    rows = draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    tree = LookaheadTree(rows, width, depth, trie=trie, device=torch.device("cpu"))
    roots: list[Node | None] = [Node(-1, None) for _ in range(rows)]
    cached: list[dict[int, tuple[int, ...]]] = [{} for _ in range(rows)]  # node index -> its path

    def layer_of(root: Node | None, layer: int) -> list[Node | None]:
        nodes: list[Node | None] = [root]
        for _ in range(layer):
            nodes = [child for node in nodes for child in (node.children if node and node.children else [None] * width)]
        return nodes

    def grow(layer: int) -> None:
        tokens = torch.full((rows, width**layer), -1)
        for row in range(rows):
            for i, parent in enumerate(layer_of(roots[row], layer - 1)):
                if parent is None or (layer > 1 and torch.rand((), generator=g) < 0.15):
                    continue
                drawn = torch.randint(0, 4, (width,), generator=g)  # few tokens: many duplicates
                tokens[row, i * width : (i + 1) * width] = drawn
                parent.children = [Node(int(token), parent) for token in drawn]
        growth = tree.grow(layer, tokens)
        for row in range(rows):
            nodes = layer_of(roots[row], layer)
            real = growth.tokens.shape[1] if growth.num_nodes is None else int(growth.num_nodes[row])
            paths = {}
            for slot, node in enumerate(nodes):
                if node is None:
                    continue
                query = int(growth.query_of[row, slot])
                assert query < real
                assert int(growth.tokens[row, query]) == node.token
                assert paths.setdefault(query, node.path()) == node.path(), "one query, two paths"
            if trie:
                assert len(set(paths.values())) == len(paths) == real, "a path was forwarded twice"
            cached[row] |= {growth.base + query: path for query, path in paths.items()}
            # Every node, new or moved, sees itself and its ancestors, by path, and nothing else.
            mask = growth.ancestors[row % len(growth.ancestors)]
            for node, path in cached[row].items():
                words = mask[node].tolist()
                seen = {j for j in range(tree.num_nodes) if words[j // 64] >> (j % 64) & 1}
                assert {cached[row][j] for j in seen} == {path[: i + 1] for i in range(len(path))}
                assert len(seen) == len(path)

    for layer in range(1, depth + 1):
        grow(layer)
    for _ in range(4):
        choice = torch.full((rows,), -1)
        for row in range(rows):
            if roots[row] is not None and draw(st.integers(0, 9)):
                choice[row] = draw(st.integers(0, width - 1))
        sources, num_moves = tree.commit(choice, all_active=bool((choice >= 0).all()))
        for row in range(rows):
            if choice[row] < 0:
                roots[row] = None
                cached[row] = {}
                assert num_moves[row] == 0
                continue
            winner = roots[row].children[int(choice[row])]
            count = sources.shape[1] if num_moves is None else int(num_moves[row])
            moved = sources[row, :count].tolist()
            assert moved == sorted(set(moved))
            old = cached[row]
            assert old[moved[0]] == (winner.token,)
            cached[row] = {i - 1: old[source][1:] for i, source in enumerate(moved) if i and source in old}
            if trie:
                below = {path for path in old.values() if len(path) > 1 and path[0] == winner.token}
                kept = {old[source] for source in moved[1:]}
                assert kept <= below
            winner.parent = None
            winner.token = -1
            roots[row] = winner
            if not any(layer_of(winner, 1)) and depth > 1:
                roots[row] = None  # nothing below it: the loop ends such a row
        if not any(roots):
            return
        live = tree.valid[:, : num_slots(width, depth - 1)]
        for row in range(rows):
            if roots[row] is not None:
                slots = [node is not None for layer in range(1, depth) for node in layer_of(roots[row], layer)]
                assert live[row].tolist() == slots
        grow(depth)


def test_without_a_trie_shapes_are_constants():
    """Full tree: the same number of queries, moves and masks in every step and row."""
    tree = LookaheadTree(2, 3, 2, trie=False, device=torch.device("cpu"))
    tree.grow(1, torch.zeros(2, 3, dtype=torch.int64))
    for _ in range(3):
        growth = tree.grow(2, torch.zeros(2, 9, dtype=torch.int64))
        assert (growth.base, growth.tokens.shape, growth.num_nodes) == (3, (2, 9), None)
        assert growth.ancestors.shape == (1, 12, 1)
        sources, num_moves = tree.commit(torch.tensor([0, 2]), all_active=True)
        assert sources.tolist() == [[0, 3, 4, 5], [2, 9, 10, 11]]
        assert num_moves is None


def test_impossible_choices_are_refused():
    tree = LookaheadTree(2, 3, 1, trie=True, device=torch.device("cpu"))
    tree.grow(1, torch.tensor([[4, 5, 6], [4, -1, -1]]))
    before = tree.tokens.clone()
    for choice, message in (
        ([0, 3], r"choice\[1\] is 3, expected -1 to 2"),
        ([-2, 0], r"choice\[0\] is -2, expected -1 to 2"),
        ([0, 2], r"choice\[1\] is 2, where the tree holds no candidate"),
    ):
        with pytest.raises(ValueError, match=message):
            tree.commit(torch.tensor(choice), all_active=True)
        assert torch.equal(tree.tokens, before)
