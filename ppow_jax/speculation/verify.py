"""Which drafted tokens the target keeps, and the token it adds: the acceptance rules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.speculation.sampling import Sampling, log_distribution

Array = jax.Array


class Verdict(NamedTuple):
    """accepted_...: how many of the K drafted tokens are kept. token_...xK1: the kept ones, then the target's own
    token at index `accepted`, then padding (repeats of it)."""

    accepted: Array
    token: Array


def emitted(draft_xK: Array, accepted: Array, bonus: Array) -> Array:
    """The kept draft tokens followed by the target's token: [..., K1]."""
    padded_xK1 = jnp.concatenate([draft_xK, bonus[..., None]], -1)
    return jnp.where(jnp.arange(padded_xK1.shape[-1]) < accepted[..., None], padded_xK1, bonus[..., None])


def leading(match_xK: Array) -> Array:
    """Length of the leading run of True along the last axis, int32."""
    return jnp.cumprod(match_xK.astype(jnp.int32), axis=-1).sum(-1)


def accept_greedy(draft_xK: Array, argmax_xK1: Array) -> Verdict:
    """Keeps drafted tokens while each is the target's argmax; adds the argmax after them (temperature 0)."""
    accepted = leading(draft_xK == argmax_xK1[..., :-1])
    bonus = jnp.take_along_axis(argmax_xK1, accepted[..., None], -1)[..., 0]
    return Verdict(accepted, emitted(draft_xK, accepted, bonus))


def accept_sampled(
    key: Array,
    draft_xK: Array,
    draft_id_xK: Array,
    q_logits_xKxW: Array,
    target_ids_W: Array,
    p_logits_xK1xV: Array,
    sampling: Sampling,
) -> Verdict:
    """Token-wise rejection sampling (Leviathan et al., 2211.17192): keep while u * q < p, else draw from
    norm(max(p - q, 0)); after K kept tokens draw from p. Exact for q the law the drafts were drawn from.

    q_logits_xKxW are over the draft vocabulary, p_logits_xK1xV over the target's; both take `sampling`.
    """
    uniform_key, bonus_key = jax.random.split(key)
    log_p_xK1xV = log_distribution(p_logits_xK1xV, sampling)
    log_q_xKxW = log_distribution(q_logits_xKxW, sampling)
    p_of_draft = jnp.exp(jnp.take_along_axis(log_p_xK1xV[..., :-1, :], draft_xK[..., None], -1)[..., 0])
    q_of_draft = jnp.exp(jnp.take_along_axis(log_q_xKxW, draft_id_xK[..., None], -1)[..., 0])
    u = jax.random.uniform(uniform_key, draft_xK.shape)
    accepted = leading(u * q_of_draft < p_of_draft)

    at = accepted[..., None, None]
    p_xV = jnp.exp(jnp.take_along_axis(log_p_xK1xV, at, -2)[..., 0, :])
    K = draft_xK.shape[-1]
    q_xW = jnp.exp(jnp.take_along_axis(log_q_xKxW, jnp.minimum(at, K - 1), -2)[..., 0, :])
    q_xW = jnp.where(accepted[..., None] < K, q_xW, 0.0)  # all kept: the bonus comes from p itself
    residual_xV = jnp.maximum(p_xV.at[..., target_ids_W].add(-q_xW), 0.0)
    # Rounding can leave nothing where p and q are equal; p is then the right law.
    residual_xV = jnp.where(residual_xV.sum(-1, keepdims=True) > 0, residual_xV, p_xV)
    bonus = jax.random.categorical(bonus_key, jnp.log(residual_xV), axis=-1).astype(jnp.int32)
    return Verdict(accepted, emitted(draft_xK, accepted, bonus))
