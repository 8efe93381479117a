"""Arithmetic: a chain of additions and subtractions, every running total written out.

Contract
--------
A problem is a chain of numbers with signs between them, none of whose running totals is below zero or has more digits
than the numbers; the answer is the list of running totals, and the last one is the result::

    47 + 38 - 60 + 05 =   85 , 25 , 30 [EOS]

A number has ``digits`` digits in base ``radix``, one token per digit, the most significant one first: what it is
depends on a carry that only the digits after it show. As in the reachability task, a digit that begins a number and one
that continues it are different tokens (``4`` and ``##4``), and the text shows plain digits. All prompts of one size are
equally long, and so are all answers.

Three properties hold by construction:

* *There is one right answer*, and :func:`check_answer` compares with sums of its own, token by token of the text.
* *Totals are uniform* and independent, the first number among them; terms are their differences. No total is more
  likely than another one before its own term has been read, whatever the earlier terms and totals are.
* *Splits are disjoint.* The split of a problem is a function of :func:`problem_fingerprint`, which depends neither on
  the order of its terms nor on an exchange of all signs: no test problem occurs in training, nor does a reordered one.
  (Single steps of two numbers do occur in both.)

Everything is drawn from a numpy ``Generator`` that the caller gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

import numpy as np

from lbr_kernels.evaluation.digits import digit_ids, digit_tokens, joined

Split: TypeAlias = Literal["train", "test"]

SPECIAL_TOKENS = ("[PAD]", "[EOS]", ",", "=", "+", "-")
PAD, EOS, COMMA, EQUALS, PLUS, MINUS = range(len(SPECIAL_TOKENS))
FIRST_DIGIT = len(SPECIAL_TOKENS)

_TEST_SHARE = 8  # one problem in eight belongs to the test split
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class ArithmeticOptions:
    """The size of the problems: ``terms`` numbers of ``digits`` digits in base ``radix``."""

    terms: int = 4
    radix: int = 10
    digits: int = 2

    def __post_init__(self) -> None:
        for name, least in (("terms", 2), ("radix", 2), ("digits", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"ArithmeticOptions: {name} is {value!r}, expected an integer >= {least}")
        if self.radix > 10:
            raise ValueError(f"ArithmeticOptions: radix is {self.radix}, expected at most 10")

    @property
    def limit(self) -> int:
        """All numbers and totals are below it."""
        return int(self.radix**self.digits)

    @property
    def vocab_size(self) -> int:
        return FIRST_DIGIT + 2 * self.radix

    @property
    def prompt_length(self) -> int:
        """The number of tokens of every prompt."""
        return self.terms * (self.digits + 1)

    @property
    def answer_length(self) -> int:
        """The number of tokens of every right answer, its end included."""
        return (self.terms - 1) * (self.digits + 1)


@dataclass(frozen=True)
class Problem:
    """One problem: ``numbers``, and ``signs``, each 1 or -1, before all of them but the first."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]

    def totals(self) -> tuple[int, ...]:
        """The running totals, one per sign."""
        signed = (sign * number for sign, number in zip(self.signs, self.numbers[1:], strict=True))
        return tuple(accumulate(signed, initial=self.numbers[0]))[1:]


@dataclass(frozen=True)
class Verdict:
    """What :func:`check_answer` found.

    ``steps`` is the number of totals that are right, up to the first that is not. ``correct`` means ended, as many
    totals as the problem has signs, and all of them right.
    """

    ended: bool
    steps: int
    correct: bool


def random_problem(options: ArithmeticOptions, *, split: Split, rng: np.random.Generator) -> Problem:
    """A problem of that side of the split. Raises ``ValueError`` for a split that there is not, or that is empty."""
    if split not in ("train", "test"):
        raise ValueError(f"random_problem: split is {split!r}, expected 'train' or 'test'")
    for _ in range(_MAX_DRAWS):
        totals = rng.integers(options.limit, size=options.terms).tolist()
        steps = [after - before for before, after in pairwise(totals)]
        signs = [(step > 0) - (step < 0) or 1 for step in steps]
        problem = Problem((totals[0], *map(abs, steps)), tuple(signs))
        if split_of(problem) == split:
            return problem
    raise ValueError(f"random_problem: no problem of {options} is in split {split!r}, in {_MAX_DRAWS} draws")


def evaluation_problems(options: ArithmeticOptions, count: int, *, seed: int) -> list[Problem]:
    """``count`` different problems of the test split. Raises ``ValueError`` for a count below 1."""
    if count < 1:
        raise ValueError(f"evaluation_problems: count is {count}, expected a positive number")
    rng = np.random.default_rng(seed)
    found: dict[Problem, None] = {}
    for _ in range(20 * count + 100):
        found[random_problem(options, split="test", rng=rng)] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"evaluation_problems: count is {count}, and only {len(found)} turned up of {options}")


def problem_fingerprint(problem: Problem) -> int:
    """A 64-bit number that is equal for problems of the same terms in another order, or with all signs exchanged."""
    signed = sorted(zip((1, *problem.signs), problem.numbers, strict=True))
    exchanged = sorted((-sign, number) for sign, number in signed)
    text = repr(min(signed, exchanged))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to."""
    return "test" if problem_fingerprint(problem) % _TEST_SHARE == 0 else "train"


def token_strings(options: ArithmeticOptions) -> list[str]:
    """The vocabulary in the order of its ids, in WordPiece's spelling."""
    return [*SPECIAL_TOKENS, *digit_tokens(options.radix)]


def number_ids(number: int, options: ArithmeticOptions) -> list[int]:
    """The tokens of one number, the most significant digit first."""
    if not 0 <= number < options.limit:
        raise ValueError(f"number_ids: number is {number}, expected 0 to {options.limit - 1}")
    return digit_ids(number, radix=options.radix, digits=options.digits, first=FIRST_DIGIT)


def prompt_ids(problem: Problem, options: ArithmeticOptions) -> list[int]:
    """The tokens of a problem, ``options.prompt_length`` of them, up to the sign that asks for the totals."""
    ids = number_ids(problem.numbers[0], options)
    for sign, number in zip(problem.signs, problem.numbers[1:], strict=True):
        ids += [PLUS if sign > 0 else MINUS, *number_ids(number, options)]
    return [*ids, EQUALS]


def answer_ids(totals: Sequence[int], options: ArithmeticOptions) -> list[int]:
    """The tokens of an answer: totals with commas between them, and the end of text."""
    ids: list[int] = []
    for total in totals:
        ids += [*number_ids(total, options), COMMA]
    return [*ids[:-1], EOS]


def check_answer(problem: Problem, ids: Sequence[int], options: ArithmeticOptions) -> Verdict:
    """Judge the tokens of an answer; what follows the first end is ignored."""
    tokens, ended = list(ids), EOS in ids
    words = to_text(tokens[: tokens.index(EOS)] if ended else tokens, options).split()
    value, steps = problem.numbers[0], 0
    for place, (sign, number) in enumerate(zip(problem.signs, problem.numbers[1:], strict=True)):
        value += sign * number
        expected = np.base_repr(value, options.radix).zfill(options.digits)
        if words[2 * place : 2 * place + 1] != [expected] or (place > 0 and words[2 * place - 1] != ","):
            break
        steps += 1
    complete = steps == len(problem.signs) and len(words) == 2 * steps - 1
    return Verdict(ended, steps, correct=ended and complete)


def to_text(ids: Iterable[int], options: ArithmeticOptions) -> str:
    """Tokens as text: words separated by spaces, a number's digits written together."""
    return joined(ids, token_strings(options))
