"""Stage 1: EAGLE-3's training-time test over anchors (2503.01840).

Every anchor unrolls a window of S draft steps over ground-truth tokens; from step 1 on the feature is the drafter's
own output. Gradients flow through all steps. The loss of a step is the cross-entropy against the target's
distribution restricted to the draft vocabulary, or a loss of the acceptance rate (`SupervisedLoss`); positions whose
target argmax is outside the draft vocabulary carry no loss.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.flags import require
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Anchors, Drafter, Prefix
from ppow_jax.models.layers import KV
from ppow_jax.objectives.head_loss import SAMPLED, DraftRule, HeadScores, Wanted, Weights, head_loss

Array = jax.Array
KINDS = ("cross_entropy", "acceptance", "hybrid")
STEP_WEIGHTS = ("decay", "acceptance")
SMOOTHING = 0.5  # alpha of D-PACE, the paper's value


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Hashable. kind: cross_entropy against the target's distribution, or one of `head_loss.overlap_loss`: acceptance
    (-log alpha) or hybrid. step_weights: decay weights step s by decay^s, acceptance by `acceptance_weights`.

    Raises UserError for another kind of either.
    """

    kind: str = "cross_entropy"
    step_weights: str = "decay"
    decay: float = 0.8

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"kind={self.kind}: must be one of {', '.join(KINDS)}")
        rule = f"must be one of {', '.join(STEP_WEIGHTS)}"
        require(self.step_weights in STEP_WEIGHTS, f"step_weights={self.step_weights}: {rule}")

    @property
    def hybrid(self) -> bool:
        """True for the hybrid of cross-entropy and acceptance rate."""
        return self.kind == "hybrid"

    def weights(self, weight_BxM: Array) -> Weights:
        """Weights of the head's losses from those of this loss."""
        return Weights(soft_BxM=weight_BxM) if self.kind == "cross_entropy" else Weights(overlap_BxM=weight_BxM)


class AnchorRows(NamedTuple):
    """Inputs of the drafter from a batch of packed rows, M anchors each.

    features_BxTxF: target features. tokens_BxT, segment_BxT (0 = padding), position_BxT; anchor_BxM,
    anchor_mask_BxM: see `data.batches`. label_BxM: the target's argmax after the anchor's next token, that is the
    token that the anchor's first step should propose, as a draft id, -1 where the draft vocabulary lacks it.
    probability_BxMxW: the target's distribution there, over the draft vocabulary. mass_BxM: the target's total
    probability of the draft vocabulary there. entropy_BxM: of its distribution over the whole vocabulary, nats.
    """

    features_BxTxF: Array
    tokens_BxT: Array
    segment_BxT: Array
    position_BxT: Array
    anchor_BxM: Array
    anchor_mask_BxM: Array
    label_BxM: Array
    probability_BxMxW: Array
    mass_BxM: Array
    entropy_BxM: Array


class StepScores(NamedTuple):
    """Scores per draft step s and anchor. total_S: the masked mean loss times the step's weight, differentiable.
    loss_SxBxM: cross-entropy, whatever the total is made of; match_SxBxM: the drafter's argmax is the target's;
    valid_SxBxM: the step's token belongs to the anchor's answer; known_SxBxM: the draft vocabulary holds the target's
    argmax; overlap_SxBxM: sum_v min(P, Q) over the whole vocabulary, the acceptance rate at temperature 1.
    """

    total: Array
    loss: Array
    match: Array
    valid: Array
    known: Array
    overlap: Array


def prefix(drafter: Drafter, embed_VxD: Array, windows: AnchorRows) -> tuple[Array, tuple[KV, ...]]:
    """Fused features g_BxTxE and the drafter's keys of every index (the embedding is that of the next token)."""
    g_BxTxE = drafting.fuse(drafter, windows.features_BxTxF)
    following_BxT = jnp.concatenate([windows.tokens_BxT[:, 1:], windows.tokens_BxT[:, :1]], 1)
    embed_BxTxE = drafter.embed(embed_VxD, following_BxT)
    every_BxT = jnp.broadcast_to(jnp.arange(following_BxT.shape[1]), following_BxT.shape)
    mask_BxTxT = anchor_mask(windows, every_BxT)  # used by drafters of several layers only
    return g_BxTxE, drafting.prefix_keys(drafter, g_BxTxE, embed_BxTxE, windows.position_BxT, mask_BxTxT)


def anchor_mask(windows: AnchorRows, anchor_BxM: Array) -> Array:
    """mask_BxMxT: the indices of the anchor's own segment up to the anchor."""
    T = windows.tokens_BxT.shape[1]
    segment_BxM = jnp.take_along_axis(windows.segment_BxT, anchor_BxM, 1)
    same = segment_BxM[..., None] == windows.segment_BxT[:, None]
    return same & (jnp.arange(T) <= anchor_BxM[..., None])


class DraftStep(NamedTuple):
    """Draft step s of every anchor's window, over the text's own tokens.

    hidden_BxMxE: the drafter's normed output. label_BxM, probability_BxMxW, mass_BxM, entropy_BxM: those of the target
    at this step, see `AnchorRows`. valid_BxM: the step's token belongs to the anchor's answer.
    """

    hidden_BxMxE: Array
    label_BxM: Array
    probability_BxMxW: Array
    mass_BxM: Array
    entropy_BxM: Array
    valid_BxM: Array


def ahead(x_BxM: Array, s: int) -> Array:
    """Values of anchor m + s at anchor m: anchors of an answer are consecutive."""
    M = x_BxM.shape[1]
    return jnp.pad(x_BxM, ((0, 0), (0, s)) + ((0, 0),) * (x_BxM.ndim - 2))[:, s : s + M]


def in_answer(windows: AnchorRows, s: int) -> Array:
    """[B, M]: True where the token of the anchors' step s belongs to the anchor's answer."""
    valid_BxM = windows.anchor_mask_BxM & ahead(windows.anchor_mask_BxM, s)
    return valid_BxM & (ahead(windows.anchor_BxM, s) == windows.anchor_BxM + s)


def last_anchors(windows: AnchorRows) -> Array:
    """[B, M]: True at the last anchor of each answer."""
    return windows.anchor_mask_BxM & ~in_answer(windows, 1)


def _at_step(windows: AnchorRows, s: int) -> tuple[Array, Array]:
    """(label_BxM of the anchors' step s, valid_BxM: see `in_answer`)."""
    return ahead(windows.label_BxM, s), in_answer(windows, s)


def counts(windows: AnchorRows, steps: int) -> Array:
    """Number of anchors that carry a loss at each step, float32 [S]."""
    at_steps = (_at_step(windows, s) for s in range(steps))
    return jnp.stack([jnp.sum(valid & (label >= 0), dtype=jnp.float32) for label, valid in at_steps])


def anchors_at(windows: AnchorRows, g_BxTxE: Array, kv: tuple[KV, ...], anchor_BxM: Array) -> Anchors:
    """The starting points of windows at these indices of the rows; g_BxTxE, kv: see `prefix`."""
    keys = [Prefix(kv, anchor_mask(windows, anchor_BxM))]
    g_BxMxE = jnp.take_along_axis(g_BxTxE, anchor_BxM[..., None], 1)
    return Anchors(g_BxMxE, jnp.take_along_axis(windows.position_BxT, anchor_BxM, 1), keys)


def text_tokens(windows: AnchorRows, steps: int) -> Iterator[Array]:
    """The text's own tokens after every anchor, token_BxM of one step after the other."""
    last = windows.tokens_BxT.shape[1] - 1
    for s in range(steps):
        yield jnp.take_along_axis(windows.tokens_BxT, jnp.minimum(windows.anchor_BxM + 1 + s, last), 1)


def unroll(drafter: Drafter, embed_VxD: Array, windows: AnchorRows, steps: int) -> list[DraftStep]:
    """Unrolls `steps` draft steps from every anchor along the text, each with the target's values for its loss."""
    anchors = anchors_at(windows, *prefix(drafter, embed_VxD, windows), windows.anchor_BxM)
    unrolled = []
    for s, out in enumerate(drafting.unroll(drafter, embed_VxD, anchors, text_tokens(windows, steps))):
        label_BxM, valid_BxM = _at_step(windows, s)
        p_BxMxW, mass_BxM = ahead(windows.probability_BxMxW, s), ahead(windows.mass_BxM, s)
        entropy_BxM, hidden_BxMxE = ahead(windows.entropy_BxM, s), drafter.norm(out, "norm")
        unrolled.append(DraftStep(hidden_BxMxE, label_BxM, p_BxMxW, mass_BxM, entropy_BxM, valid_BxM))
    return unrolled


def score_step(
    drafter: Drafter,
    step: DraftStep,
    weights: Weights,
    rule: DraftRule = SAMPLED,
    hybrid: bool = False,
) -> tuple[Array, HeadScores]:
    """(the sum of the weighted losses of one draft step, scores of its anchors); see `head_loss`."""
    head_WxE = drafter.params["lm_head"]
    dtype = jnp.dtype(drafter.compute_dtype or head_WxE.dtype)
    wanted = Wanted(step.probability_BxMxW, step.mass_BxM, step.label_BxM)
    return head_loss(step.hidden_BxMxE, head_WxE, wanted, weights, rule, dtype, hybrid)


def seen_step(drafter: Drafter, step: DraftStep, rule: DraftRule = SAMPLED) -> HeadScores:
    """The scores of one draft step's anchors, for weights that depend on them."""
    return score_step(*jax.lax.stop_gradient((drafter, step)), Weights(), rule)[1]


def acceptance_weights(log_q_SxBxM: Array, valid_SxBxM: Array) -> Array:
    """D-PACE's weight of every draft step (2605.18810, equations 7 and 8), [S, B, M].

    w_s = sum_{m >= s} prod_{i <= m} p_i with p_i = (1 - SMOOTHING) q_i + SMOOTHING: the gradient of the expected
    accepted length sum_m prod_{i <= m} p_i by log p_s. log_q_SxBxM: log of q, the probability of the label, -inf where
    it cannot be drafted. valid_SxBxM: the step's token belongs to the answer.
    """
    chance_SxBxM = jnp.cumprod((1.0 - SMOOTHING) * jnp.exp(log_q_SxBxM) + SMOOTHING, axis=0)
    return jnp.cumsum(jnp.where(valid_SxBxM, chance_SxBxM, 0.0)[::-1], axis=0)[::-1]


def training_time_test(
    drafter: Drafter,
    embed_VxD: Array,
    windows: AnchorRows,
    steps: int,
    loss: SupervisedLoss,
    counts_S: Array | None = None,
) -> StepScores:
    """Unrolls `steps` draft steps from every anchor; see `StepScores` (each field stacked over steps).

    counts_S: counts of the whole batch (see `counts`), if these rows are only a part of it.
    """
    counts_S = counts(windows, steps) if counts_S is None else counts_S
    unrolled, scores = unroll(drafter, embed_VxD, windows, steps), []
    weight_S: Sequence[float] | Array = [loss.decay**s for s in range(steps)]
    if loss.step_weights == "acceptance":
        log_q_SxBxM = jnp.stack([seen_step(drafter, step).log_q_BxM for step in unrolled])
        weight_S = acceptance_weights(log_q_SxBxM, jnp.stack([step.valid_BxM for step in unrolled]))
    for s, step in enumerate(unrolled):
        known_BxM = step.label_BxM >= 0
        counted_BxM = (step.valid_BxM & known_BxM).astype(jnp.float32)
        weights = loss.weights(weight_S[s] * counted_BxM / jnp.maximum(counts_S[s], 1.0))
        total, seen = score_step(drafter, step, weights, hybrid=loss.hybrid)
        scores.append(StepScores(total, seen.loss_BxM, seen.match_BxM, step.valid_BxM, known_BxM, seen.overlap_BxM))
    return StepScores(*(jnp.stack(x) for x in zip(*scores, strict=True)))


class Totals(NamedTuple):
    """Sums of `StepScores` over rows and anchors, so that microbatches and devices add up exactly. All [S], float32.

    accepted_S, reached_S: the number of anchors that match, among those whose earlier steps all matched, and the number
    of the latter. Their ratios are the conditional acceptance rates of a greedy chain; see `simulated_length`. loss_S,
    known_S: over the anchors that carry a loss. match_S, overlap_S, valid_S: over all whose step belongs to their
    answer.
    """

    accepted_S: Array
    reached_S: Array
    loss_S: Array
    known_S: Array
    match_S: Array
    overlap_S: Array
    valid_S: Array

    @classmethod
    def of(cls, scores: StepScores) -> "Totals":
        """Sums over one batch of rows."""

        def total(x_SxBxM: Array | int, mask_SxBxM: Array) -> Array:
            return jnp.sum(jnp.where(mask_SxBxM, x_SxBxM, 0), (1, 2), dtype=jnp.float32)

        known = scores.valid & scores.known
        return cls(
            *chain_counts(scores),
            total(scores.loss, known),
            total(1, known),
            total(scores.match, scores.valid),
            total(scores.overlap, scores.valid),
            total(1, scores.valid),
        )


def chain_counts(scores: StepScores) -> tuple[Array, Array]:
    """(accepted_S, reached_S); see `Totals`."""
    alive_SxBxM = jnp.cumprod(scores.match & scores.valid, axis=0).astype(bool)
    before_SxBxM = jnp.concatenate([jnp.ones_like(alive_SxBxM[:1]), alive_SxBxM[:-1]]) & scores.valid
    return alive_SxBxM.sum((1, 2), dtype=jnp.float32), before_SxBxM.sum((1, 2), dtype=jnp.float32)


def simulated_length(accepted_S: Array, reached_S: Array) -> Array:
    """tau of greedy chain decoding, bonus token included: 1 + a_0 + a_0 a_1 + ... (EAGLE-3).

    Exact on text that the target wrote greedily: a drafted token is the text's token until the first miss.
    """
    return 1.0 + jnp.sum(jnp.cumprod(accepted_S / jnp.maximum(reached_S, 1)))
