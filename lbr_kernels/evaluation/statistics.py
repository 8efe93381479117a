"""Intervals for what is counted."""

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
