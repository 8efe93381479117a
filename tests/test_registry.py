"""The ops as torch sees them: opcheck, torch.compile, schemas, and the choice of a backend."""

from __future__ import annotations

import pytest
import simt_backend
import torch
from support import device_of, to_device
from test_bad_input import attention, commit, packed, packed_gradient, product, routing, sample, top
from torch._subclasses.fake_tensor import FakeTensorMode

from lbr_kernels import Router, RouterConfig, ops
from lbr_kernels.ops import _flags, _preferences, _registry
from lbr_kernels.ops._backends import BACKENDS
from lbr_kernels.ops.route import gpu_backends as route_backends
from lbr_kernels.ops.tree_attention import gpu_backends


def op_arguments(name):
    """Positional and keyword arguments of ``torch.ops.lbr_kernels.<name>``."""
    if name == "tree_attention":
        _, a = attention(num_nodes=torch.tensor([3, 1], dtype=torch.int32))
        extras = {"window": 4, "softcap": 5.0, "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
        names = ("query", "key_cache", "value_cache", "prefix_lens", "ancestors")
        return tuple(a[n] for n in names), {"num_nodes": a["num_nodes"], **extras}
    if name == "commit_":
        _, a = commit()
        return (a["caches"], a["prefix_lens"], a["sources"]), {"num_moves": torch.tensor([2, 0], dtype=torch.int32)}
    if name == "sample_children":
        _, a = sample()
        return (a["logits"], a["uniforms"], 0.7, 5, 0.9, 0.01), {"row_index": torch.tensor([1, 0])}
    if name == "top_children":
        _, a = top()
        return (a["logits"], 3), {}
    if name.startswith("packed_tree_attention"):
        _, a = packed() if name == "packed_tree_attention" else packed_gradient()
        query, key, value, end = (a[n] for n in ("query", "key", "value", "subtree_end"))
        extras = {"positions": torch.arange(5, dtype=torch.int32)[None], "window": 4, "softcap": 5.0}
        extras |= {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
        if name == "packed_tree_attention":
            leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
            return (*leaves, end), {**extras, "sinks": extras["sinks"].requires_grad_()}
        return (a["grad"], query, key, value, a["out"], a["lse"], end), extras
    if name == "linear":
        _, a = product()
        return tuple(a.values()), {}
    _, a = routing()
    uniforms = torch.rand(2, dtype=torch.float64)
    return (a["hidden"], a["weights"].data, 3, 2, *a["weights"][3:]), {"uniforms": uniforms}


@pytest.mark.parametrize("name", ops._registry.OPS)
@pytest.mark.parametrize("isa", [0, 1])
def test_opcheck(name, isa):
    args, kwargs = op_arguments(name)
    torch.library.opcheck(getattr(torch.ops.lbr_kernels, name).default, args, {**kwargs, "isa": isa})


@pytest.mark.parametrize("name", ops._registry.OPS)
def test_opcheck_of_the_reference(name):
    """The reference is the kernel of the same schema wherever no faster one is registered."""
    args, kwargs = op_arguments(name)
    with torch.library._scoped_library("lbr_kernels_test", "DEF") as library:
        schema = str(getattr(torch.ops.lbr_kernels, name).default._schema).removeprefix("lbr_kernels::")
        library.define(schema)
        reference = ops._registry.OPS[name]
        library.impl(name, lambda *a, isa=0, **k: reference(*a, **k), "CompositeExplicitAutograd")
        library._register_fake(name, lambda *a, isa=0, **k: None if name == "commit_" else reference(*a, **k))
        torch.library.opcheck(getattr(torch.ops.lbr_kernels_test, name).default, args, kwargs)


@pytest.mark.parametrize("backend", [simt_backend.NAME, "triton"])
def test_opcheck_of_the_gpu_kernels(backend):
    """On the CPU: the CUDA kernel on the shim, the Triton kernel in the interpreter."""
    device = device_of(backend)
    assert ops.backends(device)["tree_attention"][backend] is None
    args, kwargs = op_arguments("tree_attention")
    args = [to_device(a.half() if a.is_floating_point() else a, device) for a in args]
    kwargs = {name: to_device(value, device) for name, value in kwargs.items()}
    torch.library.opcheck(BACKENDS[backend].overload("tree_attention"), args, kwargs)


def test_flags_outlive_the_mode_of_the_first_call(monkeypatch):
    """Generation runs in inference mode, tracing on fake tensors; the word that kernels write is neither's."""
    monkeypatch.setattr(_flags, "_words", {})
    with torch.inference_mode(), FakeTensorMode():
        word = _flags.word(torch.device("cpu"))
    assert type(word) is torch.Tensor
    assert not word.is_inference()
    word.fill_(3)
    with pytest.raises(RuntimeError, match=r"prefix_lens was not in .*; tree_attention: a row's num_nodes was not in"):
        ops.raise_if_flagged("cpu")
    ops.raise_if_flagged("cpu")


def test_which_gpu_kernels_take_a_router():
    """backend=None goes past "cuda" where that refuses: the two agree, as the shim's messages show."""
    assert ops.backends("cpu")["route"][simt_backend.NAME] is None
    for width, depth, dim, heads in (
        (3, 1, 128, 4), (32, 1, 8, 2), (33, 1, 8, 2), (2, 3, 6, 1), (2, 1, 260, 65), (2, 2, 12, 1),
    ):  # fmt: skip
        router = Router(RouterConfig(hidden_size=8, depth=depth, dim=dim, num_heads=heads))
        weights, slots = router.packed(), sum(width**layer for layer in range(1, depth + 1))
        order = route_backends(weights, width, depth)
        try:
            ops.route(torch.randn(1, slots, 8), weights, width=width, depth=depth, backend=simt_backend.NAME)
            taken = True
        except RuntimeError as error:
            taken = "the nearest accepted backend is 'triton'" not in str(error)
        assert order == (("cuda", "triton") if taken else ("triton",))


def test_which_gpu_kernels_take_a_tensor():
    """The order that backend=None tries on a GPU: by measured preference, and only what takes the tensors."""

    def order(D=64, dtype=torch.half, Dv=None, **change):
        query, key = torch.zeros(1, 4, 3, D, dtype=dtype), torch.zeros(1, 2, 9, D, dtype=dtype)
        value = torch.zeros(1, 2, 9, Dv or D, dtype=dtype)
        given = {"query": query, "key_cache": key, "value_cache": value}
        return gpu_backends(**{**given, **change})

    assert order() == order(D=128, Dv=80, dtype=torch.bfloat16) == ("cuda", "triton")
    assert order(D=20) == order(Dv=4) == order(dtype=torch.float32) == ("triton",)
    assert order(key_cache=torch.zeros(1, 2, 9, 72).half()[..., 3:67]) == ("triton",)
    assert order(D=264) == order(dtype=torch.float64) == ()


@pytest.mark.parametrize(
    ("rows", "head_size", "known"),
    [(3, 64, (16, 64)), (16, 65, (16, 128)), (17, 128, (32, 128)), (65, 80, (128, 128)), (273, 256, (128, 256))],
)
def test_preferences(monkeypatch, rows, head_size, known):
    assert _preferences.tree_attention(rows, head_size) == ("cuda", "triton")
    monkeypatch.setitem(_preferences.TREE_ATTENTION, known, "triton")
    assert _preferences.tree_attention(rows, head_size) == ("triton", "cuda")
    assert _preferences.tree_attention(200 if rows <= 64 else 3, head_size) == ("cuda", "triton")


def test_preferences_of_other_ops(monkeypatch):
    """An op without a table by shape asks its own entry, on what is no CPU."""
    asked = []

    def default_backend(op, device, dtype, prefer):
        asked.append((op, tuple(prefer)))
        return "reference"

    monkeypatch.setattr(_registry, "default_backend", default_backend)
    logits = torch.zeros(1, 5, device="meta")
    ops.top_children(logits, 2)
    monkeypatch.setitem(_preferences.OPS, "top_children", "triton")
    ops.top_children(logits, 2)
    assert asked == [("top_children", ("cuda", "triton")), ("top_children", ("triton", "cuda"))]


@pytest.mark.parametrize("make", [attention, packed, sample, top, routing, product])
@pytest.mark.parametrize("backend", [None, "cpu-portable"])
def test_compiles_without_graph_breaks(make, backend):
    op, arguments = make()
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: op(**kwargs, backend=backend), fullgraph=True, backend="aot_eager")
    want, got = op(**arguments, backend=backend), compiled(**arguments)
    for a, b in zip(want if isinstance(want, tuple) else [want], got if isinstance(got, tuple) else [got], strict=True):
        assert torch.equal(a, b)


def test_compiled_commit_mutates():
    _, arguments = commit()
    caches, lens, sources = arguments["caches"], arguments["prefix_lens"], arguments["sources"]
    want = [cache.clone() for cache in caches]
    want_lens = lens.clone()
    ops.commit_(want, want_lens, sources)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(a, b, lens, sources):
        ops.commit_([a, b], lens, sources)
        return a.sum() + b.sum()

    total = step(*caches, lens, sources)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    assert torch.equal(lens, want_lens)
    torch.testing.assert_close(total, want[0].sum() + want[1].sum())


def test_backends_says_why():
    table = ops.backends("cpu")
    assert set(table) == {
        "tree_attention", "packed_tree_attention", "packed_tree_attention_backward", "commit_", "sample_children",
        "top_children", "route", "linear",
    }  # fmt: skip
    for reasons in table.values():
        assert reasons["reference"] is None
    assert "takes tensors on cpu" in ops.backends("cuda")["route"]["cpu"]


def test_gradients_are_the_references():
    """Where a gradient is wanted the reference runs; a kernel asked for by name says that it has none."""
    _, a = attention()
    a["query"].requires_grad_()
    ops.tree_attention(**a).sum().backward()
    assert a["query"].grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="tree_attention: backend 'cpu' cannot run: it has no gradient"):
        ops.tree_attention(**a, backend="cpu")
    with torch.no_grad():
        ops.tree_attention(**a, backend="cpu")


@pytest.mark.parametrize("backend", [None, "cpu", "cpu-portable"])
def test_a_kernel_with_a_gradient_runs_where_one_is_wanted(monkeypatch, backend):
    """Packed tree attention is differentiable on every backend: nothing falls back to the reference."""
    monkeypatch.setitem(_registry.OPS, "packed_tree_attention", None)
    monkeypatch.setitem(_registry.OPS, "packed_tree_attention_backward", None)
    _, a = packed()
    a["query"].requires_grad_()
    ops.packed_tree_attention(**a, backend=backend).sum().backward()
    assert a["query"].grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_commit_tells_autograd(backend):
    """A backward pass that has kept a cache finds out that it was overwritten; one that requires a gradient is safe."""
    _, a = commit()
    weight = torch.randn(2, 2, 20, 16, requires_grad=True)
    product = (weight * a["caches"][0]).sum()
    ops.commit_(**a, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(RuntimeError, match=r"commit_: caches\[0\] requires a gradient"):
        ops.commit_([weight], a["prefix_lens"], a["sources"], backend=backend)
    with torch.inference_mode():
        caches = [torch.zeros(2, 2, 20, 16)]
        ops.commit_(caches, torch.tensor([5, 6], dtype=torch.int32), a["sources"], backend=backend)
