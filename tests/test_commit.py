"""commit_: bit-exact moves in place, for overlapping slides of every size, on layers of different shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import backends_of, device_of, to_device
from torch import Tensor

from lbr_kernels import ops
from lbr_kernels.decoding.tree import LookaheadTree

BACKENDS = backends_of("commit_", interpreted=False)


def commit_(caches: list[Tensor], lens: Tensor, *args: object, backend: str, **kwargs: object) -> None:
    """``ops.commit_`` of tensors on the CPU, wherever the backend runs."""
    device = device_of(backend)
    there = [to_device(cache, device) for cache in caches]
    lens_there = to_device(lens, device)
    ops.commit_(
        there, lens_there, *(to_device(a, device) for a in args), backend=backend,
        **{name: to_device(value, device) for name, value in kwargs.items()},
    )  # fmt: skip
    for cache, moved in zip([*caches, lens], [*there, lens_there], strict=True):
        cache.copy_(moved)


def expected(caches: list[Tensor], lens: Tensor, sources: Tensor, moves: list[int], steps: list[int]):
    """The move said once more: gather everything that moves, then put it down."""
    caches = [cache.clone() for cache in caches]
    lens = lens.clone()
    for b, count in enumerate(moves):
        if count == 0:
            continue
        for cache in caches:
            rows = [cache[b, :, int(lens[b]) + int(source)].clone() for source in sources[b, :count]]
            for i, row in enumerate(rows):
                cache[b, :, int(lens[b]) + i] = row
        lens[b] += steps[b]
    return caches, lens


def random_caches(shapes, B, S, g, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    return [torch.randn(B, H, S, D, generator=g).to(dtypes[i % len(dtypes)]) for i, (H, D) in enumerate(shapes)]


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_ascending_move(backend, data):
    """Random ascending sources of every size; layers of different heads, head sizes and dtypes; rows that stay."""
    draw = data.draw
    B, T, longest = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(0, 30))
    M = draw(st.integers(1, T))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lens = torch.randint(0, longest + 1, (B,), generator=g, dtype=torch.int32)
    moves = [draw(st.integers(0, M)) for _ in range(B)]
    sources = torch.full((B, M), 2**31 - 1, dtype=torch.int32)  # absurd where it must not be read
    for b, count in enumerate(moves):
        sources[b, :count] = torch.randperm(T, generator=g)[:count].sort().values
    steps = [draw(st.integers(0, count)) for count in moves]
    caches = random_caches([(1, 16), (3, 8), (2, 24), (4, 5)], B, longest + T, g)
    want, want_lens = expected(caches, lens, sources, moves, steps)
    commit_(
        caches, lens, sources, advance=torch.tensor(steps, dtype=torch.int32),
        num_moves=torch.tensor(moves, dtype=torch.int32), backend=backend,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    assert torch.equal(lens, want_lens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (3, 1), (3, 2), (2, 3), (3, 3), (8, 2)])
@pytest.mark.parametrize("trie", [False, True])
def test_survivors_of_every_choice(backend, width, depth, trie):
    """For each winner of a full tree: slots that are read for one node and written for another (method, section 2)."""
    tree = LookaheadTree(1, width, depth, trie=trie, device=torch.device("cpu"))
    for choice in range(width):
        tree.num_nodes = 0
        for layer in range(1, depth + 1):
            tree.grow(layer, torch.arange(width**layer)[None] + 100 * layer)
        names = torch.full((1, 1, 10 + tree.num_slots, 4), -1.0)
        names[0, 0, 10:] = torch.arange(tree.num_slots)[:, None]
        want = [choice]
        for _ in range(depth):
            want += [width + width * slot + k for slot in want if slot >= 0 for k in range(width)]
        want = sorted(slot for slot in set(want) if slot < tree.num_slots)
        lens = torch.tensor([10], dtype=torch.int32)
        sources, num_moves = tree.commit(torch.tensor([choice]), all_active=True)
        commit_([names], lens, sources, num_moves=num_moves, backend=backend)
        assert names[0, 0, 10 : 10 + len(want), 0].tolist() == want
        assert lens.tolist() == [11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_arena(backend):
    """Strided views, as a tree cache holds them; memory between them is left alone."""
    g = torch.Generator().manual_seed(0)
    arena = torch.randn(2, 6, 40, 32, generator=g)
    views = [arena[:, 0:2, 3:30, :16], arena[:, 3:5, :35:2, 8:24]]
    lens = torch.tensor([3, 9], dtype=torch.int32)
    sources = torch.tensor([[1, 2, 5], [0, 3, 4]], dtype=torch.int32)
    want, want_lens = expected(views, lens, sources, [3, 3], [1, 1])
    untouched = arena[:, 5].clone()
    commit_(views, lens, sources, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(views, want, strict=True))
    assert torch.equal(lens, want_lens)
    assert torch.equal(arena[:, 5], untouched)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    lens = torch.tensor([4, 4], dtype=torch.int32)
    cache = torch.randn(2, 1, 8, 4)
    before = cache.clone()
    commit_([cache], lens, torch.zeros(2, 0, dtype=torch.int32), backend=backend)
    stay = torch.zeros(2, dtype=torch.int32)
    commit_([cache], lens, torch.full((2, 3), -7, dtype=torch.int32), num_moves=stay, backend=backend)
    commit_([], lens, torch.tensor([[0], [0]], dtype=torch.int32), backend=backend)
    assert torch.equal(cache, before)
    assert lens.tolist() == [5, 5]
