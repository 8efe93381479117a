"""The tree cache: arenas, growth without losing anything, sliding layers that keep their window and the tree alone."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from test_invariants import padded, random_prompts, seeded, trained_looking_router
from transformers import DynamicCache

from lbr_kernels import generate
from lbr_kernels.decoding import cache as cache_module
from lbr_kernels.decoding.cache import TreeCache


def prefilled(lengths: list[int], window: int | None = None, layers: int = 3, seed: int = 0) -> DynamicCache:
    """A cache of left-padded random states; position p of row b is recognisable by its value."""
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    cache = DynamicCache()
    for layer in range(layers):
        heads, dim = 1 + layer, 4 + 2 * layer
        keys = torch.randn(len(lengths), heads, longest, dim, generator=g)
        if window is not None and layer == 1:
            cache.layers.append(cache_module.DynamicSlidingWindowLayer(window))
        else:
            cache.layers.append(cache_module.DynamicLayer())
        cache.layers[layer].update(keys, keys + 1)
    return cache


@pytest.mark.parametrize("lengths", [[5, 5], [7, 3]])
@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_are_packed_without_padding(lengths, repeats):
    cache = prefilled(lengths)
    want = [layer.keys.clone() for layer in cache.layers]
    tree = TreeCache.from_prefill(cache, torch.tensor(lengths), repeats=repeats, tree_nodes=4, max_new_tokens=10)
    assert len(tree.groups) == 1
    assert all(layer.keys is None for layer in cache.layers)
    for layer, keys in zip(tree.layers, want, strict=True):
        for row in range(2 * repeats):
            length = lengths[row // repeats]
            assert torch.equal(layer.keys[row, :, :length], keys[row // repeats, :, -length:])
            assert torch.equal(layer.values[row, :, :length], keys[row // repeats, :, -length:] + 1)


def test_one_arena_per_head_size():
    """All layers' heads of one size lie side by side, so that few tensors stand for all of them in a commit."""
    tree = TreeCache.from_prefill(prefilled([5, 3]), torch.tensor([5, 3]), repeats=1, tree_nodes=4, max_new_tokens=9)
    group = tree.groups[0]
    views = [view for layer in group.layers for view in (layer.keys, layer.values)]
    assert len(group.buffers) == len({view.shape[3] for view in views}) < len(views)
    for arena in group.buffers:
        inside = [v for v in views if v.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()]
        assert arena.is_contiguous()
        assert arena.shape[1] == sum(view.shape[1] for view in inside)
        firsts = sorted((view.storage_offset() // arena.stride(1), view.shape[1]) for view in inside)
        assert [first for first, _ in firsts] == [sum(n for _, n in firsts[:i]) for i in range(len(firsts))]


@pytest.mark.parametrize("lengths", [[6, 6], [6, 2]])
def test_nodes_go_behind_the_prefix_and_growth_keeps_everything(lengths, monkeypatch):
    """Write, commit and grow for many steps with an arena that has to be enlarged now and then."""
    monkeypatch.setattr(cache_module, "_MIN_GROWTH", 3)
    lens = torch.tensor(lengths)
    tree = TreeCache.from_prefill(prefilled(lengths), lens, repeats=1, tree_nodes=2, max_new_tokens=30)
    mirror = [[layer.keys[row, :, :length].clone() for row, length in enumerate(lengths)] for layer in tree.layers]
    capacities = {tree.groups[0].capacity}
    for step in range(30):
        tree.set_base(0)
        for index, layer in enumerate(tree.layers):
            nodes = torch.randn(2, layer.keys.shape[1], 2, layer.keys.shape[3])
            buffer, _ = tree.update(nodes, nodes, index)
            assert buffer is layer.keys
            for row in range(2):
                mirror[index][row] = torch.cat([mirror[index][row], nodes[row, :, step % 2][:, None]], dim=1)
        sources = torch.tensor([[step % 2], [step % 2]], dtype=torch.int32)
        tree.commit(sources, None, backend=None)
        tree.committed(all_rows=True)
        capacities.add(tree.groups[0].capacity)
    assert len(capacities) > 2
    assert max(capacities) <= 6 + 30 + 2
    for index, layer in enumerate(tree.layers):
        for row, length in enumerate(lengths):
            assert torch.equal(layer.keys[row, :, : length + 30], mirror[index][row])


def test_rows_that_stay_behind():
    tree = TreeCache.from_prefill(prefilled([4, 4]), torch.tensor([4, 4]), repeats=1, tree_nodes=2, max_new_tokens=5)
    assert tree.groups[0].uniform
    moves = torch.tensor([1, 0], dtype=torch.int32)
    tree.commit(torch.zeros(2, 1, dtype=torch.int32), moves, backend=None)
    tree.committed(all_rows=False)
    assert tree.groups[0].prefix_lens.tolist() == [5, 4]
    assert not tree.groups[0].uniform


def test_unknown_states_are_refused():
    from transformers.cache_utils import LinearAttentionLayer

    cache = prefilled([4])
    cache.layers.append(LinearAttentionLayer())
    with pytest.raises(TypeError, match="its cache holds a LinearAttentionLayer, a state that the branches of a tree"):
        TreeCache.from_prefill(cache, torch.tensor([4]), repeats=1, tree_nodes=2, max_new_tokens=5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(("width", "depth"), [(3, 1), (2, 2)])
def test_sliding_layers_keep_their_window_only(family, width, depth, monkeypatch):
    """Texts far longer than the window, cut again and again: the same text, and bounded memory."""
    model = tiny_model(family)
    inputs = padded(random_prompts([11, 3, 7]))
    arguments = {
        "width": width, "depth": depth, "max_new_tokens": 60, "do_sample": True, "top_k": 0,
        "router": trained_looking_router(model, depth),
    }  # fmt: skip
    want = generate(model, **inputs, **arguments, generator=seeded(0))
    capacities = []
    cut = cache_module.LayerGroup.cut_to_window

    def spy(group):
        capacities.append(group.capacity)
        cut(group)

    monkeypatch.setattr(cache_module, "_MIN_GROWTH", 4)
    monkeypatch.setattr(cache_module.LayerGroup, "cut_to_window", spy)
    out = generate(model, **inputs, **arguments, generator=seeded(0), return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert len(capacities) > 5
    assert max(capacities) < 6 + 4 + width**depth + 8
    # What is left of a sliding layer can still be continued from.
    more = generate(
        model, out.sequences, past_key_values=out.past_key_values, max_new_tokens=5, width=1, do_sample=False,
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones(3, 60, dtype=torch.int64)], 1),
    )  # fmt: skip
    fresh = generate(
        model, out.sequences, max_new_tokens=5, width=1, do_sample=False,
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones(3, 60, dtype=torch.int64)], 1),
    )  # fmt: skip
    assert torch.equal(more, fresh)
