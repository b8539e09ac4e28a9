"""The clipped, group-relative, target-anchored objective over windows.

Sources: PPOW (2605.14978), PPO (1707.06347), GRPO (2402.03300).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def group_advantage(reward_xG: Array, delta: float = 1e-4) -> Array:
    """(R - mean) / (std + delta) inside each group; a group whose rewards are equal gets zeros."""
    above_xG = centred(reward_xG)
    return above_xG / (jnp.sqrt(jnp.mean(above_xG**2, -1, keepdims=True)) + delta)


def centred(reward_xG: Array) -> Array:
    """R - mean inside each group; zeros for a group whose rewards are equal."""
    above_xG = reward_xG - reward_xG.mean(-1, keepdims=True)
    return jnp.where(flat_groups(reward_xG)[..., None], 0.0, above_xG)  # the mean of equal numbers may be rounded


def flat_groups(reward_xG: Array) -> Array:
    """True for each group whose rewards are all equal, and which therefore has no gradient."""
    return reward_xG.max(-1) - reward_xG.min(-1) < 1e-6


def decisive_tokens(accepted_xG: Array, r_dist_xG: Array, K: int) -> Array:
    """mask_xGxK of the drafted tokens that the reward depends on, for groups of G windows.

    Under token-by-token verification the tokens after the first rejection cannot change R_speedup, so leaving them out
    is exact and reduces variance. R_dist scores the whole window where nothing was accepted: there all tokens count if
    it differs between such windows of the group; if it is equal for all of them it carries no signal about their
    tokens.
    """
    none_xG = accepted_xG == 0
    most = jnp.where(none_xG, r_dist_xG, -jnp.inf).max(-1, keepdims=True)
    least = jnp.where(none_xG, r_dist_xG, jnp.inf).min(-1, keepdims=True)
    whole_xG = none_xG & (most > least)
    return (jnp.arange(K) <= accepted_xG[..., None]) | whole_xG[..., None]


def decision_logp(logp_xK: Array, target_logp: Array, accepted: Array) -> Array:
    """Joint log-probability of drafting each token and of its acceptance decision, [..., K].

    Under p/q rejection a token is accepted with probability min(1, p / q): drafted and accepted has probability
    min(p, q), drafted and rejected max(q - p, 0). logp_xK: log q. target_logp: log p, [..., K]. accepted: the number of
    accepted tokens of each window, [...]. Tokens after the first rejection keep log q; they are masked out elsewhere.
    """
    place_K = jnp.arange(logp_xK.shape[-1])
    gap_xK = jnp.maximum(-jnp.expm1(target_logp - logp_xK), 1e-6)  # 1 - p/q, for a token that was rejected
    rejected_xK = logp_xK + jnp.log(gap_xK)
    decided_xK = jnp.where(place_K == accepted[..., None], rejected_xK, logp_xK)
    return jnp.where(place_K < accepted[..., None], jnp.minimum(logp_xK, target_logp), decided_xK)


class Surrogate(NamedTuple):
    """objective: to be maximised, mean over valid windows. clipped: fraction of windows at the clip. ratio: mean."""

    objective: Array
    clipped: Array
    ratio: Array


def clipped_surrogate(
    logp_NxK: Array,
    old_logp_NxK: Array,
    decisive_NxK: Array,
    advantage_N: Array,
    valid_N: Array,
    clip: float,
    count: Array | None = None,
) -> Surrogate:
    """mean min(r A, clip(r, 1 - clip, 1 + clip) A), r = pi(window) / pi_old(window) over the decisive tokens.

    count: number of valid windows in the whole batch, if these are only a part of it.
    """
    difference_NxK = jnp.where(decisive_NxK, logp_NxK - old_logp_NxK, 0.0)
    ratio_N = jnp.exp(jnp.clip(difference_NxK.sum(-1), -20.0, 20.0))
    bounded_N = jnp.clip(ratio_N, 1.0 - clip, 1.0 + clip)
    gain_N = jnp.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    count = jnp.maximum(valid_N.sum() if count is None else count, 1)

    def mean(x_N: Array) -> Array:
        return jnp.sum(jnp.where(valid_N, x_N, 0.0)) / count

    return Surrogate(mean(gain_N), mean((bounded_N * advantage_N < ratio_N * advantage_N) * 1.0), mean(ratio_N))
