"""What a Local Branch Routing call can be told, beyond what ``model.generate`` takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ENGINES = ("eager", "static", "graph")
_MOST_SLOTS = 2**20  # no machine holds the masks of more


@dataclass(frozen=True)
class LBRConfig:
    """The settings of :func:`lbr_kernels.generate`, as one object.

    Args:
        width: K, children per node.
        depth: L, layers of the tree; a router is made for one depth.
        router_temperature: tau of the routing softmax.
        router_do_sample: draw the choice (the paper) or take the most likely candidate; by default as ``do_sample``.
        candidate_min_p: with ``do_sample=False`` a candidate must be at least this many times as likely as the best
            one, else its place stays empty.
        trie: forward each distinct path once instead of every slot of the full tree. The text is the same. By default
            on for CPUs, where nodes cost time, and off on GPUs, where fixed shapes matter more.
        engine: how steps are run, ``"eager"``, ``"static"`` or ``"graph"`` (see ``decoding/engine.py``); the text is
            the same. By default a CUDA graph where the call can be run as one, else eager; ``stats`` says which and
            why. An engine asked for by name never falls back.
        backend: the ops' backend, see ``lbr_kernels.ops.backends()``; by default the best that runs.
    """

    width: int = 3
    depth: int = 1
    router_temperature: float = 1.0
    router_do_sample: bool | None = None
    candidate_min_p: float = 0.05
    trie: bool | None = None
    engine: Literal["eager", "static", "graph"] | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in (None, *ENGINES):
            raise ValueError(f"generate: engine is {self.engine!r}, expected {', '.join(map(repr, ENGINES))} or None")
        for name in ("width", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"generate: {name} is {value!r}, expected an integer >= 1")
            object.__setattr__(self, name, int(value))
        for name in ("router_do_sample", "trie"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"generate: {name} is {value!r}, expected True, False or None")
        # Layer by layer, as the whole number may be beyond computing.
        slots = layer = 1
        for _ in range(self.depth):
            layer *= self.width
            slots += layer
            if slots > _MOST_SLOTS:
                raise ValueError(
                    f"generate: width {self.width} and depth {self.depth} make a tree of more than {_MOST_SLOTS} "
                    "nodes, the most that is accepted"
                )
        if not 0 < self.router_temperature < math.inf:
            raise ValueError(
                f"generate: router_temperature is {self.router_temperature!r}, expected a finite number > 0"
            )
        if not 0 <= self.candidate_min_p <= 1:
            raise ValueError(
                f"generate: candidate_min_p is {self.candidate_min_p!r}, expected 0 <= candidate_min_p <= 1"
            )

    def draws_choice(self, do_sample: bool) -> bool:
        """Whether the choice is drawn in a call with this ``do_sample``."""
        return do_sample if self.router_do_sample is None else self.router_do_sample
