"""The Triton kernels, on a GPU where there is one, else in Triton's interpreter, against the reference in fp64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, device_of, pack_mask, random_trees, to_device
from test_tree_attention import VARIANTS, plain_attention, problem, unrolled
from torch import Tensor
from triton_guards import ahead_of_time

from lbr_kernels import ops
from lbr_kernels.ops import tree_attention_triton

DEVICE = device_of("triton")
assert tree_attention_triton.interpreting() == (DEVICE.type == "cpu")


@pytest.fixture
def use_splits(monkeypatch):
    """Sets the number of splits for all calls."""
    return lambda splits: monkeypatch.setattr(tree_attention_triton, "choose_splits", lambda *_: splits)


def moved(arguments: dict) -> dict:
    """Tensors to the device under test."""
    return {name: to_device(value, DEVICE) for name, value in arguments.items()}


def attend(p: dict, **extras) -> tuple[Tensor, Tensor]:
    out, lse = tree_attention_triton.tree_attention_triton(**moved(p), **moved(extras))
    assert out.dtype == p["query"].dtype
    assert lse.dtype == torch.float32
    return out.cpu(), lse.cpu()


def oracle(p: dict, **extras) -> tuple[Tensor, Tensor]:
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    return ops.tree_attention(**wide, **extras, return_lse=True, backend="reference")


def poison_unseen_(p: dict, *, window: int | None = None, num_nodes: Tensor | None = None) -> None:
    """NaN in every slot that no real query sees, be it for the mask or for the window."""
    T, N = p["ancestors"].shape[1], p["query"].shape[2]
    node = torch.arange(T)
    bits = (p["ancestors"][:, :, node // 64] >> (node % 64)) & 1 == 1
    for b, length in enumerate(p["prefix_lens"].tolist()):
        sees = bits[b % len(bits)]
        depth = sees.sum(-1)
        live = torch.zeros(p["key_cache"].shape[2], dtype=torch.bool)
        for n in range(N if num_nodes is None else int(num_nodes[b])):
            position = length + depth[T - N + n] - 1
            reach = length + T if window is None else window
            live[:length] |= position - torch.arange(length) < reach
            live[length : length + T] |= sees[T - N + n] & (position - (length + depth - 1) < reach)
        for name in ("key_cache", "value_cache"):
            p[name][b, :, ~live] = torch.nan


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_budget(use_splits, variant, dtype, splits):
    use_splits(splits)
    p, extras = problem(dtype=dtype, T=12, N=9, longest=300, D=64, Dv=64), VARIANTS[variant]
    out, lse = attend(p, **extras)
    want, want_lse = oracle(p, **extras)
    assert_within_budget(out, want, plain_attention(p, extras), "output")
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_shape(data):
    """Shapes, lengths, trees, dtypes, splits and features at random; NaN in whatever nobody sees."""
    draw = data.draw
    T = draw(st.integers(1, 150))
    B, N = draw(st.integers(1, 2)), draw(st.integers(1, min(T, 20)))
    p = problem(
        B=B, Hk=draw(st.sampled_from([1, 2])), group=draw(st.sampled_from([1, 2, 3, 5, 7, 8])), T=T, N=N,
        D=draw(st.integers(1, 130)), Dv=draw(st.integers(1, 130)),
        longest=draw(st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 255, 256, 257])),
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 999)), shared_tree=draw(st.booleans()),
    )  # fmt: skip
    Hq = p["query"].shape[1]
    extras = draw(
        st.fixed_dictionaries({}, optional={
            "window": st.sampled_from([1, 2, 50, 300]), "softcap": st.just(8.0),
            "scale": st.sampled_from([0.3, -0.2, 0.0]),
            "sinks": st.just(torch.linspace(-2, 2, Hq)), "alibi_slopes": st.just(torch.linspace(0.01, 0.2, Hq)),
            "num_nodes": st.just(torch.arange(N, N - B, -1, dtype=torch.int32).clamp(0)),
        })
    )  # fmt: skip
    poison_unseen_(p, window=extras.get("window"), num_nodes=extras.get("num_nodes"))
    splits = draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention_triton, "choose_splits", lambda *_: splits)
        out, lse = attend(p, **extras)
    want, want_lse = oracle(p, **extras)
    plain = ops.tree_attention(**p, **extras, backend="reference")
    assert_within_budget(out, want, plain, "output", roundings=8)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_ratios_with_39_nodes(use_splits, group, dtype):
    use_splits(2)
    p = problem(B=1, Hk=1, group=group, T=39, N=39, longest=190, dtype=dtype)
    out, _ = attend(p)
    for n in (0, 20, 38):
        allowed = 3e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[0, :, n].double(), unrolled(p, 0, n), rtol=0, atol=allowed)


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (16, 3), (24, 80), (96, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(use_splits, D, Dv, dtype):
    use_splits(2)
    p = problem(B=1, Hk=1, D=D, Dv=Dv, longest=140, dtype=dtype)
    out, _ = attend(p)
    assert_within_budget(out, oracle(p)[0], ops.tree_attention(**p, backend="reference"), "output", roundings=8)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("T", [64, 65, 150])
def test_last_bit_of_a_word(T, window):
    """Only the last bit of a word, or the tree's last, is set: the sign bit must count, as a depth too."""
    for bit, length in product({63, T - 1}, [0, 37]):
        sees = torch.zeros(1, T, T, dtype=torch.bool)
        sees[0, :, bit] = True
        p = {
            "query": torch.randn(1, 2, min(T, 20), 8),
            "key_cache": torch.randn(1, 1, T + 40, 8),
            "value_cache": torch.randn(1, 1, T + 40, 8),
            "prefix_lens": torch.tensor([length], dtype=torch.int32),
            "ancestors": pack_mask(sees),
        }
        poison_unseen_(p, window=window)
        out, lse = attend(p, window=window)
        want, want_lse = oracle(p, window=window)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


def test_output_names_the_visible_nodes(use_splits):
    """With zero queries and keys, and node j worth 2^j, the output times the number of visible nodes is the mask."""
    use_splits(3)
    _, sees = random_trees(2, 20, torch.Generator().manual_seed(3))
    value = torch.full((2, 1, 240, 1), torch.nan)
    lens = torch.tensor([0, 211], dtype=torch.int32)
    for b, length in enumerate(lens.tolist()):
        value[b, :, :length] = 0
        value[b, 0, length : length + 20, 0] = 2.0 ** torch.arange(20)
    p = {
        "query": torch.zeros(2, 1, 20, 8),
        "key_cache": torch.zeros(2, 1, 240, 8),
        "value_cache": value,
        "prefix_lens": lens,
        "ancestors": pack_mask(sees),
    }
    out, _ = attend(p)
    named = (out[:, 0, :, 0] * (sees.sum(-1) + lens[:, None])).round().long()
    torch.testing.assert_close(named, (sees.long() << torch.arange(20)).sum(-1))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 3, 130])
def test_num_nodes_and_what_nobody_sees(use_splits, splits, window):
    """Queries past a row's count return zero; what only they see, and what the window leaves out, may be NaN."""
    use_splits(splits)
    p = problem(B=3, T=8, N=4, longest=300)
    counts = torch.tensor([4, 0, 2], dtype=torch.int32)
    full, _ = attend(p, window=window)
    poison_unseen_(p, window=window, num_nodes=counts)
    out, lse = attend(p, window=window, num_nodes=counts)
    for b, count in enumerate(counts.tolist()):
        torch.testing.assert_close(out[b, :, :count], full[b, :, :count])
        assert (out[b, :, count:] == 0).all()
        assert (lse[b, :, count:] == -torch.inf).all()
        assert lse[b, :, :count].isfinite().all()


@pytest.mark.parametrize("features", [{"window": 4}, {"alibi_slopes": VARIANTS["alibi"]["alibi_slopes"]}])
def test_depths_override_the_mask(features):
    p = problem(B=2, T=6, N=6, shared_tree=True)
    depths = ((p["ancestors"] >> torch.arange(6)) & 1).sum(-1).to(torch.int32)
    out, _ = attend(p, **features)
    assert torch.equal(out, attend(p, **features, depths=depths)[0])
    moved_down = depths + torch.arange(6, dtype=torch.int32)
    deeper, _ = attend(p, **features, depths=moved_down)
    torch.testing.assert_close(deeper.double(), oracle(p, **features, depths=moved_down)[0], rtol=0, atol=3e-6)
    assert not torch.equal(out, deeper)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1e-40])
@pytest.mark.parametrize("longest", [0, 1, 129])
def test_any_scale(scale, longest):
    p = problem(B=1, Hk=1, group=4, T=5, N=5, longest=longest)
    out, lse = attend(p, scale=scale)
    want, want_lse = oracle(p, scale=scale)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


def test_strided_views(use_splits):
    """Queries as models make them, caches as slices of an arena, one cache and one tree for all rows."""
    use_splits(2)
    p = problem(B=2, longest=150, shared_tree=True)
    p["key_cache"][1], p["value_cache"][1], p["prefix_lens"][1] = p["key_cache"][0], p["value_cache"][0], 150
    want, _ = attend(p)
    p["query"] = p["query"].transpose(1, 2).contiguous().transpose(1, 2)
    arena = torch.full((4, 5, 2 * p["key_cache"].shape[2], 24), torch.nan)
    view = arena[1:3, 2:4, ::2, 3:19]
    view.copy_(p["key_cache"])
    p["key_cache"] = view
    p["value_cache"] = p["value_cache"][:1].expand(2, -1, -1, -1)
    p["prefix_lens"] = p["prefix_lens"][:1].expand(2)
    wide = torch.full((7, 3), -1)
    wide[:, :1] = p["ancestors"][0]
    p["ancestors"] = wide[None, :, :1].expand(2, -1, -1)
    assert torch.equal(attend(p)[0], want)


@pytest.mark.parametrize("place", [0, 7, 70, 131])
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0}, {"window": 300}])
def test_nan_that_is_seen_is_passed_on(use_splits, place, features):
    """A NaN in a visible key or value reaches the output, wherever it stands, and in no other head."""
    use_splits(2)
    p = problem(B=1, Hk=2, T=4, N=4, longest=128, spare=0)
    p["ancestors"][:] = 15
    for name in ("key_cache", "value_cache"):
        p[name] = p[name].nan_to_num(0.5)
    p["value_cache"][0, 1, place, 2] = torch.nan
    out, lse = attend(p, **features)
    assert out[:, 2:, :, 2].isnan().all()
    assert out.isnan().sum() == 2 * 4
    assert lse.isfinite().all()
    p["value_cache"] = p["value_cache"].nan_to_num(0.5)
    p["key_cache"][0, 0, place, 3] = torch.nan
    out, lse = attend(p, **features)
    assert out[:, :2].isnan().all()
    assert lse[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()
    assert lse[:, 2:].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("name", "value"), [("prefix_lens", -1), ("prefix_lens", 292), ("num_nodes", -1), ("num_nodes", 6)]
)
def test_a_row_out_of_range_is_nan(use_splits, splits, name, value):
    """It is not read, others are as ever, and the flag is raised."""
    use_splits(splits)
    p = problem(B=3, longest=280, spare=4)  # S - T = 284
    p["num_nodes"] = torch.full((3,), 5, dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    want, want_lse = attend(p, flag=flag)
    assert flag.item() == 0
    p[name][1] = value
    out, lse = attend(p, flag=flag)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert torch.equal(out[::2], want[::2])
    assert torch.equal(lse[::2], want_lse[::2])
    assert flag.item() == (1 if name == "prefix_lens" else 2)


def test_counters_are_left_at_zero(use_splits):
    """Every tile's parts were counted, and the counter is fit for the next launch; results are the same each time."""
    use_splits(3)
    p = moved(problem(longest=400))
    out, lse = torch.empty_like(p["query"]), torch.empty(p["query"].shape[:3], device=DEVICE)
    call = tree_attention_triton.launch(**p, out=out, lse=lse, multiprocessors=1)
    first = None
    for _ in range(2):
        tree_attention_triton.tree_attention_kernel[(call.programs,)](**call.arguments, **call.options)
        assert call.arguments["counters"].numel() == 4
        assert (call.arguments["counters"] == 0).all()
        first = out.clone() if first is None else first
        assert torch.equal(out, first)


@pytest.mark.parametrize("programs", [1, 108 * 2, 132 * 3])
def test_choice_of_splits(programs):
    """Some work for each, none where tiles fill the device, and waves as full as any number of splits makes them."""
    choose = tree_attention_triton.choose_splits
    for tiles in (1, 2, 8, 96, 300, 5000):
        for slots in (1, 100, 1000, 131072):
            splits = choose(tiles, slots, 64, programs)
            assert 1 <= splits <= max(1, slots // (64 * tree_attention_triton.MIN_BLOCKS_PER_SPLIT))
            assert splits <= tree_attention_triton.MAX_SPLITS
            if tiles >= 2 * programs:
                assert splits == 1
    if programs > 1:
        assert choose(8, 131072, 64, programs) * 8 >= 0.8 * programs


def test_head_size_is_limited():
    p = problem(B=1, D=300, Dv=16)
    message = (
        "tree_attention: query has head size 300, expected at most 256 for backend 'triton'; "
        "the nearest accepted backend is 'reference'"
    )
    with pytest.raises(RuntimeError, match=message):
        attend(p)
    with pytest.raises(RuntimeError, match="value_cache has head size 257"):
        attend(problem(B=1, D=16, Dv=257))


@pytest.mark.full  # as `make gpu-check` sees
def test_kernels_compile_without_spills():
    pytest.importorskip("rich")
    (record,) = ahead_of_time("r.resources(['tree_attention bfloat16 d64 rows 16, all features'], [90])")
    assert record["spill_bytes"] == 0
    assert record["blocks_per_sm"] >= 2
