"""Adaptive windows: the length of a window, chosen while it is drafted, and the choice not to draft at all.

Before each further draft step (a token of a chain, a level of a tree), the drafter decides whether to continue; for a
tree it then decides how many nodes are verified. Both rules use the estimated probability that a path is accepted,
which is the drafter's own probability of that path.

throughput: a step is taken if its expected gain exceeds its cost, valued at the tokens per time that decoding currently
reaches. Each row keeps acceptance statistics of its own rounds, which calibrate the drafter's probabilities.
threshold: a step is taken if the probability is at least `Stopping.threshold`.

Where rounds gain less than plain decoding, drafting backs off for a while and is then tried again. A cooldown is long
enough to amortise what the failed trial lost, and at least twice as long as the one before, up to LONGEST_COOLDOWN.

The rows of a batch decide together, since every row bears the cost of a round: they use the means of their expected
gains and of their rates. Sampled chains do not: their tokens depend on where a window ends, so a row would depend on
its neighbours. There a row should count what its draft costs all rows, see `CostTable.alone`.

Lossless at any temperature: a decision depends only on tokens that are kept in the window, and no token that was drawn
is taken back (dropping a token because of its own probability would bias the output). The nodes of a tree are not
drawn: they are a function of the prefix and of the rows' statistics so far, so any of them may be left out.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.flags import require

Array = jax.Array

RULES = ("throughput", "threshold")
MEMORY = 0.9  # decay of a row's running sums per round
MARGIN = 1.15  # factor by which an estimated gain must exceed its (certain) cost (best of 1 to 1.35 on SmolLM2)
TRIAL, RETRIAL = 8, 3  # windows drafted before drafting may back off: at the start, and after a cooldown
BUDGET = 2.0  # steps of plain decoding that a trial may lose
SHARE = 0.015  # share of the time that trials may lose: determines the length of a cooldown
FIRST_COOLDOWN, LONGEST_COOLDOWN = 24, 256  # rounds


@dataclasses.dataclass(frozen=True)
class Stopping:
    """Rule that ends an adaptive window, see the module. Hashable: static in every program.

    rule: one of RULES. threshold: used by the rule of that name.
    """

    rule: str = "throughput"
    threshold: float = 0.1

    def __post_init__(self) -> None:
        require(self.rule in RULES, f"--stop_rule={self.rule}: must be one of {', '.join(RULES)}")
        rule = "must be above 0 and at most 1"
        require(0 < self.threshold <= 1, f"--stop_threshold={self.threshold}: {rule}")


class CostTable(NamedTuple):
    """Cost table of a round on this device, in steps of plain decoding.

    step: one draft step. verify_N1: verifying 0..N drafted tokens.
    """

    step: Array
    verify_N1: Array

    @classmethod
    def of(cls, step: float, verify_N1: np.ndarray) -> "CostTable":
        """Converts both to float32 arrays, so that every program sees the same types."""
        return cls(jnp.asarray(step, jnp.float32), jnp.asarray(verify_N1, jnp.float32))

    def alone(self, rows: int) -> "CostTable":
        """Costs for a row that decides by itself: the loss of all rows in a round, whether or not others draft too."""
        return CostTable(rows * self.step, 1 + rows * (self.verify_N1 - 1))

    def of_step(self, steps: int, widens: bool) -> Array:
        """Cost of one more draft step after `steps`. widens: adds the cost of verifying it, which is certain."""
        return self.step + (self.verify_N1[steps + 1] - self.verify_N1[steps] if widens else 0.0)

    def of_round(self, steps_B: Array, drafted_B: Array) -> Array:
        """Costs [B] of rounds with these numbers of draft steps and of verified drafts."""
        return self.step * steps_B + self.verify_N1[drafted_B]


class AcceptanceStats(flax.struct.PyTreeNode):
    """Acceptance statistics and back-off state of each row. All [B].

    tokens, cost, accepted, expected, reached: decayed sums over rounds, of committed tokens, of cost in steps of plain
    decoding, of accepted drafts, of the number of accepted drafts that the drafter's probabilities predict, and of
    draft steps whose predecessors were all accepted. trial: windows left before the row may back off. cooldown:
    rounds left of the current one. next_cooldown: length of the next one, in rounds.
    """

    tokens_B: Array
    cost_B: Array
    accepted_B: Array
    expected_B: Array
    reached_B: Array
    trial_B: Array
    cooldown_B: Array
    next_cooldown_B: Array

    @classmethod
    def start(cls, B: int) -> "AcceptanceStats":
        """Initial statistics: as fast as plain decoding, in a trial, half of the drafts accepted as predicted."""
        one, whole = jnp.ones(B), jnp.ones(B, jnp.int32)
        return cls(one, one, one, one, 2 * one, TRIAL * whole, 0 * whole, FIRST_COOLDOWN * whole)

    @property
    def rate_B(self) -> Array:
        """Tokens per step of plain decoding, at least 1, the rate of decoding without drafts."""
        return jnp.maximum(self.tokens_B / self.cost_B, 1.0)

    @property
    def calibration_B(self) -> Array:
        """Calibration factor: accepted drafts divided by predicted ones."""
        return self.accepted_B / self.expected_B

    @property
    def acceptance_rate_B(self) -> Array:
        """Acceptance rate of draft steps whose predecessors were all accepted."""
        return self.accepted_B / self.reached_B

    @property
    def drafts_B(self) -> Array:
        """Rows that draft in this round, that is those not in a cooldown."""
        return self.cooldown_B == 0


def together(x_B: Array, live_B: Array | None) -> Array:
    """The mean over the live rows, for all rows; x_B itself where rows decide by themselves (None). [B, ...]."""
    if live_B is None:
        return x_B
    live_B = live_B.reshape(-1, *[1] * (x_B.ndim - 1))
    mean = jnp.where(live_B, x_B, 0).sum(0) / jnp.maximum(live_B.sum(), 1)
    return jnp.broadcast_to(mean, x_B.shape)


def continues(
    stats: AcceptanceStats, stopping: Stopping, price: Array, logp_BxX: Array, live_B: Array | None = None
) -> Array:
    """Decides for each row [B] whether one more draft step is worth its cost.

    price: cost of the step, and of verifying its tokens if these are certain to be verified. logp_BxX: log-probability
    of each path that the step would extend. live_B: the rows that decide together, see `together`.
    """
    if stopping.rule == "threshold":
        return logp_BxX.max(-1) >= np.log(stopping.threshold)
    reached_B = jnp.minimum(stats.calibration_B * jnp.exp(logp_BxX).sum(-1), 1.0)
    gain_B, rate_B = together(reached_B * stats.acceptance_rate_B, live_B), together(stats.rate_B, live_B)
    return gain_B > MARGIN * rate_B * price


def kept(
    stats: AcceptanceStats, stopping: Stopping, verify_N1: Array, logp_BxN: Array, live_B: Array | None = None
) -> Array:
    """Numbers [B] of a tree's N best nodes worth verifying. logp_BxN: log-probabilities of their paths, descending."""
    if stopping.rule == "threshold":
        return (logp_BxN >= np.log(stopping.threshold)).sum(-1)
    gained_BxN = together(jnp.cumsum(stats.calibration_B[:, None] * jnp.exp(logp_BxN), -1), live_B)
    price_BxN1 = MARGIN * together(stats.rate_B, live_B)[:, None] * verify_N1
    worth_BxN1 = jnp.pad(gained_BxN, ((0, 0), (1, 0))) - price_BxN1
    return jnp.argmax(worth_BxN1, -1)


def update(
    stats: AcceptanceStats,
    accepted_B: Array,
    steps_B: Array,
    depth_B: Array,
    expected_B: Array,
    cost_B: Array,
    live_B: Array | None = None,
    gained_B: Array | None = None,
) -> AcceptanceStats:
    """Updates the statistics after a round, from its accepted drafts and its cost in steps of plain decoding.

    steps_B: draft steps. depth_B: the most drafts that could be accepted. expected_B: sum of the drafts' path
    probabilities. live_B: the rows that decide together, see `together`. gained_B: tokens that the round committed; by
    default the accepted drafts and the target's own token.
    """
    drafts_B = steps_B > 0
    gained_B = accepted_B + 1 if gained_B is None else gained_B

    def fade(sum_B: Array, new_B: Array) -> Array:
        return jnp.where(drafts_B, MEMORY * sum_B + new_B, sum_B)

    tokens_B, spent_B = fade(stats.tokens_B, gained_B), fade(stats.cost_B, cost_B)
    tried = 1 if live_B is None else live_B.sum(dtype=jnp.int32)  # windows drafted under one joint decision
    trial_B = jnp.where(drafts_B, jnp.maximum(stats.trial_B - tried, 0), stats.trial_B)
    lost_B = together(spent_B - tokens_B, live_B)
    backs_off_B = drafts_B & (lost_B > 0) & ((trial_B == 0) | (lost_B > BUDGET))
    earned_B = jnp.ceil(jnp.minimum(lost_B / SHARE, LONGEST_COOLDOWN)).astype(jnp.int32)
    next_cooldown_B = jnp.maximum(stats.next_cooldown_B, earned_B)
    cooldown_B = jnp.where(backs_off_B, next_cooldown_B, jnp.maximum(stats.cooldown_B - 1, 0))
    back_B = ~drafts_B & (stats.cooldown_B > 0) & (cooldown_B == 0)  # a cooldown ends: statistics start afresh
    longer_B = jnp.minimum(2 * next_cooldown_B, LONGEST_COOLDOWN)
    return AcceptanceStats(
        jnp.where(back_B, 1.0, tokens_B),
        jnp.where(back_B, 1.0, spent_B),
        fade(stats.accepted_B, accepted_B),
        fade(stats.expected_B, expected_B),
        fade(stats.reached_B, jnp.minimum(accepted_B + 1, depth_B)),
        trial_B=jnp.where(back_B, RETRIAL, trial_B),
        cooldown_B=cooldown_B,
        next_cooldown_B=jnp.where(backs_off_B, longer_B, stats.next_cooldown_B),
    )
