"""Tokens that an n-gram lookup would draft right in the windows of packed texts, for objectives that discount them."""

import jax
import jax.numpy as jnp

from ppow_jax.data.batches import PackedBatch
from ppow_jax.speculation import ngram
from ppow_jax.speculation.verify import leading

Array = jax.Array


def looked_up(batch: PackedBatch, K: int) -> Array:
    """[B, M]: number of a window's first tokens, 0 to K, that the lookup of decoding would draft right.

    Each anchor's text is that of its own segment up to the root, the token after the anchor. Tokens after the end of a
    segment are never right. Takes M T integers per row.
    """
    (B, T), M = batch.tokens_BxT.shape, batch.anchor_BxM.shape[1]
    place_BxM = jnp.take_along_axis(batch.position_BxT, batch.anchor_BxM, 1)  # of the anchor in its segment
    index_BxMxT = (batch.anchor_BxM - place_BxM)[..., None] + jnp.arange(T)
    text_BxMxT = jnp.take_along_axis(batch.tokens_BxT[:, None], jnp.minimum(index_BxMxT, T - 1), 2)
    match = ngram.find(text_BxMxT.reshape(B * M, T), (place_BxM + 2).reshape(B * M), K)
    index_BxMxK = batch.anchor_BxM[..., None] + 2 + jnp.arange(K)
    within_BxMxK = jnp.minimum(index_BxMxK, T - 1)
    wanted_BxMxK = jnp.take_along_axis(batch.tokens_BxT[:, None], within_BxMxK, 2)
    segment_BxM = jnp.take_along_axis(batch.segment_BxT, batch.anchor_BxM, 1)
    own_BxMxK = jnp.take_along_axis(batch.segment_BxT[:, None], within_BxMxK, 2) == segment_BxM[..., None]
    right_BxMxK = (match.token_BxN.reshape(B, M, K) == wanted_BxMxK) & own_BxMxK & (index_BxMxK < T)
    right_BxMxK &= (match.matched_B > 0).reshape(B, M, 1)
    return jnp.where(batch.anchor_mask_BxM, leading(right_BxMxK), 0)
