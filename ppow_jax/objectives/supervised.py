"""Stage 1: EAGLE-3's training-time test over anchors (2503.01840).

Every anchor unrolls a window of S draft steps over ground-truth tokens; from step 1 on the feature is the drafter's
own output. Gradients flow through all steps. The loss of a step is the cross-entropy against the target's
distribution restricted to the draft vocabulary; positions whose target argmax lies outside it carry no loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.layers import KV
from ppow_jax.objectives.head_loss import HeadLoss, head_loss

Array = jax.Array


class Windows(NamedTuple):
    """What the drafter needs of a batch of packed rows, M anchors each.

    features_BxTxF: target features. tokens_BxT, segment_BxT (0 = padding), position_BxT; anchor_BxM,
    anchor_mask_BxM: see `data.batches`. label_BxM: the target's argmax after the anchor's next token, that is the
    token that the anchor's first step should propose, as a draft id, -1 where the draft vocabulary lacks it.
    probability_BxMxW: the target's distribution there, over the draft vocabulary.
    """

    features_BxTxF: Array
    tokens_BxT: Array
    segment_BxT: Array
    position_BxT: Array
    anchor_BxM: Array
    anchor_mask_BxM: Array
    label_BxM: Array
    probability_BxMxW: Array


class StepScores(NamedTuple):
    """Per draft step s and anchor. total_S: sum of decay^s * the masked mean loss, differentiable. loss_SxBxM;
    match_SxBxM: the drafter's argmax is the target's; valid_SxBxM: the step's token belongs to the anchor's answer;
    known_SxBxM: the draft vocabulary holds the target's argmax; overlap_SxBxM: sum_v min(P, Q), the acceptance at
    temperature 1.
    """

    total: Array
    loss: Array
    match: Array
    valid: Array
    known: Array
    overlap: Array


def prefix(drafter: Drafter, embed_VxD: Array, windows: Windows) -> tuple[Array, tuple[KV, ...]]:
    """Fused features g_BxTxE and the drafter's keys of every index (the embedding is that of the next token)."""
    g_BxTxE = drafting.fuse(drafter, windows.features_BxTxF)
    following_BxT = jnp.concatenate([windows.tokens_BxT[:, 1:], windows.tokens_BxT[:, :1]], 1)
    embed_BxTxE = drafter.embed(embed_VxD, following_BxT)
    every_BxT = jnp.broadcast_to(jnp.arange(following_BxT.shape[1]), following_BxT.shape)
    mask_BxTxT = anchor_mask(windows, every_BxT)  # which counts for drafters of several layers alone
    return g_BxTxE, drafting.prefix_keys(drafter, g_BxTxE, embed_BxTxE, windows.position_BxT, mask_BxTxT)


def anchor_mask(windows: Windows, anchor_BxM: Array) -> Array:
    """mask_BxMxT: the indices of the anchor's own segment up to the anchor."""
    T = windows.tokens_BxT.shape[1]
    segment_BxM = jnp.take_along_axis(windows.segment_BxT, anchor_BxM, 1)
    same = segment_BxM[..., None] == windows.segment_BxT[:, None]
    return same & (jnp.arange(T) <= anchor_BxM[..., None])


class DraftStep(NamedTuple):
    """Draft step s of every anchor's window, over the text's own tokens.

    hidden_BxMxE: the drafter's normed output. label_BxM, probability_BxMxW: what the target wants there, see `Windows`.
    valid_BxM: the step's token belongs to the anchor's answer.
    """

    hidden_BxMxE: Array
    label_BxM: Array
    probability_BxMxW: Array
    valid_BxM: Array


def unroll(drafter: Drafter, embed_VxD: Array, windows: Windows, steps: int) -> list[DraftStep]:
    """`steps` draft steps from every anchor, tokens from the text, features the drafter's own from step 1 on."""
    M, T = windows.anchor_BxM.shape[1], windows.tokens_BxT.shape[1]
    g_BxTxE, kv = prefix(drafter, embed_VxD, windows)
    keys = [Prefix(kv, anchor_mask(windows, windows.anchor_BxM))]
    g_BxMxE = jnp.take_along_axis(g_BxTxE, windows.anchor_BxM[..., None], 1)
    position_BxM = jnp.take_along_axis(windows.position_BxT, windows.anchor_BxM, 1)

    def ahead(x, s):  # what anchor m + s holds: anchors of an answer are consecutive
        return jnp.pad(x, ((0, 0), (0, s)) + ((0, 0),) * (x.ndim - 2))[:, s : s + M]

    chain: tuple = ()
    unrolled = []
    for s in range(steps):
        token_BxM = jnp.take_along_axis(windows.tokens_BxT, jnp.minimum(windows.anchor_BxM + 1 + s, T - 1), 1)
        embed_BxMxE = drafter.embed(embed_VxD, token_BxM)
        out, chain = drafting.step(drafter, g_BxMxE, embed_BxMxE, position_BxM + s, keys, chain, first=s == 0)
        g_BxMxE = drafting.feed(drafter, out)
        valid_BxM = windows.anchor_mask_BxM & ahead(windows.anchor_mask_BxM, s)
        valid_BxM &= ahead(windows.anchor_BxM, s) == windows.anchor_BxM + s
        label_BxM, probability_BxMxW = ahead(windows.label_BxM, s), ahead(windows.probability_BxMxW, s)
        unrolled.append(DraftStep(drafter.norm(out, "norm"), label_BxM, probability_BxMxW, valid_BxM))
    return unrolled


def judge(drafter: Drafter, step: DraftStep, weight_BxM: Array) -> HeadLoss:
    """The head's loss against the step's probabilities, see `head_loss`."""
    head_WxE = drafter.params["lm_head"]
    dtype = jnp.bfloat16 if drafter.mixed else head_WxE.dtype
    return head_loss(step.hidden_BxMxE, head_WxE, step.probability_BxMxW, step.label_BxM, weight_BxM, dtype)


def training_time_test(
    drafter: Drafter, embed_VxD: Array, windows: Windows, steps: int, decay: float
) -> StepScores:
    """Unrolls `steps` draft steps from every anchor; see `StepScores` (each field stacked over steps)."""
    scores = []
    for s, step in enumerate(unroll(drafter, embed_VxD, windows, steps)):
        counted_BxM = (step.valid_BxM & (step.label_BxM >= 0)).astype(jnp.float32)
        judged = judge(drafter, step, decay**s * counted_BxM / jnp.maximum(counted_BxM.sum(), 1.0))
        known_BxM = step.label_BxM >= 0
        scores.append(
            StepScores(judged.total, judged.loss_BxM, judged.match_BxM, step.valid_BxM, known_BxM, judged.overlap_BxM)
        )
    return StepScores(*(jnp.stack(x) for x in zip(*scores, strict=True)))


def mean_loss(scores: StepScores) -> Array:
    """Masked mean loss of each step, [S]."""
    counted_SxBxM = scores.valid & scores.known
    total_S = jnp.sum(jnp.where(counted_SxBxM, scores.loss, 0.0), (1, 2))
    return total_S / jnp.maximum(counted_SxBxM.sum((1, 2)), 1)


def chain_counts(scores: StepScores) -> tuple[Array, Array]:
    """(accepted_S, reached_S): of the anchors whose earlier steps all matched, how many were there and how many
    match. Their ratios are the conditional acceptances of a greedy chain; see `simulated_length`.
    """
    alive_SxBxM = jnp.cumprod(scores.match & scores.valid, axis=0).astype(bool)
    before_SxBxM = jnp.concatenate([jnp.ones_like(alive_SxBxM[:1]), alive_SxBxM[:-1]]) & scores.valid
    return alive_SxBxM.sum((1, 2)), before_SxBxM.sum((1, 2))


def simulated_length(accepted_S: Array, reached_S: Array) -> Array:
    """tau of greedy chain decoding, bonus token included: 1 + a_0 + a_0 a_1 + ... (EAGLE-3).

    Exact on text that the target wrote greedily: a drafted token is the text's token until the first miss.
    """
    return 1.0 + jnp.sum(jnp.cumprod(accepted_S / jnp.maximum(reached_S, 1)))
