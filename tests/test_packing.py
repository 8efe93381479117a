"""Trajectories as packed trees, against the tree that is read off the trajectory node by node."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama

from lbr_kernels import Router, generate
from lbr_kernels.training.packing import pack

SHAPES = [(1, 1), (3, 1), (2, 2), (3, 2), (2, 3), (3, 3)]


def rollout(width, depth, *, vocab=5, rows=3, steps=9, seed=0, eos=None, router=False):
    """A trajectory with many equal siblings; rows with different prompts, the first two with the same."""
    model = tiny_llama(vocab_size=vocab)
    prompts = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2], [3, 1, 2, 4]])[:rows] % vocab
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])[:rows]
    return generate(
        model, prompts, attention_mask=mask, width=width, depth=depth, do_sample=True, top_k=0, max_new_tokens=steps,
        router=Router.for_model(model, depth=depth, dim=8, num_heads=2) if router else None,
        eos_token_id=eos, pad_token_id=0, generator=torch.Generator().manual_seed(seed), return_dict_in_generate=True,
    ).trajectory  # fmt: skip


def walk(trajectory, row):
    """Every grown node of a row as (place on the node axis, path from the prompt), and the decisions' slots likewise.

    From the trajectory's contract alone: layers of a tree are lists of (place, path).
    """
    K, L = trajectory.settings.width, trajectory.settings.depth
    tokens = trajectory.node_tokens[row].tolist()
    place = 0
    nodes, decisions = [], []
    layers = [[(None, ())]]

    def grow():
        nonlocal place
        layer = []
        for parent in layers[-1]:
            for _ in range(K):
                exists = tokens[place] >= 0
                assert not exists or parent is not None
                layer.append((place, (*parent[1], tokens[place])) if exists else None)
                nodes.extend(layer[-1:] if exists else [])
                place += 1
        layers.append(layer)

    for _ in range(1, L):
        grow()
    for step in range(int(trajectory.num_committed[row])):
        grow()
        decisions.append([node for layer in layers[1:] for node in layer])
        choice = int(trajectory.choices[row, step])
        layers = [layer[choice * K ** (d - 1) : (choice + 1) * K ** (d - 1)] for d, layer in enumerate(layers) if d]
    assert all(token == -1 for token in tokens[place:])
    return nodes, decisions


@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("eos", [None, 3])
def test_every_path_is_there_once(width, depth, share, eos):
    for seed in range(2):
        trajectory = rollout(width, depth, seed=seed, eos=eos)
        packed = pack(trajectory, share_prompts=share)
        assert len(packed.cu_seqlens) == (3 if share else 4)
        bounds = packed.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(packed)
        pack_of = torch.bucketize(torch.arange(len(packed)), packed.cu_seqlens[1:].long(), right=True)
        first = packed.cu_seqlens.long()[pack_of]
        end = packed.subtree_end.long() + first

        # Parents, depths and runs agree with each other.
        parents, tokens, ends = packed.parents.tolist(), packed.tokens.tolist(), end.tolist()
        paths, below = [], [1] * len(packed)
        for index, parent in enumerate(parents):
            assert parent < index
            paths.append([*paths[parent], tokens[index]] if parent >= 0 else [tokens[index]])
            assert packed.positions[index] == len(paths[index]) - 1
        for index in reversed(range(len(packed))):
            assert ends[index] == index + below[index]  # in DFS order a subtree is a run
            if parents[index] >= 0:
                assert index < ends[parents[index]]
                below[parents[index]] += below[index]

        used = set()
        for row in range(len(trajectory)):
            prompt = trajectory.prompt_ids[row][trajectory.prompt_mask[row]].tolist()
            nodes, decisions = walk(trajectory, row)
            index = packed.node_index[row].tolist()
            for place, path in nodes:
                assert paths[index[place]] == [*prompt, *path]
            assert {place for place, i in enumerate(index) if i >= 0} == {place for place, _ in nodes}
            distinct = {(row, path) for _, path in nodes}
            assert len({index[place] for place, _ in nodes}) == len(distinct)
            used |= {index[place] for place, _ in nodes}
            for step in range(trajectory.num_steps):
                slots = packed.slot_index[row, step].tolist()
                want = decisions[step] if step < len(decisions) else [None] * len(slots)
                assert slots == [-1 if node is None else index[node[0]] for node in want]
        lens = trajectory.prompt_mask.sum(1)
        assert len(packed) == len(used) + int(lens[packed.prompts].sum())


def test_the_committed_child_comes_last():
    """So that side branches close soon: the trunk's nodes are visible to the end of the row."""
    trajectory = rollout(3, 1, rows=1)
    packed = pack(trajectory)
    long = (packed.subtree_end == len(packed)).sum()
    assert long == 2 + trajectory.num_steps
