"""Attention of draft windows: M anchors per row, each with its prefix and its own chain of drafted keys."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import Keys, inner, query_blocks, scores, weighted_values

Array = jax.Array


def attend(q_BxMxHxd: Array, prefix: Sequence[Keys], chain: Sequence[tuple[Array, Array]]) -> Array:
    """Joint softmax over the prefix blocks and the window's own chain: [B, M, H*d] in the dtype of the queries.

    prefix: blocks with a mask_BxMxL each. chain: (key, value) [B, M, Kv, d] of the window's steps so far; window m
    attends to its own only.
    """
    outs = []
    for rows in query_blocks(q_BxMxHxd.shape[1]):
        blocks = [Keys(kv, mask_BxMxL[:, rows]) for kv, mask_BxMxL in prefix]
        outs.append(_attend_block(q_BxMxHxd[:, rows], blocks, [(k[:, rows], v[:, rows]) for k, v in chain]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _attend_block(q_BxMxHxd: Array, prefix: Sequence[Keys], chain: Sequence[tuple[Array, Array]]) -> Array:
    B, M, H, d = q_BxMxHxd.shape
    Kv = prefix[0].kv.k_BxKvxdxL.shape[1]
    q = q_BxMxHxd.reshape(B, M, Kv, H // Kv, d)
    parts = [scores(q_BxMxHxd, block) for block in prefix]  # each [B, Kv, g, M, L]
    if chain:
        own = jnp.stack([inner(q, k[:, :, :, None]) for k, _ in chain], -1) * d**-0.5  # [B, M, Kv, g, R]
        parts.append(own.transpose(0, 2, 3, 1, 4))
    top = functools.reduce(jnp.maximum, [part.max(-1) for part in parts])[..., None]
    parts = [jnp.exp(part - jax.lax.stop_gradient(top)) for part in parts]
    total_BxKvxgxM = functools.reduce(jnp.add, [part.sum(-1) for part in parts])
    total_BxMxH = total_BxKvxgxM.transpose(0, 3, 1, 2).reshape(B, M, H)
    values = [weighted_values(part, block.kv.v_BxKvxLxd) for part, block in zip(parts, prefix, strict=False)]
    out = functools.reduce(jnp.add, values).reshape(B, M, Kv, H // Kv, d)
    for r, (_, v) in enumerate(chain):
        out += parts[-1][..., r].transpose(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return (out.reshape(B, M, H, d) / total_BxMxH[..., None]).reshape(B, M, H * d).astype(q_BxMxHxd.dtype)
