"""Training: the likelihood of trajectories, the loss, and the plug-ins of trainers."""
