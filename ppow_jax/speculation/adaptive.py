"""How long a window should be, decided while it is drafted, and whether to draft at all.

Before each further token the drafter asks whether it is worth its cost: the chance that everything drafted so far is
accepted, times the usual acceptance, against the time that drafting and verifying one more would take, valued at the
tokens per time that decoding reaches now. Where rounds gain less than plain decoding, drafting rests, and tries again
later: each rest twice as long as the one before.

Lossless at any temperature: a decision sees tokens that are kept in the window, and none is taken back (a token dropped
because of its own probability would bias the output).
"""

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

MEMORY = 0.9  # weight of the past in the running sums of a row
TRIAL = 4  # rounds that a row drafts before it may rest
FIRST_REST, LONGEST_REST = 16, 256  # rounds


class Pace(flax.struct.PyTreeNode):
    """What each row has gained lately. All [B].

    tokens, cost, accepted, judged: decayed sums over rounds, of committed tokens, of cost in steps of plain decoding,
    of accepted drafts, and of drafts whose predecessors were all accepted. trial: rounds until the row may rest. rest:
    rounds left without drafts. pause: how long the next rest is.
    """

    tokens_B: Array
    cost_B: Array
    accepted_B: Array
    judged_B: Array
    trial_B: Array
    rest_B: Array
    pause_B: Array

    @classmethod
    def start(cls, B: int) -> "Pace":
        """As fast as plain decoding, about to try."""
        one, whole = jnp.ones(B), jnp.ones(B, jnp.int32)
        return cls(one, one, one, 2 * one, TRIAL * whole, 0 * whole, FIRST_REST * whole)

    @property
    def rate_B(self) -> Array:
        """Tokens per step of plain decoding."""
        return self.tokens_B / self.cost_B

    @property
    def drafts_B(self) -> Array:
        """Rows that draft in this round."""
        return self.rest_B == 0


def worth_going_on(pace: Pace, drafted: int, logp_B: Array, cost_K1: Array) -> Array:
    """[B]: whether one more token after `drafted` pays.

    logp_B: log-probability, the drafter's own, of all drafted so far. cost_K1: of a round that drafts 0..K tokens, in
    steps of plain decoding.
    """
    more = cost_K1[drafted + 1] - cost_K1[drafted]
    usual_B = pace.accepted_B / pace.judged_B
    return jnp.exp(logp_B) * usual_B > jnp.maximum(pace.rate_B, 1.0) * more


def update(pace: Pace, accepted_B: Array, window_B: Array, cost_B: Array) -> Pace:
    """After a round that accepted so many of window_B drafts. cost_B: what it took, in steps of plain decoding."""
    drafted_B = window_B > 0

    def fade(sum_B, new_B):
        return jnp.where(drafted_B, MEMORY * sum_B + new_B, sum_B)

    tokens_B, spent_B = fade(pace.tokens_B, accepted_B + 1), fade(pace.cost_B, cost_B)
    trial_B = jnp.where(drafted_B, jnp.maximum(pace.trial_B - 1, 0), pace.trial_B)
    tired_B = drafted_B & (trial_B == 0) & (tokens_B < spent_B)
    rest_B = jnp.where(tired_B, pace.pause_B, jnp.maximum(pace.rest_B - 1, 0))
    back_B = ~drafted_B & (rest_B == 0)  # begins anew
    longer_B = jnp.minimum(2 * pace.pause_B, LONGEST_REST)
    return Pace(
        jnp.where(back_B, 1.0, tokens_B),
        jnp.where(back_B, 1.0, spent_B),
        fade(pace.accepted_B, accepted_B),
        fade(pace.judged_B, jnp.minimum(accepted_B + 1, window_B)),
        jnp.where(back_B, TRIAL, trial_B),
        rest_B,
        jnp.where(tired_B, longer_B, pace.pause_B),
    )
