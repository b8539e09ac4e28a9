"""Which drafted tokens the target keeps, and the token it adds: the acceptance rules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.speculation.sampling import Sampling, log_distribution

Array = jax.Array


class Verdict(NamedTuple):
    """accepted_...: how many of the K drafted tokens are kept. token_...xK1: the kept ones, then the target's own
    token at index `accepted`, then padding (repeats of it).
    """

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


def acceptance_probability(p: Array, q: Array) -> Array:
    """Chance of keeping a token that was drawn with probability q where the target gives it p: min(1, p / q)."""
    return jnp.minimum(p / jnp.maximum(q, jnp.finfo(q.dtype).tiny), 1.0)


def residual(p_xV: Array, q_xV: Array) -> Array:
    """Law of the token that replaces a rejected one: norm(max(p - q, 0)).

    Rounding can leave nothing where p and q are equal; p is then the right law.
    """
    rest_xV = jnp.maximum(p_xV - q_xV, 0.0)
    total = rest_xV.sum(-1, keepdims=True)
    return jnp.where(total > 0, rest_xV / jnp.where(total > 0, total, 1.0), p_xV)


def accept_sampled(
    key: Array,
    draft_xK: Array,
    draft_id_xK: Array,
    q_logits_xKxW: Array,
    target_ids_W: Array,
    p_logits_xK1xV: Array,
    sampling: Sampling,
) -> Verdict:
    """Token-wise rejection sampling (Leviathan et al., 2211.17192): a drafted token is kept with
    `acceptance_probability`, the first one that is not gives way to a draw from `residual`; after K kept tokens
    comes a draw from p. Exact for q the law the drafts were drawn from.

    q_logits_xKxW are over the draft vocabulary, p_logits_xK1xV over the target's; both take `sampling`.
    """
    uniform_key, bonus_key = jax.random.split(key)
    log_p_xK1xV = log_distribution(p_logits_xK1xV, sampling)
    log_q_xKxW = log_distribution(q_logits_xKxW, sampling)
    p_of_draft = jnp.exp(jnp.take_along_axis(log_p_xK1xV[..., :-1, :], draft_xK[..., None], -1)[..., 0])
    q_of_draft = jnp.exp(jnp.take_along_axis(log_q_xKxW, draft_id_xK[..., None], -1)[..., 0])
    u = jax.random.uniform(uniform_key, draft_xK.shape)
    accepted = leading(u < acceptance_probability(p_of_draft, q_of_draft))

    at = accepted[..., None, None]
    p_xV = jnp.exp(jnp.take_along_axis(log_p_xK1xV, at, -2)[..., 0, :])
    K = draft_xK.shape[-1]
    q_xW = jnp.exp(jnp.take_along_axis(log_q_xKxW, jnp.minimum(at, K - 1), -2)[..., 0, :])
    q_xV = jnp.zeros_like(p_xV).at[..., target_ids_W].set(q_xW)
    law_xV = jnp.where(accepted[..., None] < K, residual(p_xV, q_xV), p_xV)
    bonus = jax.random.categorical(bonus_key, jnp.log(law_xV), axis=-1).astype(jnp.int32)
    return Verdict(accepted, emitted(draft_xK, accepted, bonus))
