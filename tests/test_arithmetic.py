"""The arithmetic task. The checks are written from its text alone: Python evaluates the prompt."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lbr_kernels.evaluation.arithmetic import (
    COMMA,
    EOS,
    PAD,
    ArithmeticOptions,
    Problem,
    answer_ids,
    check_answer,
    evaluation_problems,
    number_ids,
    problem_fingerprint,
    prompt_ids,
    random_problem,
    split_of,
    to_text,
    token_strings,
)

SIZES = [
    ArithmeticOptions(),
    ArithmeticOptions(terms=4, radix=2, digits=1),
    ArithmeticOptions(terms=5, radix=4, digits=3),
    ArithmeticOptions(terms=3, radix=10, digits=1),
]


def totals_of(text: str, options: ArithmeticOptions) -> list[str]:
    """The running totals of a prompt's text, by Python's own arithmetic."""
    words = text.removesuffix(" =").split()
    found = []
    for end in range(3, len(words) + 1, 2):
        expression = " ".join(str(int(word, options.radix)) if word.isdigit() else word for word in words[:end])
        value, digits = eval(expression), ""
        assert 0 <= value < options.radix**options.digits
        for _ in range(options.digits):
            value, digit = divmod(value, options.radix)
            digits = str(digit) + digits
        found.append(digits)
    return found


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_answers_are_what_python_computes(options):
    for problem in evaluation_problems(options, 3 if options.radix == 2 else 100, seed=1):
        prompt, answer = prompt_ids(problem, options), answer_ids(problem.totals(), options)
        assert (len(prompt), len(answer)) == (options.prompt_length, options.answer_length)
        assert max(prompt + answer) < options.vocab_size
        text = to_text(prompt, options)
        assert re.fullmatch(r"\d+( [+-] \d+)+ =", text)
        assert to_text(answer, options) == " , ".join(totals_of(text, options)) + " [EOS]"
        verdict = check_answer(problem, answer, options)
        assert (verdict.ended, verdict.steps, verdict.correct) == (True, options.terms - 1, True)
        assert check_answer(problem, [*answer, PAD, COMMA], options) == verdict


def test_every_change_of_a_right_answer_is_found():
    options = ArithmeticOptions(terms=3)
    for problem in evaluation_problems(options, 5, seed=2):
        right = answer_ids(problem.totals(), options)
        for place in range(len(right)):
            for token in range(options.vocab_size):
                changed = [*right[:place], token, *right[place + 1 :]]
                assert check_answer(problem, changed, options).correct == (token == right[place])
            assert not check_answer(problem, right[:place], options).correct
            assert not check_answer(problem, [*right[:place], *right[place + 1 :]], options).correct
            assert not check_answer(problem, [*right[:place], right[place], *right[place:]], options).correct or (
                right[place] == EOS
            )


def test_what_a_verdict_says():
    options = ArithmeticOptions(terms=4)
    problem = Problem(numbers=(47, 38, 60, 5), signs=(1, -1, 1))
    assert to_text(prompt_ids(problem, options), options) == "47 + 38 - 60 + 05 ="

    def judge(ids: list[int]) -> tuple[bool, int, bool]:
        verdict = check_answer(problem, ids, options)
        return verdict.ended, verdict.steps, verdict.correct

    right = answer_ids((85, 25, 30), options)
    assert judge(right) == (True, 3, True)
    assert judge(right[:-1]) == (False, 3, False), "not ended"
    assert judge(answer_ids((85, 25), options)) == (True, 2, False), "too short"
    assert judge(answer_ids((85, 25, 30, 30), options)) == (True, 3, False), "too long"
    assert judge([*right[:-1], COMMA, EOS]) == (True, 3, False), "a comma too many"
    assert judge(answer_ids((85, 24, 30), options)) == (True, 1, False), "a wrong step, and a right result"
    assert judge(answer_ids((30,), options)) == (True, 0, False), "the result alone"
    assert judge([EOS, *right]) == (True, 0, False)
    assert judge([]) == (False, 0, False)


def test_order_and_an_exchange_of_signs_do_not_change_the_split():
    problem = Problem((10, 20, 30), (1, -1))
    same = [Problem((20, 10, 30), (1, -1)), Problem((10, 30, 20), (-1, 1)), Problem((30, 10, 20), (-1, -1))]
    other = [Problem((10, 20, 30), (1, 1)), Problem((10, 20, 31), (1, -1)), Problem((30, 20, 10), (1, -1))]
    assert {problem_fingerprint(p) for p in same} == {problem_fingerprint(problem)}
    assert problem_fingerprint(problem) not in {problem_fingerprint(p) for p in other}
    rng = np.random.default_rng(3)
    for split in ("train", "test"):
        assert {split_of(random_problem(ArithmeticOptions(), split=split, rng=rng)) for _ in range(100)} == {split}


def test_split_is_one_in_eight():
    rng = np.random.default_rng(4)
    drawn = [Problem(tuple(rng.integers(100, size=4).tolist()), (1, -1, 1)) for _ in range(4000)]
    count = Counter(map(split_of, drawn))
    assert abs(count["test"] - 500) < 5 * (4000 / 8 * 7 / 8) ** 0.5


def test_one_seed_one_list_of_different_problems():
    options = ArithmeticOptions()
    problems = evaluation_problems(options, 50, seed=5)
    assert problems == evaluation_problems(options, 50, seed=5)
    assert problems != evaluation_problems(options, 50, seed=6)
    assert len(set(problems)) == 50


def test_totals_are_uniform():
    """No total is more likely than another, by tens and by units: five standard deviations."""
    options, rng = ArithmeticOptions(), np.random.default_rng(7)
    problems = [random_problem(options, split="train", rng=rng) for _ in range(5000)]
    for place in range(3):
        for unit in (1, 10):
            count = Counter(problem.totals()[place] // unit % 10 for problem in problems)
            assert all(abs(count[digit] - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5 for digit in range(10))


def test_vocabulary():
    options = ArithmeticOptions(radix=4)
    assert len(token_strings(options)) == options.vocab_size == len(set(token_strings(options)))
    assert [to_text(number_ids(number, options), options) for number in (0, 3, 4, 15)] == ["00", "03", "10", "33"]


def test_bad_arguments_are_refused():
    options = ArithmeticOptions()
    for change, message in (
        ({"terms": 1}, "terms is 1, expected an integer >= 2"),
        ({"digits": True}, "digits is True"),
        ({"radix": 11}, "radix is 11, expected at most 10"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(options, **change)
    with pytest.raises(ValueError, match="split is 'dev'"):
        random_problem(options, split="dev", rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="count is 0"):
        evaluation_problems(options, 0, seed=0)
    with pytest.raises(ValueError, match="count is 20, and only"):
        evaluation_problems(ArithmeticOptions(terms=4, radix=2, digits=1), 20, seed=0)
    with pytest.raises(ValueError, match="is in split 'test'"):
        random_problem(ArithmeticOptions(terms=2, radix=2, digits=1), split="test", rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="number is 100, expected 0 to 99"):
        number_ids(100, options)
