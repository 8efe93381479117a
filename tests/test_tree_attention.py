"""tree_attention against attention unrolled path by path, and every kernel against the reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ON_GPU,
    assert_close,
    assert_within_budget,
    backends_of,
    device_of,
    dtypes_of,
    pack_mask,
    poison_,
    random_trees,
    to_device,
)
from torch import Tensor

from lbr_kernels import ops

BACKENDS = backends_of("tree_attention")
KERNELS = [param for param in BACKENDS if param.values[0] not in ("reference", "cpu")]
CPU_KERNELS = [param for param in KERNELS if param.values[0] not in (*ON_GPU, "cuda-simt")]
BACKENDS_AND_DTYPES = [
    pytest.param(*param.values, dtype, marks=param.marks)
    for param in BACKENDS
    for dtype in dtypes_of("tree_attention", param.values[0])
]


def attend(*args, backend, **kwargs):
    """``ops.tree_attention`` on the backend's device, with tensors that come from the CPU and go back there."""
    device = device_of(backend)
    args = [to_device(value, device) for value in args]
    kwargs = {name: to_device(value, device) for name, value in kwargs.items()}
    out = ops.tree_attention(*args, **kwargs, backend=backend)
    return tuple(part.cpu() for part in out) if isinstance(out, tuple) else out.cpu()


def problem(
    *, B=2, Hk=2, group=2, T=7, N=5, D=16, Dv=16, longest=70, spare=9, dtype=torch.float32, seed=0, shared_tree=False
) -> dict[str, Tensor]:
    """Random tensors, trees that differ by row, lengths from 0 to ``longest``, NaN in every dead slot."""
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(0, longest + 1, (B,), generator=g)
    lens[0] = longest
    _, sees = random_trees(1 if shared_tree else B, T, g)
    S = longest + T + spare
    query = torch.randn(B, Hk * group, N, D, generator=g).to(dtype)
    key = torch.randn(B, Hk, S, D, generator=g).to(dtype)
    value = torch.randn(B, Hk, S, Dv, generator=g).to(dtype)
    used = sees[:, T - N :].any(1).expand(B, T)
    for cache in (key, value):
        poison_(cache, lens, used)
    return {
        "query": query,
        "key_cache": key,
        "value_cache": value,
        "prefix_lens": lens.to(torch.int32),
        "ancestors": pack_mask(sees),
    }


def problem_for(backend: str, **shape) -> dict[str, Tensor]:
    """A problem in the widest type that the backend takes."""
    return problem(dtype=dtypes_of("tree_attention", backend)[0], **shape)


def unrolled(p: dict[str, Tensor], b: int, n: int, *, window=None, softcap=None, sinks=None, slopes=None) -> Tensor:
    """One query's output in fp64, its path's keys laid out one after the other and attended to plainly."""
    query, length = p["query"][b, :, n].double(), int(p["prefix_lens"][b])
    T, N = p["ancestors"].shape[1], p["query"].shape[2]
    words = p["ancestors"][b % len(p["ancestors"]), T - N + n].tolist()
    path = [j for j in range(T) if words[j // 64] >> (j % 64) & 1]
    slots = [*range(length), *(length + j for j in path)]
    # Along a path positions are consecutive.
    position = torch.arange(len(slots)).double()
    group = query.shape[0] // p["key_cache"].shape[1]
    out = []
    for h in range(query.shape[0]):
        keys = p["key_cache"][b, h // group, slots].double()
        values = p["value_cache"][b, h // group, slots].double()
        scores = keys @ query[h] / math.sqrt(query.shape[1])
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes[h].double() * (position - position[-1])
        if window:
            scores[position[-1] - position >= window] = -torch.inf
        if sinks is not None:
            scores = torch.cat([scores, sinks[h : h + 1].double()])
            values = torch.cat([values, torch.zeros_like(values[:1])])
        out.append(scores.softmax(0) @ values)
    return torch.stack(out)


VARIANTS = {
    "plain": {},
    "window": {"window": 9},
    "window-of-one": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 0.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    "all": {
        "window": 20,
        "softcap": 5.0,
        "sinks": torch.tensor([0.5, -1.0, 4.0, 0.0]),
        "alibi_slopes": torch.tensor([0.05, 0.25, 0.125, 0.1]),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_unrolled_paths(backend, variant):
    """Every node's result is plain attention over its own path; NaN in dead slots is never read."""
    p, extras = problem_for(backend, B=3, T=9, N=6), VARIANTS[variant]
    out = attend(**p, **extras, backend=backend)
    for b in range(3):
        for n in range(6):
            names = {"alibi_slopes": "slopes"}
            want = unrolled(p, b, n, **{names.get(k, k): v for k, v in extras.items()})
            assert_close(out[b, :, n], want)


def plain_attention(p: dict[str, Tensor], extras: dict) -> Tensor:
    """What a user would write: torch's SDPA with a dense mask, in the tensors' own dtype."""
    query, key, value = (p[name] for name in ("query", "key_cache", "value_cache"))
    B, Hq, N, D = query.shape
    S, T = key.shape[2], p["ancestors"].shape[1]
    group = Hq // key.shape[1]
    node = torch.arange(T)
    sees = (p["ancestors"][:, :, node // 64] >> (node % 64)) & 1 == 1
    depth = sees.sum(-1).expand(B, T)
    bias = torch.full((B, Hq, N, S), -torch.inf)
    for b, length in enumerate(p["prefix_lens"].tolist()):
        visible = torch.zeros(N, S, dtype=torch.bool)
        visible[:, :length] = True
        visible[:, length : length + T] = sees[b % len(sees), T - N :]
        position = torch.arange(S)
        position[length : length + T] = length + depth[b] - 1
        offset = position - (length + depth[b, T - N :, None] - 1)
        if extras.get("window"):
            visible &= -offset < extras["window"]
        slopes = extras.get("alibi_slopes", torch.zeros(Hq))
        bias[b] = torch.where(visible, slopes[:, None, None] * offset, -torch.inf)
    key = key.nan_to_num(0).repeat_interleave(group, 1)
    value = value.nan_to_num(0).repeat_interleave(group, 1)
    scores = query @ key.mT * D**-0.5
    if extras.get("softcap"):
        scores = torch.tanh(scores / extras["softcap"]) * extras["softcap"]
    scores = scores + bias.to(query.dtype)
    if "sinks" in extras:
        sinks = extras["sinks"].to(query.dtype)[:, None, None].expand(B, Hq, N, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_budget(backend, dtype, variant):
    p, extras = problem(dtype=dtype, T=12, N=9, longest=300, D=64, Dv=64), VARIANTS[variant]
    out, lse = attend(**p, **extras, return_lse=True, backend=backend)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    want, want_lse = ops.tree_attention(**wide, **extras, return_lse=True, backend="reference")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_within_budget(out, want, plain_attention(p, extras), "output")
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", [param for param in KERNELS if param.values[0] != "triton"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(backend, data):
    """Shapes, lengths, trees, dtypes and features at random, against the reference in fp64."""
    check_any_shape(backend, data.draw)


@pytest.mark.parametrize("backend", [param for param in KERNELS if param.values[0] == "triton"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_shape_in_triton(backend, data):
    """Fewer of the same: the interpreter is slow."""
    check_any_shape(backend, data.draw)


def check_any_shape(backend, draw):
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]))
    T = draw(st.integers(1, 150))
    p = problem(
        B=draw(st.integers(1, 4)), Hk=draw(st.sampled_from([1, 2, 3])), group=group, T=T,
        N=draw(st.integers(1, min(T, 40))), D=8 * draw(st.integers(2, 16)), Dv=8 * draw(st.integers(2, 16)),
        longest=draw(st.sampled_from([0, 1, 63, 64, 65, 255, 256, 257, 700])),
        dtype=draw(st.sampled_from(dtypes_of("tree_attention", backend))), seed=draw(st.integers(0, 999)),
        shared_tree=draw(st.booleans()),
    )  # fmt: skip
    Hq = p["query"].shape[1]
    extras = draw(
        st.fixed_dictionaries({}, optional={
            "window": st.sampled_from([1, 2, 50, 300]), "softcap": st.just(8.0),
            "scale": st.sampled_from([0.3, -0.2, 0.0]),
            "sinks": st.just(torch.linspace(-2, 2, Hq)), "alibi_slopes": st.just(torch.linspace(0.01, 0.2, Hq)),
        })
    )  # fmt: skip
    out, lse = attend(**p, **extras, return_lse=True, backend=backend)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    want, want_lse = ops.tree_attention(**wide, **extras, return_lse=True, backend="reference")
    plain = ops.tree_attention(**p, **extras, backend="reference")
    assert_within_budget(out, want, plain, "output", roundings=8)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_head_sizes(backend, head_dim):
    p = problem_for(backend, D=head_dim, Dv=272 - head_dim, longest=40)
    out = attend(**p, backend=backend)
    assert_close(out[1, :, 3], unrolled(p, 1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "group", [n if n in (1, 2, 3, 5, 7, 8, 16) else pytest.param(n, marks=pytest.mark.full) for n in range(1, 17)]
)
def test_any_group(backend, group):
    """GQA 1 to 16, with 39 nodes: the ratios and sizes that packed kernels tend to leave out."""
    p = problem_for(backend, group=group, T=39, N=39, longest=90)
    out = attend(**p, backend=backend)
    for n in (0, 38):
        assert_close(out[0, :, n], unrolled(p, 0, n))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_names_the_visible_nodes(backend):
    """With zero queries and keys, and node j worth 2^j, the output times the number of visible nodes is the mask."""
    dtype = dtypes_of("tree_attention", backend)[0]
    T = 20 if dtype == torch.float32 else 9
    _, sees = random_trees(2, T, torch.Generator().manual_seed(3))
    value = torch.full((2, 1, 40, 8), torch.nan, dtype=dtype)
    lens = torch.tensor([0, 11], dtype=torch.int32)
    for b, length in enumerate(lens.tolist()):
        value[b, :, :length] = 0
        value[b, 0, length : length + T] = (2.0 ** torch.arange(T))[:, None]
    zeros = torch.zeros(2, 1, 40, 8, dtype=dtype)
    out = attend(zeros[:, :, :T], zeros, value, lens, pack_mask(sees), backend=backend)
    count = sees.sum(-1) + lens[:, None]
    named = (out[:, 0].float() * count[..., None]).round().long()
    assert (named == (sees.long() << torch.arange(T)).sum(-1)[..., None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_bit_of_a_word(backend):
    """Trees of 64, 65 and 128 nodes in which only the last bit of a word is set: the sign bit must count."""
    for T in (64, 65, 128):
        sees = torch.zeros(1, T, T, dtype=torch.bool)
        sees[0, :, T - 1] = True
        query, key, value = (torch.randn(1, h, T, 8, dtype=dtypes_of("tree_attention", backend)[0]) for h in (2, 1, 1))
        key[:, :, :-1] = value[:, :, :-1] = torch.nan
        lens = torch.zeros(1, dtype=torch.int32)
        out = attend(query, key, value, lens, pack_mask(sees), backend=backend)
        torch.testing.assert_close(out, value[:, :, -1:].expand(1, 2, T, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [5, 63, 70, 127])
def test_bits_beyond_the_tree_are_ignored(backend, T):
    p = problem_for(backend, T=T, N=5)
    want = attend(**p, window=6, backend=backend)
    p["ancestors"][..., -1] |= -1 << T % 64
    assert torch.equal(attend(**p, window=6, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_nodes(backend):
    """Queries past a row's count return zero, and what only they see is not read."""
    p = problem_for(backend, B=3, T=8, N=4)
    counts = torch.tensor([4, 0, 2], dtype=torch.int32)
    full = attend(**p, backend=backend)
    for b, count in enumerate(counts.tolist()):
        words = p["ancestors"][b, 4 : 4 + count, 0].tolist()
        seen = torch.tensor([any(word >> j & 1 for word in words) for j in range(8)])
        poison_(p["key_cache"][b : b + 1], p["prefix_lens"][b : b + 1] * bool(count), seen[None])
    out, lse = attend(**p, num_nodes=counts, return_lse=True, backend=backend)
    for b, count in enumerate(counts.tolist()):
        assert torch.equal(out[b, :, :count], full[b, :, :count])
        assert (out[b, :, count:] == 0).all()
        assert (lse[b, :, count:] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing(backend):
    p = problem_for(backend, B=1, T=2, N=2, longest=0)
    p["ancestors"] = torch.zeros_like(p["ancestors"])
    out, lse = attend(**p, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out, lse = attend(**p, sinks=sinks, return_lse=True, backend=backend)
    assert (out == 0).all()
    torch.testing.assert_close(lse[0, :, 0], sinks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depths_override_the_mask(backend):
    """Given depths move a node's position, and with it the window."""
    p = problem_for(backend, B=2, T=6, N=6)
    by_mask = pack_depths(p["ancestors"])
    out = attend(**p, window=4, depths=by_mask, backend=backend)
    assert torch.equal(out, attend(**p, window=4, backend=backend))
    deeper = attend(**p, window=4, depths=by_mask + 2, backend=backend)
    assert torch.equal(deeper[1], attend(**p, window=4, depths=by_mask + 2, backend=backend)[1])
    assert not torch.equal(out, deeper)


def pack_depths(ancestors: Tensor) -> Tensor:
    T = ancestors.shape[1]
    bits = (ancestors[..., 0, None] >> torch.arange(T)) & 1
    return bits.sum(-1).to(torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1e-40])
@pytest.mark.parametrize("longest", [0, 1, 2, 129])
def test_any_scale(backend, scale, longest):
    """Zero and negative too; with rows that fill vectors halfway, and odd numbers of keys."""
    p = problem_for(backend, B=1, Hk=1, group=4, T=5, N=5, longest=longest)
    out = attend(**p, scale=scale, backend=backend)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    want = ops.tree_attention(**wide, scale=scale, backend="reference")
    assert_close(out, want)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("level", [-300.0, -20.0, 60.0])
@pytest.mark.parametrize("window", [None, 3])
def test_scores_of_any_level(backend, dtype, level, window):
    """All scores far from zero, on either side: what is summed is relative to the largest."""
    p = problem(B=2, Hk=1, group=4, T=9, N=3, D=16, longest=300, dtype=dtype)
    p["query"][..., 0] = 4.0 if level > 0 else -4.0
    p["key_cache"][..., 0] = torch.where(p["key_cache"][..., 0].isnan(), torch.nan, abs(level))
    out, lse = attend(**p, window=window, backend=backend, return_lse=True)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    want, want_lse = ops.tree_attention(**wide, window=window, backend="reference", return_lse=True)
    # Rounding a score in fp32 moves its probability by so many roundings; in half precision that is nothing.
    roundings = 8 + int(abs(level)) if dtype == torch.float32 else 8
    assert_within_budget(out, want, plain_attention(p, {"window": window}), roundings=roundings)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [2**31 - 1, 2**32, 2**63 - 1])
def test_a_window_beyond_all_positions_is_none(backend, window):
    p = problem_for(backend)
    assert torch.equal(attend(**p, window=window, backend=backend), attend(**p, window=2**20, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """Queries as models make them, caches as slices of an arena: nothing needs to be dense but the last axis."""
    p = problem_for(backend, B=2)
    want = attend(**p, backend=backend)
    p["query"] = p["query"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("key_cache", "value_cache"):
        arena = torch.full((4, 5, 2 * p[name].shape[2], 32), torch.nan, dtype=p[name].dtype)
        view = arena[1:3, 2:4, ::2, 8:24] if backend in ("cuda", "cuda-simt") else arena[1:3, 2:4, ::2, 3:19]
        view.copy_(p[name])
        p[name] = view
    p["prefix_lens"] = torch.stack([p["prefix_lens"], p["prefix_lens"]], 1)[:, 0].clone()
    p["ancestors"] = torch.stack([p["ancestors"], p["ancestors"] * 0], 1)[:, 0]
    assert torch.equal(attend(**p, backend=backend), want)


@pytest.mark.parametrize("backend", CPU_KERNELS)
def test_a_row_does_not_depend_on_its_batch(backend):
    """Bit for bit the same alone, in a batch, and with one, two or four threads."""
    p = problem_for(backend, B=4, longest=900, group=7, D=64, Dv=64, T=20, N=13)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(attend(**p, backend=backend))
            for b in range(4):
                row = {name: tensor[b : b + 1] for name, tensor in p.items()}
                assert torch.equal(attend(**row, backend=backend), results[-1][b : b + 1])
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_no_queries(backend):
    p = problem_for(backend, B=2)
    none = {name: tensor[:0] for name, tensor in p.items()}
    assert attend(**none, backend=backend).shape == (0, 4, 5, 16)
    assert attend(**{**p, "query": p["query"][:, :0]}, backend=backend).shape == (2, 0, 5, 16)
    p["query"] = p["query"][:, :, :0]
    assert attend(**p, backend=backend).shape == (2, 4, 0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 7, 69, 70, 73])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_that_is_seen_is_passed_on(backend, place, softcap):
    """A NaN in a visible key makes the output and its log-sum-exp NaN, wherever it stands, and in no other head."""
    p = problem_for(backend, B=1, Hk=2, T=4, N=4, spare=0)
    p["ancestors"][:] = 15
    p["key_cache"] = p["key_cache"].nan_to_num(0.5)
    p["value_cache"] = p["value_cache"].nan_to_num(0.5)
    p["key_cache"][0, 0, place, 3] = torch.nan
    out, lse = attend(**p, softcap=softcap, return_lse=True, backend=backend)
    assert out[:, :2].isnan().all()
    assert lse[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()
    assert lse[:, 2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_tree(backend):
    p = problem_for(backend, T=3, N=0)
    assert attend(**p, backend=backend).shape == (2, 4, 0, 16)
    p = {**p, "ancestors": torch.empty(1, 0, 0, dtype=torch.int64)}
    assert attend(**p, backend=backend).shape == (2, 4, 0, 16)
