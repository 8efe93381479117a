"""What is particular to sample_children's CUDA kernel: how blocks share rows, bad values, that no schedule matters."""

from __future__ import annotations

import itertools

import pytest
import simt_backend
import torch
from support import DTYPES

from lbr_kernels import ops

SIMT = simt_backend.NAME
FILTERS = {
    "none": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
}


@pytest.fixture
def simt():
    """The shim's module, whose device is as usual again afterwards."""
    assert ops.backends("cpu")["sample_children"][SIMT] is None
    yield simt_backend.MODULE[0]
    simt_backend.MODULE[0].configure(seed=simt_backend.SEED)
    ops.raise_if_flagged("cpu")


def logits_of(rows, vocabulary, dtype=torch.float32, room=3):
    """With room between rows, so that they begin anywhere in 16 bytes, and NaN in it."""
    storage = torch.full((rows, vocabulary + room), torch.nan, dtype=dtype)
    logits = storage[:, 1 : vocabulary + 1]
    return logits.copy_(torch.randn(rows, vocabulary) * 2.5)


def assert_same(logits, width=3, backend="cpu", **arguments):
    """sample_children's and top_children's tokens are the CPU kernel's; twice, since the first leaves counters."""
    index = arguments.get("row_index")
    rows = len(logits) if index is None else len(index)
    uniforms = torch.rand(rows, width, dtype=torch.float64)
    for op, argument in ((ops.sample_children, uniforms), (ops.top_children, width)):
        want = op(logits, argument, backend=backend, **arguments)
        for _ in range(2):
            got = op(logits, argument, backend=SIMT, **arguments)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    ops.raise_if_flagged("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILTERS)
def test_blocks_share_rows(simt, name, dtype):
    """Devices of every size, rows of every alignment, vocabularies that are no multiple of anything."""
    for multiprocessors, vocabulary in ((2, 40_009), (5, 70_001), (7, 24_571)):
        simt.configure(multiprocessors=multiprocessors, seed=multiprocessors)
        assert simt.choose_blocks(rows=3, vocabulary=vocabulary, resident=multiprocessors, most=999) > 1
        assert_same(logits_of(3, vocabulary, dtype), **FILTERS[name])


@pytest.mark.parametrize("value", [0.0, -0.0, -3.0])
def test_equal_logits_everywhere(simt, value):
    """Ties lie in all blocks, and nearly all of them are left out."""
    logits = torch.full((1, 20_000), value)
    logits[0, 7::2] = abs(value) if value == 0 else value
    for multiprocessors in (1, 4):
        simt.configure(multiprocessors=multiprocessors)
        for filters in ({"top_p": 0.3}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5}, {"top_p": 0.0}, {"top_k": 5}):
            assert_same(logits, width=5, **filters)


def test_rows_with_filters_of_their_own(simt):
    """More rows than groups of blocks, some without children; each row's passes are its own."""
    logits = logits_of(5, 40_000)
    filters = {
        "temperature": torch.tensor([1.0, 0.7, 2.0, 1.0, 1.0]), "top_k": torch.tensor([0, 50, 0, 3, 0]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.5, 0.01]), "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0]),
    }  # fmt: skip
    for multiprocessors in (3, 6):
        simt.configure(multiprocessors=multiprocessors)
        assert_same(logits, row_index=torch.tensor([4, 0, -1, 3, 1, 1, 2]), **filters)


@pytest.mark.parametrize("vocabulary", [30, 70_000])
def test_more_rows_than_resident_blocks(simt, vocabulary):
    simt.configure(multiprocessors=4)
    assert_same(logits_of(9, vocabulary, torch.bfloat16), top_p=0.8)


def test_many_best(simt):
    """More than can be merged are looked for by one block alone."""
    simt.configure(multiprocessors=8)
    for width in (100, 600):
        assert_same(logits_of(1, 17_000, torch.float16), width=width)


@pytest.mark.parametrize("name", FILTERS)
def test_no_schedule_changes_a_bit(simt, name):
    logits, uniforms = logits_of(2, 17_000), torch.rand(2, 4, dtype=torch.float64)
    results = []
    for seed, multiprocessors in itertools.product(range(5), (1, 3, 6)):
        simt.configure(seed=seed, multiprocessors=multiprocessors)
        results.append(ops.sample_children(logits, uniforms, backend=SIMT, **FILTERS[name]))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


BAD_LOGITS = "a row of logits held NaN or"
BAD_DRAW = "a row's uniforms, filters or row_index were out of range"


@pytest.mark.parametrize("vocabulary", [50, 12_000])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logits", torch.nan, BAD_LOGITS),
        ("logits", torch.inf, BAD_LOGITS),
        ("all logits", -torch.inf, BAD_LOGITS),
        ("uniforms", 1.0, BAD_DRAW),
        ("uniforms", -1e-9, BAD_DRAW),
        ("uniforms", torch.nan, BAD_DRAW),
        ("row_index", 99, BAD_DRAW),
        ("row_index", -2, BAD_DRAW),
        ("temperature", 0.0, BAD_DRAW),
        ("temperature", torch.inf, BAD_DRAW),
        ("temperature", torch.nan, BAD_DRAW),
        ("top_k", -1.0, BAD_DRAW),
        ("top_k", 1.5, BAD_DRAW),
        ("top_k", 1e300, BAD_DRAW),
        ("top_p", 1.1, BAD_DRAW),
        ("top_p", torch.nan, BAD_DRAW),
        ("min_p", -0.1, BAD_DRAW),
    ],
)
def test_a_bad_value_is_a_flag(simt, name, value, message, vocabulary):
    """The row's tokens are -1 and its log-probabilities NaN, no other row's are, and it is said once."""
    simt.configure(multiprocessors=6)  # two blocks for each of the longer rows
    names = ("temperature", "top_k", "top_p", "min_p")
    filters = {n: torch.tensor([v] * 3, dtype=torch.float64) for n, v in zip(names, (1, 9, 0.9, 0), strict=True)}
    logits, uniforms, index = logits_of(3, vocabulary), torch.rand(3, 2, dtype=torch.float64), torch.arange(3)
    arguments = {"logits": logits, "uniforms": uniforms, "row_index": index, **filters}
    want = ops.sample_children(**arguments, backend="cpu")
    if name == "all logits":
        logits[1] = value
    elif name in ("logits", "uniforms"):
        arguments[name][1, -1] = value
    else:
        arguments[name][1] = value
    for op in (ops.sample_children, ops.top_children):
        if op is ops.top_children:
            if name == "uniforms":
                continue
            del arguments["uniforms"]
            arguments["width"] = 2
        for _ in range(2):
            tokens, log_probs = op(**arguments, backend=SIMT)
            assert (tokens[1] == -1).all()
            assert log_probs[1].isnan().all()
            if op is ops.sample_children:
                assert torch.equal(tokens[[0, 2]], want[0][[0, 2]])
            assert (tokens[[0, 2], 0] >= 0).all()
            with pytest.raises(RuntimeError, match=message):
                ops.raise_if_flagged("cpu")
            ops.raise_if_flagged("cpu")


def test_filters_that_are_numbers_are_refused_at_once(simt):
    with pytest.raises(RuntimeError, match=r"sample_children: top_p is 1\.5, expected 0 <= top_p <= 1"):
        ops.sample_children(torch.randn(1, 9), torch.rand(1, 2, dtype=torch.float64), top_p=1.5, backend=SIMT)
    with pytest.raises(RuntimeError, match=r"it takes float32, float16 or bfloat16, got torch\.float64"):
        ops.top_children(torch.randn(1, 9).double(), 2, backend=SIMT)


def test_how_many_blocks_share_a_row(simt):
    choose = simt.choose_blocks
    assert choose(rows=8, vocabulary=151_936, resident=132, most=132) == 16  # nearly all of the device
    assert 24 <= choose(rows=1, vocabulary=151_936, resident=132, most=132) <= 75
    assert choose(rows=132, vocabulary=151_936, resident=132, most=132) == 1
    assert choose(rows=10_000, vocabulary=151_936, resident=132, most=132) == 1
    assert choose(rows=1, vocabulary=2000, resident=132, most=132) == 1
    assert choose(rows=1, vocabulary=151_936, resident=132, most=5) == 5
    assert choose(rows=1, vocabulary=151_936, resident=132, most=0) == 1
    assert choose(rows=70, vocabulary=151_936, resident=132, most=132) > 1  # else nearly half would be idle


def test_a_refused_row_leaves_no_counts(simt):
    """What it has put into a histogram is gone in the next launch."""
    simt.configure(multiprocessors=4)
    good = logits_of(1, 20_000)
    bad = good.clone()
    bad[0, 5] = torch.nan
    for _ in range(4):
        ops.top_children(bad, 2, top_k=30, backend=SIMT)
        with pytest.raises(RuntimeError, match=BAD_LOGITS):
            ops.raise_if_flagged("cpu")
        assert_same(good, top_k=30)
