"""Pass@k by trying all choices, and intervals where they are known."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import mean

import pytest

from lbr_kernels.evaluation.statistics import mean_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(samples):
    for correct in range(samples + 1):
        answers = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            expected = mean(any(choice) for choice in combinations(answers, k))
            assert pass_at_k(correct, samples, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_at_its_ends():
    assert pass_at_k(0, 64, 32) == 0.0
    assert pass_at_k(33, 64, 32) == 1.0
    assert pass_at_k(16, 64, 1) == pytest.approx(0.25)
    assert 0 < pass_at_k(1, 10**6, 1000) < 1, "no large number appears"
    for correct, samples, k in ((-1, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5)):
        with pytest.raises(ValueError, match=r"pass_at_k: (correct|k) is"):
            pass_at_k(correct, samples, k)


def test_wilson_interval():
    low, high = wilson_interval(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson_interval(0, 10)[0] == pytest.approx(0)
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(1, 0)


def test_mean_interval():
    """By scipy's t distribution; nothing is known of the spread of a single value."""
    stats = pytest.importorskip("scipy.stats")
    for values in ([0.5, 0.6], [0.1, 0.4, 0.2], list(range(29)), [1.0, 1.0, 1.0], list(range(200))):
        middle, half = mean_interval(values)
        assert middle == pytest.approx(mean(values))
        error = stats.sem(values) if len(set(values)) > 1 else 0
        assert half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * error, rel=2e-3)
    assert mean_interval([0.3]) == (0.3, math.inf)
    with pytest.raises(ValueError, match="mean_interval: values is empty"):
        mean_interval([])
