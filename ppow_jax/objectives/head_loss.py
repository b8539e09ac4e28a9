"""The drafter's head and its losses in one function, so that [B, M, W] logits are never stored.

Two losses share the logits: the soft cross-entropy against the target's distribution, and -log of the probability that
the drafted token is accepted. Their gradients are known as soon as the logits are, so the forward pass computes them
too, one batch row at a time while the row's logits are still in the processor's cache; the backward pass only scales.
On a mesh it is one row of every device at a time: P parts of the batch are processed in parallel.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ppow_jax import sharding
from ppow_jax.models.layers import inner, input_gradient, linear, weight_gradient
from ppow_jax.models.vocabulary import top_k

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DraftRule:
    """Drafting rule, which determines the probability that the label is drafted. Hashable.

    temperature: of softmax(z / T); as it falls, sampled drafting becomes greedy drafting. rivals: 0 for one sampled
    token, q_T(label). Above 0 the probability is sigmoid((z_label - z_rival) / T) with the rivals-th largest logit of
    the other tokens: a smooth form of "the label is among the first `rivals`", the condition for acceptance in a tree.
    """

    temperature: float = 1.0
    rivals: int = 0


SAMPLED = DraftRule()  # one token, drawn from the drafter's distribution


class HeadLoss(NamedTuple):
    """total: sum of the weighted losses, the one differentiable part. loss_BxM: cross-entropy against p. match_BxM:
    True where the label has the highest logit. overlap_BxM: sum_v min(mass p, q), the acceptance rate of a sampled
    draft at temperature 1. log_a_BxM: log-probability that the label is drafted, -inf where it is unknown.
    """

    total: Array
    loss_BxM: Array
    match_BxM: Array
    overlap_BxM: Array
    log_a_BxM: Array


class Wanted(NamedTuple):
    """The target's side of a draft step. p_BxMxW: its distribution over the draft vocabulary (sums to 1). mass_BxM: its
    total probability of the draft vocabulary. label_BxM: draft id of its argmax, -1 where there is none.
    """

    p_BxMxW: Array
    mass_BxM: Array
    label_BxM: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def head_loss(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    soft_BxM: Array,
    hard_BxM: Array | None,
    rule: DraftRule,
    dtype: DTypeLike,
) -> HeadLoss:
    """sum of soft * (-sum_v p_v log softmax(h w^T)_v) + hard * (-log a(label)) over anchors, and its parts.

    h_BxMxE: normed hidden states. w_WxE: the head. soft_BxM, hard_BxM: weights, constant for the gradient; hard None
    drops its term, which is faster. rule: drafting rule that defines a. dtype: of the products.
    """
    rows = [_row(h, w_WxE, Wanted(*wanted), rule, dtype)[:4] for h, *wanted in _rows(h_BxMxE, *wanted)]
    return _gather(rows, soft_BxM, hard_BxM)


def _rows(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """[P, ...] of each [B, ...]: the first row of every part, then the second one, and so on."""
    B = arrays[0].shape[0]
    parts = sharding.parts("batch", B)
    cut = [x.reshape(parts, B // parts, *x.shape[1:]) for x in arrays]
    return (tuple(x[:, row] for x in cut) for row in range(B // parts))


def _together(rows: Sequence[Array]) -> Array:
    """The inverse of `_rows`."""
    stacked = jnp.stack(rows, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _row(h_PxMxE: Array, w_WxE: Array, wanted: Wanted, rule: DraftRule, dtype: DTypeLike) -> tuple[Array, ...]:
    p_PxMxW, mass_PxM, label_PxM = wanted
    z_PxMxW = linear(h_PxMxE, w_WxE.astype(dtype))
    q_PxMxW, logsumexp_PxM, top_PxM = _softmax(z_PxMxW)
    loss_PxM = logsumexp_PxM - inner(p_PxMxW, z_PxMxW)
    label_z_PxM = jnp.take_along_axis(z_PxMxW, jnp.maximum(label_PxM, 0)[..., None], -1)[..., 0]
    known_PxM = label_PxM >= 0
    match_PxM = known_PxM & (label_z_PxM >= top_PxM)
    overlap_PxM = jnp.minimum(mass_PxM[..., None] * p_PxMxW, q_PxMxW).sum(-1)
    log_a_PxM, g_PxMxW = _acceptance(z_PxMxW, q_PxMxW, logsumexp_PxM, label_PxM, label_z_PxM, rule)
    log_a_PxM = jnp.where(known_PxM, log_a_PxM, -jnp.inf)
    return loss_PxM, match_PxM, overlap_PxM, log_a_PxM, q_PxMxW, g_PxMxW


def _softmax(z_PxMxW: Array) -> tuple[Array, Array, Array]:
    """(softmax, logsumexp, largest) over the last axis."""
    top_PxM = z_PxMxW.max(-1)
    e_PxMxW = jnp.exp(z_PxMxW - top_PxM[..., None])
    total_PxM = e_PxMxW.sum(-1)
    return e_PxMxW / total_PxM[..., None], top_PxM + jnp.log(total_PxM), top_PxM


def _acceptance(
    z_PxMxW: Array, q_PxMxW: Array, logsumexp_PxM: Array, label_PxM: Array, label_z_PxM: Array, rule: DraftRule
) -> tuple[Array, Array]:
    """(log a_PxM, the gradient of -log a by the logits), see `DraftRule`."""
    T, token_W = rule.temperature, jnp.arange(z_PxMxW.shape[-1])
    label_PxMxW = token_W == label_PxM[..., None]
    if rule.rivals:
        others_PxMxW = jnp.where(label_PxMxW, -jnp.inf, z_PxMxW)
        rival_z, rival = (x[..., -1] for x in top_k(others_PxMxW, rule.rivals))
        margin_PxM = (label_z_PxM - rival_z) / T
        g_PxMxW = (token_W == rival[..., None]) * 1.0 - label_PxMxW
        return jax.nn.log_sigmoid(margin_PxM), g_PxMxW * (jax.nn.sigmoid(-margin_PxM) / T)[..., None]
    if T != 1.0:
        q_PxMxW, logsumexp_PxM, _ = _softmax(z_PxMxW / T)
    return label_z_PxM / T - logsumexp_PxM, (q_PxMxW - label_PxMxW) / T


def _gather(rows: Sequence[Sequence[Array]], soft_BxM: Array, hard_BxM: Array | None) -> HeadLoss:
    loss_BxM, match_BxM, overlap_BxM, log_a_BxM = (_together(x) for x in zip(*rows, strict=True))
    total = jnp.sum(jnp.where(soft_BxM > 0, soft_BxM * loss_BxM, 0.0))
    if hard_BxM is not None:
        total -= jnp.sum(jnp.where(hard_BxM != 0, hard_BxM * log_a_BxM, 0.0))
    return HeadLoss(total, loss_BxM, match_BxM, overlap_BxM, log_a_BxM)


def _forward(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    soft_BxM: Array,
    hard_BxM: Array | None,
    rule: DraftRule,
    dtype: DTypeLike,
) -> tuple[HeadLoss, tuple[Array, Array]]:
    rows, dh, dw_PxWxE = [], [], jnp.zeros(())
    weights = (soft_BxM,) if hard_BxM is None else (soft_BxM, hard_BxM)
    for h_PxMxE, p, mass, label, soft_PxM, *hard in _rows(h_BxMxE, *wanted, *weights):
        *row, q_PxMxW, a_PxMxW = _row(h_PxMxE, w_WxE, Wanted(p, mass, label), rule, dtype)
        g_PxMxW = (q_PxMxW - p) * soft_PxM[..., None]
        if hard:
            g_PxMxW += a_PxMxW * hard[0][..., None]
        g_PxMxW, w = g_PxMxW.astype(dtype), w_WxE.astype(dtype)
        dh.append(input_gradient(g_PxMxW.reshape(-1, w.shape[0]), w, h_PxMxE.dtype).reshape(h_PxMxE.shape))
        dw_PxWxE += weight_gradient(g_PxMxW, h_PxMxE.astype(dtype))
        rows.append(row)
    return _gather(rows, soft_BxM, hard_BxM), (_together(dh), dw_PxWxE.sum(0))  # one sum over devices, not one per row


def _backward(
    rule: DraftRule, dtype: DTypeLike, saved: tuple[Array, Array], cotangent: HeadLoss
) -> tuple[Array, Array, None, None, None]:
    dh_BxMxE, dw_WxE = saved
    c = cotangent.total
    return (c * dh_BxMxE).astype(dh_BxMxE.dtype), c * dw_WxE, None, None, None


head_loss.defvjp(_forward, _backward)
