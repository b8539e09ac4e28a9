"""Reductions over the vocabulary: a fast argmax, and statistics that never hold [..., V]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import linear

Array = jax.Array


def argmax(z: Array) -> Array:
    """`jnp.argmax(z, -1)` as int32, lowest index first, in two plain reductions.

    XLA:CPU does not vectorise the reduction over (value, index) pairs; this form is about ten times faster there.
    A row that holds a NaN gives its last index.
    """
    last = z.shape[-1] - 1
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    return jnp.min(jnp.where(z == z.max(-1, keepdims=True), index, last), -1)


class Survey(NamedTuple):
    """Of softmax(hidden head^T / temperature), per row: argmax_N int32, its logsumexp_N, entropy_N (nats)."""

    argmax_N: Array
    logsumexp_N: Array
    entropy_N: Array


def survey(hidden_NxD: Array, head_VxD: Array, temperature: float = 1.0, chunk: int = 8192) -> Survey:
    """Streams over the vocabulary in chunks of rows of the head, so that at most [N, chunk] logits exist.

    Ties go to the lowest id, as in `argmax` over the whole vocabulary.
    """
    N, V = hidden_NxD.shape[0], head_VxD.shape[0]
    best_N, argmax_N = jnp.full(N, -jnp.inf), jnp.zeros(N, jnp.int32)
    total_N, weighted_N = jnp.zeros(N), jnp.zeros(N)  # sum of e^(z - best), and of z e^(z - best)
    for start in range(0, V, chunk):
        z_NxC = linear(hidden_NxD, head_VxD[start : start + chunk]) / temperature
        top_N = z_NxC.max(-1)
        argmax_N = jnp.where(top_N > best_N, start + argmax(z_NxC), argmax_N)
        new_N = jnp.maximum(best_N, top_N)
        scale_N = jnp.exp(best_N - new_N)
        e_NxC = jnp.exp(z_NxC - new_N[:, None])
        total_N = total_N * scale_N + e_NxC.sum(-1)
        weighted_N = weighted_N * scale_N + (e_NxC * z_NxC).sum(-1)
        best_N = new_N
    logsumexp_N = best_N + jnp.log(total_N)
    return Survey(argmax_N, logsumexp_N, logsumexp_N - weighted_N / total_N)
