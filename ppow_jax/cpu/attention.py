"""Softmax attention on a CPU as a single custom call."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def attend(q_BxSxHxd: Array, blocks: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Softmax attention over several blocks of keys as if they were one: [B, S, H, d] float32.

    blocks: (k_BxKvxdxL, v_BxKvxLxd, mask_BxSxL) each, float32 and True = visible; H is a multiple of Kv. The result is
    0 for a query without visible keys. A query's result is bit for bit independent of the other queries, and of the
    split of its keys into blocks. Call it only in programs for CPUs, and only if `library.available()`.
    """
    flat = [x for block in blocks for x in block]
    shape = jax.ShapeDtypeStruct(q_BxSxHxd.shape, jnp.float32)
    return jax.ffi.ffi_call("ppow_attention", shape, vmap_method="sequential")(q_BxSxHxd.astype(jnp.float32), *flat)
