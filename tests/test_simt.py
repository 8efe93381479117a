"""The SIMT shim (tests/simt): that it computes what a GPU computes, and finds the mistakes that it is made to find.

The kernels are in tests/simt/self_test.cu. With ``LBR_KERNELS_SANITIZE=1``, set as ``make test-sanitize`` sets it, they
are built with the sanitizers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import simt_build
import torch
from simt_build import SIMT, build, sanitized
from torch import Tensor

from lbr_kernels.ops import _extension

SEEDS = range(10)
SOURCE = SIMT / "self_test.cu"


@pytest.fixture(scope="module")
def simt() -> ModuleType:
    return build([SOURCE], name="simt_self_test")


@pytest.fixture(autouse=True)
def _configured(simt: ModuleType) -> None:
    simt.configure()


def run(
    simt: ModuleType,
    kernel: str,
    *tensors: Tensor,
    numbers: tuple[int, ...] = (),
    grid: tuple[int, int, int] = (1, 1, 1),
    threads: int = 32,
    shared: int = 0,
) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
    simt.run(kernel, [tensor.data_ptr() for tensor in tensors], list(numbers), list(grid), threads, shared)


def line(kernel: str, call: str, occurrence: int = 0) -> str:
    """Where ``kernel`` calls ``call``, as faults say it."""
    text = SOURCE.read_text(encoding="utf-8")
    at = re.search(rf"LBR_KERNEL\(.*\) {kernel}\(", text).start()
    for _ in range(occurrence + 1):
        at = text.index(call, at + 1)
    return f"self_test.cu:{text.count(chr(10), 0, at) + 1}"


def test_a_build_is_named_by_what_it_is_made_of(tmp_path, monkeypatch):
    """Wherever that stands: every header of csrc counts, those for CPUs do not."""

    def name(csrc: Path) -> str:
        monkeypatch.setattr(simt_build._extension, "source_dir", lambda: csrc)
        return simt_build._digest([SOURCE], [SIMT, csrc / "cuda"], ["-O2"])

    here, there = (shutil.copytree(_extension.source_dir(), tmp_path / folder) for folder in ("here", "there"))
    first = name(here)
    assert name(there) == first
    for header, counts in (("cpu/simd.h", False), ("params.h", True), ("cuda/block_group.cuh", True)):
        with (there / header).open("a", encoding="utf-8") as file:
            file.write("// changed\n")
        assert (name(there) != first) == counts, header
        shutil.copyfile(here / header, there / header)


# ---- Barriers, and who gets ahead where one is missing ----


def rotated(simt: ModuleType, seed: int, threads: int, distance: int, barriers: int) -> bool:
    simt.configure(seed=seed)
    out = torch.zeros(2, threads, dtype=torch.int32)
    run(simt, "rotate", out, numbers=(threads, distance, barriers), threads=threads, shared=4 * threads)
    expected = torch.arange(threads, dtype=torch.int32).roll(-distance)
    return torch.equal(out, torch.stack([expected, threads + expected]))


@pytest.mark.parametrize("threads", [32, 64, 1024])
@pytest.mark.parametrize("distance", [1, 31])
def test_barriers_order_what_threads_write(simt, threads, distance):
    assert all(rotated(simt, seed, threads, distance, barriers=3) for seed in SEEDS)


@pytest.mark.parametrize(("threads", "distance"), [(32, 1), (32, 31), (64, 32), (1024, 512)])
@pytest.mark.parametrize("barriers", [1, 2], ids=["after", "before"])
def test_a_missing_barrier_is_seen(simt, threads, distance, barriers):
    assert not all(rotated(simt, seed, threads, distance, barriers) for seed in SEEDS)


def test_any_thread_may_be_the_last(simt):
    def last(seed: int, rounds: int) -> Tensor:
        simt.configure(seed=seed)
        out = torch.zeros(rounds, dtype=torch.int32)
        run(simt, "race", out, numbers=(rounds,), threads=64, shared=4)
        return out

    over_seeds = torch.cat([last(seed, rounds=1) for seed in SEEDS])
    assert len((over_seeds // 32).unique()) == 2
    assert len((over_seeds % 32).unique()) > 4
    changes = [len(last(seed, rounds=300).unique()) - 1 for seed in SEEDS]
    assert min(changes) < 3  # a warp may stay behind for as long as that,
    assert max(changes) > 10  # or be ahead now and behind then


# Of 64 threads the first 40 take another way than the rest.
DIVERGENT = {
    "end_before_barrier": "barrier: 40 threads (first 0) wait at {block_barrier}, 24 threads (first 40) have ended",
    "two_barriers": "barrier: 40 threads (first 0) wait at {block_barrier}, "
    "24 threads (first 40) wait at {second block_barrier}",
    "shuffle_by_some": "warp: 56 threads (first 0) have ended, 8 threads (first 32) wait at {shuffle_xor by 1}",
    "barrier_beside_shuffle": "barrier: 56 threads (first 0) wait at {block_barrier}, "
    "8 threads (first 32) wait at {shuffle_xor by 1}",
    "two_masks": "warp: 32 threads (first 0) have ended, 8 threads (first 32) wait at {shuffle_xor by 1}, "
    "24 threads (first 40) wait at {shuffle_xor by 2}",
}


@pytest.mark.parametrize("kernel", DIVERGENT)
def test_a_divergent_collective_is_reported(simt, kernel):
    def place(match: re.Match[str]) -> str:
        what = match[1].removeprefix("second ")
        return f"{line(kernel, what.split()[0], what != match[1])} ({what})"

    expected = "divergent " + re.sub(r"\{(.*?)\}", place, DIVERGENT[kernel])
    for seed in SEEDS:
        simt.configure(seed=seed)
        with pytest.raises(RuntimeError) as error:
            run(simt, kernel, numbers=(40,), threads=64, grid=(2, 3, 1))
        text = str(error.value)
        assert text.startswith(expected)
        assert re.search(r"; block \([01], [012], 0\); launched at self_test\.cu:\d+, seed \d, launch 0$", text)


@pytest.mark.parametrize("kernel", DIVERGENT)
def test_the_shim_goes_on_after_a_fault(simt, kernel):
    with pytest.raises(RuntimeError, match="divergent"):
        run(simt, kernel, numbers=(40,), threads=64)
    run(simt, kernel, numbers=(64,), threads=64)
    x, y = torch.arange(64.0), torch.empty(64)
    run(simt, "shuffle", x, y, numbers=(1,), threads=64)
    assert torch.equal(y, x.view(-1, 2).flip(1).flatten())


def test_waiting_for_what_never_comes_is_a_fault(simt):
    with pytest.raises(RuntimeError, match=f"no progress.*{line('wait_for_ever', 'load_shared_by_blocks')}"):
        run(simt, "wait_for_ever", torch.zeros(1))


# ---- Shuffles, matrices, products ----


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 31])
def test_shuffle(simt, mask):
    x, y = torch.randn(96), torch.empty(96)
    run(simt, "shuffle", x, y, numbers=(mask,), threads=96)
    assert torch.equal(y, x[torch.arange(96) ^ mask])


def test_shuffle_by_a_mask_that_names_no_lane(simt):
    with pytest.raises(RuntimeError, match=f"shuffle_xor by 32, .*{line('shuffle', 'shuffle_xor')}"):
        run(simt, "shuffle", torch.zeros(32), torch.zeros(32), numbers=(32,))


@pytest.mark.parametrize("delta", [0, 1, 5, 31])
def test_shuffle_up_and_ballot(simt, delta):
    x, up, votes = torch.randint(99, (64,), dtype=torch.int32), *torch.zeros(2, 64, dtype=torch.int32)
    run(simt, "shuffle_up_and_ballot", x, up, votes, numbers=(delta,), threads=64)
    lane = torch.arange(64)
    assert torch.equal(up, x[torch.where(lane % 32 >= delta, lane - delta, lane)])
    for warp in (0, 1):
        odd = sum(1 << i for i, value in enumerate(x[32 * warp : 32 * warp + 32].tolist()) if value % 2)
        assert {vote % 2**32 for vote in votes[32 * warp : 32 * warp + 32].tolist()} == {odd}


@pytest.mark.parametrize("lane", [0, 7, 31])
def test_broadcast(simt, lane):
    x, got = torch.randn(64).double(), torch.zeros(64).double()
    run(simt, "broadcast_lane", x, got, numbers=(lane,), threads=64)
    assert torch.equal(got.view(2, 32), x.view(2, 32)[:, lane : lane + 1].expand(2, 32))


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(simt, transposed):
    rows = np.random.default_rng(0).permutation(64)[:32]
    memory = np.arange(64 * 8, dtype=np.uint16).reshape(64, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.uint16)
    offsets = torch.from_numpy((rows * 16).astype(np.int32))
    run(simt, "load", torch.from_numpy(memory), offsets, out, numbers=(1024, transposed), shared=1024)
    matrices = memory[rows].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    # Lane 4 i + j holds elements (i, 2 j) and (i, 2 j + 1) of each matrix.
    expected = matrices.reshape(4, 32, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize(("offset", "what"), [(8, "misaligned address: offset 8"), (1024, "offset 1024"), (-16, "-16")])
def test_a_matrix_row_out_of_place_is_reported(simt, offset, what):
    offsets = torch.arange(32, dtype=torch.int32) * 16
    offsets[17] = offset
    memory, out = torch.zeros(512, dtype=torch.int16), torch.zeros(128, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"matrix row at .*{what}.*, block \(0, 0, 0\), thread 17;"):
        run(simt, "load", memory, offsets, out, numbers=(1024, 0), shared=1024)


def fragments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each lane holds of a 16x16, b 16x8, c 16x8, after PTX's "Matrix Fragments for mma.m16n8k16"."""
    lane, i = torch.arange(32)[:, None], torch.arange(8)
    group, thread = lane >> 2, lane % 4
    row_of_a = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    column_of_a = thread * 2 + (i & 1) + torch.where(i >= 4, 8, 0)
    i = i[:4]
    row_of_b, column_of_b = thread * 2 + (i & 1) + torch.where(i >= 2, 8, 0), group
    row_of_c, column_of_c = torch.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    parts = a[..., row_of_a, column_of_a], b[..., row_of_b, column_of_b], c[..., row_of_c, column_of_c]
    return tuple(part.contiguous() for part in parts)


DTYPES = {torch.float16: "multiply_half", torch.bfloat16: "multiply_bfloat16"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_accumulate(simt, dtype):
    a, b, c = torch.randn(4, 16, 16).to(dtype), torch.randn(4, 16, 8).to(dtype), torch.randn(4, 16, 8)
    of_a, of_b, of_c = fragments(a, b, c)
    run(simt, DTYPES[dtype], of_a, of_b, of_c, numbers=(1,), grid=(4, 1, 1))
    expected = c
    for k in range(16):  # exact products, summed in fp32 in this order
        expected = expected + a[:, :, k, None].float() * b[:, k, None, :].float()
    assert torch.equal(of_c, fragments(a, b, expected)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_accumulate_takes_every_number(simt, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 16, 16)
    finite = every.masked_fill(~every.isfinite(), 0)
    for half in (0, 1):
        identity = torch.eye(16, dtype=dtype)[:, 8 * half : 8 * half + 8].expand(len(every), -1, -1)
        of_a, of_b, of_c = fragments(finite, identity, torch.zeros(len(every), 16, 8))
        run(simt, DTYPES[dtype], of_a, of_b, of_c, numbers=(1,), grid=(len(every), 1, 1))
        assert torch.equal(of_c, fragments(finite, identity, finite.float()[:, :, 8 * half :][:, :, :8])[2])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_accumulate_keeps_what_is_not_finite(simt, dtype, value):
    a, b = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype)
    a[9, 3] = value
    of_a, of_b, of_c = fragments(a, b, torch.zeros(16, 8))
    run(simt, DTYPES[dtype], of_a, of_b, of_c, numbers=(1,))
    expected = fragments(a, b, a.float().sum(1, keepdim=True).expand(16, 8))[2]
    torch.testing.assert_close(of_c, expected, rtol=0, atol=0, equal_nan=True)


# ---- Shared memory and copies into it ----


def test_shared_memory_is_fresh_and_poisoned(simt):
    for _ in range(3):
        out = torch.zeros(32, dtype=torch.int32)
        run(simt, "rotate", torch.zeros(64, dtype=torch.int32), numbers=(32, 1, 3), shared=128)
        run(simt, "fresh", out, numbers=(32, 0), shared=128)
        assert (out == -1).all()
        assert all(out.view(dtype).isnan().all() for dtype in (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.skipif(not sanitized(), reason="LBR_KERNELS_SANITIZE is not 1")
def test_a_write_behind_shared_memory_is_reported():
    script = (
        "import torch; from simt_build import SIMT, build\n"
        "module = build([SIMT / 'self_test.cu'], name='simt_self_test'); out = torch.zeros(32, dtype=torch.int32)\n"
        "module.run('fresh', [out.data_ptr()], [32, 1], [1, 1, 1], 32, 128)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=SIMT.parent, capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert f"in fresh {SIMT}/{line('fresh', 'shared[p.numbers[0]]')}" in result.stderr


def copied(
    simt: ModuleType, seed: int, threads: int = 64, valid: int = 64, finish: bool = True
) -> tuple[Tensor, Tensor]:
    """Source and destination of two groups of copies, of which the second is read too early."""
    simt.configure(seed=seed)
    threads = 64
    source = torch.arange(8 * threads, dtype=torch.int32).view(2, threads, 4)
    out = torch.zeros_like(source)
    run(simt, "copy", source, out, numbers=(threads, valid, finish), threads=threads, shared=32 * threads)
    return source, out


def test_copies_arrive_where_they_are_waited_for_and_elsewhere_by_chance(simt):
    for seed in SEEDS:
        source, out = copied(simt, seed)
        assert torch.equal(out[0], source[0])
        early = (out[1] == source[1]).all(-1)
        assert torch.equal(early, (out[1] != -1).any(-1))
        assert 0 < early.sum() < len(early)


def test_a_copy_that_is_not_valid_reads_nothing_and_writes_zeros(simt):
    for seed in SEEDS:
        source, out = copied(simt, seed, valid=40)
        assert torch.equal(out[0], source[0] * (torch.arange(64) < 40)[:, None])


def test_a_copy_that_is_never_waited_for_is_reported(simt):
    with pytest.raises(RuntimeError, match=f"thread ended with 1 copies in flight.*{line('copy', 'copy_async_16')}"):
        copied(simt, 0, finish=False)


def test_the_source_of_a_copy_is_read_early_or_late(simt):
    source, out = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    run(simt, "overwrite_source", source, out, shared=512)
    assert 0 < (out == 1).all(-1).sum() < 32


@pytest.mark.parametrize(
    ("to", "of", "what"),
    [
        (1024, 0, "copy to offset 1024 of shared memory, which has 1024 bytes"),
        (-16, 0, "copy to offset -16 of shared memory"),
        (8, 0, "copy to a misaligned address: offset 8"),
        (0, 8, "copy from a misaligned address"),
    ],
)
def test_a_copy_out_of_place_is_reported(simt, to, of, what):
    with pytest.raises(
        RuntimeError, match=rf"{what}.*{line('copy_to', 'copy_async_16')}, block \(0, 0, 0\), thread 0;"
    ):
        run(simt, "copy_to", torch.zeros(64), numbers=(to, of), shared=1024)
    run(simt, "copy_to", torch.zeros(64), numbers=(1008, 16), shared=1024)


def test_copies_of_words(simt):
    late = 0
    for seed in SEEDS:
        simt.configure(seed=seed)
        for finish in (1, 0):
            source, out = torch.arange(1, 65, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
            run(simt, "copy_words", source, out, numbers=(finish,), threads=64, shared=256)
            right = out == source * (torch.arange(64) % 2 == 0)
            assert (right | (out == -1)).all()
            assert right.all() or not finish
            late += int((~right).sum())
    assert late > 0


# ---- Blocks ----


def counted(simt: ModuleType, blocks: int = 64) -> tuple[Tensor, int]:
    counters, tickets = torch.zeros(2, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)
    bits = torch.zeros(blocks // 32, dtype=torch.int32)
    run(simt, "count", counters, tickets, bits, grid=(blocks // 2, 2, 1))
    assert counters[0] == blocks
    assert torch.equal(tickets.sort()[0], torch.arange(blocks, dtype=torch.int32))
    assert (bits == -1).all()
    return tickets, int(counters[1])


def test_atomics_count_right_and_what_is_not_atomic_counts_wrong(simt):
    lost = []
    for seed in SEEDS:
        simt.configure(seed=seed)
        lost.append(64 - counted(simt)[1])
    assert max(lost) > 0
    assert min(lost) == 0  # where one block is alive at a time


def test_functions_and_fp64(simt):
    x = torch.randn(32)
    out = torch.empty(6, 32, dtype=torch.float64)
    run(simt, "functions", x, out)
    wide = x.double()
    third = wide / 3
    for got, want in zip(out, (x.erf(), x.abs(), wide.exp(), wide.square().log()), strict=False):
        torch.testing.assert_close(got, want.double(), rtol=3e-7, atol=0)
    assert torch.equal(out[4], third * third - 1)
    assert torch.equal(out[5], third * third + 1)


def test_sums_and_maxima_of_all_threads(simt):
    total, largest = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    run(simt, "sum_and_maximum", total, largest, grid=(3, 1, 1), threads=64)
    assert total.item() == 192 * 2**40 + sum(1000 * block + thread for block in range(3) for thread in range(64))
    assert largest.item() == 2063


# ---- Blocks that wait for each other ----


def test_values_that_are_waited_for(simt):
    for seed in SEEDS:
        simt.configure(seed=seed, multiprocessors=5)
        rows = torch.full((6, 4), -1, dtype=torch.int32).view(torch.float32)
        rows[0] = torch.tensor([7.0, 8.0, 9.0, 1.0])
        run(simt, "chain", rows, grid=(5, 1, 1), threads=64)
        assert torch.equal(rows[1:], torch.arange(2.0, 7.0)[:, None].expand(5, 4))


def meet(simt: ModuleType, blocks: int, counted: int) -> bool:
    """Whether every block has read in each round what its neighbour wrote in that round."""
    counter, wrote, read = (torch.zeros(shape, dtype=torch.int32) for shape in (1, (4, blocks), (4, blocks)))
    run(simt, "meet", counter, wrote, read, numbers=(4, blocks, counted), grid=(blocks, 1, 1), threads=64)
    assert counter.item() == 0 or counted != blocks
    return torch.equal(read, wrote)


def test_a_group_of_blocks_meets(simt):
    for seed in SEEDS:
        simt.configure(seed=seed, multiprocessors=5)
        assert meet(simt, 5, 5)
        assert meet(simt, 1, 1)


def test_a_group_that_counts_too_few_does_not(simt):
    """Somebody reads too early; or its counter begins anew too early, and somebody waits for ever."""
    for seed in SEEDS:
        simt.configure(seed=seed, multiprocessors=5)
        try:
            if not meet(simt, 5, 4):
                return
        except RuntimeError as error:
            if "no progress" in str(error):
                return
    pytest.fail("nobody has noticed")


def test_more_blocks_than_the_device_holds_are_refused(simt):
    simt.configure(multiprocessors=4)
    with pytest.raises(RuntimeError, match="5 blocks that run side by side; this device holds 4"):
        meet(simt, 5, 5)


def test_a_group_that_counts_too_many_waits_for_ever(simt):
    with pytest.raises(RuntimeError, match=r"no progress.*block_group\.cuh"):
        meet(simt, 3, 4)


def test_one_seed_gives_one_order_and_another_seed_another(simt):
    def orders(seed: int) -> list[list[int]]:
        simt.configure(seed=seed)
        return [counted(simt)[0].tolist() for _ in range(3)]

    first = orders(0)
    assert first == orders(0)
    assert all(a != b for a, b in zip(first, orders(1), strict=True))
    assert first[0] != first[1]
    simt.configure(seed=0, first_launch=2)
    assert counted(simt)[0].tolist() == first[2]


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "what"),
    [
        ((0, 1, 1), 32, 0, "the grid is empty"),
        ((1, 65536, 1), 32, 0, "the grid has more blocks"),
        ((1, 1, 1), 48, 0, "48 threads"),
        ((1, 1, 1), 1056, 0, "1056 threads"),
        ((1, 1, 1), 0, 0, "0 threads"),
        ((1, 1, 1), 32, 232449, "232449 bytes of shared memory; a block can have 232448"),
    ],
)
def test_launches_that_cuda_refuses(simt, grid, threads, shared, what):
    with pytest.raises(RuntimeError, match=what):
        run(simt, "two_masks", numbers=(1024,), grid=grid, threads=threads, shared=shared)


def test_the_device_is_what_configure_said(simt):
    assert simt.device() == [3, 233472, 232448]
    simt.configure(multiprocessors=132, shared_bytes_per_multiprocessor=102400, shared_bytes_per_block=101376)
    assert simt.device() == [132, 102400, 101376]
    with pytest.raises(RuntimeError, match="a block can have 101376"):
        run(simt, "two_masks", numbers=(32,), shared=101377)


# ---- Numbers ----


def interesting_floats() -> Tensor:
    """Every 16-bit number of both types, the middles between neighbours, and what lies one fp32 step beside those."""
    exact = torch.cat([torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(t).float() for t in DTYPES])
    exact = exact[exact.isfinite()].unique()
    middles = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    values = torch.cat(
        [exact, middles, torch.tensor([65504.0, 65519.99, 65520.0, 3.3961e38, float("inf"), float("nan")])]
    )
    infinity = torch.tensor(float("inf"))
    return torch.cat([values, values.nextafter(infinity), values.nextafter(-infinity)])


@pytest.fixture(scope="module")
def converted(simt: ModuleType) -> tuple[Tensor, ...]:
    x = interesting_floats()
    half, bfloat = torch.zeros(2, len(x), dtype=torch.int32)
    functions = torch.zeros(5, len(x))
    run(simt, "convert", x, half, bfloat, functions, numbers=(len(x),))
    return x, half.view(torch.float16).view(-1, 2), bfloat.view(torch.bfloat16).view(-1, 2), *functions


def test_pack_rounds_as_torch_does(converted):
    x, half, bfloat, *_ = converted
    for packed in (half, bfloat):
        expected = torch.stack([x, -x], 1).to(packed.dtype)
        assert torch.equal(packed.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(packed.view(torch.int16)[number], expected.view(torch.int16)[number])  # signs of zero, too


def test_functions(converted):
    x, _, _, exp2, log2, tanh, *maxima = converted
    exact = x.double().exp2()
    expected = torch.where(exact < 2.0**-126, torch.zeros(()), exact.float())
    torch.testing.assert_close(exp2, expected, rtol=2.4e-7, atol=0, equal_nan=True)
    assert not ((exp2 > 0) & (exp2 < 2.0**-126)).any()
    torch.testing.assert_close(log2, x.double().log2().float(), rtol=2.4e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(tanh, x.double().tanh().float(), rtol=2.4e-7, atol=0, equal_nan=True)
    for maximum in maxima:
        assert torch.equal(maximum, torch.fmax(x, torch.ones(())))


def test_bits(simt):
    numbers = [1, -1, 2**62, -(2**63), *(3**k for k in range(28))]
    out = torch.zeros(32, 2, dtype=torch.int32)
    run(simt, "bits", torch.tensor(numbers), out)
    words = [number % 2**64 for number in numbers]
    assert out.tolist() == [[bin(word).count("1"), (word & -word).bit_length() - 1] for word in words]
