"""One interface for whatever decides: a trained router, a function, or nothing (uniform)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lbr_kernels import ops
from lbr_kernels.ops.route import routing_log_probs
from lbr_kernels.router import Router

RouterLike = Router | str | Path | Callable[[Tensor, Tensor], Tensor]
"""A :class:`Router`, a directory or Hub id, or a function of ``(hidden [B, T, D], valid [B, T])`` to scores ``[B, K]``.

Slots stand in level order. Scores of candidates that do not exist are ignored; softmax and temperature come after.
"""


class Routing:
    """Decides which candidate each row commits."""

    def __init__(
        self,
        router: RouterLike | None,
        *,
        width: int,
        depth: int,
        hidden_size: int,
        temperature: float,
        device: torch.device,
        backend: str | None,
    ) -> None:
        self.width, self.depth, self.temperature, self.backend = width, depth, temperature, backend
        if isinstance(router, (str, Path)):
            router = Router.from_pretrained(router)
        self.router = router
        self.weights: ops.RouterWeights | None = None
        if isinstance(router, Router):
            for name, made_for, here in (
                ("hidden size", router.config.hidden_size, hidden_size),
                ("depth", router.config.depth, depth),
            ):
                if made_for != here:
                    raise ValueError(f"generate: router was made for {name} {made_for}, this call has {name} {here}")
            weights = router.packed()
            self.weights = weights._replace(data=weights.data.to(device))
        elif router is not None and not callable(router):
            raise TypeError(
                f"generate: router is a {type(router).__name__}, "
                "expected a Router, a path or Hub id, a callable or None"
            )

    def copy(self) -> Routing:
        """The same with weights of its own."""
        other = copy.copy(self)
        if self.weights is not None:
            other.weights = self.weights._replace(data=self.weights.data.clone())
        return other

    @property
    def module(self) -> nn.Module | None:
        """What a trajectory's fingerprint is taken of."""
        return self.router if isinstance(self.router, nn.Module) else None

    def choose(
        self, hidden: Tensor | None, valid: Tensor, active: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B, K]`` and choices ``[B]`` (-1 where not active); argmax without uniforms."""
        if self.weights is not None:
            assert hidden is not None
            return ops.route(
                hidden if hidden.dtype != torch.float64 else hidden.float(), self.weights,
                width=self.width, depth=self.depth, temperature=self.temperature,
                uniforms=uniforms, valid=valid, active=active, backend=self.backend,
            )  # fmt: skip
        exists = valid[:, : self.width]
        scores = torch.zeros(exists.shape, dtype=torch.float32, device=exists.device)
        if self.router is not None:
            assert hidden is not None
            assert callable(self.router)
            scores = self.router(hidden, valid)
            if not isinstance(scores, Tensor):
                raise TypeError(f"generate: router returned a {type(scores).__name__}, expected a tensor [B, K]")
            if scores.shape != exists.shape:
                raise ValueError(
                    f"generate: router returned shape {list(scores.shape)}, expected [B, K] = {list(exists.shape)}"
                )
            scores = scores.float()
            _check_scores(scores, exists, active)
        log_probs = routing_log_probs(scores, exists, active, self.temperature)
        return log_probs, torch.where(active, _draw(log_probs, uniforms), -1)


def _check_scores(scores: Tensor, exists: Tensor, active: Tensor) -> None:
    """A function may exclude a candidate by -inf, but not all of them, and may give neither NaN nor +inf."""
    shown = torch.where(exists & active[:, None], scores, -torch.inf)
    bad = active & ((shown.isnan() | (shown == torch.inf)).any(-1) | (shown == -torch.inf).all(-1))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"generate: router returned the scores {scores[row].tolist()} for row {row}, expected numbers below "
            "infinity, at least one of them finite"
        )


def _draw(log_probs: Tensor, uniforms: Tensor | None) -> Tensor:
    """The first candidate whose running probability exceeds the uniform number; the argmax without one."""
    if uniforms is None:
        return log_probs.argmax(-1)
    probability = log_probs.double().exp()
    running = probability.cumsum(-1)
    # Clamped to the last candidate of positive probability, should rounding leave a rest.
    last = torch.where(probability > 0, torch.arange(log_probs.shape[1], device=log_probs.device), -1).amax(-1)
    return torch.minimum((running <= uniforms[:, None]).sum(-1), last)
