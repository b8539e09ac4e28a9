"""Data, rollouts, optimizer steps and the training loop."""
