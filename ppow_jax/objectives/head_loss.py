"""The drafter's head and its soft cross-entropy in one function, so that [B, M, W] logits are never kept.

The gradient of a cross-entropy is known as soon as its logits are, so the forward pass computes it too, one batch row
at a time while the row's logits are still in the processor's cache; the backward pass only scales.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import linear, weight_gradient

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
    rows = [
        _row(h, w_WxE, p, label, dtype)[:4] for h, p, label in zip(h_BxMxE, p_BxMxW, label_BxM, strict=True)
    ]
    return _gather(rows, weight_BxM)


def _row(h_MxE, w_WxE, p_MxW, label_M, dtype):
    z_MxW = linear(h_MxE, w_WxE.astype(dtype))
    top_M = z_MxW.max(-1)
    e_MxW = jnp.exp(z_MxW - top_M[:, None])
    total_M = e_MxW.sum(-1)
    logsumexp_M = top_M + jnp.log(total_M)
    loss_M = logsumexp_M - jnp.sum(p_MxW * z_MxW, -1)
    q_MxW = e_MxW / total_M[:, None]
    label_z_M = jnp.take_along_axis(z_MxW, jnp.maximum(label_M, 0)[:, None], 1)[:, 0]
    known_M = label_M >= 0
    log_q_M = jnp.where(known_M, label_z_M - logsumexp_M, -jnp.inf)
    return loss_M, known_M & (label_z_M >= top_M), jnp.minimum(p_MxW, q_MxW).sum(-1), log_q_M, q_MxW


def _gather(rows, weight_BxM):
    loss_BxM, match_BxM, overlap_BxM, log_q_BxM = (jnp.stack(x) for x in zip(*rows, strict=True))
    total = jnp.sum(jnp.where(weight_BxM > 0, weight_BxM * loss_BxM, 0.0))
    return HeadLoss(total, loss_BxM, match_BxM, overlap_BxM, log_q_BxM)


def _forward(h_BxMxE, w_WxE, p_BxMxW, label_BxM, weight_BxM, dtype):
    rows, dh, dw_WxE = [], [], jnp.zeros(())
    for h_MxE, p_MxW, label_M, weight_M in zip(h_BxMxE, p_BxMxW, label_BxM, weight_BxM, strict=True):
        *row, q_MxW = _row(h_MxE, w_WxE, p_MxW, label_M, dtype)
        g_MxW = ((q_MxW - p_MxW) * weight_M[:, None]).astype(dtype)
        w = w_WxE.astype(dtype)
        dh.append(jnp.einsum("mw,we->me", g_MxW, w, preferred_element_type=jnp.float32))
        dw_WxE += weight_gradient(g_MxW, h_MxE.astype(dtype))
        rows.append(row)
    return _gather(rows, weight_BxM), (jnp.stack(dh), dw_WxE)


def _backward(dtype, saved, cotangent):
    dh_BxMxE, dw_WxE = saved
    c = cotangent.total
    return c * dh_BxMxE, c * dw_WxE, None, None, None


head_loss.defvjp(_forward, _backward)
