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
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ppow_jax import sharding
from ppow_jax.models.layers import inner, input_gradient, linear, weight_gradient
from ppow_jax.models.vocabulary import top_k

Array = jax.Array
T = TypeVar("T")


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
LEAST = 1e-20  # acceptance rates below it count as it, in -log alpha and in its gradient


class HeadScores(NamedTuple):
    """Scores of each anchor, without gradients.

    loss_BxM: cross-entropy against p. match_BxM: True where the label has the highest logit. overlap_BxM: sum_v
    min(mass p, q), the acceptance rate of a sampled draft at temperature 1. log_a_BxM: log-probability that the label
    is drafted by the rule, log_q_BxM: at temperature 1; both -inf where it is unknown.
    """

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


class Weights(NamedTuple):
    """Weights of the losses at each anchor, constants for the gradient; None drops a loss, which is faster.

    soft_BxM: of the cross-entropy. hard_BxM: of -log a(label). overlap_BxM: of `overlap_loss`.
    """

    soft_BxM: Array | None = None
    hard_BxM: Array | None = None
    overlap_BxM: Array | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def head_loss(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    weights: Weights,
    rule: DraftRule,
    dtype: DTypeLike,
    hybrid: bool = False,
) -> tuple[Array, HeadScores]:
    """(sum over anchors of soft * (-sum_v p_v log softmax(h w^T)_v) - hard * log a(label) + overlap * `overlap_loss`,
    scores).

    h_BxMxE: normed hidden states. w_WxE: the head. rule: drafting rule that defines a. dtype: of the products. hybrid:
    see `overlap_loss`.
    """
    rows = [_row(h, w_WxE, wanted, rule, dtype)[0] for h, wanted in _rows((h_BxMxE, wanted))]
    return _summed(rows, weights, hybrid)


def overlap_loss(alpha_x: Array, cross_entropy_x: Array, hybrid: bool) -> Array:
    """Loss of the acceptance rate alpha = sum_v min(P_v, q_v): LK losses (2602.23881).

    P is the target's distribution over its whole vocabulary. Tokens outside the draft vocabulary have q = 0, so their
    probability is lost, and alpha is at most the target's mass inside. The loss is -log alpha; hybrid: lambda *
    cross-entropy + (1 - lambda) * (1 - alpha), with lambda = exp(-3 alpha) constant for the gradient. (The paper takes
    lambda from the mean alpha of a batch; here every position has its own, so that microbatches add up exactly.)
    """
    if not hybrid:
        return -jnp.log(jnp.maximum(alpha_x, LEAST))
    lambda_x = jnp.exp(-FALL * jax.lax.stop_gradient(alpha_x))
    return lambda_x * cross_entropy_x + (1.0 - lambda_x) * (1.0 - alpha_x)


def _overlap_gradient(p_xW: Array, mass_x: Array, q_xW: Array, alpha_x: Array, hybrid: bool) -> Array:
    """The gradient of `overlap_loss` by the logits."""
    below_xW = jnp.where(q_xW < mass_x[..., None] * p_xW, q_xW, 0.0)
    g_xW = q_xW * below_xW.sum(-1, keepdims=True) - below_xW  # of -alpha
    if not hybrid:
        return g_xW / jnp.maximum(alpha_x, LEAST)[..., None]
    lambda_x1 = jnp.exp(-FALL * alpha_x)[..., None]
    return lambda_x1 * (q_xW - p_xW) + (1.0 - lambda_x1) * g_xW


def _rows(tree: T) -> Iterator[T]:
    """[P, ...] of each [B, ...]: the first row of every part, then the second one, and so on."""
    B = jax.tree.leaves(tree)[0].shape[0]
    parts = sharding.parts("batch", B)
    cut = jax.tree.map(lambda x: x.reshape(parts, B // parts, *x.shape[1:]), tree)
    return (jax.tree.map(lambda x, row=row: x[:, row], cut) for row in range(B // parts))


def _together(rows: Sequence[Array]) -> Array:
    """The inverse of `_rows`."""
    stacked = jnp.stack(rows, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _row(
    h_PxMxE: Array, w_WxE: Array, wanted: Wanted, rule: DraftRule, dtype: DTypeLike
) -> tuple[HeadScores, Array, Array]:
    """(scores [P, M] each, softmax [P, M, W], the gradient of -log a by the logits [P, M, W])."""
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
    return HeadScores(loss_PxM, match_PxM, overlap_PxM, log_a_PxM, log_q_PxM), q_PxMxW, g_PxMxW


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


def _summed(rows: Sequence[HeadScores], weights: Weights, hybrid: bool) -> tuple[Array, HeadScores]:
    """The results of `head_loss` from the scores of its rows."""
    scores = HeadScores(*(_together(x) for x in zip(*rows, strict=True)))
    total = jnp.zeros(())
    if weights.soft_BxM is not None:
        total += jnp.sum(jnp.where(weights.soft_BxM > 0, weights.soft_BxM * scores.loss_BxM, 0.0))
    if weights.hard_BxM is not None:
        total -= jnp.sum(jnp.where(weights.hard_BxM != 0, weights.hard_BxM * scores.log_a_BxM, 0.0))
    if weights.overlap_BxM is not None:
        weighted_BxM = weights.overlap_BxM * overlap_loss(scores.overlap_BxM, scores.loss_BxM, hybrid)
        total += jnp.sum(jnp.where(weights.overlap_BxM > 0, weighted_BxM, 0.0))
    return total, scores


def _forward(
    h_BxMxE: Array,
    w_WxE: Array,
    wanted: Wanted,
    weights: Weights,
    rule: DraftRule,
    dtype: DTypeLike,
    hybrid: bool,
) -> tuple[tuple[Array, HeadScores], tuple[Array, Array]]:
    rows, dh, dw_PxWxE, w = [], [], jnp.zeros(()), w_WxE.astype(dtype)
    for h_PxMxE, row, of_row in _rows((h_BxMxE, wanted, weights)):
        scores, q_PxMxW, a_PxMxW = _row(h_PxMxE, w_WxE, row, rule, dtype)
        g_PxMxW = jnp.zeros_like(q_PxMxW)
        if of_row.soft_BxM is not None:
            g_PxMxW += (q_PxMxW - row.p_BxMxW) * of_row.soft_BxM[..., None]
        if of_row.hard_BxM is not None:
            g_PxMxW += a_PxMxW * of_row.hard_BxM[..., None]
        if of_row.overlap_BxM is not None:
            overlap_PxMxW = _overlap_gradient(row.p_BxMxW, row.mass_BxM, q_PxMxW, scores.overlap_BxM, hybrid)
            g_PxMxW += overlap_PxMxW * of_row.overlap_BxM[..., None]
        g_PxMxW = g_PxMxW.astype(dtype)
        dh.append(input_gradient(g_PxMxW.reshape(-1, w.shape[0]), w, h_PxMxE.dtype).reshape(h_PxMxE.shape))
        dw_PxWxE += weight_gradient(g_PxMxW, h_PxMxE.astype(dtype))
        rows.append(scores)
    return _summed(rows, weights, hybrid), (_together(dh), dw_PxWxE.sum(0))  # one sum over devices, not one per row


def _backward(
    rule: DraftRule, dtype: DTypeLike, hybrid: bool, saved: tuple[Array, Array], cotangent: tuple[Array, HeadScores]
) -> tuple[Array, Array, None, None]:
    dh_BxMxE, dw_WxE = saved
    c = cotangent[0]
    return (c * dh_BxMxE).astype(dh_BxMxE.dtype), c * dw_WxE, None, None


head_loss.defvjp(_forward, _backward)
