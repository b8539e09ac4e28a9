"""Reductions over the vocabulary: a fast argmax, and statistics that never materialise [..., V]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models.layers import inner, linear

Array = jax.Array


def argmax(z: Array) -> Array:
    """`jnp.argmax(z, -1)` as int32, lowest index first, in two plain reductions.

    XLA:CPU does not vectorise the reduction over (value, index) pairs; this form is about ten times faster there.
    A row that holds a NaN gives its last index.
    """
    last = z.shape[-1] - 1
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    return jnp.min(jnp.where(z == z.max(-1, keepdims=True), index, last), -1)


def top_k(z: Array, k: int, groups: int = 64) -> tuple[Array, Array]:
    """The k largest of the last axis, descending, and their indices, as `jax.lax.top_k`; ties in any order.

    The k groups with the largest maxima contain them all. XLA:CPU's own selection over 8192 takes as long as a
    vocabulary softmax; computing a maximum per group first makes it three times as fast.
    """
    V = z.shape[-1]
    if V % groups or k > groups:
        return jax.lax.top_k(z, k)
    grouped = z.reshape(*z.shape[:-1], groups, V // groups)
    _, group = jax.lax.top_k(grouped.max(-1), k)
    held = jnp.take_along_axis(grouped, group[..., None], -2).reshape(*z.shape[:-1], -1)
    value, place = jax.lax.top_k(held, k)
    first = jnp.take_along_axis(group, place // (V // groups), -1) * (V // groups)
    return value, first + place % (V // groups)


class Survey(NamedTuple):
    """Statistics of softmax(hidden head^T / temperature), per row: argmax_N int32, logsumexp_N, entropy_N (nats)."""

    argmax_N: Array
    logsumexp_N: Array
    entropy_N: Array


def survey(hidden_NxD: Array, head_VxD: Array, temperature: float = 1.0, chunk: int = 8192) -> Survey:
    """Streams over the vocabulary in chunks of rows of the head, so that at most [N, chunk] logits exist.

    Ties go to the lowest id, as in `argmax` over the whole vocabulary. On a mesh that shards the vocabulary, its P
    parts are streamed in parallel, each on its own device, and combined at the end.
    """
    N, V = hidden_NxD.shape[0], head_VxD.shape[0]
    P = sharding.parts("vocab", V)
    head_PxVxD = head_VxD.reshape(P, V // P, -1)
    best, index = jnp.full((N, P), -jnp.inf), jnp.zeros((N, P), jnp.int32)
    total, weighted = jnp.zeros((N, P)), jnp.zeros((N, P))  # sum of e^(z - best), and of z e^(z - best)
    for start in range(0, V // P, max(1, chunk // P)):
        rows_PxCxD = head_PxVxD[:, start : start + max(1, chunk // P)]
        z_NxPxC = linear(hidden_NxD, rows_PxCxD.reshape(-1, head_VxD.shape[1])).reshape(N, P, -1) / temperature
        top = z_NxPxC.max(-1)
        index = jnp.where(top > best, start + argmax(z_NxPxC), index)
        new = jnp.maximum(best, top)
        scale, best = jnp.exp(best - new), new
        e_NxPxC = jnp.exp(z_NxPxC - best[..., None])
        total = total * scale + e_NxPxC.sum(-1)
        weighted = weighted * scale + inner(e_NxPxC, z_NxPxC)
    best_N = best.max(-1)
    first_N = argmax(best)  # ties go to the first, which has the lowest ids
    argmax_N = first_N * (V // P) + jnp.take_along_axis(index, first_N[:, None], 1)[:, 0]
    scale = jnp.exp(best - best_N[:, None])
    total_N, weighted_N = (total * scale).sum(-1), (weighted * scale).sum(-1)
    logsumexp_N = best_N + jnp.log(total_N)
    return Survey(argmax_N, logsumexp_N, logsumexp_N - weighted_N / total_N)
