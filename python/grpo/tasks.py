"""The two tasks of the study, as the loop sees them: questions with a prompt and a checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lbr_kernels.evaluation import arithmetic, reachability

ARITHMETIC = {
    "arithmetic": arithmetic.ArithmeticOptions(terms=4, radix=10, digits=2),
    "bits": arithmetic.ArithmeticOptions(terms=3, radix=2, digits=1),  # small, for tests
}
REACHABILITY, HOPS = reachability.ReachabilityOptions(), 3


@dataclass(frozen=True)
class Question:
    """``prompt`` are token ids, equally many in all questions of a task; ``is_right`` judges the ids of an answer."""

    prompt: list[int]
    is_right: Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Task:
    """``training`` and ``held_out`` draw that many questions, no question of one occurring in the other."""

    name: str
    eos: int
    max_new_tokens: int
    training: Callable[[int, np.random.Generator], list[Question]]
    held_out: Callable[[int, np.random.Generator], list[Question]]


def _arithmetic_questions(
    options: arithmetic.ArithmeticOptions, split: arithmetic.Split, count: int, rng: np.random.Generator
) -> list[Question]:
    problems = [arithmetic.random_problem(options, split=split, rng=rng) for _ in range(count)]
    return [Question(arithmetic.prompt_ids(p, options), partial(_adds_up, p, options)) for p in problems]


def _adds_up(problem: arithmetic.Problem, options: arithmetic.ArithmeticOptions, answer: Sequence[int]) -> bool:
    return arithmetic.check_answer(problem, answer, options).correct


def _reachability_questions(split: reachability.Split, count: int, rng: np.random.Generator) -> list[Question]:
    """Twins, a graph for each pair: ``count`` is even. No two held-out graphs are the same."""
    hops = np.full((count // 2, 1), HOPS)
    problems = reachability.twin_batch(REACHABILITY, hops, split=split, rng=rng, distinct=split == "test").problems()
    return [Question(reachability.prompt_ids(p, REACHABILITY), partial(_leads_there, p)) for p in problems]


def _leads_there(problem: reachability.Problem, answer: Sequence[int]) -> bool:
    return reachability.check_answer(problem, answer, REACHABILITY).correct


def arithmetic_task(options: arithmetic.ArithmeticOptions) -> Task:
    """The arithmetic task at any size."""
    return Task(
        f"arithmetic-{options.terms}-{options.radix}-{options.digits}",
        eos=arithmetic.EOS,
        max_new_tokens=options.answer_length,
        training=partial(_arithmetic_questions, options, "train"),
        held_out=partial(_arithmetic_questions, options, "test"),
    )


TASKS = {
    **{name: arithmetic_task(options) for name, options in ARITHMETIC.items()},
    "reachability": Task(
        "reachability",
        eos=reachability.EOS,
        max_new_tokens=REACHABILITY.max_answer_length,
        training=partial(_reachability_questions, "train"),
        held_out=partial(_reachability_questions, "test"),
    ),
}
