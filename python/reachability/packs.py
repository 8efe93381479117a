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
from forest import Forest
from numpy.typing import NDArray
from torch import Tensor

from lbr_kernels.evaluation.reachability import (
    ARROW,
    ROOT,
    ReachabilityOptions,
    Split,
    answer_tokens,
    graph_tokens,
    legal_masks,
    next_tokens,
    node_tokens,
    prompt_tokens,
    random_true,
    random_walks,
    right_masks,
    twin_batch,
)


@dataclass(frozen=True)
class Pack:
    """B graphs with the same number of branches. S is the number of answer tokens of a row, padding included.

    ``forest`` holds them, with so many ``branches`` each; ``answers [B, S]`` are the slots of the answers' tokens, and
    ``targets [B, S]`` those tokens, ``PAD`` where an answer is shorter; those of one branch stand in a row.
    ``right`` bool ``[B, S, vocabulary]`` marks the tokens that lead to the reachable target; it is all false on padding
    and in walks. ``legal``, of the same shape, marks the tokens that are legal in the place of an answer's token
    wherever they lead (``reachability.legal_tokens``); a walk has no targets and may end where there are no children.
    It is all false on padding.
    """

    branches: int
    forest: Forest
    answers: Tensor
    targets: Tensor
    right: Tensor
    legal: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same on another device."""
        forest = Forest(self.forest.tokens.to(device), self.forest.parents.to(device))
        others = (self.answers, self.targets, self.right, self.legal)
        return Pack(self.branches, forest, *(tensor.to(device) for tensor in others))


def make_pack(
    options: ReachabilityOptions, hops: Sequence[int], *, graphs: int, pairs: int, walks: int,
    rng: np.random.Generator, split: Split = "train",
) -> Pack:  # fmt: skip
    """A pack of ``graphs`` new graphs, each with ``2 * pairs`` questions, ``hops`` at random, and walks."""
    batch = twin_batch(options, rng.choice(hops, (graphs, pairs)), split=split, rng=rng)
    paths = np.full((graphs, 2 * pairs, options.max_hops), -1)
    found = batch.random_paths(rng)
    paths[..., : found.shape[-1]] = found
    questions = prompt_tokens(batch, options)[:, :, options.graph_length :]
    right, legal = right_masks(batch, paths, options), legal_masks(batch, paths, options)
    parts = [graph_tokens(batch, options), _joined(questions, answer_tokens(paths, options))]

    sources = np.zeros((graphs, walks, options.num_names), np.bool_)  # the nodes that have children
    graph, node, _ = np.nonzero(batch.adjacency)
    sources[graph, :, node] = True
    starts = random_true(sources, rng)
    everywhere = np.ones_like(sources)
    walked = random_walks(batch.adjacency, starts, everywhere, options.max_hops, rng)
    parts.append(_joined(_walk_questions(starts, options), answer_tokens(walked, options)))
    may_go = next_tokens(batch.adjacency, starts, walked, everywhere, ~sources, options)
    tokens = torch.from_numpy(np.concatenate(parts, axis=1))

    # All rows have one layout: behind the trunk one branch after the other, and each begins at the trunk's end.
    trunk, answer_length = options.graph_length, options.max_answer_length
    lengths = np.repeat([questions.shape[-1] + answer_length, options.digits + 2 + answer_length], [2 * pairs, walks])
    begins = trunk + np.cumsum(lengths) - lengths
    parents = np.arange(-1, tokens.shape[1] - 1)
    parents[begins] = trunk - 1
    answers = torch.from_numpy(((begins + lengths)[:, None] - np.arange(answer_length, 0, -1)).reshape(-1))
    return Pack(
        branches=len(lengths),
        forest=Forest(tokens, torch.from_numpy(parents).expand(graphs, -1)),
        answers=answers.expand(graphs, -1),
        targets=tokens[:, answers],
        right=torch.from_numpy(np.concatenate([right, np.zeros_like(may_go)], axis=1)).flatten(1, 2),
        legal=torch.from_numpy(np.concatenate([legal, may_go], axis=1)).flatten(1, 2),
    )


def _joined(questions: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Branches ``[G, tokens]``: every question before its answer."""
    return np.concatenate([questions, answers], axis=-1).reshape(len(questions), -1)


def _walk_questions(starts: NDArray[np.int64], options: ReachabilityOptions) -> NDArray[np.int64]:
    """``[R] start ->`` for starts ``[G, W]``: ``[G, W, digits + 2]``."""
    questions = np.full((*starts.shape, options.digits + 2), ARROW)
    questions[..., 0] = ROOT
    questions[..., 1:-1] = node_tokens(starts, options)
    return questions
