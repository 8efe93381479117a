"""commit_ in CUDA C++, beyond what every backend is asked for: bad values, many caches, alignments. On the shim."""

from __future__ import annotations

import pytest
import simt_backend
import torch
from barriers import first_failure, waits
from test_commit import expected, random_caches

from lbr_kernels import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _shim():
    assert ops.backends("cpu")["commit_"][simt_backend.NAME] is None
    yield
    simt_backend.MODULE[0].configure(seed=simt_backend.SEED)


def example():
    g = torch.Generator().manual_seed(5)
    made = random_caches([(2, 16), (1, 24)], 3, 40, g)
    lens = torch.tensor([0, 7, 30], dtype=torch.int32)
    sources = torch.tensor([[0, 2, 5], [1, 2, 3], [4, 6, 9]], dtype=torch.int32)
    return made, lens, sources


@pytest.mark.parametrize("seed", range(20))
def test_launch_after_launch(seed):
    """Counters are zero again after every launch, whatever the order of the blocks."""
    simt_backend.MODULE[0].configure(seed=seed, resident_blocks=6)
    caches, lens, sources = example()
    given = {"num_moves": torch.tensor([3, 3, 0], dtype=torch.int32), "advance": torch.tensor([2, 0, 1]).int()}
    for _ in range(3):
        want, want_lens = expected(caches, lens, sources, [3, 3, 0], [2, 0, 1])
        ops.commit_(caches, lens, sources, **given, backend=simt_backend.NAME)
        assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
        assert torch.equal(lens, want_lens)
    assert lens.tolist() == [6, 7, 30]


@pytest.mark.parametrize("count", [79, 80, 81, 162])
def test_more_caches_than_a_launch_takes(count):
    g = torch.Generator().manual_seed(0)
    caches = random_caches([(1, 8)] * count, 2, 20, g)
    lens = torch.tensor([3, 9], dtype=torch.int32)
    sources = torch.tensor([[1, 2, 5], [0, 3, 4]], dtype=torch.int32)
    want, want_lens = expected(caches, lens, sources, [3, 3], [1, 1])
    ops.commit_(caches, lens, sources, backend=simt_backend.NAME)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    assert torch.equal(lens, want_lens)


@pytest.mark.parametrize(("dtype", "offset", "dim"), [
    (torch.int8, 1, 5), (torch.int8, 0, 16), (torch.bfloat16, 1, 8), (torch.float32, 1, 3), (torch.float32, 2, 2),
    (torch.float64, 1, 2), (torch.float64, 0, 1),
])  # fmt: skip
def test_every_alignment(dtype, offset, dim):
    """Columns of 1, 2, 4, 8 and 16 bytes; what lies beside the cache stays."""
    memory = torch.randint(-99, 99, (2 * 2 * 12 * dim + offset + 1,)).to(dtype)
    cache = memory[offset:-1].view(2, 2, 12, dim)
    lens = torch.tensor([1, 4], dtype=torch.int32)
    sources = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 6, 7]], dtype=torch.int32)
    want, _ = expected([cache], lens, sources, [6, 6], [1, 1])
    beside = memory[:offset].clone(), memory[-1].clone()
    ops.commit_([cache], lens, sources, backend=simt_backend.NAME)
    assert torch.equal(cache, want[0])
    assert torch.equal(memory[:offset], beside[0])
    assert memory[-1] == beside[1]


@pytest.mark.parametrize("change", [
    {"num_moves": -1}, {"num_moves": 4}, {"num_moves": -(2**31)}, {"advance": -1}, {"advance": 4},
    {"lens": -1}, {"lens": 37}, {"lens": 2**31 - 1}, {"sources": [2, 2, 3]}, {"sources": [-1, 2, 3]},
    {"sources": [1, 2, 2**31 - 1]}, {"sources": [3, 2, 5]},
])  # fmt: skip
def test_a_row_that_cannot_be_stays_as_it_was(change):
    caches, lens, sources = example()
    num_moves, advance = (torch.tensor([3, 3, 3], dtype=torch.int32) for _ in range(2))
    given = {"num_moves": num_moves, "advance": advance, "lens": lens, "sources": sources}
    for name, value in change.items():
        given[name][1] = torch.tensor(value)
    want, want_lens = expected(caches, torch.where(torch.arange(3) == 1, 0, lens).int(), sources, [3, 0, 3], [3, 0, 3])
    want_lens[1] = lens[1]
    ops.commit_(caches, lens, sources, num_moves=num_moves, advance=advance, backend=simt_backend.NAME)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    assert torch.equal(lens, want_lens)
    with pytest.raises(RuntimeError, match="commit_: a row's sources did not ascend"):
        ops.raise_if_flagged(CPU)
    ops.raise_if_flagged(CPU)


@pytest.mark.parametrize("advance", [-1, 4, 2**40, -(2**40)])
def test_an_advance_that_cannot_be(advance):
    caches, lens, sources = example()
    before = [cache.clone() for cache in (*caches, lens)]
    ops.commit_(caches, lens, sources, advance=advance, backend=simt_backend.NAME)
    assert all(torch.equal(a, b) for a, b in zip((*caches, lens), before, strict=True))
    with pytest.raises(RuntimeError, match="its num_moves, advance or prefix_lens was out of range"):
        ops.raise_if_flagged(CPU)


def test_a_batch_of_no_rows():
    ops.commit_([], torch.empty(0, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int32), backend=simt_backend.NAME)


def rows_of_several_blocks():
    caches = random_caches([(40, 16)], 3, 40, torch.Generator().manual_seed(0), (torch.float32,))
    lens = torch.tensor([0, 7, 30], dtype=torch.int32)
    sources = torch.tensor([[0, 2, 5], [1, 2, 3], [4, 6, 9]], dtype=torch.int32)
    want, want_lens = expected(caches, lens, sources, [3, 3, 3], [1, 1, 1])
    ops.commit_(caches, lens, sources, backend=simt_backend.NAME)
    assert torch.equal(caches[0], want[0])
    assert torch.equal(lens, want_lens)


def test_the_kernel_as_it_is():
    assert first_failure("commit_", [rows_of_several_blocks], multiprocessors=[3]) is None


@pytest.mark.parametrize("line", waits("commit.cu"))
def test_without(line):
    """Each of the kernel's waits is needed."""
    assert first_failure("commit_", [rows_of_several_blocks], multiprocessors=[3], without=line) is not None
