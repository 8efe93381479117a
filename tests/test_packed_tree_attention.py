"""packed_tree_attention and its gradients against attention written node by node, and every kernel against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ON_GPU, assert_within_budget, backends_of, device_of, dtypes_of, to_device
from torch import Tensor

from lbr_kernels import ops
from lbr_kernels.ops import _registry
from lbr_kernels.ops.packed_tree_attention import node_positions, packed_tree_attention_backward_ref

OP = "packed_tree_attention"
BACKENDS = backends_of(OP, interpreted=False)
KERNELS = [param for param in BACKENDS if param.values[0] not in ("reference", "cpu")]
CPU_KERNELS = [param for param in KERNELS if param.values[0] not in ON_GPU]
BACKENDS_AND_DTYPES = [
    pytest.param(*param.values, dtype, marks=param.marks)
    for param in BACKENDS
    for dtype in dtypes_of(OP, param.values[0])
]
RESULTS = ("out", "query", "key", "value", "sinks")


def ends(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def chain(T: int) -> list[int]:
    return [T] * T


def star(T: int) -> list[int]:
    """A root and its leaves."""
    return [T, *range(2, T + 1)][:T]


def nested(parents: list[int]) -> list[int]:
    """Subtree ends of nodes in DFS order."""
    end = list(range(1, len(parents) + 1))
    for node in reversed(range(len(parents))):
        if parents[node] >= 0:
            end[parents[node]] = max(end[parents[node]], end[node])
    return end


def random_tree(T: int, seed: int = 0) -> list[int]:
    """Each node's parent is one of the last node's ancestors, that node, or nothing."""
    g = torch.Generator().manual_seed(seed)
    path: list[int] = []
    parents = []
    for node in range(T):
        path = path[: int(torch.randint(0, len(path) + 1, (1,), generator=g))] if node % 5 == 0 else path
        path = path[: len(path) - int(torch.randint(0, 3, (1,), generator=g))] if path else path
        parents.append(path[-1] if path else -1)
        path.append(node)
    return nested(parents)


def trajectory(T: int, *, width: int = 3, depth: int = 1, prompt: int = 9, chosen_last: bool = True) -> list[int]:
    """A prompt and a committed trunk of nodes with ``width`` children; branches are ``depth`` generations deep."""
    parents: list[int] = []

    def grow(parent: int, generations: int) -> None:
        parents.append(parent)
        node = len(parents) - 1
        for _ in range(width if generations > 1 else 0):
            grow(node, generations - 1)

    trunk = []
    for node in range(prompt):
        parents.append(node - 1)
    while len(parents) < T and chosen_last:
        parent = trunk[-1] if trunk else prompt - 1
        for _ in range(width - 1):
            grow(parent, depth)
        parents.append(parent)
        trunk.append(len(parents) - 1)
    if not chosen_last:
        steps = T // width + 1
        trunk = [prompt - 1, *range(prompt, prompt + steps)]
        parents += trunk[:-1]
        for node in reversed(trunk[:-1]):
            for _ in range(width - 1):
                grow(node, depth)
    kept = nested(parents)[:T]
    return [min(end, T) for end in kept]


def rollouts(T: int, *, prompt: int = 12, number: int = 3) -> list[int]:
    """One prompt, and several trajectories behind it."""
    length = (T - prompt) // number
    end = [T] * prompt
    for i in range(number):
        size = length if i + 1 < number else T - prompt - length * (number - 1)
        end += [prompt + length * i + e for e in trajectory(size, prompt=2)]
    return end


def padded(T: int) -> list[int]:
    """A trajectory, with nodes behind it and in between that nobody sees and that see nothing or their ancestors."""
    end = trajectory(T - T // 3, prompt=4)
    end[5] = end[11 % len(end)] = 0
    return end + [0] * (T // 3)


def islands(T: int) -> list[int]:
    """Nodes that see themselves alone, and between them nodes that see nothing."""
    return [node + 1 if node % 3 else 0 for node in range(T)]


def not_nested(T: int, seed: int = 0) -> list[int]:
    """Any ends at all."""
    g = torch.Generator().manual_seed(seed)
    return [int(torch.randint(0, T + 1, (1,), generator=g)) for _ in range(T)]


TREES = {
    "random": random_tree,
    "chain": chain,
    "star": star,
    "trajectory": trajectory,
    "deep branches": lambda T: trajectory(T, depth=2),
    "branches behind": lambda T: trajectory(T, chosen_last=False),
    "rollouts": rollouts,
    "padded": padded,
    "islands": islands,
    "not nested": not_nested,
}


def problem(
    end: Tensor, *, B=2, Hk=2, group=2, D=16, Dv=16, dtype=torch.float32, seed=0, cu_seqlens: Tensor | None = None
) -> dict[str, Tensor]:
    """Random tensors and a gradient; NaN in keys and values that nobody sees and queries that see nothing."""
    g = torch.Generator().manual_seed(seed)
    T = end.shape[1]
    sizes = {"query": (Hk * group, D), "key": (Hk, D), "value": (Hk, Dv), "grad": (Hk * group, Dv)}
    p = {name: torch.randn(B, heads, T, dim, generator=g).to(dtype) for name, (heads, dim) in sizes.items()}
    sees = visible(end, cu_seqlens)
    unseen, blind = (~sees.any(1)).expand(B, T), (~sees.any(2)).expand(B, T)
    for name, where in (("query", blind), ("key", unseen), ("value", unseen)):
        p[name].masked_fill_(where[:, None, :, None], torch.nan)
    p["subtree_end"] = end
    if cu_seqlens is not None:
        p["cu_seqlens"] = cu_seqlens
    return p


def visible(end: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """bool ``[rows, query, key]``, node by node."""
    T = end.shape[1]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    sees = torch.zeros(len(end), T, T, dtype=torch.bool)
    for b, row in enumerate(end.tolist()):
        for first, behind in itertools.pairwise(bounds):
            for k in range(first, behind):
                sees[b, k : max(k, first + row[k]), k] = True
    return sees


def run(p: dict[str, Tensor], backend: str, **extras: object) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of the op, on the backend's device, and back from there."""
    device = device_of(backend)
    p = {name: to_device(tensor, device) for name, tensor in p.items()}
    extras = {name: to_device(value, device) for name, value in extras.items()}
    leaves = {name: p[name].detach().requires_grad_() for name in ("query", "key", "value")}
    if "sinks" in extras:
        leaves["sinks"] = extras["sinks"].detach().requires_grad_()
    rest = {name: tensor for name, tensor in p.items() if name not in (*leaves, "grad")}
    out, lse = ops.packed_tree_attention(**{**rest, **extras, **leaves}, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out, list(leaves.values()), p["grad"])
    found = {"out": out.detach(), "lse": lse, **dict(zip(leaves, grads, strict=True))}
    return {name: tensor.cpu() for name, tensor in found.items()}


def oracle(
    p: dict[str, Tensor], *, positions=None, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None
):
    """The same in fp64, one query after the other, each with the list of keys that it sees."""
    leaves = {name: p[name].double().requires_grad_() for name in ("query", "key", "value")}
    if sinks is not None:
        leaves["sinks"] = sinks.double().requires_grad_()
    query, key, value = (leaves[name] for name in ("query", "key", "value"))
    B, Hq, T, D = query.shape
    group = Hq // key.shape[1]
    sees = visible(p["subtree_end"], p.get("cu_seqlens"))
    rows, lse = [], torch.full((B, Hq, T), -torch.inf, dtype=torch.float64)
    for b in range(B):
        mask = sees[b % len(sees)]
        place = mask.tril(-1).sum(1) if positions is None else positions[b % len(positions)].long()
        for q in range(T):
            seen = [k for k in mask[q].nonzero().flatten().tolist() if not window or place[q] - place[k] < window]
            if not seen:
                rows.append(value.new_zeros(Hq, value.shape[3]))
                lse[b, :, q] = -torch.inf if sinks is None else sinks.double()
                continue
            keys = key[b, :, seen].repeat_interleave(group, 0)
            scores = (keys @ query[b, :, q, :, None]).squeeze(-1) * (D**-0.5 if scale is None else scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores + alibi_slopes.double()[:, None] * (place[seen] - place[q])
            if sinks is not None:
                scores = torch.cat([scores, leaves["sinks"][:, None]], 1)
            lse[b, :, q] = scores.detach().logsumexp(1)
            weights = scores.softmax(1)[:, None, : len(seen)]
            rows.append((weights @ value[b, :, seen].repeat_interleave(group, 0)).squeeze(1))
    out = torch.stack(rows).view(B, T, Hq, -1).transpose(1, 2)
    grads = torch.autograd.grad(out, list(leaves.values()), p["grad"].double())
    return {"out": out.detach(), "lse": lse, **dict(zip(leaves, grads, strict=True))}


def plain(
    p: dict[str, Tensor], *, positions=None, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None
):
    """What a user would write: a dense mask and softmax, in the tensors' own dtype."""
    dtype = p["query"].dtype
    leaves = {name: p[name].nan_to_num(0).requires_grad_() for name in ("query", "key", "value")}
    if sinks is not None:
        leaves["sinks"] = sinks.to(dtype).requires_grad_()
    B, Hq, T, D = p["query"].shape
    group = Hq // p["key"].shape[1]
    sees = visible(p["subtree_end"], p.get("cu_seqlens"))
    place = sees.tril(-1).sum(2) if positions is None else positions
    offset = place[:, None, :] - place[:, :, None]
    if window:
        sees = sees & (-offset < window)
    keys, values = (leaves[name].repeat_interleave(group, 1) for name in ("key", "value"))
    scores = leaves["query"] @ keys.mT * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        scores = scores + (alibi_slopes[:, None, None] * offset[:, None]).to(dtype)
    blind = ~sees.any(2)[:, None, :, None]
    scores = scores.masked_fill(~sees[:, None] & ~blind, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, leaves["sinks"][:, None, None].expand(B, Hq, T, 1)], -1)
    out = (scores.softmax(-1)[..., :T] @ values).masked_fill(blind, 0)
    grads = torch.autograd.grad(out, list(leaves.values()), p["grad"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def reference(p: dict[str, Tensor], **extras: object) -> dict[str, Tensor]:
    """The reference in fp64, which the tests hold to the oracle: an oracle for larger problems."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    return run(wide, "reference", **extras)


def assert_all_within_budget(found, want, simple, *, roundings: int = 8) -> None:
    """What is exactly zero, as the gradient of a softmax over one score, may be off by roundings of 1."""

    def one_more(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.flatten(), tensor.new_ones(1)])

    for name in RESULTS:
        if name in want:
            dtype = simple["out"].dtype
            actual = found[name].to(dtype) if name == "sinks" else found[name]
            assert actual.shape == want[name].shape
            sides = (one_more(side) for side in (actual, want[name].double(), simple[name].to(dtype)))
            assert_within_budget(*sides, name, roundings=roundings)
    seen = want["lse"].isfinite()
    assert torch.equal(found["lse"].isfinite(), seen)
    torch.testing.assert_close(found["lse"][seen].double(), want["lse"][seen].double(), rtol=3e-6, atol=3e-6)


def widest(backend: str) -> torch.dtype:
    return dtypes_of(OP, backend)[0]


def slopes(heads: int) -> Tensor:
    return torch.linspace(0.02, 0.3, heads)


VARIANTS = {
    "plain": {},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "alibi": {"alibi_slopes": slopes(4)},
    "all": {
        "window": 14, "softcap": 3.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]), "alibi_slopes": slopes(4),
        "scale": 0.4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """What has been computed for one backend, for the others."""
    known: dict[object, object] = {}

    def get(key, compute):
        if key not in known:
            known[key] = compute()
        return known[key]

    return get


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tree", TREES)
def test_equals_the_definition(expected, backend, tree):
    """Two rows with trees of their own, over several blocks of queries and slices; NaN in what must not be read."""
    end = ends(TREES[tree](131), TREES["random"](131))
    p = problem(end, group=4, Hk=1, dtype=widest(backend))
    want, simple = expected((tree, widest(backend)), lambda: (oracle(p), plain(p)))
    assert_all_within_budget(run(p, backend), want, simple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tree", ["rollouts", "padded"])
def test_variants_equal_the_definition(expected, backend, variant, tree):
    p, extras = problem(ends(TREES[tree](70)), dtype=widest(backend)), VARIANTS[variant]
    want, simple = expected((variant, tree, widest(backend)), lambda: (oracle(p, **extras), plain(p, **extras)))
    assert_all_within_budget(run(p, backend, **extras), want, simple, roundings=24)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_error_budget(expected, backend, dtype, variant):
    p, extras = problem(ends(trajectory(300, prompt=40)), B=1, D=64, Dv=64, dtype=dtype), VARIANTS[variant]
    want, simple = expected(("budget", dtype, variant), lambda: (reference(p, **extras), plain(p, **extras)))
    found = run(p, backend, **extras)
    assert found["lse"].dtype == torch.float32
    assert all(found[name].dtype == dtype for name in ("out", "query", "key", "value"))
    assert_all_within_budget(found, want, simple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (20, 20), (64, 64), (80, 48), (128, 128), (1, 33), (96, 1)])
def test_head_sizes_and_groups(expected, backend, group, D, Dv):
    p = problem(ends(rollouts(110)), B=1, Hk=2, group=group, D=D, Dv=Dv, dtype=widest(backend))
    want, simple = expected(("sizes", group, D, Dv, widest(backend)), lambda: (reference(p), plain(p)))
    assert_all_within_budget(run(p, backend), want, simple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 5, 6, 7, 8, 15, 16, 17, 47, 48, 49, 95, 96, 97, 193])
def test_lengths_around_blocks_and_tiles(expected, backend, T):
    p = problem(ends(random_tree(T)), group=1, dtype=widest(backend))
    want, simple = expected(("lengths", T, widest(backend)), lambda: (reference(p), plain(p)))
    assert_all_within_budget(run(p, backend), want, simple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tree", ["trajectory", "chain", "branches behind", "not nested"])
def test_long_packs(expected, backend, tree):
    """Many slices, and keys that many of them share."""
    p = problem(ends(TREES[tree](900)), B=1, group=3, D=32, Dv=32, dtype=widest(backend))
    want, simple = expected(("long", tree, widest(backend)), lambda: (reference(p), plain(p)))
    assert_all_within_budget(run(p, backend), want, simple)


@pytest.mark.parametrize("backend", KERNELS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_shape(backend, data):
    """Shapes, trees, packs, dtypes and features at random, against the reference in fp64."""
    draw = data.draw
    lengths = draw(st.lists(st.sampled_from([0, 1, 3, 20, 48, 67, 110]), min_size=1, max_size=3))
    packed = len(lengths) > 1 or draw(st.booleans())
    B = 1 if packed else draw(st.integers(1, 3))
    trees, seed = draw(st.integers(1, B).filter(lambda n: n in (1, B))), draw(st.integers(0, 999))

    def tree(T: int, seed: int) -> list[int]:
        kind = ("random", "not nested", "chain", "trajectory")[seed % 4] if T >= 20 else "random"
        return TREES[kind](T, seed) if seed % 4 < 2 or kind == "random" else TREES[kind](T)

    rows = [[end for i, T in enumerate(lengths) for end in tree(T, seed + 7 * i + b)] for b in range(trees)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) if packed else None
    p = problem(
        torch.tensor(rows, dtype=torch.int32).view(trees, sum(lengths)), B=B, Hk=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 7])), D=draw(st.integers(1, 70)), Dv=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(dtypes_of(OP, backend))), seed=seed, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    Hq = p["query"].shape[1]
    extras = draw(
        st.fixed_dictionaries({}, optional={
            "window": st.sampled_from([1, 2, 11, 2**40]), "softcap": st.just(2.0),
            "scale": st.sampled_from([0.3, -0.2, 0.0]), "sinks": st.just(torch.linspace(-2, 2, Hq)),
            "alibi_slopes": st.just(slopes(Hq)),
        })
    )  # fmt: skip
    # What is exactly zero here is the difference of two sums of so many terms, which are rounded in fp32.
    terms = max(p["query"].shape[3], p["value"].shape[3])
    roundings = 12 + terms // (2 if p["query"].dtype == torch.float32 else 16)
    assert_all_within_budget(run(p, backend, **extras), reference(p, **extras), plain(p, **extras), roundings=roundings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packs_are_trees_of_their_own(backend):
    """With cu_seqlens every pack gives what it gives alone, empty ones and single nodes too."""
    lengths = [0, 1, 60, 0, 131, 1, 1, 40, 0]
    end = ends([e for i, T in enumerate(lengths) for e in random_tree(T, i)])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    p = problem(end, B=1, group=3, dtype=widest(backend), cu_seqlens=bounds.to(torch.int32))
    for extras in ({}, {"window": 5, "alibi_slopes": slopes(6)}):
        found = run(p, backend, **extras)
        for first, T in zip(bounds.tolist(), lengths, strict=False):
            names = ("query", "key", "value", "grad")
            alone = {name: p[name][:, :, first : first + T] for name in names}
            alone["subtree_end"] = end[:, first : first + T]
            for name, tensor in run(alone, backend, **extras).items():
                torch.testing.assert_close(found[name][:, :, first : first + T], tensor, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_no_nodes(backend, bounds):
    p = problem(torch.empty(1, 0, dtype=torch.int32), B=1, dtype=widest(backend))
    assert {t.shape[2] for name, t in run(p, backend).items() if name != "sinks"} == {0}
    run({**p, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_heads_or_values(backend):
    p = problem(ends(random_tree(50)), dtype=widest(backend))
    none = {name: tensor[:0] if name != "subtree_end" else tensor for name, tensor in p.items()}
    assert run(none, backend)["out"].shape == (0, 4, 50, 16)
    no_heads = {**p, "query": p["query"][:, :0], "grad": p["grad"][:, :0]}
    found = run(no_heads, backend)
    assert found["out"].shape == (2, 0, 50, 16)
    assert (found["key"] == 0).all()
    assert (found["value"] == 0).all()
    no_values = {**p, "value": p["value"][..., :0], "grad": p["grad"][..., :0]}
    found = run(no_values, backend)
    assert found["out"].shape == (2, 4, 50, 0)
    assert (found["query"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tree", TREES)
def test_output_names_the_visible_nodes(backend, tree):
    """With zero queries and keys, and node j worth 2^j, the output times the number of visible nodes is the mask."""
    T = 20 if widest(backend) == torch.float32 else 9
    end = ends([min(e, T) for e in TREES[tree](24)][:T])
    sees = visible(end)[0]
    zeros = torch.zeros(1, 1, T, 8, dtype=widest(backend))
    worth = (2.0 ** torch.arange(T)).to(zeros.dtype)[:, None].expand(1, 1, T, 8).contiguous()
    p = {"query": zeros, "key": zeros, "value": worth, "grad": zeros, "subtree_end": end}
    count = sees.sum(1)[:, None]
    named = (run(p, backend)["out"][0, 0].float() * count).round().long()
    assert (named == (sees.long() << torch.arange(T)).sum(1)[:, None]).all()
    # A value's gradient likewise names the queries that see it, each of them worth 2^j for all that it sees.
    p["grad"] = (worth[0, 0].float() * count).to(zeros.dtype)[None, None]
    named = run(p, backend)["value"][0, 0].float().round().long()
    assert (named == (sees.long() << torch.arange(T)[:, None]).sum(0)[:, None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_that_see_nothing(backend):
    """Zero output, -inf, zero gradients; a sink is all that they have."""
    end = ends([0] * 50, [*chain(30), *[0] * 20])
    end[1, :30] = 30
    p = problem(end, dtype=widest(backend))
    found = run(p, backend)
    for b, first in ((0, 0), (1, 30)):
        assert (found["lse"][b, :, first:] == -torch.inf).all()
        for name in ("out", "query", "key", "value"):
            assert (found[name][b, :, first:] == 0).all(), name
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = run(p, backend, sinks=sinks)
    assert (found["out"][0] == 0).all()
    torch.testing.assert_close(found["lse"][0], sinks[:, None].expand(4, 50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unseen_node_may_see(backend):
    """A node of no subtree, its own included, within its ancestors' subtrees: its query counts, its key does not."""
    end = chain(60)
    end[20] = end[59] = 0
    end[50] = 50
    p = problem(ends(end), dtype=widest(backend))
    found = run(p, backend, window=5)
    assert_all_within_budget(found, oracle(p, window=5), plain(p, window=5))
    assert (found["out"][:, :, [20, 50, 59]] != 0).all()
    for name in ("key", "value"):
        assert (found[name][:, :, [20, 50, 59]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_may_leave_nothing_to_see(backend):
    """An unseen node's ancestors lie before the window: its query is not read."""
    end = chain(60)
    end[20] = 0
    p = problem(ends(end), dtype=widest(backend))
    p["query"][:, :, 20] = torch.nan
    found = run(p, backend, window=1)
    assert all(tensor.isfinite().all() for name, tensor in found.items() if name != "lse")
    assert (found["lse"][:, :, 20] == -torch.inf).all()
    for name in ("out", "query"):
        assert (found[name][:, :, 20] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions(expected, backend):
    """By default the number of ancestors; given ones move windows and ALiBi's distances, per row or for all."""
    end = ends(trajectory(60), random_tree(60))
    p = problem(end, dtype=widest(backend))
    extras = {"window": 6, "alibi_slopes": slopes(4)}
    sees = visible(end)
    counted = sees.tril(-1).sum(2).to(torch.int32)
    assert torch.equal(node_positions(end), counted)
    found = run(p, backend, **extras)
    again = run(p, backend, **extras, positions=counted)
    assert all(torch.equal(found[name], again[name]) for name in found)
    for positions in (counted * 2 + 1_000_000, counted.flip(0), counted[:1] // 2, -counted):
        given = {**extras, "positions": positions}
        moved = run(p, backend, **given)
        assert_all_within_budget(moved, oracle(p, **given), plain(p, **given))
        assert not torch.equal(moved["out"], found["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1e-40, None])
def test_any_scale(expected, backend, scale):
    p = problem(ends(random_tree(100)), B=1, dtype=widest(backend))
    want, simple = expected(
        ("scale", scale, widest(backend)), lambda: (reference(p, scale=scale), plain(p, scale=scale))
    )
    assert_all_within_budget(run(p, backend, scale=scale), want, simple)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("level", [-300.0, -20.0, 60.0])
def test_scores_of_any_level(backend, dtype, level):
    """All scores far from zero, on either side: what is summed is relative to the largest."""
    p = problem(ends(rollouts(120)), B=1, Hk=1, group=4, D=16, dtype=dtype)
    p["query"][..., 0] = 4.0 if level > 0 else -4.0
    p["key"][..., 0] = abs(level)
    # Rounding a score in fp32 moves its probability by so many roundings; in half precision that is nothing.
    roundings = 8 + int(abs(level)) if dtype == torch.float32 else 8
    found, want, simple = run(p, backend), reference(p), plain(p)
    for name in RESULTS[:4]:
        assert_within_budget(found[name], want[name], simple[name], name, roundings=roundings)
    torch.testing.assert_close(found["lse"].double(), want["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rising_scores(backend):
    """Every key's score is far above those before it, so that sums are scaled down again and again."""
    T = 200
    p = problem(ends(chain(T)), B=1, Hk=1, group=1, D=8, dtype=widest(backend))
    p["query"][..., 0] = 8.0
    p["key"][..., 0] = torch.arange(T) * 0.25
    p["key"][..., 0, 100:] -= 20
    found, want, simple = run(p, backend), reference(p), plain(p)
    for name in RESULTS[:4]:
        assert_within_budget(found[name], want[name], simple[name], name, roundings=200)
    torch.testing.assert_close(found["lse"].double(), want["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [2**31 - 1, 2**32, 2**63 - 1])
def test_a_window_beyond_all_positions_is_none(backend, window):
    p = problem(ends(random_tree(80)), dtype=widest(backend))
    wide, none = run(p, backend, window=window), run(p, backend, window=2**20)
    assert all(torch.equal(wide[name], none[name]) for name in none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_one_sees_itself(backend):
    p = problem(ends(chain(70)), Hk=2, group=1, dtype=widest(backend))
    found = run(p, backend, window=1)
    torch.testing.assert_close(found["out"], p["value"])
    torch.testing.assert_close(found["value"], p["grad"])
    assert found["key"].abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tensors(backend):
    """Slices of larger tensors, as models make them, and a gradient of any strides: the bits are the same."""
    p = problem(ends(trajectory(100), random_tree(100)), group=2, dtype=widest(backend))
    want = run(p, backend, window=7)
    for name in ("query", "key", "value", "grad"):
        B, H, T, D = p[name].shape
        arena = torch.full((B + 1, 2 * T, H + 1, D + 16), torch.nan, dtype=p[name].dtype)
        view = arena[1:, ::2, 1:, 8 : 8 + D].transpose(1, 2)
        view.copy_(p[name])
        p[name] = view
    p["subtree_end"] = torch.stack([p["subtree_end"], p["subtree_end"] * 0], 1)[:, 0]
    found = run(p, backend, window=7)
    assert all(torch.equal(found[name], want[name]) for name in want)
    for name in ("out",) if backend == "reference" else ("out", "query", "key", "value"):
        assert found[name].transpose(1, 2).is_contiguous()
    # The gradient of a sum has no strides at all, and one may be transposed.
    p["grad"] = torch.ones((), dtype=widest(backend)).expand(p["grad"].shape)
    expanded = run(p, backend)
    p["grad"] = torch.ones_like(p["grad"])
    assert all(torch.equal(tensor, expanded[name]) for name, tensor in run(p, backend).items())
    p["grad"] = p["grad"].mT.contiguous().mT
    assert all(torch.equal(tensor, expanded[name]) for name, tensor in run(p, backend).items())


@pytest.mark.parametrize("backend", CPU_KERNELS)
def test_neither_threads_nor_the_batch_change_a_bit(backend):
    """Output and gradients of a row are the same alone, in a batch, and with one, two, three or five threads."""
    end = ends(trajectory(500, prompt=64), chain(500), random_tree(500))
    p = problem(end, B=3, Hk=2, group=2, D=32, Dv=32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(p, backend)
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found = run(p, backend)
            assert all(torch.equal(found[name], want[name]) for name in want)
            b = count % 3
            alone = run({name: tensor[b : b + 1] for name, tensor in p.items()}, backend)
            assert all(torch.equal(alone[name], want[name][b : b + 1]) for name in want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [param for param in BACKENDS if param.values[0] in ON_GPU])
def test_deterministic(backend):
    p = problem(ends(trajectory(900, prompt=64)), dtype=widest(backend))
    want = run(p, backend)
    for _ in range(3):
        found = run(p, backend)
        assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("node", [0, 5, 57])
def test_nan_that_is_seen_is_passed_on(backend, node):
    """A NaN in a key makes what sees it NaN, and nothing in another head."""
    p = problem(ends(chain(60)), B=1, Hk=2, dtype=widest(backend))
    p["key"][0, 0, node, 3] = torch.nan
    found = run(p, backend)
    assert found["out"][:, :2, node:].isnan().all()
    assert found["lse"][:, :2, node:].isnan().all()
    assert found["query"][:, :2, node:].isnan().any(-1).all()
    for name in ("out", "query", "lse"):
        assert found[name][:, 2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extras", [{}, VARIANTS["all"]], ids=["plain", "all"])
def test_compiles_without_graph_breaks(backend, extras):
    """Forward and backward, as one graph each; what runs then are the same kernels."""
    device = device_of(backend)
    p = {name: to_device(t, device) for name, t in problem(ends(random_tree(40)), dtype=widest(backend)).items()}
    extras = {name: to_device(value, device) for name, value in extras.items()}
    if backend == "reference":
        p = {name: t.nan_to_num(0.5) if t.is_floating_point() else t for name, t in p.items()}

    def loss(query, key, value):
        out = ops.packed_tree_attention(query, key, value, p["subtree_end"], **extras, backend=backend)
        return (out * p["grad"]).sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [p[name].detach().requires_grad_() for name in ("query", "key", "value")]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("tree", ["random", "padded", "not nested"])
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_gradcheck_of_the_reference(tree, variant):
    end = ends(TREES[tree](8))
    extras = {k: v for k, v in VARIANTS[variant].items() if k not in ("window", "sinks", "alibi_slopes")}
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(1, h, 8, 2, generator=g, dtype=torch.float64).requires_grad_() for h in (2, 1, 1)]

    def attend(query, key, value):
        return ops.packed_tree_attention(query, key, value, end, window=4, backend="reference", **extras)

    assert torch.autograd.gradcheck(attend, leaves)
    if tree == "random":
        assert torch.autograd.gradgradcheck(attend, leaves)
    # The reference of the gradient's op, which runs where there is no kernel, is the reference's gradient.
    out, lse = ops.packed_tree_attention(*leaves, end, window=4, backend="reference", return_lse=True, **extras)
    positions = node_positions(end)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64)
    tensors = [tensor.detach() for tensor in (grad, *leaves, out, lse)]
    found = packed_tree_attention_backward_ref(*tensors, end, positions=positions, window=4, **extras)
    for actual, want in zip(found, torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(actual, want)


def test_a_kernel_s_gradient_has_none():
    """It says so, in the place of a second derivative of zero."""
    q, k, v = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3))
    out = ops.packed_tree_attention(q, k, v, ends(chain(3)), backend="cpu-portable")
    with pytest.raises(RuntimeError, match="backend 'reference' can be differentiated twice"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (0, 2, 3, 8)])
def test_gradients_of_nothing(shape):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    ops.packed_tree_attention(q, k, v, ends(chain(shape[2]))).sum().backward()
    assert q.grad.shape == shape


def test_a_sink_of_a_query_that_sees_nothing():
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    grads = []
    for backend in ("cpu", "reference"):
        sinks = torch.tensor([-torch.inf, 0.0], requires_grad=True)
        out = ops.packed_tree_attention(q, k, v, ends([0, 3, 3]), sinks=sinks, backend=backend)
        grads.append(torch.autograd.grad(out.sum(), sinks)[0])
    torch.testing.assert_close(*grads)


def test_a_window_without_positions_is_checked_first():
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    for end, message in (
        (torch.tensor([3, 3, 3], dtype=torch.int32), r"subtree_end has shape \[3\]"),
        (ends([9, 3, 3]), r"subtree_end\[0, 0\] is 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.packed_tree_attention(q, k, v, end, window=2)


def test_lse_has_no_gradient():
    p = problem(ends(chain(9)))
    for backend in ("reference", "cpu"):
        p["query"].requires_grad_()
        _, lse = ops.packed_tree_attention(
            p["query"], p["key"], p["value"], p["subtree_end"], return_lse=True, backend=backend
        )
        assert not lse.requires_grad


def test_only_the_gradients_that_are_wanted():
    """A frozen projection's tensors get none; sinks alone may be trained."""
    p = problem(ends(random_tree(40)))
    sinks = torch.zeros(4, requires_grad=True)
    out = ops.packed_tree_attention(p["query"], p["key"], p["value"], p["subtree_end"], sinks=sinks)
    out.backward(p["grad"])
    torch.testing.assert_close(sinks.grad, run(p, "reference", sinks=sinks)["sinks"])
    p["value"].requires_grad_()
    out = ops.packed_tree_attention(p["query"], p["key"], p["value"], p["subtree_end"])
    out.backward(p["grad"])
    torch.testing.assert_close(p["value"].grad, run(p, "reference")["value"])
    assert p["key"].grad is None


def test_backward_takes_what_the_forward_gave_in_any_layout():
    """Compilers may lay out the saved output and log-sum-exp anew."""
    p = problem(ends(random_tree(100)))
    inputs = [p[name] for name in ("query", "key", "value")]
    out, lse = torch.ops.lbr_kernels.packed_tree_attention(*inputs, p["subtree_end"])
    backward = torch.ops.lbr_kernels.packed_tree_attention_backward
    want = backward(p["grad"], *inputs, out, lse, p["subtree_end"])
    laid_out = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert laid_out.stride(-1) != 1
    with pytest.raises(RuntimeError, match="lse has stride 8 along its last axis, expected 1"):
        backward(p["grad"], *inputs, out, laid_out, p["subtree_end"])
    spread = torch.empty(4, 8, 100)[::2, ::2].copy_(lse)
    again = backward(p["grad"].contiguous(), *inputs, out.contiguous(), spread, p["subtree_end"])
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


def test_the_gradient_of_a_kernel_is_a_kernel(monkeypatch):
    """Neither pass comes near the reference."""
    for op in (OP, f"{OP}_backward"):
        monkeypatch.setitem(_registry.OPS, op, None)
    run(problem(ends(random_tree(40))), "cpu")
