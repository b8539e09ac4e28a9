"""Rollouts of stage 2: choose windows, draft each G times, verify them with the target, compute rewards."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.corpus.target_pass import Scored
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.models.transformer import Context
from ppow_jax.models.vocabulary import survey
from ppow_jax.objectives import supervised
from ppow_jax.objectives.criticality import choose_windows, criticality, divergence, window_means
from ppow_jax.objectives.policy import centred, decisive_tokens, flat_groups, group_advantage
from ppow_jax.objectives.rewards import CostModel, proximity_reward, speedup_reward
from ppow_jax.speculation.propose import propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.token_scores import score_tokens, token_logits
from ppow_jax.speculation.verify import accepted_greedy, accepted_sampled

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Hashable. window K; group G; windows A: prefixes per row; rollout_temperature of the drafts.

    verify_temperature: 0 accepts greedily (argmax), above 0 by p/q rejection at that temperature.
    eta, eps: of R_dist (eta = 0 disables it). adaw, adaw_start: priority sampling, and the step at which it begins.
    greedy_reference: decode the target's continuation; False uses the text itself, which is the same where the
    target wrote it at temperature 0. divide_by_std: divide advantages by the standard deviation of their group.
    """

    window: int
    group: int
    windows: int
    rollout_temperature: float
    verify_temperature: float
    eta: float
    eps: float
    adaw: bool
    adaw_start: int
    greedy_reference: bool
    costs: CostModel
    divide_by_std: bool = True


class Rollout(NamedTuple):
    """N = B * A * G windows of K tokens, constants for the gradient; windows are laid out as [B, A*G].

    anchor_BxX: anchor index of each window (X = A * G). token_, id_, logp_BxXxK: the drafts, target and draft ids, and
    their log-probability when drawn. target_logp_BxXxK: the target's, at the temperature of acceptance. decisive_BxXxK:
    tokens that the reward depends on. accepted_BxX, reward_BxX, advantage_BxX, valid_BxX. hidden_BxXxKxD: the target's
    state that verifies each drafted token; `scoring.restricted` turns it into a distribution over the draft vocabulary.
    """

    anchor_BxX: Array
    root_BxX: Array
    token_BxXxK: Array
    id_BxXxK: Array
    logp_BxXxK: Array
    target_logp_BxXxK: Array
    decisive_BxXxK: Array
    accepted_BxX: Array
    reward_BxX: Array
    advantage_BxX: Array
    valid_BxX: Array
    hidden_BxXxKxD: Array


class Measured(NamedTuple):
    """Data for the metrics of rollouts, beside the windows themselves.

    speedup_BxX, proximity_BxX: the parts of the reward. critical_BxA, chosen_BxA: criticality of the chosen windows,
    and whether they are valid. critical_BxM: criticality of every anchor.
    """

    speedup_BxX: Array
    proximity_BxX: Array
    critical_BxA: Array
    chosen_BxA: Array
    critical_BxM: Array


def rollout(
    key_B: Array,
    step: Array,
    drafter: Drafter,
    target_params: dict,
    config: ModelConfig,
    scored: Scored,
    settings: RolloutSettings,
) -> tuple[Rollout, Measured]:
    """Windows of rows with their rewards. key_B: one per row, so that a row does not depend on the others."""
    windows, G, K = scored.windows, settings.group, settings.window
    choose_B, draft_B, accept_B = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(key_B)
    g_BxTxE, kv = supervised.prefix(drafter, target_params["embed"], windows)
    v_BxM = criticality_of(drafter, target_params["embed"], config, scored, g_BxTxE, kv)
    chosen_BxA, valid_BxA, chosen_v = _choose(choose_B, step, windows, v_BxM, settings)

    def beams(x_BxM, index_BxA=chosen_BxA):
        return jnp.repeat(jnp.take_along_axis(x_BxM, index_BxA, 1), G, axis=1)

    anchor_BxX, valid_BxX = beams(windows.anchor_BxM), jnp.repeat(valid_BxA, G, axis=1)
    root_BxX = jnp.take_along_axis(windows.tokens_BxT, anchor_BxX + 1, 1)
    anchors = supervised.anchors_at(windows, g_BxTxE, kv, anchor_BxX)
    sampling = Sampling(settings.rollout_temperature)
    draft = propose(
        drafter,
        target_params["embed"],
        anchors.g_BxMxE,
        root_BxX,
        anchors.position_BxM,
        anchors.keys,
        K,
        sampling,
        draft_B,
    )
    logp_BxXxK = jnp.take_along_axis(draft.log_q_BxMxKxW, draft.id_BxMxK[..., None], -1)[..., 0]

    hidden_BxAxD = jnp.take_along_axis(scored.hidden_BxMxD, chosen_BxA[..., None], 1)
    hidden_BxXxKxD = _verify(target_params, config, scored, anchor_BxX, draft.token_BxMxK, hidden_BxAxD, G)
    scored_drafts = score_tokens(
        hidden_BxXxKxD, transformer.head(target_params), draft.token_BxMxK, settings.verify_temperature
    )
    if settings.verify_temperature == 0:
        accepted_BxX = accepted_greedy(draft.token_BxMxK, scored_drafts.argmax)
    else:
        u_BxXxK = jax.vmap(lambda key: jax.random.uniform(key, logp_BxXxK.shape[1:]))(accept_B)
        accepted_BxX = accepted_sampled(u_BxXxK, logp_BxXxK, scored_drafts.logp_at_temperature)

    r_speedup = speedup_reward(accepted_BxX, K, settings.costs)
    reference_BxA = _reference_logp(target_params, config, scored, chosen_BxA, hidden_BxAxD, settings)
    reference_BxX = jnp.repeat(reference_BxA, G, axis=1)
    r_dist = proximity_reward(accepted_BxX, reference_BxX, scored_drafts.logp.sum(-1), settings.eta, settings.eps)
    reward_BxX = r_speedup + r_dist
    B, A = chosen_BxA.shape
    reward_BxAxG, grouped = reward_BxX.reshape(B, A, G), (B, A, G)
    decisive = decisive_tokens(accepted_BxX.reshape(grouped), r_dist.reshape(grouped), K)
    advantage = group_advantage(reward_BxAxG) if settings.divide_by_std else centred(reward_BxAxG)

    result = Rollout(
        anchor_BxX,
        root_BxX,
        draft.token_BxMxK,
        draft.id_BxMxK,
        logp_BxXxK,
        scored_drafts.logp_at_temperature,
        decisive.reshape(B, A * G, K),
        accepted_BxX,
        reward_BxX,
        advantage.reshape(B, A * G),
        valid_BxX,
        hidden_BxXxKxD,
    )
    return jax.lax.stop_gradient((result, Measured(r_speedup, r_dist, chosen_v, valid_BxA, v_BxM)))


def summary(windows: Rollout, measured: Measured, anchor_mask_BxM: Array) -> dict[str, Array]:
    """Metrics of the rollouts of a whole batch."""
    (B, X, K), A = windows.token_BxXxK.shape, measured.chosen_BxA.shape[1]
    valid_BxX, reward_BxX = windows.valid_BxX, windows.reward_BxX

    def mean(x, mask=valid_BxX):
        return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(mask.sum(), 1)

    reward = mean(reward_BxX)
    histogram_BxXxK1 = jax.nn.one_hot(windows.accepted_BxX, K + 1) * valid_BxX[..., None]
    return {
        "reward": reward,
        "reward_std": jnp.sqrt(mean((reward_BxX - reward) ** 2)),
        "reward_speedup": mean(measured.speedup_BxX),
        "reward_proximity": mean(measured.proximity_BxX),
        "accepted_length": mean(windows.accepted_BxX.astype(jnp.float32)),
        "accepted_histogram": histogram_BxXxK1.sum((0, 1)),
        "flat_groups": mean(flat_groups(reward_BxX.reshape(B, A, X // A)) * 1.0, measured.chosen_BxA),
        "criticality": mean(measured.critical_BxA, measured.chosen_BxA),
        "criticality_all": mean(measured.critical_BxM, anchor_mask_BxM),
        "windows": valid_BxX.sum(),
    }


def criticality_of(
    drafter: Drafter, embed_VxD: Array, config: ModelConfig, scored: Scored, g_BxTxE: Array, kv: tuple[KV, ...]
) -> Array:
    """v_BxM of every anchor. g_BxTxE, kv: see `supervised.prefix`.

    Q is the drafter's first step at each position, not the step that a window would take there: one draft step over all
    anchors instead of K. (`objectives.expected.priority` has those steps available and uses them.) Of KL(P || Q) only
    the part that the drafter can reduce is used, mass(P) KL(P restricted || Q); 0 if the label is not a draft token.
    """
    windows = scored.windows
    anchors = supervised.anchors_at(windows, g_BxTxE, kv, windows.anchor_BxM)
    (out,) = drafting.unroll(drafter, embed_VxD, anchors, supervised.text_tokens(windows, 1))
    kl_BxM = windows.mass_BxM * divergence(windows.probability_BxMxW, drafting.logits(drafter, out))
    reachable_BxM = windows.anchor_mask_BxM & (windows.label_BxM >= 0)
    return jnp.where(reachable_BxM, criticality(windows.entropy_BxM, kl_BxM, config.vocab_size), 0.0)


def _choose(key_B, step, windows, v_BxM, settings: RolloutSettings):
    """Chooses anchors whose whole window is inside their answer, by criticality once ADAW has begun."""
    K, M = settings.window, windows.anchor_BxM.shape[1]
    last = jnp.pad(windows.anchor_BxM, ((0, 0), (0, K - 1)), constant_values=-1)[:, K - 1 : K - 1 + M]
    inside = jnp.pad(windows.anchor_mask_BxM, ((0, 0), (0, K - 1)))[:, K - 1 : K - 1 + M]
    allowed_BxM = windows.anchor_mask_BxM & inside & (last == windows.anchor_BxM + K - 1)
    winnable_BxM = windows.label_BxM >= 0  # otherwise its first token cannot be accepted
    weight_BxM = jnp.where(winnable_BxM, window_means(v_BxM, K), 0.0)
    priority = settings.adaw & (step >= settings.adaw_start)
    index_BxA, valid_BxA = choose_windows(
        key_B, jnp.where(priority, weight_BxM, 1.0), allowed_BxM, settings.windows
    )
    return index_BxA, valid_BxA, jnp.take_along_axis(weight_BxM, index_BxA, 1)


def _prefix_context(scored: Scored, anchor_BxX: Array) -> Context:
    """The target's keys of a row, as tokens after each root attend to them: up to the root, inside the segment."""
    T = scored.windows.tokens_BxT.shape[1]
    root_BxX = anchor_BxX + 1
    segment_BxX = jnp.take_along_axis(scored.windows.segment_BxT, root_BxX, 1)
    mask = (segment_BxX[..., None] == scored.windows.segment_BxT[:, None]) & (
        jnp.arange(T) <= root_BxX[..., None]
    )
    return Context(scored.kv, mask, scored.windows.position_BxT)


def _verify(target_params, config, scored: Scored, anchor_BxX, token_BxXxK, hidden_BxAxD, G) -> Array:
    """hidden_BxXxKxD that verifies each drafted token: the root's (already known), then those of drafts 1..K-1."""
    B, X, K = token_BxXxK.shape
    first = jnp.repeat(hidden_BxAxD, G, axis=1)[:, :, None]
    if K == 1:
        return first
    S = X * (K - 1)
    root_position_BxX = jnp.take_along_axis(scored.windows.position_BxT, anchor_BxX, 1) + 1
    position = root_position_BxX[..., None] + 1 + jnp.arange(K - 1)
    window_S, offset_S = jnp.arange(S) // (K - 1), jnp.arange(S) % (K - 1)
    own = (window_S[:, None] == window_S) & (offset_S[None] <= offset_S[:, None])
    prefix = _prefix_context(scored, anchor_BxX)
    out = transformer.forward(
        target_params,
        config,
        token_BxXxK[:, :, :-1].reshape(B, S),
        position.reshape(B, S),
        jnp.broadcast_to(own, (B, S, S)),
        [prefix._replace(mask_BxSxL=jnp.repeat(prefix.mask_BxSxL, K - 1, axis=1))],
    )
    return jnp.concatenate([first, out.hidden_BxSxD.reshape(B, X, K - 1, -1)], axis=2)


def _reference_logp(target_params, config, scored: Scored, chosen_BxA, hidden_BxAxD, settings) -> Array:
    """log P of the target's own greedy window after each root, [B, A], nats."""
    if settings.eta == 0:
        return jnp.zeros(chosen_BxA.shape)
    windows, K = scored.windows, settings.window
    B, M = windows.anchor_BxM.shape
    if not settings.greedy_reference:
        token_BxM = jnp.take_along_axis(windows.tokens_BxT, jnp.minimum(windows.anchor_BxM + 2, _last(windows)), 1)
        z_BxM = token_logits(scored.hidden_BxMxD, transformer.head(target_params), token_BxM)
        logp_BxM = z_BxM - scored.survey.logsumexp_N.reshape(B, M)
        return jnp.take_along_axis(K * window_means(logp_BxM, K), chosen_BxA, 1)
    return _decode_reference(target_params, config, scored, chosen_BxA, hidden_BxAxD, K)


def _last(windows) -> int:
    return windows.tokens_BxT.shape[1] - 1


def _decode_reference(target_params, config, scored: Scored, chosen_BxA, hidden_BxAxD, K: int) -> Array:
    """Summed log-probability of K tokens that the target decodes greedily after each root."""
    B, A = chosen_BxA.shape
    anchor_BxA = jnp.take_along_axis(scored.windows.anchor_BxM, chosen_BxA, 1)
    position_BxA = jnp.take_along_axis(scored.windows.position_BxT, anchor_BxA, 1) + 2
    prefix, head_VxD = _prefix_context(scored, anchor_BxA), transformer.head(target_params)
    own_AxA = jnp.broadcast_to(jnp.eye(A, dtype=bool), (B, A, A))
    past: list[tuple[KV | StackedKV, ...]] = []
    total_BxA, hidden = jnp.zeros((B, A)), hidden_BxAxD
    for s in range(K):
        flat = hidden.reshape(B * A, -1)
        surveyed = survey(flat, head_VxD)
        token_BxA = surveyed.argmax_N.reshape(B, A)
        z = token_logits(flat, head_VxD, surveyed.argmax_N)
        total_BxA += (z - surveyed.logsumexp_N).reshape(B, A)
        if s < K - 1:
            contexts = [prefix, *(Context(kv, own_AxA, position_BxA + r) for r, kv in enumerate(past))]
            out = transformer.forward(target_params, config, token_BxA, position_BxA + s, own_AxA, contexts)
            past.append(out.kv)
            hidden = out.hidden_BxSxD
    return total_BxA
