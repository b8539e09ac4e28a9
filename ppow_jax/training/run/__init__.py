"""Running a stage: the loop, checkpoints, metrics, signals, profiles."""
