"""How long a window should be, decided while it is drafted, and whether to draft at all.

Before each further token, or level of a tree, the drafter decides whether to go on; of a tree it then decides how many
nodes are verified. Two rules, both over the chances of paths to be accepted, which are the drafter's own probabilities.

throughput: what can be gained is worth more than it costs, valued at the tokens per time that decoding reaches now. A
row learns from its own rounds how far its drafter's chances can be trusted.
threshold: the chance is at least `Stopping.threshold`.

Where rounds gain less than plain decoding, drafting rests, and tries again later: long enough to make up for what the
try lost, and each rest at least twice as long as the one before.

The rows of a batch decide together, since all of them pay for a round: by the means of their gains and their paces.
Sampled chains do not: their tokens depend on where a window ends, so a row would depend on its neighbours. There a row
should count what it costs all of them, see `Prices.alone`.

Lossless at any temperature: a decision sees tokens that are kept in the window, and none that was drawn is taken back
(a token dropped because of its own probability would bias the output). The nodes of a tree are not drawn: they are a
function of the prefix and of what the rows have gained so far, so any of them may be left out.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.config import require

Array = jax.Array

RULES = ("throughput", "threshold")
MEMORY = 0.9  # weight of the past in the running sums of a row
MARGIN = 1.15  # a gain is a guess, its price is certain: by so much it must exceed it (best of 1 to 1.35 on SmolLM2)
TRIAL, RETRIAL = 8, 3  # windows drafted before drafting may rest: at first, and after a rest
BUDGET = 2.0  # steps of plain decoding that a try may lose
SHARE = 0.015  # of the time that tries may lose: how long a rest is
FIRST_REST, LONGEST_REST = 24, 256  # rounds


@dataclasses.dataclass(frozen=True)
class Stopping:
    """When a window ends, see the module. Hashable: static in every program.

    rule: one of RULES. threshold: of the rule of that name.
    """

    rule: str = "throughput"
    threshold: float = 0.1

    def __post_init__(self):
        require(self.rule in RULES, f"--stop_rule={self.rule}: must be one of {', '.join(RULES)}")
        rule = "must be above 0 and at most 1"
        require(0 < self.threshold <= 1, f"--stop_threshold={self.threshold}: {rule}")


class Prices(NamedTuple):
    """What the parts of a round cost here, in steps of plain decoding.

    step: one draft step. verify_N1: verifying 0..N drafted tokens.
    """

    step: Array
    verify_N1: Array

    @classmethod
    def of(cls, step: float, verify_N1: np.ndarray) -> "Prices":
        """As float32 arrays, which every program takes alike."""
        return cls(jnp.asarray(step, jnp.float32), jnp.asarray(verify_N1, jnp.float32))

    def alone(self, rows: int) -> "Prices":
        """To a row that decides by itself: what all rows lose in a round, whether or not others draft as well."""
        return Prices(rows * self.step, 1 + rows * (self.verify_N1 - 1))

    def of_step(self, steps: int, widens: bool) -> Array:
        """Of one more draft step after `steps`. widens: what it drafts is certain to be verified, which counts too."""
        return self.step + (self.verify_N1[steps + 1] - self.verify_N1[steps] if widens else 0.0)

    def of_round(self, steps_B: Array, drafted_B: Array) -> Array:
        """[B]: of rounds with so many draft steps and verified drafts."""
        return self.step * steps_B + self.verify_N1[drafted_B]


class Pace(flax.struct.PyTreeNode):
    """What each row has gained lately. All [B].

    tokens, cost, accepted, expected, judged: decayed sums over rounds, of committed tokens, of cost in steps of plain
    decoding, of accepted drafts, of accepted drafts as their chances had it, and of draft steps whose predecessors were
    all accepted. trial: windows until the row may rest. rest: rounds left without drafts. pause: how long the next rest
    is.
    """

    tokens_B: Array
    cost_B: Array
    accepted_B: Array
    expected_B: Array
    judged_B: Array
    trial_B: Array
    rest_B: Array
    pause_B: Array

    @classmethod
    def start(cls, B: int) -> "Pace":
        """As fast as plain decoding, about to try; half of the drafts accepted, as expected."""
        one, whole = jnp.ones(B), jnp.ones(B, jnp.int32)
        return cls(one, one, one, one, 2 * one, TRIAL * whole, 0 * whole, FIRST_REST * whole)

    @property
    def rate_B(self) -> Array:
        """Tokens per step of plain decoding; what decoding without drafts reaches is the least."""
        return jnp.maximum(self.tokens_B / self.cost_B, 1.0)

    @property
    def trust_B(self) -> Array:
        """Accepted drafts by expected ones."""
        return self.accepted_B / self.expected_B

    @property
    def usual_B(self) -> Array:
        """Share of draft steps that were right, of those that could be."""
        return self.accepted_B / self.judged_B

    @property
    def drafts_B(self) -> Array:
        """Rows that draft in this round."""
        return self.rest_B == 0


def together(x_B: Array, live_B: Array | None) -> Array:
    """The mean over the live rows, for all rows; as it is where rows decide by themselves (None). [B, ...]."""
    if live_B is None:
        return x_B
    live_B = live_B.reshape(-1, *[1] * (x_B.ndim - 1))
    mean = jnp.where(live_B, x_B, 0).sum(0) / jnp.maximum(live_B.sum(), 1)
    return jnp.broadcast_to(mean, x_B.shape)


def goes_on(
    pace: Pace, stopping: Stopping, price: Array, logp_BxX: Array, live_B: Array | None = None
) -> Array:
    """[B]: whether one more draft step pays.

    price: of the step and of verifying what it adds, if that is certain to be verified. logp_BxX: the log-chance of
    each path that the step would extend. live_B: the rows that decide together, see `together`.
    """
    if stopping.rule == "threshold":
        return logp_BxX.max(-1) >= np.log(stopping.threshold)
    reached_B = jnp.minimum(pace.trust_B * jnp.exp(logp_BxX).sum(-1), 1.0)
    gain_B, rate_B = together(reached_B * pace.usual_B, live_B), together(pace.rate_B, live_B)
    return gain_B > MARGIN * rate_B * price


def kept(
    pace: Pace, stopping: Stopping, verify_N1: Array, logp_BxN: Array, live_B: Array | None = None
) -> Array:
    """[B]: how many of the N best nodes of a tree are worth verifying. logp_BxN: their paths' log-chances, falling."""
    if stopping.rule == "threshold":
        return (logp_BxN >= np.log(stopping.threshold)).sum(-1)
    gained_BxN = together(jnp.cumsum(pace.trust_B[:, None] * jnp.exp(logp_BxN), -1), live_B)
    price_BxN1 = MARGIN * together(pace.rate_B, live_B)[:, None] * verify_N1
    worth_BxN1 = jnp.pad(gained_BxN, ((0, 0), (1, 0))) - price_BxN1
    return jnp.argmax(worth_BxN1, -1)


def update(
    pace: Pace,
    accepted_B: Array,
    steps_B: Array,
    depth_B: Array,
    expected_B: Array,
    cost_B: Array,
    live_B: Array | None = None,
) -> Pace:
    """After a round that accepted so many drafts, at a cost in steps of plain decoding.

    steps_B: draft steps. depth_B: the most drafts that could be accepted. expected_B: what their chances added up to.
    live_B: the rows that decide together, see `together`.
    """
    drafts_B = steps_B > 0

    def fade(sum_B, new_B):
        return jnp.where(drafts_B, MEMORY * sum_B + new_B, sum_B)

    tokens_B, spent_B = fade(pace.tokens_B, accepted_B + 1), fade(pace.cost_B, cost_B)
    tried = 1 if live_B is None else live_B.sum(dtype=jnp.int32)  # windows that were drafted for one decision
    trial_B = jnp.where(drafts_B, jnp.maximum(pace.trial_B - tried, 0), pace.trial_B)
    lost_B = together(spent_B - tokens_B, live_B)
    tired_B = drafts_B & (lost_B > 0) & ((trial_B == 0) | (lost_B > BUDGET))
    earned_B = jnp.ceil(jnp.minimum(lost_B / SHARE, LONGEST_REST)).astype(jnp.int32)
    pause_B = jnp.maximum(pace.pause_B, earned_B)
    rest_B = jnp.where(tired_B, pause_B, jnp.maximum(pace.rest_B - 1, 0))
    back_B = ~drafts_B & (rest_B == 0)  # begins anew
    longer_B = jnp.minimum(2 * pause_B, LONGEST_REST)
    return Pace(
        jnp.where(back_B, 1.0, tokens_B),
        jnp.where(back_B, 1.0, spent_B),
        fade(pace.accepted_B, accepted_B),
        fade(pace.expected_B, expected_B),
        fade(pace.judged_B, jnp.minimum(accepted_B + 1, depth_B)),
        trial_B=jnp.where(back_B, RETRIAL, trial_B),
        rest_B=rest_B,
        pause_B=jnp.where(tired_B, longer_B, pace.pause_B),
    )
