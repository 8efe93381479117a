"""Intervals and estimates for what is counted."""

from __future__ import annotations

import math


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
