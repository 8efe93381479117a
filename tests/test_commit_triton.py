"""commit_ in Triton, on a GPU where there is one, else in Triton's interpreter: the shared cases, flags, guards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import device_of, to_device
from test_commit import expected, random_caches
from test_registry import op_arguments
from torch import Tensor
from triton_guards import Guarded, ahead_of_time, flags_of

from lbr_kernels import ops
from lbr_kernels.ops import _triton_support, commit_triton
from lbr_kernels.ops._backends import BACKENDS
from lbr_kernels.ops._triton_support import interpreting

DEVICE = device_of("triton")
BAD_MOVE = 4


def i32(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def commit(caches: list[Tensor], lens: Tensor, sources: Tensor, **extras) -> int:
    """In place; returns the bits that were set."""
    _, bits = flags_of(lambda: ops.commit_(caches, lens, sources, **extras, backend="triton"), DEVICE)
    return bits


def same(caches: list[Tensor], want: list[Tensor]) -> bool:
    """As bits: a NaN is what it was."""
    return all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, want, strict=True))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_ascending_move(data):
    """Layers of any shapes and dtypes, rows that stay, heads of more than a piece; nothing around them is touched."""
    draw = data.draw
    B, T, longest = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(0, 12))
    M = draw(st.integers(1, T))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lens = torch.randint(0, longest + 1, (B,), generator=g, dtype=torch.int32)
    moves = [draw(st.integers(0, M)) for _ in range(B)]
    sources = torch.full((B, M), 2**31 - 1, dtype=torch.int32)  # absurd where it must not be read
    for b, count in enumerate(moves):
        sources[b, :count] = torch.randperm(T, generator=g)[:count].sort().values
    steps = [draw(st.integers(0, count)) for count in moves]
    shapes = draw(st.lists(st.sampled_from([(1, 16), (3, 8), (2, 24), (4, 5), (1, 1), (2, 300)]), max_size=5))
    dtypes = draw(st.sampled_from([(torch.float32, torch.bfloat16), (torch.float64,), (torch.int8, torch.bool)]))
    caches = [cache.to(dtypes[i % len(dtypes)]) for i, cache in enumerate(random_caches(shapes, B, longest + T, g))]
    want, want_lens = expected(caches, lens, sources, moves, steps)
    guarded, guarded_input = Guarded(), Guarded()
    caches, lens = [guarded(cache, device=DEVICE) for cache in caches], guarded(lens, device=DEVICE)
    sources, advance, num_moves = (guarded_input(t, device=DEVICE) for t in (sources, i32(*steps), i32(*moves)))
    assert commit(caches, lens, sources, advance=advance, num_moves=num_moves) == 0
    assert same(caches, want)
    assert torch.equal(lens.cpu(), want_lens)
    guarded.check(written=True)
    guarded_input.check()


@pytest.mark.parametrize(
    "narrow",
    [lambda arena: [], lambda arena: [arena[:, 5:6, :30, 1:4]], lambda arena: [arena[:, 5:6, :30, :3]]],
    ids=["aligned", "odd address", "odd width"],
)
def test_views_of_one_arena(narrow):
    """Strided views, as a tree cache holds them, also of what is not aligned; memory between them is left alone."""
    g = torch.Generator().manual_seed(0)
    arena = torch.randn(2, 7, 40, 32, generator=g)
    lens, sources = i32(3, 9), torch.stack([i32(1, 2, 5), i32(0, 3, 4)])

    def views(arena: Tensor) -> list[Tensor]:
        return [arena[:, 0:2, 3:30, :16], arena[:, 3:5, :35:2, 8:24], *narrow(arena)]

    want, want_lens = expected(views(arena), lens, sources, [3, 3], [1, 1])
    whole = arena.clone()
    for view, moved in zip(views(whole), want, strict=True):
        view.copy_(moved)
    arena, lens = arena.to(DEVICE), lens.to(DEVICE)
    assert commit(views(arena), lens, sources.to(DEVICE)) == 0
    assert torch.equal(arena.cpu(), whole)
    assert torch.equal(lens.cpu(), want_lens)


def test_bits_are_copied():
    """NaNs with payloads, negative zeros, denormals: whatever the dtype, a slot is what it was."""
    patterns = torch.randint(-(2**31), 2**31, (1, 2, 20, 8), dtype=torch.int64).int()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cache = patterns.view(dtype).clone()
        want = cache.clone()
        want[:, :, 4:7] = cache[:, :, [5, 9, 19]]
        cache, lens = cache.to(DEVICE), i32(4).to(DEVICE)
        assert commit([cache], lens, i32(1, 5, 15)[None].to(DEVICE)) == 0
        assert same([cache], [want])


def test_nothing_to_do():
    lens = i32(4, 4).to(DEVICE)
    cache = torch.randn(2, 1, 8, 4, device=DEVICE)
    before = cache.cpu().clone()
    assert commit([cache], lens, torch.zeros(2, 0, dtype=torch.int32, device=DEVICE)) == 0
    stay, absurd = i32(0, 0).to(DEVICE), torch.full((2, 3), -7, dtype=torch.int32, device=DEVICE)
    assert commit([cache], lens, absurd, num_moves=stay) == 0
    assert lens.tolist() == [4, 4]
    nothing = [torch.zeros(2, 0, 9, 4, device=DEVICE), torch.zeros(2, 1, 9, 0, device=DEVICE)]
    assert commit([], lens, i32(0, 0)[:, None].to(DEVICE)) == 0
    assert commit(nothing, lens, i32(0, 3)[:, None].to(DEVICE), advance=0) == 0
    assert commit([], i32().to(DEVICE), torch.zeros(0, 3, dtype=torch.int32, device=DEVICE)) == 0
    assert same([cache], [before])
    assert lens.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("descending", {"sources": [3, 1]}),
        ("repeated", {"sources": [2, 2]}),
        ("negative", {"sources": [-1, 0]}),
        ("past the buffer", {"sources": [0, 16]}),
        ("far past the buffer", {"sources": [0, 2**31 - 1]}),
        ("negative length", {"lens": -2}),
        ("absurd length", {"lens": 2**31 - 1}),
        ("moves", {"num_moves": 3}),
        ("negative moves", {"num_moves": -1}),
        ("advance", {"advance": 3}),
        ("negative advance", {"advance": -1}),
    ],
)
@pytest.mark.parametrize("per_row", [True, False])
def test_a_bad_row_stays_as_it_was(name, change, per_row):
    """Its bit is set, and the rows beside it are moved."""
    caches = [torch.randn(3, 2, 20, 16), torch.randn(3, 1, 21, 8)]
    lens, sources = i32(4, 4, 4), torch.stack([i32(1, 15)] * 3)
    steps, moves = i32(1, 1, 1), i32(2, 2, 2)
    want, want_lens = expected(caches, lens, sources, [2, 0, 2], [1, 0, 1])
    lens[1], sources[1] = change.get("lens", 4), i32(*change.get("sources", (1, 15)))
    moves[1], steps[1] = change.get("num_moves", 2), change.get("advance", 1)
    want_lens[1] = lens[1]
    extras = {"advance": steps.to(DEVICE), "num_moves": moves.to(DEVICE)}
    if not per_row:
        if "advance" in change:  # for all rows
            extras["advance"], want, want_lens = change["advance"], [cache.clone() for cache in caches], lens.clone()
        else:
            extras["advance"] = 1
        if "num_moves" not in change:
            del extras["num_moves"]
    guarded = Guarded()
    caches, lens = [guarded(cache, device=DEVICE) for cache in caches], guarded(lens, device=DEVICE)
    assert commit(caches, lens, sources.to(DEVICE), **extras) == BAD_MOVE
    assert same(caches, want)
    assert torch.equal(lens.cpu(), want_lens)
    guarded.check(written=True)


def test_a_slot_past_the_shortest_cache_is_bad():
    caches = [torch.randn(1, 1, 30, 4, device=DEVICE), torch.randn(1, 1, 20, 4, device=DEVICE)]
    before = [cache.cpu().clone() for cache in caches]
    lens = i32(10).to(DEVICE)
    assert commit(caches, lens, i32(10)[None].to(DEVICE)) == BAD_MOVE
    assert same(caches, before)
    assert lens.tolist() == [10]
    ops.raise_if_flagged(DEVICE)


def test_the_flag_says_what_happened():
    ops.commit_([], i32(-1).to(DEVICE), i32(0)[None].to(DEVICE), backend="triton")
    with pytest.raises(RuntimeError, match=r"commit_: a row's sources did not ascend .*; it stayed as it was"):
        ops.raise_if_flagged(DEVICE)


def test_counters_are_left_at_zero():
    """Lengths grow once, by who comes last of a row's programs; layouts that differ are one launch."""
    caches = [torch.randn(2, H, 12, D, device=DEVICE).to(dtype) for H, D, dtype in (
        (2, 16, torch.float32), (3, 16, torch.bfloat16), (2, 16, torch.float32), (1, 700, torch.float32),
    )]  # fmt: skip
    lens, counters = i32(2, 3).to(DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    call = commit_triton.launch(caches, lens, torch.stack([i32(0, 4)] * 2).to(DEVICE), counters, advance=2)
    assert call.programs == 2 * (2 * 2 + 3 + 3)
    for n in (1, 2):
        call.run(DEVICE)
        assert counters.tolist() == [0, 0]
        assert lens.tolist() == [2 + 2 * n, 3 + 2 * n]


def test_every_stream_and_every_capture_has_counters_of_its_own(monkeypatch):
    """Captured launches share with nobody; where memory that lasts has run out, a graph clears its own."""
    monkeypatch.setattr(_triton_support, "_pieces", {})
    monkeypatch.setattr(_triton_support, "_of_streams", {})
    monkeypatch.setattr(_triton_support, "_BLOCK", 128)
    device = torch.device("cpu")
    first = _triton_support.counters(device, 5)
    assert first.tolist() == [0] * 5
    assert _triton_support.counters(device, 3).data_ptr() == first.data_ptr()
    longer = _triton_support.counters(device, 40)
    assert longer.data_ptr() >= first.data_ptr() + 5 * 4
    assert _triton_support.counters(device, 5).data_ptr() == longer.data_ptr()
    assert len(_triton_support._pieces[device]) == 1
    assert _triton_support.counters(device, 200).tolist() == [0] * 200
    assert len(_triton_support._pieces[device]) == 2, "the old piece must last: a graph may use it"


def test_opcheck():
    args, kwargs = op_arguments("commit_")
    caches, *rest = args
    args = ([to_device(cache, DEVICE) for cache in caches], *(to_device(a, DEVICE) for a in rest))
    kwargs = {name: to_device(value, DEVICE) for name, value in kwargs.items()}
    assert ops.backends(DEVICE)["commit_"]["triton"] is None
    torch.library.opcheck(BACKENDS["triton"].overload("commit_"), args, kwargs)
    assert interpreting() == (DEVICE.type == "cpu")


@pytest.mark.full  # as `make gpu-check` sees
def test_compiles_without_spills():
    pytest.importorskip("rich")
    for record in ahead_of_time("r.resources(['commit_ 36 layers bfloat16 d128, 12 moves'], [80, 90, 100])"):
        assert record["spill_bytes"] == 0
        assert record["blocks_per_sm"] >= 16
