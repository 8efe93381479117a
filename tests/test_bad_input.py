"""One table of bad calls for every op: all backends refuse them in the same words, before anything is written."""

from __future__ import annotations

import pytest
import torch
from support import BACKENDS, device_of, to_device
from test_route import random_router

from lbr_kernels import ops
from lbr_kernels.ops import _registry
from lbr_kernels.ops._backends import GPU_OPS

NAN, INF = float("nan"), float("inf")


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(**change):
    arguments = {
        "query": torch.randn(2, 4, 3, 16),
        "key_cache": torch.randn(2, 2, 20, 16),
        "value_cache": torch.randn(2, 2, 20, 8),
        "prefix_lens": i32(5, 16),
        "ancestors": torch.ones(2, 4, 1, dtype=torch.int64),
    }
    return ops.tree_attention, {**arguments, **change}


def commit(**change):
    arguments = {
        "caches": [torch.randn(2, 2, 20, 16), torch.randn(2, 1, 20, 8)],
        "prefix_lens": i32(5, 16),
        "sources": i32(0, 2, 1, 3).view(2, 2),
    }
    return ops.commit_, {**arguments, **change}


def sample(**change):
    arguments = {"logits": torch.randn(2, 9), "uniforms": torch.rand(2, 3, dtype=torch.float64)}
    return ops.sample_children, {**arguments, **change}


def top(**change):
    return ops.top_children, {"logits": torch.randn(2, 9), "width": 3, **change}


def routing(**change):
    router = random_router(2, 20, 16)
    return ops.route, {"hidden": torch.randn(2, 12, 20), "weights": router.packed(), "width": 3, "depth": 2, **change}


def product(**change):
    arguments = {"input": torch.randn(2, 3, 16), "weight": torch.randn(5, 16), "bias": torch.randn(5)}
    return ops.linear, {**arguments, **change}


def packed(**change):
    arguments = {
        "query": torch.randn(2, 4, 5, 16),
        "key": torch.randn(2, 2, 5, 16),
        "value": torch.randn(2, 2, 5, 8),
        "subtree_end": i32(5, 2, 5, 5, 5).view(1, 5),
    }
    return ops.packed_tree_attention, {**arguments, **change}


def one_pack(**change):
    _, arguments = packed()
    return packed(**{**{name: tensor[:1] for name, tensor in arguments.items()}, **change})


def packed_tree_attention_backward(*, query, backend, **arguments):
    """The gradient's op by itself, as autograd calls it."""
    op = "packed_tree_attention_backward"
    return _registry.call(op, backend, query, query=query, **arguments)


def packed_gradient(**change):
    _, arguments = packed()
    more = {"grad": torch.randn(2, 4, 5, 8), "out": torch.randn(2, 4, 5, 8), "lse": torch.randn(2, 4, 5)}
    return packed_tree_attention_backward, {**arguments, **more, **change}


def with_value(shape, index, value, dtype=torch.float32, fill=0):
    tensor = torch.full(shape, fill, dtype=dtype)
    tensor[index] = value
    return tensor


CACHE = torch.randn(2, 2, 20, 16)
SHAPE3 = torch.randn(4, 3, 16)
TABLE = {
    # linear
    "input width": (product(input=torch.randn(2, 15)), "input has shape [2, 15], expected [..., 16]"),
    "input without axes": (product(input=torch.tensor(1.0)), "input has shape [], expected [..., 16]"),
    "input dtype": (product(input=torch.randn(2, 16).half()), "input has dtype torch.float16, expected torch.float32"),
    "input stride": (product(input=torch.randn(2, 32)[:, ::2]), "input has stride 2 along its last axis, expected 1"),
    "weight rank": (product(weight=torch.randn(16)), "weight has shape [16], expected [O, I]"),
    "weight dtype": (
        product(weight=torch.zeros(5, 16, dtype=torch.int8)),
        "weight has dtype torch.int8, expected torch.float32, torch.float16 or torch.bfloat16",
    ),
    "weight stride": (product(weight=torch.randn(16, 5).T), "weight has stride 5 along its last axis, expected 1"),
    "bias shape": (product(bias=torch.randn(4)), "bias has shape [4], expected [5]"),
    "bias dtype": (product(bias=torch.randn(5).bfloat16()), "bias has dtype torch.bfloat16, expected torch.float32"),
    # tree_attention
    "query rank": (attention(query=SHAPE3), "query has shape [4, 3, 16], expected [B, Hq, N, D]"),
    "query dtype": (
        attention(query=torch.zeros(2, 4, 3, 16, dtype=torch.int32)),
        "query has dtype torch.int32, expected torch.float32, torch.float16 or torch.bfloat16",
    ),
    "query stride": (
        attention(query=torch.randn(2, 4, 3, 32)[..., ::2]),
        "query has stride 2 along its last axis, expected 1",
    ),
    "key dtype": (
        attention(key_cache=torch.randn(2, 2, 20, 16).half()),
        "key_cache has dtype torch.float16, expected torch.float32",
    ),
    "key batch": (
        attention(key_cache=torch.randn(3, 2, 20, 16)),
        "key_cache has shape [3, 2, 20, 16], expected [2, Hk, S, 16]",
    ),
    "value slots": (
        attention(value_cache=torch.randn(2, 2, 19, 8)),
        "value_cache has shape [2, 2, 19, 8], expected [2, 2, 20, Dv]",
    ),
    "head counts": (
        attention(query=torch.randn(2, 3, 3, 16)),
        "query has 3 heads, expected a multiple of key_cache's 2",
    ),
    "lens dtype": (
        attention(prefix_lens=torch.tensor([5, 16])),
        "prefix_lens has dtype torch.int64, expected torch.int32",
    ),
    "lens shape": (attention(prefix_lens=i32(5)), "prefix_lens has shape [1], expected [2]"),
    "length past the buffer": (
        attention(prefix_lens=i32(5, 17)),
        "prefix_lens[1] is 17, expected 0 <= length <= S - T = 16",
    ),
    "negative length": (attention(prefix_lens=i32(-3, 4)), "prefix_lens[0] is -3, expected 0 <= length <= S - T = 16"),
    "mask words": (
        attention(ancestors=torch.ones(2, 4, 2, dtype=torch.int64)),
        "ancestors has shape [2, 4, 2], expected [2, 4, 1]".replace("[2, 4, 1]", "[1 or 2, 4, 1]"),
    ),
    "mask batch": (
        attention(ancestors=torch.ones(3, 4, 1, dtype=torch.int64)),
        "ancestors has shape [3, 4, 1], expected [1 or 2, T, W]",
    ),
    "more queries than nodes": (
        attention(ancestors=torch.ones(1, 2, 1, dtype=torch.int64)),
        "query has 3 nodes, expected at most the tree's 2",
    ),
    "num_nodes": (attention(num_nodes=i32(1, 4)), "num_nodes[1] is 4, expected 0 <= count <= N = 3"),
    "depths": (attention(depths=i32(1, 1).view(1, 2)), "depths has shape [1, 2], expected [1 or 2, 4]"),
    "window": (attention(window=0), "window is 0, expected an integer >= 1"),
    "softcap": (attention(softcap=-1.0), "softcap is -1, expected a number > 0"),
    "sinks": (attention(sinks=torch.zeros(3)), "sinks has shape [3], expected [4]"),
    "slopes": (
        attention(alibi_slopes=torch.zeros(4, dtype=torch.float64)),
        "alibi_slopes has dtype torch.float64, expected torch.float32",
    ),
    # packed_tree_attention
    "packed query rank": (packed(query=SHAPE3), "query has shape [4, 3, 16], expected [B, Hq, T, D]"),
    "packed query dtype": (
        packed(query=torch.zeros(2, 4, 5, 16, dtype=torch.int32)),
        "query has dtype torch.int32, expected torch.float32, torch.float16 or torch.bfloat16",
    ),
    "packed query stride": (
        packed(query=torch.randn(2, 4, 5, 32)[..., ::2]),
        "query has stride 2 along its last axis, expected 1",
    ),
    "packed key nodes": (
        packed(key=torch.randn(2, 2, 6, 16)),
        "key has shape [2, 2, 6, 16], expected [2, Hk, 5, 16]",
    ),
    "packed key dtype": (
        packed(key=torch.randn(2, 2, 5, 16).double()),
        "key has dtype torch.float64, expected torch.float32",
    ),
    "packed key stride": (
        packed(key=torch.randn(2, 2, 16, 5).mT),
        "key has stride 5 along its last axis, expected 1",
    ),
    "packed value heads": (
        packed(value=torch.randn(2, 1, 5, 8)),
        "value has shape [2, 1, 5, 8], expected [2, 2, 5, Dv]",
    ),
    "packed value dtype": (
        packed(value=torch.randn(2, 2, 5, 8).double()),
        "value has dtype torch.float64, expected torch.float32",
    ),
    "packed value stride": (
        packed(value=torch.randn(2, 2, 8, 5).mT),
        "value has stride 5 along its last axis, expected 1",
    ),
    "packed head counts": (packed(query=torch.randn(2, 3, 5, 16)), "query has 3 heads, expected a multiple of key's 2"),
    "packed head size": (
        packed(query=torch.randn(2, 4, 5, 0), key=torch.randn(2, 2, 5, 0)),
        "query has head size 0, expected at least 1",
    ),
    "subtree_end dtype": (
        packed(subtree_end=torch.full((1, 5), 5)),
        "subtree_end has dtype torch.int64, expected torch.int32",
    ),
    "subtree_end rows": (
        packed(subtree_end=i32(*[5] * 15).view(3, 5)),
        "subtree_end has shape [3, 5], expected [1 or 2, 5]",
    ),
    "subtree past the pack": (
        packed(subtree_end=i32(5, 2, 6, 5, 5).view(1, 5)),
        "subtree_end[0, 2] is 6, expected 0 <= end <= its pack's 5",
    ),
    "negative subtree_end": (
        packed(subtree_end=i32(5, 2, 5, 5, 5, 5, 2, 5, 5, -1).view(2, 5)),
        "subtree_end[1, 4] is -1, expected 0 <= end <= its pack's 5",
    ),
    "packs of several rows": (packed(cu_seqlens=i32(0, 5)), "query has 2 rows, expected 1 with cu_seqlens"),
    "packs out of order": (
        one_pack(cu_seqlens=i32(0, 4, 3, 5)),
        "cu_seqlens is [0, 4, 3, 5], expected an ascending list from 0 to T = 5",
    ),
    "packs that end early": (
        one_pack(cu_seqlens=i32(0, 4)),
        "cu_seqlens is [0, 4], expected an ascending list from 0 to T = 5",
    ),
    "packs that begin late": (
        one_pack(cu_seqlens=i32(1, 5)),
        "cu_seqlens is [1, 5], expected an ascending list from 0 to T = 5",
    ),
    "no packs": (one_pack(cu_seqlens=i32()), "cu_seqlens is empty, expected at least [0]"),
    "subtree past its own pack": (
        one_pack(cu_seqlens=i32(0, 2, 5), subtree_end=i32(2, 2, 3, 3, 4).view(1, 5)),
        "subtree_end[0, 4] is 4, expected 0 <= end <= its pack's 3",
    ),
    "packs dtype": (
        packed(cu_seqlens=torch.tensor([0, 5])),
        "cu_seqlens has dtype torch.int64, expected torch.int32",
    ),
    "positions for a window": (
        packed(positions=i32(0, 1).view(1, 2)),
        "positions has shape [1, 2], expected [1 or 2, 5]",
    ),
    "packed window": (packed(window=0), "window is 0, expected an integer >= 1"),
    "packed softcap": (packed(softcap=0.0), "softcap is 0, expected a number > 0"),
    "packed sinks": (packed(sinks=torch.zeros(2)), "sinks has shape [2], expected [4]"),
    "packed slopes": (
        packed(alibi_slopes=torch.zeros(4, dtype=torch.float64)),
        "alibi_slopes has dtype torch.float64, expected torch.float32",
    ),
    # its gradient
    "gradient of another query": (
        packed_gradient(query=SHAPE3),
        "query has shape [4, 3, 16], expected [B, Hq, T, D]",
    ),
    "gradient without positions": (
        packed_gradient(window=3),
        "positions is None, expected them where there is a window or alibi_slopes",
    ),
    "gradient past the pack": (
        packed_gradient(subtree_end=i32(5, 2, 6, 5, 5).view(1, 5)),
        "subtree_end[0, 2] is 6, expected 0 <= end <= its pack's 5",
    ),
    "grad shape": (
        packed_gradient(grad=torch.randn(2, 4, 5, 16)),
        "grad has shape [2, 4, 5, 16], expected [2, 4, 5, 8]",
    ),
    "grad dtype": (
        packed_gradient(grad=torch.randn(2, 4, 5, 8).double()),
        "grad has dtype torch.float64, expected torch.float32",
    ),
    "grad stride": (
        packed_gradient(grad=torch.randn(2, 4, 8, 5).mT),
        "grad has stride 5 along its last axis, expected 1",
    ),
    "out shape": (packed_gradient(out=torch.randn(2, 4, 6, 8)), "out has shape [2, 4, 6, 8], expected [2, 4, 5, 8]"),
    "lse shape": (packed_gradient(lse=torch.randn(2, 2, 5)), "lse has shape [2, 2, 5], expected [2, 4, 5]"),
    "lse dtype": (
        packed_gradient(lse=torch.randn(2, 4, 5).double()),
        "lse has dtype torch.float64, expected torch.float32",
    ),
    # commit_
    "cache rank": (commit(caches=[torch.randn(2, 20, 16)]), "caches[0] has shape [2, 20, 16], expected [2, H, S, D]"),
    "cache stride": (
        commit(caches=[torch.randn(2, 1, 20, 16).mT]),
        "caches[0] has stride 16 along its last axis, expected 1",
    ),
    "sources dtype": (
        commit(sources=torch.zeros(2, 1, dtype=torch.int64)),
        "sources has dtype torch.int64, expected torch.int32",
    ),
    "descending sources": (
        commit(sources=i32(0, 2, 3, 1).view(2, 2)),
        "sources[1, 1] is 1, expected ascending sources, here >= 4",
    ),
    "repeated sources": (
        commit(sources=i32(2, 2, 1, 3).view(2, 2)),
        "sources[0, 1] is 2, expected ascending sources, here >= 3",
    ),
    "negative source": (
        commit(sources=i32(-1, 0).view(2, 1)),
        "sources[0, 0] is -1, expected ascending sources, here >= 0",
    ),
    "source past the buffer": (
        commit(sources=i32(0, 4).view(2, 1)),
        "sources[1, 0] is 4, expected prefix_lens + source < S = 20 with prefix_lens = 16",
    ),
    "an expanded cache": (
        commit(caches=[torch.randn(1, 2, 20, 16).expand(2, -1, -1, -1)]),
        "caches[0] is expanded, expected memory of its own",
    ),
    "a cache twice": (
        commit(caches=[CACHE, torch.randn(2, 1, 20, 8), CACHE]),
        "caches[2] is caches[0] again, expected each buffer once",
    ),
    "moves": (commit(num_moves=i32(1, 3)), "num_moves[1] is 3, expected 0 <= count <= M = 2"),
    "advance": (commit(advance=3), "advance for row 0 is 3, expected 0 <= advance <= its moves = 2"),
    "row advance": (commit(advance=i32(2, -1)), "advance for row 1 is -1, expected 0 <= advance <= its moves = 2"),
    "commit length": (commit(prefix_lens=i32(5, -2)), "prefix_lens[1] is -2, expected >= 0"),
    # sample_children, top_children
    "logits rank": (sample(logits=torch.randn(9)), "logits has shape [9], expected [R, V]"),
    "no vocabulary": (
        sample(logits=torch.randn(2, 0)),
        "logits has a vocabulary of 0, expected 1 <= V <= 4194304",
    ),
    "uniforms dtype": (
        sample(uniforms=torch.rand(2, 3)),
        "uniforms has dtype torch.float32, expected torch.float64",
    ),
    "uniforms rows": (
        sample(uniforms=torch.rand(3, 3, dtype=torch.float64)),
        "uniforms has shape [3, 3], expected [2, K]",
    ),
    "uniform of 1": (
        sample(uniforms=with_value((2, 3), (1, 2), 1.0, torch.float64)),
        "uniforms[1, 2] is 1, expected 0 <= u < 1",
    ),
    "uniform NaN": (
        sample(uniforms=with_value((2, 3), (0, 1), NAN, torch.float64)),
        "uniforms[0, 1] is nan, expected 0 <= u < 1",
    ),
    "no children": (sample(uniforms=torch.rand(2, 0, dtype=torch.float64)), "width is 0, expected an integer >= 1"),
    "temperature": (sample(temperature=0.0), "temperature is 0, expected a finite number > 0"),
    "row temperature": (
        sample(temperature=torch.tensor([1.0, -2.0])),
        "temperature[1] is -2, expected a finite number > 0",
    ),
    "temperatures for other rows": (
        sample(temperature=torch.ones(3)),
        "temperature has shape [3], expected [2]",
    ),
    "top_k": (sample(top_k=-1), "top_k is -1, expected an integer >= 0"),
    "half a top_k": (
        sample(top_k=torch.tensor([3, 0.5])),
        "top_k[1] is 0.5, expected an integer >= 0",
    ),
    "endless top_k": (sample(top_k=torch.tensor([INF, 0])), "top_k[0] is inf, expected an integer >= 0"),
    "NaN top_k": (sample(top_k=torch.tensor([0, NAN])), "top_k[1] is nan, expected an integer >= 0"),
    "top_p": (sample(top_p=1.5), "top_p is 1.5, expected 0 <= top_p <= 1"),
    "min_p": (top(min_p=-0.5), "min_p is -0.5, expected 0 <= min_p <= 1"),
    "row index": (
        sample(row_index=torch.tensor([0, 2])),
        "row_index[1] is 2, expected -1 <= index < R = 2",
    ),
    "NaN logits": (
        sample(logits=with_value((2, 9), (1, 8), NAN)),
        "logits row 1 holds NaN, expected finite numbers or -inf",
    ),
    "infinite logits": (
        sample(logits=with_value((2, 9), (0, 2), INF)),
        "logits row 0 holds +inf, expected finite numbers or -inf",
    ),
    "all filtered out": (
        sample(logits=with_value((2, 9), 1, -INF)),
        "logits row 1 is -inf everywhere, expected at least one token that is not filtered out",
    ),
    "top width": (top(width=0), "width is 0, expected an integer >= 1"),
    "top NaN": (top(logits=with_value((2, 9), (0, 0), NAN)), "logits row 0 holds NaN, expected finite numbers or -inf"),
    # route
    "width": (routing(width=0), "width is 0, expected an integer >= 1"),
    "hidden nodes": (
        routing(hidden=torch.randn(2, 11, 20)),
        "hidden has shape [2, 11, 20], expected [2, 12, 20]".replace("[2, 12, 20]", "[B, 12, D]"),
    ),
    "a router that is not packed": (
        routing(weights=random_router(2, 20, 16)),
        "weights is a Router, expected RouterWeights: what Router.packed() gives",
    ),
    "another hidden size": (
        routing(hidden=torch.randn(2, 12, 21)),
        "hidden has shape [2, 12, 21], expected [B, T, 20]: the router was made for hidden size 20",
    ),
    "another depth": (routing(depth=1), "depth is 1, expected 2: the router was made for that depth"),
    "router temperature": (routing(temperature=INF), "temperature is inf, expected a finite number > 0"),
    "router uniforms": (
        routing(uniforms=torch.tensor([0.5, -0.1], dtype=torch.float64)),
        "uniforms[1] is -0.1, expected 0 <= u < 1",
    ),
    "NaN hidden": (
        routing(hidden=with_value((2, 12, 20), (1, 3, 4), NAN)),
        "hidden row 1 has a score that is not finite, expected finite hidden states and weights",
    ),
    "infinite hidden": (
        routing(hidden=with_value((2, 12, 20), (0, 0, 4), INF), uniforms=torch.zeros(2, dtype=torch.float64)),
        "hidden row 0 has a score that is not finite, expected finite hidden states and weights",
    ),
    "valid dtype": (routing(valid=torch.ones(2, 12)), "valid has dtype torch.float32, expected torch.bool"),
    "no candidate": (
        routing(valid=with_value((2, 12), 1, False, torch.bool, True)),
        "valid row 1 has no candidate, expected at least one in an active row",
    ),
    "orphan": (
        routing(valid=with_value((2, 12), (0, 1), False, torch.bool, True)),
        "valid[0, 6] is set, expected its parent's to be set too",
    ),
    "gap between siblings": (
        routing(valid=with_value((2, 12), (1, 4), False, torch.bool, True)),
        "valid[1, 5] is set, expected the sibling before it to be set too",
    ),
    "active shape": (routing(active=torch.ones(3, dtype=torch.bool)), "active has shape [3], expected [2]"),
}


def clones(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [clones(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TABLE)
def test_refused_in_the_same_words(backend, case):
    (op, arguments), message = TABLE[case]
    before = {name: clones(value) for name, value in arguments.items()}
    with pytest.raises(RuntimeError) as error:
        op(**arguments, backend=backend)
    assert str(error.value) == f"{op.__name__}: {message}"
    for name, value in arguments.items():
        for now, was in zip(*(x if isinstance(x, list) else [x] for x in (value, before[name])), strict=True):
            if isinstance(now, torch.Tensor):
                assert now.equal(was) or now.isnan().any(), f"{name} was written to"


# Values lie on the device, where tests/test_<op>_cuda.py and tests/test_<op>_triton.py have them; of tree attention's
# types those that a backend does not take come first.
ELSEWHERE = (
    "length past the buffer", "negative length", "num_nodes", "query dtype", "key dtype",
    "descending sources", "repeated sources", "negative source", "source past the buffer", "moves", "advance",
    "row advance", "commit length", "uniform of 1", "uniform NaN", "row temperature", "half a top_k", "endless top_k",
    "NaN top_k", "row index", "NaN logits", "infinite logits", "all filtered out", "top NaN", "router uniforms",
    "NaN hidden", "infinite hidden", "no candidate", "orphan", "gap between siblings",
    "packed query dtype", "packed key dtype", "packed value dtype", "grad dtype", "lse dtype", "subtree past the pack",
    "negative subtree_end", "packs out of order", "packs that end early", "packs that begin late",
    "subtree past its own pack", "gradient past the pack",
)  # fmt: skip
ON_GPU = [case for case, ((op, _), _) in TABLE.items() if op.__name__ in GPU_OPS and case not in ELSEWHERE]


def halved(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.half).copy_(tensor)


@pytest.mark.parametrize("backend", ["cuda-simt", "triton"])
@pytest.mark.parametrize("case", ON_GPU)
def test_gpu_kernels_refuse_in_the_same_words(backend, case):
    (op, arguments), message = TABLE[case]
    tensors = ("query", "key_cache", "value_cache")
    arguments = {name: halved(value) if name in tensors else value for name, value in arguments.items()}
    device = device_of(backend)
    arguments = {
        name: [to_device(item, device) for item in value] if isinstance(value, list) else to_device(value, device)
        for name, value in arguments.items()
    }
    with pytest.raises(RuntimeError) as error:
        op(**arguments, backend=backend)
    assert str(error.value) == f"{op.__name__}: {message}"


@pytest.mark.parametrize("name", ["tree_attention", "commit_", "sample_children", "route"])
def test_backends_by_name_do_not_fall_back(name):
    op, arguments = {"tree_attention": attention, "commit_": commit, "sample_children": sample, "route": routing}[
        name
    ]()
    with pytest.raises(RuntimeError, match=f"{name}: backend 'gpu' cannot run: there is no such backend, known are"):
        op(**arguments, backend="gpu")
    missing = "it takes tensors on cuda, got cpu"
    with pytest.raises(RuntimeError, match=f"{name}: backend 'cuda' cannot run: {missing}; the nearest accepted"):
        op(**arguments, backend="cuda")
    meta = {
        key: [t.to("meta") for t in value] if isinstance(value, list) else value.to("meta")
        for key, value in arguments.items()
        if isinstance(value, (list, torch.Tensor))
    }
    with pytest.raises(RuntimeError, match=f"{name}: backend 'cpu' cannot run: it takes tensors on cpu, got meta"):
        op(**{**arguments, **meta}, backend="cpu")


def test_doubles_are_for_the_reference():
    op, arguments = attention()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=r"cannot run: it takes float32, float16 or bfloat16, got torch\.float64"):
        op(**wide, backend="cpu")
    assert op(**wide).dtype == torch.float64
