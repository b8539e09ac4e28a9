"""The drafter's head and its losses in one function, so that [B, M, W] logits are never stored.

Three losses share the logits: the soft cross-entropy against the target's distribution, -log of the probability that
the label is drafted, and a loss of the acceptance rate of sampled drafts (`overlap_loss`). Their gradients are known as
soon as the logits are, so the forward pass computes them too, one batch row at a time while the row's logits are still
in the processor's cache; the backward pass only scales.
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
FALL = 3.0  # eta of the hybrid loss, the paper's value
LEAST = 1e-20  # acceptance rate below which -log alpha is flat


class HeadLoss(NamedTuple):
    """total: sum of the weighted losses, the one differentiable part. loss_BxM: cross-entropy against p. match_BxM:
    True where the label has the highest logit. overlap_BxM: sum_v min(mass p, q), the acceptance rate of a sampled
    draft at temperature 1. log_a_BxM: log-probability that the label is drafted by the rule, log_q_BxM: at temperature
    1; both -inf where it is unknown.
    """

    total: Array
    loss_BxM: Array
    match_BxM: Array
    overlap_BxM: Array
    log_a_BxM: Array
    log_q_BxM: Array


class Wanted(NamedTuple):
    """The target's side of a draft step. p_BxMxW: its distribution over the draft vocabulary (sums to 1). mass_BxM: its
    total probability of the draft vocabulary. label_BxM: draft id of its argmax, -1 where there is none.
    """

    p_BxMxW: Array
    mass_BxM: Array
    label_BxM: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 8))
def head_loss(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    soft_BxM: Array,
    hard_BxM: Array | None,
    rule: DraftRule,
    dtype: DTypeLike,
    overlap_BxM: Array | None = None,
    hybrid: bool = False,
) -> HeadLoss:
    """sum of soft * (-sum_v p_v log softmax(h w^T)_v) + hard * (-log a(label)) + overlap * `overlap_loss`, and its
    parts.

    h_BxMxE: normed hidden states. w_WxE: the head. soft_BxM, hard_BxM, overlap_BxM: weights, constant for the gradient;
    None drops the term, which is faster. rule: drafting rule that defines a. dtype: of the products. hybrid: see
    `overlap_loss`.
    """
    rows = [_row(h, w_WxE, Wanted(*wanted), rule, dtype)[:5] for h, *wanted in _rows(h_BxMxE, *wanted)]
    return _gather(rows, soft_BxM, hard_BxM, overlap_BxM, hybrid)


def overlap_loss(alpha_x: Array, cross_entropy_x: Array, hybrid: bool) -> Array:
    """Loss of the acceptance rate alpha = sum_v min(P_v, q_v): LK losses (2602.23881).

    P is the target's distribution over its whole vocabulary. Tokens outside the draft vocabulary have q = 0, so their
    probability is lost, and alpha is at most the target's mass inside. The loss is -log alpha; hybrid: lambda *
    cross-entropy + (1 - lambda) * (1 - alpha), with lambda = exp(-3 alpha) constant for the gradient. (The paper takes
    lambda from the mean alpha of a batch; here every position has its own, so that microbatches add up exactly.)
    """
    if not hybrid:
        return -jnp.log(jnp.maximum(alpha_x, LEAST))
    lambda_x = jnp.exp(-FALL * alpha_x)
    return lambda_x * cross_entropy_x + (1.0 - lambda_x) * (1.0 - alpha_x)


def _overlap_gradient(p_xW: Array, mass_x: Array, q_xW: Array, alpha_x: Array, hybrid: bool) -> Array:
    """The gradient of `overlap_loss` by the logits."""
    below_xW = jnp.where(q_xW < mass_x[..., None] * p_xW, q_xW, 0.0)
    g_xW = q_xW * below_xW.sum(-1, keepdims=True) - below_xW  # of -alpha
    if not hybrid:
        return g_xW / jnp.maximum(alpha_x, LEAST)[..., None]
    lambda_x1 = jnp.exp(-FALL * alpha_x)[..., None]
    return lambda_x1 * (q_xW - p_xW) + (1.0 - lambda_x1) * g_xW


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
    log_q_PxM = jnp.where(known_PxM, label_z_PxM - logsumexp_PxM, -jnp.inf)
    return loss_PxM, match_PxM, overlap_PxM, log_a_PxM, log_q_PxM, q_PxMxW, g_PxMxW


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


def _gather(
    rows: Sequence[Sequence[Array]],
    soft_BxM: Array,
    hard_BxM: Array | None,
    overlap_BxM: Array | None,
    hybrid: bool,
) -> HeadLoss:
    loss_BxM, match_BxM, alpha_BxM, log_a_BxM, log_q_BxM = (_together(x) for x in zip(*rows, strict=True))
    total = jnp.sum(jnp.where(soft_BxM > 0, soft_BxM * loss_BxM, 0.0))
    if hard_BxM is not None:
        total -= jnp.sum(jnp.where(hard_BxM != 0, hard_BxM * log_a_BxM, 0.0))
    if overlap_BxM is not None:
        weighted_BxM = overlap_BxM * overlap_loss(alpha_BxM, loss_BxM, hybrid)
        total += jnp.sum(jnp.where(overlap_BxM > 0, weighted_BxM, 0.0))
    return HeadLoss(total, loss_BxM, match_BxM, alpha_BxM, log_a_BxM, log_q_BxM)


def _forward(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    soft_BxM: Array,
    hard_BxM: Array | None,
    rule: DraftRule,
    dtype: DTypeLike,
    overlap_BxM: Array | None,
    hybrid: bool,
) -> tuple[HeadLoss, tuple[Array, Array]]:
    rows, dh, dw_PxWxE = [], [], jnp.zeros(())
    weights = [weight for weight in (soft_BxM, hard_BxM, overlap_BxM) if weight is not None]
    for h_PxMxE, p, mass, label, soft_PxM, *more in _rows(h_BxMxE, *wanted, *weights):
        *row, q_PxMxW, a_PxMxW = _row(h_PxMxE, w_WxE, Wanted(p, mass, label), rule, dtype)
        g_PxMxW = (q_PxMxW - p) * soft_PxM[..., None]
        if hard_BxM is not None:
            g_PxMxW += a_PxMxW * more[0][..., None]
        if overlap_BxM is not None:
            g_PxMxW += _overlap_gradient(p, mass, q_PxMxW, row[2], hybrid) * more[-1][..., None]
        g_PxMxW, w = g_PxMxW.astype(dtype), w_WxE.astype(dtype)
        dh.append(input_gradient(g_PxMxW.reshape(-1, w.shape[0]), w, h_PxMxE.dtype).reshape(h_PxMxE.shape))
        dw_PxWxE += weight_gradient(g_PxMxW, h_PxMxE.astype(dtype))
        rows.append(row)
    loss = _gather(rows, soft_BxM, hard_BxM, overlap_BxM, hybrid)
    return loss, (_together(dh), dw_PxWxE.sum(0))  # one sum over devices, not one per row


def _backward(
    rule: DraftRule, dtype: DTypeLike, hybrid: bool, saved: tuple[Array, Array], cotangent: HeadLoss
) -> tuple[Array, Array, None, None, None, None]:
    dh_BxMxE, dw_WxE = saved
    c = cotangent.total
    return (c * dh_BxMxE).astype(dh_BxMxE.dtype), c * dw_WxE, None, None, None, None


head_loss.defvjp(_forward, _backward)
