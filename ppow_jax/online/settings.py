"""Settings of online adaptation."""

import dataclasses

from ppow_jax.flags import require

OBJECTIVES = ("recipe", "supervised")
OPTIMIZERS = ("muon", "adamw")


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """Settings of an adaptation. Hashable.

    budget: most of the time that adaptation may take while requests are decoded, as a share of both together; idle time
      is free.
    objective: recipe (the exact estimator of PPOW's reward at temperature 0.5, plus the supervised loss) or supervised
      (training-time test).
    learning_rate: of all steps, after a warm-up of WARMUP steps. optimizer: see `training.optimizers`.
    draft_steps: K, drafted tokens per window, in training and in replays.
    row_length, max_anchors: tokens and trained positions of a training row. Longer requests are cut.
    passes: training steps on each row, at most.
    rows: rows that wait at most; the oldest is dropped first.
    window: answers of the moving window over which the drafters are compared.
    least: answers that are replayed before each decision about a new drafter.
    """

    budget: float = 0.05
    objective: str = "recipe"
    learning_rate: float = 1.5e-3
    optimizer: str = "muon"
    draft_steps: int = 4
    row_length: int = 512
    max_anchors: int = 352
    passes: int = 1
    rows: int = 16
    window: int = 64
    least: int = 4

    def __post_init__(self):
        require(0 < self.budget <= 1, f"--online_budget={self.budget}: must be above 0 and at most 1")
        rule = f"must be one of {', '.join(OBJECTIVES)}"
        require(self.objective in OBJECTIVES, f"--online_objective={self.objective}: {rule}")
        require(self.learning_rate > 0, f"--online_learning_rate={self.learning_rate}: must be above 0")
        rule = f"must be one of {', '.join(OPTIMIZERS)}"
        require(self.optimizer in OPTIMIZERS, f"optimizer={self.optimizer}: {rule}")
        for name in ("draft_steps", "passes", "rows", "least"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        rule = f"must be more than draft_steps={self.draft_steps}, and at most row_length={self.row_length}"
        require(self.draft_steps < self.max_anchors <= self.row_length, f"max_anchors={self.max_anchors}: {rule}")
        require(self.window >= self.least, f"window={self.window}: must be at least least={self.least}")
