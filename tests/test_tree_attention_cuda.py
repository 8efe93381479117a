"""What is particular to tree_attention's CUDA kernel: how it is split, what it refuses, that no schedule matters."""

from __future__ import annotations

import itertools

import pytest
import simt_backend
import torch
from support import assert_within_budget, device_of, to_device
from test_tree_attention import VARIANTS, problem

from lbr_kernels import ops

HEADS_AND_ROWS = [(64, 16), (64, 32), (64, 64), (64, 128), (128, 16), (128, 32), (128, 64), (128, 128)]
HEADS_AND_ROWS += [(256, 16), (256, 64)]


@pytest.fixture
def simt():
    """The shim's module, whose device is as usual again afterwards."""
    assert ops.backends("cpu")["tree_attention"][simt_backend.NAME] is None
    yield simt_backend.MODULE[0]
    simt_backend.MODULE[0].configure(seed=simt_backend.SEED)


def attend(p, **extras):
    return ops.tree_attention(**p, **extras, return_lse=True, backend=simt_backend.NAME)


@pytest.mark.parametrize(("head", "rows"), HEADS_AND_ROWS)
def test_every_tile_on_devices_of_every_size(simt, head, rows):
    """Each instantiation with one part and with many, some rows too short for theirs, in both types."""
    group, N = (4, rows // 4) if rows <= 64 else (7, 23)
    for dtype, Dv in itertools.product((torch.float16, torch.bfloat16), (head, head - 8)):
        p = problem(B=2, Hk=1, group=group, N=N, T=N + 5, D=head, Dv=Dv, longest=900, dtype=dtype)
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
        want, want_lse = ops.tree_attention_ref(**wide)
        plain, _ = ops.tree_attention_ref(**p)
        for multiprocessors in (1, 4, 132):
            simt.configure(multiprocessors=multiprocessors)
            out, lse = attend(p)
            assert_within_budget(out, want, plain, f"{multiprocessors} multiprocessors", roundings=4)
            torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [900, 3000, 40_000])
def test_merges_in_one_two_and_three_rounds(simt, longest):
    """Parts are merged eight at a time."""
    p = problem(B=2, Hk=1, group=4, N=3, T=3, D=64, Dv=64, longest=longest, dtype=torch.float16)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    want, want_lse = ops.tree_attention_ref(**wide)
    plain, _ = ops.tree_attention_ref(**p)
    multiprocessors = {900: 2, 3000: 20, 40_000: 132}[longest]
    parts = simt.choose_splits(tiles=2, key_tiles=longest // 64, slots=3 * multiprocessors, merge_cost=0.05)
    assert (parts > 8) + (parts > 64) == {900: 0, 3000: 1, 40_000: 2}[longest]
    simt.configure(multiprocessors=multiprocessors)
    for _ in range(2):  # the second finds the counters that the first has left
        out, lse = attend(p)
        assert_within_budget(out, want, plain, roundings=4)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_schedule_changes_a_bit(simt, variant):
    """Whichever thread and block comes first, and whichever block merges: the bits are the same."""
    p = problem(B=3, Hk=2, T=12, N=9, D=64, Dv=64, longest=500, dtype=torch.bfloat16)
    for multiprocessors in (1, 60):
        results = []
        for seed in range(12):
            simt.configure(seed=seed, multiprocessors=multiprocessors)
            results.append(attend(p, **VARIANTS[variant]))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_the_next_launch_finds_the_workspace_as_it_was(simt):
    """Counters are at zero again after every launch, whatever its shape: nothing has to be cleared in between."""
    simt.configure(multiprocessors=60)
    for seed, (Hk, group, longest) in enumerate([(2, 4, 900), (1, 7, 300), (3, 1, 1500), (2, 4, 900)] * 2):
        p = problem(B=2, Hk=Hk, group=group, N=5, D=64, Dv=64, longest=longest, dtype=torch.float16, seed=seed)
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
        assert_within_budget(attend(p)[0], ops.tree_attention_ref(**wide)[0], ops.tree_attention_ref(**p)[0])


@pytest.mark.parametrize("backend", [simt_backend.NAME, "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_lens": [70, 999, 3]}, "a row's prefix_lens was not in 0 <= length <= S - T"),
        ({"prefix_lens": [70, -1, 3]}, "a row's prefix_lens was not in 0 <= length <= S - T"),
        ({"num_nodes": [5, 6, 5]}, "a row's num_nodes was not in 0 <= count <= N"),
        ({"num_nodes": [5, -2, 5]}, "a row's num_nodes was not in 0 <= count <= N"),
    ],
)
def test_a_bad_value_is_nan_and_a_flag(backend, change, message):
    """No check on the host sees it; the row is NaN, no other row is, and it is said once."""
    p = {name: to_device(t, device_of(backend)) for name, t in problem(B=3, dtype=torch.float16).items()}
    device = p["query"].device
    want, _ = ops.tree_attention(**p, return_lse=True, backend=backend)
    ops.raise_if_flagged(device)
    bad = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in change.items()}
    if "prefix_lens" in bad:
        second = torch.tensor([False, True, False], device=device)
        bad["prefix_lens"] = torch.where(second, bad["prefix_lens"], p["prefix_lens"])
    out, lse = ops.tree_attention(**{**p, **bad}, return_lse=True, backend=backend)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert torch.equal(out[[0, 2]], want[[0, 2]])
    with pytest.raises(RuntimeError, match=message):
        ops.raise_if_flagged(device)
    ops.raise_if_flagged(device)


def misaligned(tensor):
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return room.view(tensor.shape).copy_(tensor)


NEAREST = " for backend 'cuda'; the nearest accepted backend is "
REFUSED = {
    "head size": (problem(D=20, dtype=torch.half), "query has head size 20, expected a multiple of 8 up to 256"),
    "value size": (problem(Dv=4, dtype=torch.half), "value_cache has head size 4, expected a multiple of 8 up to 256"),
    "no values": (problem(Dv=0, dtype=torch.half), "value_cache has head size 0, expected a multiple of 8 up to 256"),
    "too large": (problem(D=264, dtype=torch.half), "query has head size 264, expected a multiple of 8 up to 256"),
    "stride": (
        {**problem(dtype=torch.half), "query": torch.randn(2, 4, 5, 28).half()[..., :16]},
        "query has a stride of 140, expected multiples of 8",
    ),
    "start": (
        {**(p := problem(dtype=torch.half)), "key_cache": misaligned(p["key_cache"])},
        "key_cache does not start at a multiple of 16 bytes, expected that it does",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take(case):
    p, message = REFUSED[case]
    with pytest.raises(RuntimeError) as error:
        attend(p)
    nearest = "reference" if case in ("too large", "no values") else "triton"
    assert str(error.value) == f"tree_attention: {message}{NEAREST}'{nearest}'"
    moved = {name: to_device(tensor, device_of(nearest)) for name, tensor in p.items()}
    assert ops.tree_attention(**moved, backend=nearest).isfinite().all()


def test_strides_of_what_is_there_once_do_not_matter():
    p = problem(B=1, dtype=torch.half)
    want = attend(p)
    p["query"] = torch.as_strided(p["query"], p["query"].shape, (3, *p["query"].stride()[1:]))
    assert all(torch.equal(a, b) for a, b in zip(attend(p), want, strict=True))


def test_other_types_are_refused_before_the_kernel():
    with pytest.raises(RuntimeError, match=r"it takes float16 or bfloat16, got torch\.float32"):
        attend(problem())


@pytest.mark.parametrize(("head", "rows"), HEADS_AND_ROWS)
def test_shared_memory_of_every_tile(simt, head, rows):
    """Up to head size 128 the tiles fit every GPU of compute capability 8 and later, beyond it data centres'."""
    assert simt.shared_bytes(head, rows) <= (99 if head <= 128 else 163) * 1024


def test_a_device_with_little_shared_memory(simt):
    simt.configure(shared_bytes_per_block=99 * 1024, shared_bytes_per_multiprocessor=100 * 1024)
    assert attend(problem(D=128, Dv=128, dtype=torch.half))[0].isfinite().all()
    with pytest.raises(RuntimeError, match=r"which takes \d+ bytes of shared memory, expected at most 101376"):
        attend(problem(D=192, Dv=128, dtype=torch.half))


def test_splits(simt):
    """As few parts as keep the device busy."""
    splits = simt.choose_splits
    assert splits(tiles=1000, key_tiles=128, slots=264, merge_cost=0.25) == 1  # busy without
    assert splits(tiles=8, key_tiles=2, slots=264, merge_cost=0.25) <= 2
    for tiles in (1, 8, 32, 64):
        for key_tiles in (16, 128, 2048):
            parts = splits(tiles=tiles, key_tiles=key_tiles, slots=264, merge_cost=0.25)
            assert 1 <= parts <= min(key_tiles, 128)
            assert tiles * parts <= 264 * 2
    assert 31 <= splits(tiles=8, key_tiles=2048, slots=264, merge_cost=0.25) <= 33  # one wave, nearly all of it
    assert splits(tiles=8, key_tiles=128, slots=264, merge_cost=4.0) < splits(
        tiles=8, key_tiles=128, slots=264, merge_cost=0.25
    )
    assert splits(tiles=1, key_tiles=0, slots=264, merge_cost=0.25) == 1
    assert splits(tiles=256, key_tiles=4096, slots=264, merge_cost=0.25) == 1  # 97 % full as it is
    assert splits(tiles=512, key_tiles=4096, slots=264, merge_cost=0.25) == 1  # no more than two waves


def test_rows_are_shared_evenly_among_tiles(simt):
    """39 nodes of 4 or 7 heads: 78 rows in each of two tiles, 91 in each of three, and not 128 and the rest."""
    for group in (4, 7):
        p = problem(B=2, Hk=1, group=group, N=39, T=39, D=64, Dv=64, longest=300, dtype=torch.half)
        counts = torch.tensor([39, 21], dtype=torch.int32)  # one tile of the second row has few real rows, or none
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
        out, _ = attend(p, num_nodes=counts)
        want, _ = ops.tree_attention_ref(**wide, num_nodes=counts)
        assert_within_budget(out, want, ops.tree_attention_ref(**p, num_nodes=counts)[0], roundings=4)
