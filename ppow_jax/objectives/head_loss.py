"""The drafter's head and its soft cross-entropy in one function, so that [B, M, W] logits are never kept.

The gradient of a cross-entropy is known as soon as its logits are, so the forward pass computes it too, one batch row
at a time while the row's logits are still in the processor's cache; the backward pass only scales. On a mesh it is one
row of every device at a time: P parts of the batch go side by side.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models.layers import inner, input_gradient, linear, weight_gradient

Array = jax.Array


class HeadLoss(NamedTuple):
    """total: sum of weight * loss, the one differentiable part. loss_BxM: cross-entropy against p. match_BxM: whether
    the label has the highest logit. overlap_BxM: sum_v min(p, q). log_q_BxM: of the label, -inf where it is unknown.
    """

    total: Array
    loss_BxM: Array
    match_BxM: Array
    overlap_BxM: Array
    log_q_BxM: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def head_loss(
    h_BxMxE: Array, w_WxE: Array, p_BxMxW: Array, label_BxM: Array, weight_BxM: Array, dtype
) -> HeadLoss:
    """Cross-entropy -sum_v p_v log softmax(h w^T)_v of every anchor, weighted and summed.

    h_BxMxE: normed hidden states. w_WxE: the head. p_BxMxW: target distribution (sums to 1). label_BxM: draft id of the
    target's argmax (-1: unknown, never matches). weight_BxM: of each loss in `total`; constant. dtype: of the products.
    """
    rows = [_row(h, w_WxE, p, label, dtype)[:4] for h, p, label in _rows(h_BxMxE, p_BxMxW, label_BxM)]
    return _gather(rows, weight_BxM)


def _rows(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """[P, ...] of each [B, ...]: the first row of every part, then the second one, and so on."""
    B = arrays[0].shape[0]
    parts = sharding.parts("batch", B)
    cut = [x.reshape(parts, B // parts, *x.shape[1:]) for x in arrays]
    return (tuple(x[:, row] for x in cut) for row in range(B // parts))


def _together(rows: Sequence[Array]) -> Array:
    """What `_rows` took apart."""
    stacked = jnp.stack(rows, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _row(h_PxMxE, w_WxE, p_PxMxW, label_PxM, dtype):
    z_PxMxW = linear(h_PxMxE, w_WxE.astype(dtype))
    top_PxM = z_PxMxW.max(-1)
    e_PxMxW = jnp.exp(z_PxMxW - top_PxM[..., None])
    total_PxM = e_PxMxW.sum(-1)
    logsumexp_PxM = top_PxM + jnp.log(total_PxM)
    loss_PxM = logsumexp_PxM - inner(p_PxMxW, z_PxMxW)
    q_PxMxW = e_PxMxW / total_PxM[..., None]
    label_z_PxM = jnp.take_along_axis(z_PxMxW, jnp.maximum(label_PxM, 0)[..., None], -1)[..., 0]
    known_PxM = label_PxM >= 0
    match_PxM = known_PxM & (label_z_PxM >= top_PxM)
    log_q_PxM = jnp.where(known_PxM, label_z_PxM - logsumexp_PxM, -jnp.inf)
    return loss_PxM, match_PxM, jnp.minimum(p_PxMxW, q_PxMxW).sum(-1), log_q_PxM, q_PxMxW


def _gather(rows, weight_BxM):
    loss_BxM, match_BxM, overlap_BxM, log_q_BxM = (_together(x) for x in zip(*rows, strict=True))
    total = jnp.sum(jnp.where(weight_BxM > 0, weight_BxM * loss_BxM, 0.0))
    return HeadLoss(total, loss_BxM, match_BxM, overlap_BxM, log_q_BxM)


def _forward(h_BxMxE, w_WxE, p_BxMxW, label_BxM, weight_BxM, dtype):
    rows, dh, dw_PxWxE = [], [], jnp.zeros(())
    for h_PxMxE, p_PxMxW, label_PxM, weight_PxM in _rows(h_BxMxE, p_BxMxW, label_BxM, weight_BxM):
        *row, q_PxMxW = _row(h_PxMxE, w_WxE, p_PxMxW, label_PxM, dtype)
        g_PxMxW = ((q_PxMxW - p_PxMxW) * weight_PxM[..., None]).astype(dtype)
        w = w_WxE.astype(dtype)
        dh.append(input_gradient(g_PxMxW.reshape(-1, w.shape[0]), w).reshape(h_PxMxE.shape))
        dw_PxWxE += weight_gradient(g_PxMxW, h_PxMxE.astype(dtype))
        rows.append(row)
    return _gather(rows, weight_BxM), (_together(dh), dw_PxWxE.sum(0))  # one sum over devices, not one per row


def _backward(dtype, saved, cotangent):
    dh_BxMxE, dw_WxE = saved
    c = cotangent.total
    return c * dh_BxMxE, c * dw_WxE, None, None, None


head_loss.defvjp(_forward, _backward)
