"""Data, rollouts, optimisation steps and the training loop."""
