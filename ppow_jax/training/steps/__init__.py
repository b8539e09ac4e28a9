"""Training steps: pure functions from a state and a batch to the next state and metrics."""
