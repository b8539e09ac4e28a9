"""The clipped, group-relative, target-anchored objective over windows (PPOW, 2605.14978; PPO, 1707.06347; GRPO,
2402.03300).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def group_advantage(reward_xG: Array, delta: float = 1e-4) -> Array:
    """(R - mean) / (std + delta) inside each group; a group whose rewards are equal gets zeros."""
    centred = reward_xG - reward_xG.mean(-1, keepdims=True)
    return centred / (jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True)) + delta)


def flat_groups(reward_xG: Array) -> Array:
    """True for each group whose rewards are all equal: it teaches nothing."""
    return reward_xG.max(-1) - reward_xG.min(-1) < 1e-6


def decisive_tokens(accepted: Array, K: int, whole_if_none: bool) -> Array:
    """mask_...xK of the drafted tokens that the reward depends on.

    Under token-by-token verification the tokens after the first rejection cannot change R_speedup, so leaving them out
    is exact and cuts variance. whole_if_none: R_dist scores the whole window where nothing was accepted.
    """
    mask = jnp.arange(K) <= accepted[..., None]
    return mask | (accepted[..., None] == 0) if whole_if_none else mask


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

    count: valid windows of the batch that the mean is taken over, where these are a part of it.
    """
    difference_NxK = jnp.where(decisive_NxK, logp_NxK - old_logp_NxK, 0.0)
    ratio_N = jnp.exp(jnp.clip(difference_NxK.sum(-1), -20.0, 20.0))
    bounded_N = jnp.clip(ratio_N, 1.0 - clip, 1.0 + clip)
    gain_N = jnp.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    count = jnp.maximum(valid_N.sum() if count is None else count, 1)

    def mean(x_N):
        return jnp.sum(jnp.where(valid_N, x_N, 0.0)) / count

    return Surrogate(
        mean(gain_N), mean((bounded_N * advantage_N < ratio_N * advantage_N) * 1.0), mean(ratio_N)
    )
