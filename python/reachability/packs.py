"""Training batches: many questions about one graph, packed behind its text.

The prompt of :mod:`lbr_kernels.evaluation.reachability` starts with the graph, which does not depend on the question. A
pack holds a graph's text once and the rest of every question, with a gold answer, as a branch of its own: sixteen
tokens per question in the place of more than a hundred. Besides questions there are *walks*, ``[R] 33 -> 12 -> ..``: a
random walk from a random node to a node without children, which teaches to look up edges before there is a goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lbr_kernels.evaluation.reachability import (
    ARROW,
    PAD,
    ROOT,
    Problem,
    ReachabilityOptions,
    answer_ids,
    node_ids,
    prompt_ids,
    right_tokens,
    twin_problems,
)


@dataclass(frozen=True)
class Pack:
    """B graphs with the same number of branches. S is the number of answer tokens of a row, padding included.

    ``tokens``, ``positions`` ``[B, T]`` and ``visible`` bool ``[B, T, T]`` are what a ``TokenTree`` starts from.
    ``answers [B, S]`` are the slots of the answers' tokens, and ``targets [B, S]`` those tokens, ``PAD`` where an
    answer is shorter. ``right`` bool ``[B, S, vocabulary]`` marks the tokens that lead to the reachable target; it is
    all false on padding and in walks.
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    answers: Tensor
    targets: Tensor
    right: Tensor


def training_pack(
    options: ReachabilityOptions, hops: Sequence[int], *, graphs: int, pairs: int, walks: int, rng: np.random.Generator
) -> Pack:
    """A pack of ``graphs`` new training graphs, each with ``2 * pairs`` questions, ``hops`` at random, and walks."""
    answer_length = options.max_answer_length
    rows: list[list[int]] = []
    right = np.zeros((graphs, 2 * pairs + walks, answer_length, options.vocab_size), np.bool_)
    for graph in range(graphs):
        counts = [int(count) for count in rng.choice(hops, max(pairs, 1))]
        problems = twin_problems(options, counts, split="train", rng=rng)
        branches = []
        for index, problem in enumerate(problems[: 2 * pairs]):
            answer = answer_ids(problem.random_path(rng), options)
            branches.append((prompt_ids(problem, options)[options.graph_length :], answer))
            for place, choices in enumerate(right_tokens(problem, answer, options)):
                right[graph, index, place, list(choices)] = True
        branches += [_walk(problems[0], options, rng) for _ in range(walks)]
        row = prompt_ids(problems[0], options)[: options.graph_length]
        for question, answer in branches:
            row += question + answer + [PAD] * (answer_length - len(answer))
        rows.append(row)

    # All rows have one layout. `branch` says for every slot which branch it is in, -1 in the trunk.
    trunk = options.graph_length
    lengths = np.array([len(question) + answer_length for question, _ in branches])
    starts = trunk + np.cumsum(lengths) - lengths
    branch = np.concatenate([np.full(trunk, -1), np.repeat(np.arange(len(branches)), lengths)])
    positions = np.arange(len(branch))
    positions[trunk:] -= np.repeat(starts - trunk, lengths)
    visible = np.tril((branch[None, :] == -1) | (branch[None, :] == branch[:, None]))
    answers = torch.from_numpy(((starts + lengths)[:, None] - np.arange(answer_length, 0, -1)).reshape(-1))
    tokens = torch.tensor(rows)
    return Pack(
        tokens=tokens,
        positions=torch.from_numpy(positions).expand(graphs, -1),
        visible=torch.from_numpy(visible).expand(graphs, -1, -1),
        answers=answers.expand(graphs, -1),
        targets=tokens[:, answers],
        right=torch.from_numpy(right).flatten(1, 2),
    )


def _walk(problem: Problem, options: ReachabilityOptions, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Question and answer of a random walk on the problem's graph."""
    node = start = int(rng.choice(sorted({u for u, _ in problem.edges})))
    path = []
    while children := problem.children(node):
        node = int(rng.choice(children))
        path.append(node)
    return [ROOT, *node_ids(start, options), ARROW], answer_ids(path, options)
