"""ADAW: chooses the windows that are worth a rollout (PPOW, 2605.14978)."""

import functools

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import inner

Array = jax.Array


def criticality(entropy: Array, divergence: Array, vocab_size: int) -> Array:
    """v = C(P) * KL(P || Q), C(P) = 1 - H(P) / log |V|: high where the target is confident and the drafter disagrees.

    entropy: H(P) in nats over the whole vocabulary; divergence: KL(P || Q) in nats; any equal shapes.
    """
    return jnp.clip(1.0 - entropy / jnp.log(float(vocab_size)), 0.0, 1.0) * divergence


def divergence(p_xW: Array, q_logits_xW: Array) -> Array:
    """KL(P || Q) in nats over the last axis, P a distribution over the draft vocabulary, Q given by logits."""
    log_p = jnp.log(jnp.maximum(p_xW, 1e-20))
    return inner(p_xW, log_p - jax.nn.log_softmax(q_logits_xW, axis=-1))


def window_means(v_BxM: Array, K: int) -> Array:
    """Mean of v over m .. m+K-1 (zero past the end): a window's criticality, at the anchor where it starts."""
    padded = jnp.pad(v_BxM, ((0, 0), (0, K - 1)))
    return functools.reduce(jnp.add, [padded[:, s : s + v_BxM.shape[1]] for s in range(K)]) / K


def choose_windows(key_B: Array, weight_BxM: Array, allowed_BxM: Array, A: int) -> tuple[Array, Array]:
    """Draws A distinct anchors per row without replacement, with probability proportional to weight, by Gumbel top-k.

    key_B: one per row. Returns (index_BxA into M, valid_BxA: False where a row has fewer than A allowed anchors).
    """
    gumbel_BxM = jax.vmap(lambda key: jax.random.gumbel(key, weight_BxM.shape[1:]))(key_B)
    score_BxM = jnp.log(jnp.maximum(weight_BxM, 1e-12)) + gumbel_BxM
    top_BxA, index_BxA = jax.lax.top_k(jnp.where(allowed_BxM, score_BxM, -jnp.inf), A)
    return index_BxA, jnp.isfinite(top_BxA)
