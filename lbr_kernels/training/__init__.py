"""Training: the likelihood of trajectories, the loss, and the plug-ins of trainers."""

from lbr_kernels.training.likelihood import TrajectoryLogProbs, trajectory_log_probs

__all__ = ["TrajectoryLogProbs", "trajectory_log_probs"]
