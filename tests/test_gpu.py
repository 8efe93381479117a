"""What only a GPU can show: graphs, streams, sizes, the sanitizer. Skipped without one.

The conformance tests of every op (tests/test_tree_attention.py and its like) run on a GPU too, for each backend there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_within_budget, gpu_backends_of, pack_mask, poison_, random_trees
from test_tree_attention import problem

from lbr_kernels import ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

BACKENDS = gpu_backends_of("tree_attention")


def on_gpu(p):
    return {name: tensor.cuda() for name, tensor in p.items()}


def assert_right(out, p, **extras):
    """``out`` against the reference in fp64, row by row, so that large problems fit."""
    for b in range(len(p["query"])):
        row = {name: tensor[b : b + 1] if len(tensor) > 1 else tensor for name, tensor in p.items()}
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in row.items()}
        want, _ = ops.tree_attention_ref(**wide, **extras)
        plain, _ = ops.tree_attention_ref(**row, **extras)
        assert_within_budget(out[b : b + 1], want, plain, f"row {b}", roundings=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_follows_lengths_trees_and_counts(backend):
    """What lies in device memory may change between replays; a captured launch reads it anew."""
    p = on_gpu(problem(B=4, Hk=2, group=7, N=9, T=12, D=128, Dv=128, longest=3000, dtype=torch.bfloat16))
    p["key_cache"], p["value_cache"] = (torch.randn_like(p[name]) for name in ("key_cache", "value_cache"))
    counts = torch.full((4,), 9, dtype=torch.int32, device="cuda")
    ops.tree_attention(**p, num_nodes=counts, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = ops.tree_attention(**p, num_nodes=counts, window=900, backend=backend)
        second = ops.tree_attention(**p, num_nodes=counts, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        _, sees = random_trees(4, 12, generator)
        p["ancestors"].copy_(pack_mask(sees))
        p["prefix_lens"].copy_(torch.randint(0, 3001 if step % 2 else 40, (4,), generator=generator))
        counts.copy_(torch.randint(0, 10, (4,), generator=generator))
        first.fill_(torch.nan)
        second.fill_(torch.nan)
        graph.replay()
        assert_right(first, {**p, "num_nodes": counts}, window=900)
        assert_right(second, {**p, "num_nodes": counts})
    ops.raise_if_flagged("cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_and_two_graphs_at_once(backend):
    """Nothing is shared between launches that run at the same time."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    problems = [
        on_gpu(problem(B=1, Hk=2, group=4, N=5, D=128, Dv=128, longest=20_000, dtype=torch.float16, seed=seed))
        for seed in range(2)
    ]
    wants = [ops.tree_attention(**p, backend=backend) for p in problems]
    torch.cuda.synchronize()
    graphs = []
    for p in problems:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.tree_attention(**p, backend=backend)
        graphs.append((graph, out))
    for _ in range(50):
        outs = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                outs.append([ops.tree_attention(**p, backend=backend) for _ in range(10)])
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for want, many, (_, replayed) in zip(wants, outs, graphs, strict=True):
            assert all(torch.equal(out, want) for out in (*many, replayed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 2, 3, 8, 33, 64, 256])
def test_batches(backend, B):
    p = problem(B=B, Hk=2, group=4, N=3, T=3, D=64, Dv=64, longest=1500, dtype=torch.bfloat16)
    assert_right(ops.tree_attention(**on_gpu(p), backend=backend), on_gpu(p))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1024, 8192, 32_768, 131_072])
@pytest.mark.parametrize("N", [3, 12, 39])
def test_long_prefixes(backend, length, N):
    generator = torch.Generator().manual_seed(N)
    _, sees = random_trees(1, N, generator)
    S = length + N + 3
    query = torch.randn(1, 28, N, 128, generator=generator).bfloat16().cuda() * 4
    key, value = (torch.randn(1, 4, S, 128, generator=generator).bfloat16() for _ in range(2))
    lens = torch.tensor([length], dtype=torch.int32)
    for cache in (key, value):
        poison_(cache, lens, torch.ones(1, N, dtype=torch.bool))
    p = {"query": query, "key_cache": key.cuda(), "value_cache": value.cuda(), "prefix_lens": lens.cuda()}
    p["ancestors"] = pack_mask(sees).cuda()
    assert_right(ops.tree_attention(**p, backend=backend), p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_launch_finds_the_workspace_as_it_was(backend):
    for seed, longest in enumerate([60_000, 300, 9000, 60_000] * 3):
        p = on_gpu(problem(B=2, Hk=2, group=4, N=5, D=64, Dv=64, longest=longest, dtype=torch.float16, seed=seed))
        want = ops.tree_attention(**p, backend=backend)
        assert torch.equal(ops.tree_attention(**p, backend=backend), want)
        assert_right(want, p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_length_is_flagged_or_refused(backend):
    p = on_gpu(problem(B=2, dtype=torch.float16))
    p["prefix_lens"][1] = 10_000
    with pytest.raises(RuntimeError, match=r"tree_attention: prefix_lens\[1\] is 10000, expected"):
        ops.tree_attention(**p, validate=True, backend=backend)
    out = ops.tree_attention(**p, backend=backend)
    assert out[1].isnan().all()
    assert out[0].isfinite().all()
    with pytest.raises(RuntimeError, match="a row's prefix_lens was not in"):
        ops.raise_if_flagged("cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    p = on_gpu(problem(dtype=torch.bfloat16))
    overload = ops._backends.BACKENDS[backend].overload("tree_attention")
    torch.library.opcheck(overload, tuple(p.values()), {"window": 5})


def test_compiles_and_takes_the_best_backend():
    p = on_gpu(problem(dtype=torch.bfloat16))
    compiled = torch.compile(lambda **kwargs: ops.tree_attention(**kwargs), fullgraph=True)
    assert torch.equal(compiled(**p), ops.tree_attention(**p))


def packed(T, *, B=1, Hk=2, group=4, D=128, dtype=torch.bfloat16, seed=0):
    """A trajectory with two branches that were not taken before every committed token."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads):
        data = torch.randn(B, T, heads, D, generator=generator, device="cuda", dtype=dtype)
        return data.transpose(1, 2).requires_grad_()

    ends = torch.arange(1, T + 1, dtype=torch.int32, device="cuda")
    ends[2::3] = T
    return [normal(Hk * group), normal(Hk), normal(Hk), ends[None].expand(B, -1).contiguous()]


def packed_gradients(args, grad, **extras):
    out = ops.packed_tree_attention(*args, **extras)
    return (out.detach(), *torch.autograd.grad(out, args[:3], grad))


@pytest.mark.parametrize("T", [1, 127, 129, 1000, 3001])
@pytest.mark.parametrize(("D", "dtype"), [(128, torch.bfloat16), (64, torch.float16), (96, torch.float32)])
@pytest.mark.parametrize("features", [{}, {"window": 200, "softcap": 20.0}])
def test_packed_trees(T, D, dtype, features):
    args = packed(T, D=D, dtype=dtype)
    grad = torch.randn_like(args[0])
    got = packed_gradients(args, grad, backend="triton", **features)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    want = packed_gradients(wide, grad.double(), backend="reference", **features)
    for one, exact in zip(got, want, strict=True):
        error = (one.double() - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error < {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    again = packed_gradients(args, grad, backend="triton", **features)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert torch.equal(got[0], packed_gradients(args, grad, **features)[0])  # backend=None


def test_packed_trees_in_a_graph():
    """Order and lists are found on the device: a replay follows other trees and packs, without the host."""
    args, bounds = packed(2000), torch.tensor([0, 900, 2000], dtype=torch.int32, device="cuda")
    args[3].clamp_(max=900)
    grad = torch.randn_like(args[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        packed_gradients(args, grad, cu_seqlens=bounds, backend="triton")
    torch.cuda.synchronize()
    ops.raise_if_flagged("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = packed_gradients(args, grad, cu_seqlens=bounds, backend="triton")
    for split in (900, 1, 1999):
        bounds[1] = split
        node = torch.arange(2000, device="cuda")
        length = torch.where(node < split, split, 2000 - split)
        args[3].copy_(torch.where(node % 3 == 2, length, torch.where(node < split, node, node - split) + 1))
        graph.replay()
        want = packed_gradients(args, grad, cu_seqlens=bounds, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ops.raise_if_flagged("cuda")


def test_packed_trees_flag_what_cannot_be():
    args = packed(500)
    args[3][0, 100] = 501
    out = ops.packed_tree_attention(*args, backend="triton")
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="a row's subtree_end or the cu_seqlens were out of range"):
        ops.raise_if_flagged("cuda")


def test_compute_sanitizer(tmp_path):
    """No access out of bounds, and no race in shared memory, in each tile and with many parts."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch\n"
        "from test_gpu import on_gpu\n"
        "from test_tree_attention import problem\n"
        "from lbr_kernels import ops\n"
        "for D in (64, 128, 256):\n"
        "    for group, N in ((4, 3), (4, 8), (4, 16), (7, 23)):\n"
        "        p = on_gpu(problem(B=1, Hk=1, group=group, N=N, T=N + 2, D=D, Dv=D, longest=2000, dtype=torch.half))\n"
        "        ops.tree_attention(**p, window=1500, backend='cuda')\n"
        "torch.cuda.synchronize()\n",
        encoding="utf-8",
    )
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-name", "kns=tree_attention_kernel"]
        done = subprocess.run([*command, sys.executable, str(script)], capture_output=True, text=True, timeout=900)
        if "Device not supported" in done.stdout + done.stderr:
            pytest.skip("compute-sanitizer does not support this device")
        assert done.returncode == 0, done.stdout[-3000:]
