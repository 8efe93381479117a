"""Commit, sampling and router in CUDA graphs, and the whole step as one. Skipped without a GPU.

The conformance tests of these ops run on a GPU too (tests/test_commit.py and its like), and tests/test_engine.py has
what a CPU can show of the engines.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from models import FAMILIES, tiny_model
from scipy.stats import chisquare
from support import gpu_backends_of
from test_engine import EXPERTS, IDS, RAGGED, SAMPLED, assert_same
from test_invariants import seeded, trained_looking_router

from lbr_kernels import Router, generate, ops, release, warmup
from lbr_kernels.decoding import engine

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def captured(call):
    """``call`` once for what is loaded at first use, then as a graph; returns the graph and its outputs."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


# --- the ops in graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", gpu_backends_of("commit_"))
def test_commit_in_a_graph(backend):
    """Sources, counts and lengths may change between replays."""
    g = torch.Generator().manual_seed(0)
    caches = [torch.randn(4, 8, 300, 64, generator=g).bfloat16().cuda() for _ in range(8)]
    lens, moves = (torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(2))
    sources = torch.zeros(4, 9, dtype=torch.int32, device="cuda")
    graph, _ = captured(lambda: ops.commit_(caches, lens, sources, num_moves=moves, backend=backend))
    for _ in range(10):
        want = [cache.cpu() for cache in caches]
        lens.copy_(torch.randint(0, 250, (4,), generator=g))
        moves.copy_(torch.tensor([9, 0, 1, 5]))
        sources.copy_(torch.stack([torch.randperm(39, generator=g)[:9].sort().values for _ in range(4)]))
        want_lens = lens.cpu()
        ops.commit_ref_(want, want_lens, sources.cpu(), num_moves=moves.cpu())
        graph.replay()
        assert all(torch.equal(cache.cpu(), expected) for cache, expected in zip(caches, want, strict=True))
        assert torch.equal(lens.cpu(), want_lens)
    ops.raise_if_flagged("cuda")


@pytest.mark.parametrize("backend", gpu_backends_of("sample_children"))
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_sampling_in_a_graph(backend, rows):
    """A real vocabulary, filters that differ by row; token for token the CPU kernel's."""
    g = torch.Generator().manual_seed(rows)
    logits, uniforms = torch.zeros(rows, 151_936).cuda(), torch.zeros(rows, 3, dtype=torch.float64).cuda()
    index = torch.zeros(rows, dtype=torch.int64, device="cuda")
    filters = {
        "temperature": torch.rand(rows, generator=g).double() + 0.5,
        "top_k": torch.randint(0, 60, (rows,), generator=g).double(),
        "top_p": 1 - torch.rand(rows, generator=g).double() / 4,
        "min_p": torch.rand(rows, generator=g).double() / 50,
    }
    there = {name: value.cuda() for name, value in filters.items()}
    graph, (tokens, log_probs) = captured(
        lambda: ops.sample_children(logits, uniforms, row_index=index, backend=backend, **there)
    )
    for _ in range(3):
        logits.copy_(torch.randn(rows, 151_936, generator=g) * 2)
        uniforms.copy_(torch.rand(rows, 3, generator=g, dtype=torch.float64))
        index.copy_(torch.randint(-1, rows, (rows,), generator=g))
        graph.replay()
        want = ops.sample_children(logits.cpu(), uniforms.cpu(), row_index=index.cpu(), **filters)
        assert torch.equal(tokens.cpu(), want[0])
        torch.testing.assert_close(log_probs.cpu(), want[1], rtol=1e-6, atol=1e-6)
    ops.raise_if_flagged("cuda")


@pytest.mark.parametrize("backend", gpu_backends_of("sample_children"))
def test_ten_million_draws(backend):
    """Frequencies by chi-square; a token of probability zero is never drawn."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    logits[0, ::7] = -torch.inf
    uniforms = torch.rand(10_000, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cuda()
    index = torch.zeros(10_000, dtype=torch.int64, device="cuda")
    tokens, _ = ops.sample_children(logits.cuda(), uniforms, row_index=index, top_p=0.98, backend=backend)
    counts = tokens.flatten().bincount(minlength=500).cpu()
    order = logits[0].argsort(descending=True)
    probability = logits[0].double().softmax(0)
    kept = order[probability[order].cumsum(0) - probability[order] < 0.98]
    left = torch.zeros(500, dtype=torch.bool)
    left[kept] = True
    assert (counts[~left] == 0).all()
    expected = probability[left] / probability[left].sum() * 10_000_000
    assert chisquare(counts[left].numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("backend", gpu_backends_of("route"))
@pytest.mark.parametrize(("batch", "width", "depth"), [(8, 3, 1), (1, 3, 2), (64, 3, 3), (8, 16, 2)])
def test_routing_in_a_graph(backend, batch, width, depth):
    g = torch.Generator().manual_seed(batch)
    router = Router.for_model(tiny_model("llama", hidden_size=3584, num_hidden_layers=1), depth=depth)
    for parameter in router.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=g)
    weights = router.packed()
    there = weights._replace(data=weights.data.cuda())
    slots = sum(width**layer for layer in range(1, depth + 1))
    hidden = torch.zeros(batch, slots, 3584, dtype=torch.bfloat16, device="cuda")
    uniforms = torch.zeros(batch, dtype=torch.float64, device="cuda")
    active = torch.ones(batch, dtype=torch.bool, device="cuda")
    graph, (log_probs, choice) = captured(
        lambda: ops.route(hidden, there, width=width, depth=depth, uniforms=uniforms, active=active, backend=backend)
    )
    for _ in range(3):
        hidden.copy_(torch.randn(hidden.shape, generator=g))
        uniforms.copy_(torch.rand(batch, generator=g, dtype=torch.float64))
        active.copy_(torch.rand(batch, generator=g) < 0.8)
        graph.replay()
        want, _ = ops.route(
            hidden.cpu(), weights, width=width, depth=depth, uniforms=uniforms.cpu(), active=active.cpu()
        )
        torch.testing.assert_close(log_probs.cpu(), want, rtol=1e-4, atol=1e-4)
        running = log_probs.double().exp().cumsum(-1)
        drawn = (running <= uniforms[:, None]).sum(-1).clamp(max=width - 1)
        assert torch.equal(choice, torch.where(active, drawn, -1))
    ops.raise_if_flagged("cuda")


# --- the step as a graph ----------------------------------------------------------------------------------------------


def call(model, engine_name, seed=1, **kwargs):
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    return generate(
        model, engine=engine_name, trie=False, generator=seeded(seed), return_dict_in_generate=True, **inputs
    )


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("do_sample", [True, False])
def test_captured_and_uncaptured_steps_give_the_same_text(width, depth, do_sample):
    """fp32; one graph for calls that differ in prompts, seeds, filters and end tokens."""
    model = tiny_model("llama").cuda()
    router = trained_looking_router(model, depth).cuda()
    for seed in range(4):
        options = {
            **RAGGED, "width": width, "depth": depth, "router": router, "do_sample": do_sample, "top_k": seed,
            "max_new_tokens": 60 + seed, "eos_token_id": [11 + seed, 29], "pad_token_id": 0,
        }  # fmt: skip
        outs = [call(model, name, seed, **options) for name in ("eager", "static", None)]
        assert_same(outs[0], outs[1])
        assert_same(outs[0], outs[2])
        assert (outs[2].stats.engine, outs[2].stats.engine_reason) == ("graph", None)
        assert ("warm-up" in outs[2].stats.seconds) == (seed == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """As a graph; mixtures of experts may do without one, where their routing asks the host."""
    model = tiny_model(family).cuda()
    outs = []
    for name in ("eager", None if family in EXPERTS else "graph"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outs.append(call(model, name, **RAGGED, width=2, depth=2, max_new_tokens=12, **SAMPLED))
    assert_same(*outs)


def test_a_text_that_outgrows_its_window():
    model = tiny_model("gemma3_text").cuda()
    outs = [call(model, name, **RAGGED, width=2, max_new_tokens=600, **SAMPLED) for name in ("eager", "graph")]
    assert_same(*outs)


def test_calls_on_several_streams():
    model = tiny_model("llama").cuda()
    want = call(model, "graph", input_ids=IDS, max_new_tokens=30, **SAMPLED)
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            assert_same(call(model, "graph", input_ids=IDS, max_new_tokens=30, **SAMPLED), want)


def test_weights_that_change_in_place_are_seen():
    """As a trainer changes them; and moved parameters make a new graph."""
    model = tiny_model("llama").cuda()
    call(model, "graph", input_ids=IDS, max_new_tokens=20, **SAMPLED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    outs = [call(model, name, input_ids=IDS, max_new_tokens=20, **SAMPLED) for name in ("eager", "graph")]
    assert_same(*outs)
    assert "warm-up" not in outs[1].stats.seconds
    model.model.layers[1].mlp.up_proj.weight.data = torch.randn_like(model.model.layers[1].mlp.up_proj.weight) / 8
    outs = [call(model, name, input_ids=IDS, max_new_tokens=20, **SAMPLED) for name in ("eager", "graph")]
    assert_same(*outs)
    assert "warm-up" in outs[1].stats.seconds


def test_a_model_that_waits_for_the_device_falls_back():
    model = tiny_model("llama").cuda()
    want = call(model, "eager", input_ids=IDS, max_new_tokens=9, **SAMPLED)
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 0 * float(x.sum() > 0)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph") as caught:
        out = call(model, None, input_ids=IDS, max_new_tokens=9, **SAMPLED)
    assert len(caught) == 1
    assert torch.equal(out.sequences, want.sequences)
    assert out.stats.engine == "eager"
    assert out.stats.engine_reason
    # The device is as good as before, and so is this thread.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(1, device="cuda").isfinite().all()
    other = tiny_model("llama", seed=1).cuda()
    assert call(other, None, input_ids=IDS, max_new_tokens=9, **SAMPLED).stats.engine == "graph"


def test_memory_that_is_too_small_falls_back(monkeypatch):
    model = tiny_model("llama").cuda()
    monkeypatch.setattr(engine, "capacity_class", lambda length: 2**34)
    with pytest.warns(UserWarning, match="memory"):
        out = call(model, None, input_ids=IDS, max_new_tokens=9, **SAMPLED)
    assert out.stats.engine == "eager"


def test_warmup_and_release():
    model = tiny_model("llama").cuda()
    before = torch.cuda.memory_allocated()
    ready = warmup(model, batch_size=2, max_length=4000)
    assert ready.engine == "graph"
    held = torch.cuda.memory_allocated() - before
    out = call(model, None, input_ids=IDS, max_length=40, **SAMPLED)
    assert "warm-up" not in out.stats.seconds
    release(model)
    assert torch.cuda.memory_allocated() - before < held / 10


def test_a_replay_does_not_wait_for_the_device():
    """Only reading what steps did waits: a call's first steps are enqueued without."""
    model = tiny_model("llama").cuda()
    call(model, "graph", input_ids=IDS, max_new_tokens=20, **SAMPLED)
    (kept,) = engine._steps[model].values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            kept.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_half_precision_by_the_cuda_kernels():
    """bf16, where attention is the CUDA kernel: a whole text, and flags stay clear."""
    model = tiny_model("llama", head_dim=64, hidden_size=256, intermediate_size=512).bfloat16().cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = call(model, None, **RAGGED, depth=2, max_new_tokens=200, **SAMPLED)
    assert out.stats.engine == "graph"
    assert out.stats.committed_tokens == 600
