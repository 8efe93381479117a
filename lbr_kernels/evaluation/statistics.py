"""Intervals and estimates for what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default.

    Raises ``ValueError`` unless ``0 <= successes <= trials`` and there is a trial.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"wilson_interval: successes is {successes}, expected 0 to {trials}, of at least one trial")
    share, weight = successes / trials, z * z / trials
    centre = share + weight / 2
    spread = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return (centre - spread) / (1 + weight), (centre + spread) / (1 + weight)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The unbiased estimate that at least one of ``k`` answers is right, from ``samples`` answers to one problem.

    1 - C(samples - correct, k) / C(samples, k): the share of all choices of ``k`` of the answers that hold a right one.
    Computed as a product, so that no large number appears. The estimate of a set of problems is the mean over them.

    Raises ``ValueError`` unless ``0 <= correct <= samples`` and ``1 <= k <= samples``.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"pass_at_k: correct is {correct}, expected 0 to {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}, expected 1 to {samples}, the number of samples")
    wrong = samples - correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(wrong + 1, samples + 1))


# Student's t at 97.5 %, by degrees of freedom; from 30 on an expansion in them is near enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few independent values, of seeds say, and half the width of its 95 % interval (Student's t).

    Of one value the width is infinite. Raises ``ValueError`` if there is none.
    """
    if not values:
        raise ValueError("mean_interval: values is empty, expected at least one")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96 + 2.37 / (count - 1)
    return mean, quantile * deviation / math.sqrt(count)
