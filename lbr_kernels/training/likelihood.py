"""The likelihood of a trajectory, with gradients, from one forward of the model (paper, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lbr_kernels.decoding.trajectory import TreeTrajectory
from lbr_kernels.router import Router


@dataclass(frozen=True)
class TrajectoryLogProbs:
    """Log-probabilities under the current parameters, of the shapes that the trajectory's own have.

    Attributes:
        node_log_probs: fp32 ``[rows, nodes]`` of every grown node's token, 0 where there is no node.
        router_log_probs: fp32 ``[rows, steps]`` of every choice, 0 where there is none.
        node_entropies: fp32 ``[rows, nodes]``, entropy in nats of the distribution that a node was drawn from; None if
            not asked for. It has no gradient unless it was asked for with one.
        router_entropies: fp32 ``[rows, steps]``, the same of the router's.
        forwarded_nodes: how many nodes the model was run on, prompts included.
    """

    node_log_probs: Tensor
    router_log_probs: Tensor
    node_entropies: Tensor | None
    router_entropies: Tensor | None
    forwarded_nodes: int


def trajectory_log_probs(
    model: nn.Module,
    router: Router | None,
    trajectory: TreeTrajectory,
    *,
    entropies: bool = False,
    detach_router_input: bool = False,
    allow_filters: bool = False,
    on_policy: bool = False,
    share_prompts: bool = True,
    chunk_size: int = 1024,
    backend: str | None = None,
) -> TrajectoryLogProbs:
    """See the class; the body is on its way."""
    raise NotImplementedError
