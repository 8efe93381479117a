"""Training: the likelihood of trajectories and the loss on it; ``training.trl`` has the plug-in for TRL's trainer."""

from lbr_kernels.training.likelihood import TrajectoryLogProbs, trajectory_log_probs
from lbr_kernels.training.loss import Advantages, PolicyLoss, group_advantages, grpo_loss, policy_loss

__all__ = [
    "Advantages",
    "PolicyLoss",
    "TrajectoryLogProbs",
    "group_advantages",
    "grpo_loss",
    "policy_loss",
    "trajectory_log_probs",
]
