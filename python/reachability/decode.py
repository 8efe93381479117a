"""The study's ways of decoding, all through the library, and what is counted of them.

Legality comes in as a logits processor (:class:`LegalTokens`), so that an oracle is one argument more of ``generate``:
behind it the K most likely tokens are the legal ones, whatever their probability.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lbr_kernels import Router, generate
from lbr_kernels.baselines import multiplex_thinking, soft_thinking
from lbr_kernels.evaluation.reachability import (
    EOS,
    Problem,
    ReachabilityOptions,
    check_answer,
    legal_tokens,
    parse_answer,
    prompt_ids,
)

BATCH = 100  # problems that are decoded together


class LegalTokens(LogitsProcessor):
    """Rules out all tokens that are not legal behind what a row has committed; where nothing is, the answer ends.

    ``blind``: what the model thinks of the legal ones is wiped out.
    """

    def __init__(self, problems: Sequence[Problem], options: ReachabilityOptions, *, blind: bool = False) -> None:
        self.problems, self.options, self.blind = problems, options, blind

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[rows, V]`` behind ids ``[rows, length]``; rows are the problems in turn."""
        assert len(input_ids) == len(self.problems), "one row per problem: trees of depth 1"
        ruled_out = torch.ones_like(scores, dtype=torch.bool)
        answers = input_ids[:, self.options.prompt_length :].tolist()
        for row, (problem, answer) in enumerate(zip(self.problems, answers, strict=True)):
            legal = legal_tokens(problem, answer, self.options)
            ruled_out[row, list(legal or [EOS])] = False
        return (scores * (not self.blind)).masked_fill(ruled_out, -torch.inf)


@dataclass
class Outcome:
    """What one way of decoding gave: a verdict per problem, and what it cost in all."""

    correct: list[bool]
    legal: list[bool]
    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    def by_hops(self, problems: Sequence[Problem]) -> dict[int, float]:
        """Accuracy at each number of hops."""
        told: dict[int, list[bool]] = {}
        for problem, correct in zip(problems, self.correct, strict=True):
            told.setdefault(problem.hops, []).append(correct)
        return {hops: sum(found) / len(found) for hops, found in sorted(told.items())}


Decode: TypeAlias = Callable[[PreTrainedModel, Tensor, LogitsProcessorList, torch.Generator, dict[str, Any]], Any]


@dataclass(frozen=True)
class Way:
    """A way of decoding: a name, whether an oracle rules out what is illegal, and the call.

    ``votes`` > 1: so many samples of each problem vote (:func:`elected`). ``blind``: see :class:`LegalTokens`.
    """

    name: str
    oracle: bool
    decode: Decode
    votes: int = 1
    blind: bool = False


def plain(name: str, *, do_sample: bool, oracle: bool = False, blind: bool = False, votes: int = 1) -> Way:
    """Decoding one token after the other."""

    def decode(
        model: PreTrainedModel, prompts: Tensor, processors: LogitsProcessorList, generator: torch.Generator,
        settings: dict[str, Any],
    ) -> Any:  # fmt: skip
        return generate(
            model, prompts, width=1, do_sample=do_sample, logits_processor=processors, generator=generator,
            num_return_sequences=votes, **settings,
        )  # fmt: skip

    return Way(name, oracle, decode, votes, blind)


def lbr(
    name: str, router: Router | None, *, width: int, depth: int = 1, do_sample: bool = True, oracle: bool = False,
    votes: int = 1,
) -> Way:  # fmt: skip
    """Local Branch Routing. With an oracle the candidates are the most likely of the legal tokens."""

    def decode(
        model: PreTrainedModel, prompts: Tensor, processors: LogitsProcessorList, generator: torch.Generator,
        settings: dict[str, Any],
    ) -> Any:  # fmt: skip
        return generate(
            model, prompts, width=width, depth=depth, router=router, do_sample=do_sample, generator=generator,
            logits_processor=processors, candidate_min_p=0.0, num_return_sequences=votes, **settings,
        )  # fmt: skip

    return Way(name, oracle, decode, votes)


def soft(name: str, *, oracle: bool, top_n: int, filters: dict[str, float] | None = None) -> Way:
    """Soft Thinking throughout; what counts is the likeliest token of every mixture."""

    def decode(
        model: PreTrainedModel, prompts: Tensor, processors: LogitsProcessorList, generator: torch.Generator,
        settings: dict[str, Any],
    ) -> Any:  # fmt: skip
        return soft_thinking(model, prompts, top_n=top_n, logits_processor=processors, **settings | (filters or {}))

    return Way(name, oracle, decode)


def multiplex(name: str, *, width: int) -> Way:
    """Multiplex Thinking throughout."""

    def decode(
        model: PreTrainedModel, prompts: Tensor, processors: LogitsProcessorList, generator: torch.Generator,
        settings: dict[str, Any],
    ) -> Any:  # fmt: skip
        return multiplex_thinking(
            model, prompts, width=width, do_sample=True, generator=generator, logits_processor=processors, **settings
        )

    return Way(name, False, decode)


def evaluate(
    way: Way, model: PreTrainedModel, problems: Sequence[Problem], options: ReachabilityOptions, seed: int
) -> Outcome:
    """Decode all problems with an evaluating model and judge the answers."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_answer_length,
        "top_k": 0,
        "temperature": 1.0,
        "return_dict_in_generate": True,
    }
    outcome = Outcome([], [])
    for first in range(0, len(problems), BATCH):
        part = list(problems[first : first + BATCH])
        prompts = torch.tensor([prompt_ids(problem, options) for problem in part], device=model.device)
        processors = LogitsProcessorList([LegalTokens(part, options, blind=way.blind)] if way.oracle else [])
        began = time.perf_counter()
        out = way.decode(model, prompts, processors, generator, settings)
        outcome.seconds += time.perf_counter() - began
        outcome.tokens += out.stats.committed_tokens
        outcome.nodes += out.stats.forwarded_nodes
        answers = [_answer(row) for row in out.sequences[:, options.prompt_length :].tolist()]
        for index, problem in enumerate(part):
            chosen = elected(answers[index * way.votes : (index + 1) * way.votes], problem, options)
            verdict = check_answer(problem, chosen, options)
            outcome.correct.append(verdict.correct)
            outcome.legal.append(verdict.legal)
    return outcome


def _answer(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1] if EOS in row else row


def elected(answers: list[list[int]], problem: Problem, options: ReachabilityOptions) -> list[int]:
    """The first of the answers that arrive at the target at which most of them do.

    Answers that have not ended, or not at one of the two targets that the prompt names, do not vote; if none does, the
    first answer counts.
    """
    ends = [(parse_answer(answer, options) or (None,))[-1] for answer in answers]
    voting = [index for index, end in enumerate(ends) if end in problem.targets]
    return answers[max(voting, key=lambda index: ends.count(ends[index]), default=0)]
