"""packed_tree_attention in Triton, on a GPU where there is one, else in Triton's interpreter, against the reference."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, device_of, to_device
from torch import Tensor
from triton_guards import Guarded, ahead_of_time, flags_of

from lbr_kernels import ops
from lbr_kernels.ops import packed_tree_attention_triton as kernels
from lbr_kernels.ops import packed_tree_order_triton as orders
from lbr_kernels.ops._backends import BACKENDS
from lbr_kernels.ops.packed_tree_attention import node_positions

DEVICE = device_of("triton")
BAD_TREE = 128
SMALL = kernels.Blocks(16, 16, warps=4, stages=1)
NAMES = ("output", "query's gradient", "key's gradient", "value's gradient", "sinks' gradient")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that small problems have many blocks, keys that live long, and such that do not."""
    monkeypatch.setattr(kernels, "block_sizes", lambda *_, **__: SMALL)
    monkeypatch.setattr(orders, "LONG", 12)


def chain(T: int) -> list[int]:
    return [T] * T


def star(T: int) -> list[int]:
    return [T, *range(2, T + 1)]


def random_tree(T: int, seed: int = 0) -> list[int]:
    """Every node is a child of one on the path to the node before it; some are new roots."""
    generator = torch.Generator().manual_seed(seed)
    ends, path = [T] * T, []
    for node in range(T):
        keep = int(torch.randint(len(path) + 1, (1,), generator=generator)) if node % 5 else max(len(path) - 1, 0)
        for closed in path[keep:]:
            ends[closed] = node
        path = [*path[:keep], node]
    return ends


def trajectory(T: int, side: int, prompt: int = 5) -> list[int]:
    """A prompt and committed nodes, before each of which stand ``side`` nodes of a chain that was not taken."""
    ends = [T] * T
    for node in range(prompt, T):
        turn = (node - prompt) % (side + 1)
        if turn < side:
            ends[node] = min(node - turn + side, T)
    return ends


def rollouts(T: int, prompt: int = 20, count: int = 3) -> list[int]:
    """Several behind one prompt, each with leaves that were not taken."""
    ends, length = [T] * T, (T - prompt) // count
    for node in range(prompt, T):
        turn = min((node - prompt) // length, count - 1)
        ends[node] = T if turn == count - 1 else prompt + (turn + 1) * length
        if node % 3 == 0:
            ends[node] = node + 1
    return ends


def problem(
    ends: list[int] | list[list[int]], *, B: int = 1, Hk: int = 1, group: int = 2, D: int = 16, Dv: int | None = None,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    subtree_end = torch.tensor(ends, dtype=torch.int32).reshape(-1, len(ends[0]) if B > 1 else len(ends))
    T, Dv = subtree_end.shape[1], D if Dv is None else Dv

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "query": normal(B, Hk * group, T, D), "key": normal(B, Hk, T, D), "value": normal(B, Hk, T, Dv),
        "subtree_end": subtree_end, "grad": normal(B, Hk * group, T, Dv),
    }  # fmt: skip


def visible(subtree_end: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The dense mask, bool ``[R, query, key]``, pack by pack."""
    R, T = subtree_end.shape
    sees = torch.zeros(R, T, T, dtype=torch.bool)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        node = torch.arange(stop - start)
        here = (node <= node[:, None]) & (node[:, None] < subtree_end[:, None, start:stop])
        sees[:, start:stop, start:stop] = here
    return sees


def differentiated(p: dict, attend, extras: dict) -> list[Tensor]:
    """The output and the gradients of what has one."""
    leaves = {name: p[name].detach().requires_grad_() for name in ("query", "key", "value")}
    extras = dict(extras)
    if "sinks" in extras:
        leaves["sinks"] = extras["sinks"].detach().requires_grad_()
        extras["sinks"] = leaves["sinks"]
    out = attend(leaves["query"], leaves["key"], leaves["value"], p["subtree_end"], **extras)
    out.backward(p["grad"])
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


def ours(p: dict, extras: dict) -> list[Tensor]:
    def attend(*args, **kwargs):
        return ops.packed_tree_attention(*args, **kwargs, backend="triton")

    on_device = {name: to_device(tensor, DEVICE) for name, tensor in p.items()}
    return [t.cpu() for t in differentiated(on_device, attend, {n: to_device(v, DEVICE) for n, v in extras.items()})]


def oracle(p: dict, extras: dict) -> list[Tensor]:
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    wide_extras = dict(extras)
    found = differentiated(wide, partial(ops.packed_tree_attention, backend="reference"), wide_extras)
    return [tensor.double() for tensor in found]


def plain(p: dict, extras: dict) -> list[Tensor]:
    """What a user would write, in the tensors' own dtype."""

    def attend(query, key, value, subtree_end, cu_seqlens=None, positions=None, **settings):
        sees = visible(subtree_end, cu_seqlens)
        if positions is None:
            positions = node_positions(subtree_end, cu_seqlens)
        offset = positions[:, None, :] - positions[:, :, None]
        if "window" in settings:
            sees = sees & (-offset < settings["window"])
        sees = sees[:, None]
        group, dtype = query.shape[1] // key.shape[1], query.dtype
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        scale = settings.get("scale")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if "softcap" in settings:
            scores = torch.tanh(scores / settings["softcap"]) * settings["softcap"]
        if "alibi_slopes" in settings:
            scores = scores + (settings["alibi_slopes"][:, None, None] * offset[:, None]).to(dtype)
        scores = torch.where(sees, scores, torch.finfo(dtype).min)
        if "sinks" in settings:
            sink = settings["sinks"].to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return torch.where(sees, weights, 0) @ value

    return differentiated(p, attend, extras)


def assert_right(p: dict, roundings: int = 8, got: list[Tensor] | None = None, clean: dict | None = None, **extras):
    """``clean``: the same without what must not be read."""
    got = ours(p, extras) if got is None else got
    want, written = oracle(clean or p, extras), plain(clean or p, extras)
    for name, one, exact, other in zip(NAMES, got, want, written, strict=False):
        assert one.dtype == (torch.float32 if name.startswith("sinks") else p["query"].dtype)
        if float(exact.abs().max()) < 1e-9:  # of a query that sees one key only: differences of what is equal
            assert float(one.abs().max()) < 64 * torch.finfo(one.dtype).eps
            continue
        # A sink's gradient is fp32 and a sum of what comes from the others, in their dtype.
        assert_within_budget(one, exact, other.to(p["query"].dtype), name, roundings=roundings)
    return got


TREES = {
    "chain": chain(41),
    "star": star(41),
    "random": random_tree(60),
    "random again": random_tree(39, 5),
    "trajectory, K=3, L=1": trajectory(65, 2),
    "trajectory, longer branches": trajectory(60, 8),
    "short lives begin with a block's last query": trajectory(40, 2, prompt=15),
    "rollouts": rollouts(60),
    "one node": [1],
    "a block": chain(16),
    "a block and one": star(17),
    "ends that do not nest": [7, 30, 3, 40, 9, 40, 6, 12, *[20, 40] * 16],
}

VARIANTS = {
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1])},
    "scale": {"scale": -0.4},
    "all": {
        "window": 9, "softcap": 2.0, "scale": 0.7,
        "sinks": torch.tensor([0.5, -1.0]), "alibi_slopes": torch.tensor([0.3, 0.1]),
    },
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_trees(tree):
    assert_right(problem(TREES[tree], group=1))


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((v, torch.float32) for v in VARIANTS), *(("all", dtype) for dtype in DTYPES[1:])]
)
def test_variants(variant, dtype):
    assert_right(problem(trajectory(45, 2), D=24, dtype=dtype), **VARIANTS[variant])


@pytest.mark.parametrize(
    ("D", "Dv", "dtype"),
    [
        (8, 8, torch.float32),
        (20, 33, torch.bfloat16),
        (64, 64, torch.float16),
        (80, 16, torch.bfloat16),
        (1, 130, torch.float32),
    ],
)
def test_head_sizes(D, Dv, dtype):
    assert_right(problem(random_tree(33), group=1, D=D, Dv=Dv, dtype=dtype))


@pytest.mark.parametrize(("Hk", "group", "parts"), [(2, 1, 1), (2, 2, 1), (1, 7, 1), (1, 4, 2), (1, 3, 3)])
def test_heads(monkeypatch, Hk, group, parts):
    """The heads of a group are summed by one program, or dealt to several; rows have trees of their own."""
    monkeypatch.setattr(kernels, "choose_parts", lambda *_: parts)
    p = problem([random_tree(20, 1), rollouts(20, 5, 2)], B=2, Hk=Hk, group=group, dtype=torch.float16)
    assert_right(p)


@pytest.mark.parametrize("features", [{}, {"window": 4, "alibi_slopes": torch.tensor([0.3, 0.1])}])
def test_packs(features):
    """One behind the other, of length 0 and 1 too; each is as if it were alone."""
    packs = [[], chain(1), trajectory(37, 2), [], rollouts(30, 9, 2), chain(1), []]
    p = problem([end for pack in packs for end in pack])
    bounds = torch.tensor([0, *map(len, packs)]).cumsum(0).int()
    got = assert_right(p, cu_seqlens=bounds, **features)
    start = int(bounds[2])
    alone = {n: t[..., start : start + 37] if n == "subtree_end" else t[:, :, start : start + 37] for n, t in p.items()}
    for one, other in zip(got, ours(alone, features), strict=True):
        torch.testing.assert_close(one[:, :, start : start + 37], other, rtol=0, atol=3e-6)


def test_rows_share_a_tree_and_have_positions_of_their_own():
    p = problem(trajectory(40, 2), group=2)
    p |= {n: torch.cat([t, t.flip(2)]) for n, t in p.items() if n != "subtree_end"}
    positions = torch.stack([node_positions(p["subtree_end"])[0], torch.arange(40, dtype=torch.int32)])
    assert_right(p, positions=positions, window=6)
    assert_right(p, positions=positions[1:], window=6, alibi_slopes=torch.tensor([0.2, 0.1]))


@pytest.mark.parametrize("features", [{}, {"window": 4}, {"sinks": torch.tensor([0.5, -1.0])}])
def test_what_nobody_sees_is_not_read(features):
    """Keys that nobody sees, and queries that see nothing, padding above all, hold NaN; their gradients are zero."""
    ends = trajectory(60, 2)
    ends[:2] = [0, 1]  # of a first node that sees nothing, and is seen by nobody
    for node in (14, 15, 30):
        ends[node] = node  # seen by nobody, and sees the others
    clean = problem(ends)
    padding = torch.arange(60) >= 53
    clean["subtree_end"] = torch.where(padding, 0, clean["subtree_end"].clamp(max=53)).int()
    sees = visible(clean["subtree_end"])
    if "window" in features:
        positions = node_positions(clean["subtree_end"])
        sees = sees & (positions[:, :, None] - positions[:, None, :] < features["window"])
    unseen, blind = ~sees[0].any(0), ~sees[0].any(1)
    assert unseen.sum() > 10
    assert blind.sum() > 7
    for name, where in (("key", unseen), ("value", unseen), ("query", blind), ("grad", blind)):
        clean[name][:, :, where] = 0
    p = {name: tensor.clone() for name, tensor in clean.items()}
    for name, where in (("key", unseen), ("value", unseen), ("query", blind)):
        p[name][:, :, where] = torch.nan
    out, query_grad, key_grad, value_grad, *_ = assert_right(p, clean=clean, **features)
    assert (out[:, :, blind] == 0).all()
    assert (query_grad[:, :, blind] == 0).all()
    assert (key_grad[:, :, unseen] == 0).all()
    assert (value_grad[:, :, unseen] == 0).all()
    _, lse = ops.packed_tree_attention(
        *(to_device(p[n], DEVICE) for n in ("query", "key", "value", "subtree_end")), return_lse=True, backend="triton"
    )
    _, want = ops.packed_tree_attention(*(clean[n] for n in ("query", "key", "value", "subtree_end")), return_lse=True)
    torch.testing.assert_close(lse.cpu(), want, rtol=2e-6, atol=2e-6)


def test_output_names_the_visible_nodes():
    """With zero queries and keys, and node j worth 2^j, the output times the number of visible nodes is the mask."""
    p = problem(random_tree(20, 3), D=8, Dv=1)
    p["query"].zero_()
    p["key"].zero_()
    p["value"][:] = 2.0 ** torch.arange(20)[:, None]
    sees = visible(p["subtree_end"])
    named = (ours(p, {})[0][:, 0, :, 0] * sees.sum(-1)).round().long()
    torch.testing.assert_close(named, (sees.long() << torch.arange(20)).sum(-1))


def test_strides():
    """Slices of larger tensors with NaN around, [B, T, H, D] seen as [B, H, T, D], and a gradient that is expanded."""
    p = problem(trajectory(33, 2), group=2, D=16)
    want = ours(p, {})
    viewed = dict(p)
    for name in ("query", "key", "value"):
        B, H, T, D = p[name].shape
        arena = torch.full((B, 2 * T, H + 1, D + 5), torch.nan)
        viewed[name] = arena[:, 1::2, :H, 3 : 3 + D].transpose(1, 2)
        viewed[name].copy_(p[name])
    got = ours(viewed, {})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for tensor in got[:1]:
        assert tensor.transpose(1, 2).is_contiguous()
    viewed["grad"] = torch.ones(1, 1, 1, 1).expand(p["grad"].shape)
    full = dict(p, grad=torch.ones_like(p["grad"]))
    assert all(torch.equal(a, b) for a, b in zip(ours(viewed, {}), ours(full, {}), strict=True))


def test_results_are_the_same_each_time_and_in_bounds():
    """Guards around all that is read or written stay as they were, and scratch holds nothing that is needed."""
    p = {n: to_device(t, DEVICE) for n, t in problem(rollouts(34, 10, 2), group=2, D=20).items()}
    given = (p["query"], p["key"], p["value"], p["subtree_end"])
    out, lse = ops.packed_tree_attention(*given, return_lse=True, backend="triton")
    forward = kernels.forward(*given, *(None,) * 7, flag=None, capability=80)
    backward = kernels.backward(
        p["grad"], *given[:3], out, lse, given[3], *(None,) * 6, flag=None, capability=80, multiprocessors=99
    )
    for call in (forward, backward):
        guarded, copies, first = Guarded(), {}, None
        for launch in call.launches.values():
            for name, tensor in launch.arguments.items():
                if isinstance(tensor, Tensor) and tensor.numel() and tensor.is_contiguous():
                    if tensor.data_ptr() not in copies:
                        copies[tensor.data_ptr()] = guarded(tensor, device=DEVICE)
                    launch.arguments[name] = copies[tensor.data_ptr()]
        for _ in range(2):
            for launch in call.launches.values():
                launch.run(DEVICE)
            results = [copies[tensor.data_ptr()].clone() for tensor in call.results]
            assert first is None or all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
            first = results
        guarded.check(written=True)


def listed(ends: Tensor, positions: Tensor | None, window: int | None, *, by_query: bool, cu_seqlens=None):
    """Which places hold which keys, and what every block has to visit: whole ones, others."""
    keys = orders.order(
        to_device(ends, DEVICE), to_device(cu_seqlens, DEVICE), to_device(positions, DEVICE), window, None
    )
    lists = orders.lists(keys, 16, 16, by_query=by_query)
    for launch in (keys.launch, *lists.launches):
        launch.run(DEVICE)
    visits = []
    for owner in range(lists.owners):
        whole, cut = lists.counts[0, owner].tolist()
        row = lists.blocks[0, owner].tolist()
        visits.append((row[:whole], row[len(row) - cut :][::-1]))
    return keys, visits


@pytest.mark.parametrize("by_query", [True, False])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    "tree",
    [
        "random",
        "trajectory, longer branches",
        "short lives begin with a block's last query",
        "rollouts",
        "ends that do not nest",
    ],
)
def test_lists_hold_what_is_seen(tree, window, by_query):
    """Every pair that sees anything once; as whole, only what all see; and no block that nobody here sees."""
    ends = torch.tensor([TREES[tree]], dtype=torch.int32)
    T, positions = ends.shape[1], node_positions(ends)
    sees = visible(ends)[0]
    if window is not None:
        sees &= positions[0, :, None] - positions[0] < window
    keys, visits = listed(ends, positions, window, by_query=by_query)
    rows, places, counts = keys.rows[0].cpu(), keys.ends[0].cpu() > 0, keys.counts[0].tolist()
    assert torch.equal(rows[places].sort().values, torch.arange(T)[ends[0] > torch.arange(T)].int())
    assert counts[:3] == [int((ends[0] - torch.arange(T) > 12).sum()), int(places.sum()) - counts[0], 0]
    long_blocks = -(-counts[0] // 16)
    of_block = [16 * block for block in range(long_blocks)]
    of_block += [keys.space + 16 * block for block in range(-(-counts[1] // 16))]
    pairs = {}
    for owner, both in enumerate(visits):
        for kind, found in zip(("whole", "cut"), both, strict=True):
            assert found == sorted(found)
            for other in found:
                if not by_query:
                    assert owner < len(of_block)
                pair = (owner, other) if by_query else (other, of_block[owner])
                assert pair not in pairs
                pairs[pair] = kind
    for block in range(-(-T // 16)):
        queries = torch.arange(16 * block, min(16 * block + 16, T))
        for place in of_block:
            here = slice(place, place + 16)
            seen = sees[queries[:, None], rows[here][places[here]].long()]
            kind = pairs.get((block, place))
            assert kind is not None or not seen.any()
            if kind == "whole":
                assert seen.all()
                assert seen.shape == (16, 16)
            if kind is None or window is not None:
                continue
            lives = ends[0][rows[here][places[here]].long()]
            assert rows[here][places[here]].min() <= queries[-1]
            assert lives.max() > queries[0]


def test_a_trajectory_costs_its_committed_tokens():
    """Beside the blocks of committed tokens, a block of queries visits few: a ninth of causal attention with L=2."""
    T, side = 1200, 8
    ends = torch.tensor([trajectory(T, side, prompt=0)], dtype=torch.int32)
    keys, visits = listed(ends, None, None, by_query=True)
    for block, (whole, cut) in enumerate(visits):
        committed = -(-16 * (block + 1) // (side + 1) // 16)
        assert len(whole) + len(cut) <= committed + 4
    total = sum(len(whole) + len(cut) for whole, cut in visits)
    assert total < 0.22 * sum(range(1, len(visits) + 1))
    assert keys.counts[0].tolist()[:2] == [-(-(T - 8) // 9) - 1, T - -(-(T - 8) // 9) + 1]


@pytest.mark.parametrize(
    ("name", "at", "value"), [("subtree_end", 9, -1), ("subtree_end", 3, 41), ("subtree_end", 39, 99)]
)
def test_a_row_with_a_bad_end_is_nan(name, at, value):
    """Nothing is read out of bounds, the row beside it is as ever, and the flag is raised."""
    p = problem([trajectory(40, 2), random_tree(40)], B=2)
    want, bits = flags_of(lambda: ours(p, {}), DEVICE)
    assert bits == 0
    guarded = Guarded()
    broken = {n: guarded(t, device=DEVICE) for n, t in p.items()}
    broken[name][0, at] = value
    got, bits = flags_of(lambda: ours(broken, {}), DEVICE)
    assert bits == BAD_TREE
    for tensor, other in zip(got, want, strict=True):
        live = tensor[0][:, 16:24]  # seen and seeing, whatever the bad value
        assert live.isnan().all()
        assert torch.equal(tensor[1], other[1])


@pytest.mark.parametrize("bounds", [[1, 40], [0, 41], [0, 39], [0, 30, 20, 40], [0, -5, 40], [0, 2**31 - 1, 40], [0]])
def test_bad_packs_are_nan(bounds):
    p = problem([min(end, 20) for end in trajectory(40, 2)])
    guarded = Guarded()
    bounds = guarded(torch.tensor(bounds, dtype=torch.int32), device=DEVICE)
    got, bits = flags_of(lambda: ours(p, {"cu_seqlens": bounds}), DEVICE)
    assert bits == BAD_TREE
    assert got[0].isnan().all()
    with pytest.raises(RuntimeError, match="packed_tree_attention: a row's subtree_end or the cu_seqlens were out of"):
        flags_raised(lambda: ours(p, {"cu_seqlens": bounds}))


def flags_raised(call) -> None:
    call()
    ops.raise_if_flagged(DEVICE)


@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 0, 5), (1, 2, 0)])
def test_empty(shape):
    B, H, T = shape
    query = torch.zeros(B, H, T, 8, device=DEVICE, requires_grad=True)
    key, value = torch.zeros(B, max(H, 1), T, 8, device=DEVICE), torch.zeros(B, max(H, 1), T, 8, device=DEVICE)
    ends = torch.zeros(1, T, dtype=torch.int32, device=DEVICE)
    out = ops.packed_tree_attention(query, key, value, ends, backend="triton")
    assert out.shape == query.shape
    out.sum().backward()
    assert query.grad.shape == query.shape


def test_larger_than_a_block_of_the_real_size(monkeypatch):
    """Sizes as on a GPU."""
    monkeypatch.undo()
    assert_right(problem(trajectory(280, 2), group=1, D=64, dtype=torch.float16))


def test_parts_of_a_group():
    """The fewest parts that fill the device, always of one size."""
    assert kernels.choose_parts(10_000, 6, 132) == 1
    assert kernels.choose_parts(400, 6, 132) == 3
    assert kernels.choose_parts(1, 7, 132) == 7
    assert kernels.choose_parts(1, 1, 132) == 1


def test_head_size_is_limited():
    message = (
        "packed_tree_attention: query has head size 300, expected at most 256 for backend 'triton'; "
        "the nearest accepted backend is 'reference'"
    )
    with pytest.raises(RuntimeError, match=message):
        ours(problem([1], D=300, Dv=8), {})
    with pytest.raises(RuntimeError, match="value has head size 257"):
        ours(problem([1], D=8, Dv=257), {})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("grad", lambda t: t[:, :1], r"grad has shape \[1, 1, 9, 16\], expected \[1, 2, 9, 16\]"),
        ("out", lambda t: t.double(), "out has dtype torch.float64, expected torch.float32"),
        ("lse", lambda t: t[..., :1], r"lse has shape \[1, 2, 1\], expected \[1, 2, 9\]"),
        ("key", lambda t: t[..., :4], r"key has shape \[1, 1, 9, 4\], expected \[1, Hk, 9, 16\]"),
    ],
)
def test_what_the_gradient_refuses(name, change, message):
    p = {n: to_device(t, DEVICE) for n, t in problem(chain(9)).items()}
    assert ops.backends(DEVICE)["packed_tree_attention_backward"]["triton"] is None
    args = {n: p[n] for n in ("grad", "query", "key", "value")}
    args |= {"out": torch.zeros_like(p["grad"]), "lse": torch.zeros(1, 2, 9, device=DEVICE)}
    args["subtree_end"] = p["subtree_end"]
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"packed_tree_attention_backward: {message}"):
        torch.ops.lbr_kernels.packed_tree_attention_backward_triton(*args.values())


def test_only_triton_has_it_on_a_gpu():
    """backend=None goes past "cuda", which has other ops."""
    assert "packed_tree_attention" not in BACKENDS["cuda"].ops
    table = ops.backends(DEVICE)
    for op in ("packed_tree_attention", "packed_tree_attention_backward"):
        assert table[op]["triton"] is None
        assert "it has no packed_tree_attention" in table[op]["cuda"]


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_problem(data):
    """Trees, packs, heads, sizes, dtypes and features at random."""
    draw = data.draw
    T, group = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3]))
    bounds = sorted(draw(st.lists(st.integers(0, T), max_size=3)))
    seed = draw(st.integers(0, 999))
    lengths = [b - a for a, b in zip([0, *bounds], [*bounds, T], strict=True)]
    ends = [end for i, length in enumerate(lengths) for end in random_tree(length, seed + i)]
    p = problem(
        ends, Hk=draw(st.sampled_from([1, 2])), group=group, D=draw(st.integers(1, 40)), Dv=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(DTYPES)), seed=seed,
    )  # fmt: skip
    Hq = p["query"].shape[1]
    extras = draw(
        st.fixed_dictionaries({}, optional={
            "window": st.sampled_from([1, 2, 6, 2**40]), "softcap": st.just(2.0),
            "scale": st.sampled_from([0.3, -0.2, 0.0]), "sinks": st.just(torch.linspace(-2, 2, Hq)),
            "alibi_slopes": st.just(torch.linspace(0.01, 0.2, Hq)),
        })
    )  # fmt: skip
    if bounds or draw(st.booleans()):
        extras["cu_seqlens"] = torch.tensor([0, *bounds, T], dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose_parts", lambda *_: draw(st.sampled_from([1, group])))
        assert_right(p, roundings=16, **extras)


def test_opcheck():
    assert ops.backends(DEVICE)["packed_tree_attention"]["triton"] is None
    p = {n: to_device(t, DEVICE) for n, t in problem(star(5), group=2, D=8).items()}
    args = [p[n].requires_grad_(p[n].is_floating_point()) for n in ("query", "key", "value", "subtree_end")]
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    torch.library.opcheck(BACKENDS["triton"].overload("packed_tree_attention"), (*args, None, None, sinks))
    given = [p["grad"], *(t.detach() for t in args[:3])]
    out, lse = torch.ops.lbr_kernels.packed_tree_attention_triton(*given[1:], args[3])
    overload = BACKENDS["triton"].overload("packed_tree_attention_backward")
    torch.library.opcheck(overload, (*given, out, lse, args[3]))


@pytest.mark.full  # as `make gpu-check` sees
def test_compiles_without_spills():
    pytest.importorskip("rich")
    (record,) = ahead_of_time("r.resources(['packed_tree_attention key_value_gradient bfloat16 d64'], [90])")
    assert record["spill_bytes"] == 0
    assert record["blocks_per_sm"] >= 1
