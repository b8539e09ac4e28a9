"""Fixed-length key/value caches, written only with accepted tokens."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ppow_jax.models.layers import KV

Array = jax.Array


def empty(B: int, num_kv_heads: int, L: int, head_dim: int, dtype: DTypeLike = jnp.float32) -> KV:
    """A cache of one layer for L positions."""
    k_BxKvxdxL = jnp.zeros((B, num_kv_heads, head_dim, L), dtype)
    return KV(k_BxKvxdxL, jnp.zeros((B, num_kv_heads, L, head_dim), dtype))


def write(cache: KV, new: KV, start_B: Array) -> KV:
    """Writes S consecutive positions from start_B on. The caller ensures start_B + S <= L.

    Slots behind the accepted ones may be filled with anything: lengths, not contents, are rolled back.
    """
    return KV(
        write_rows(cache.k_BxKvxdxL, new.k_BxKvxdxL, start_B, axis=2),
        write_rows(cache.v_BxKvxLxd, new.v_BxKvxLxd, start_B, axis=1),
    )


def write_rows(buffer: Array, new: Array, start_B: Array, axis: int = 0) -> Array:
    """Writes new[b] into buffer[b] from start_B[b] on, along `axis` of the row; a start below 0 counts as 0."""
    new = new.astype(buffer.dtype)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, allow_negative_indices=False)
    if buffer.shape[0] == 1:  # a plain slice update stays in place on every backend
        return write(buffer, new, start_B[0], axis + 1)
    return jax.vmap(functools.partial(write, axis=axis))(buffer, new, start_B)


def grow(kv: KV, L: int, dtype: DTypeLike = jnp.float32) -> KV:
    """Copies keys and values to the start of a cache of length L."""
    room = L - kv.v_BxKvxLxd.shape[2]
    k_BxKvxdxL = jnp.pad(kv.k_BxKvxdxL.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, room)))
    return KV(k_BxKvxdxL, jnp.pad(kv.v_BxKvxLxd.astype(dtype), ((0, 0), (0, 0), (0, room), (0, 0))))


def visible(L: int, length_B: Array, S: int) -> Array:
    """mask_BxSxL of the first length_B slots, the same for each of S queries."""
    return jnp.broadcast_to((jnp.arange(L) < length_B[:, None])[:, None], (length_B.shape[0], S, L))


def after(start_B: Array, token_B: Array) -> Array:
    """start_B, in a form that XLA must compute after token_B (token ids are never negative).

    A cache that is read and then written stays in place only if the write depends on every read; otherwise XLA
    copies each cache in each round. `optimization_barrier` does not give that order, a data dependency does.
    """
    return jnp.where(token_B < 0, 0, start_B)
