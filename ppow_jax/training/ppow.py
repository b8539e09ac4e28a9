"""Stage 2: one PPOW step - score, choose, roll out, verify, reward, differentiate, update - as one XLA program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppow_jax import sharding
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.objectives import supervised
from ppow_jax.objectives.confidence import confidence_loss
from ppow_jax.objectives.criticality import divergence, window_means
from ppow_jax.objectives.expected import window_loss
from ppow_jax.objectives.policy import clipped_surrogate, decisive_tokens
from ppow_jax.objectives.rewards import speedup_reward
from ppow_jax.objectives.supervised import Windows
from ppow_jax.training.accumulate import each, summed
from ppow_jax.training.rollout import Rollout, RolloutSettings, criticality_of, rollout, summary
from ppow_jax.training.scoring import Scored, restricted, score
from ppow_jax.training.supervised import TrainState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """Hashable. clip: of the window's ratio. kl_weight: beta of KL(target || drafter). passes: optimiser passes over
    the rollouts of a step. exact: the expected reward of every window of the text in place of sampled ones, see
    `objectives.expected`; for text that the target wrote at temperature 0, and greedy acceptance. confidence_weight:
    of the confidence head's loss; 0 for a drafter without one.
    """

    clip: float
    kl_weight: float
    passes: int
    exact: bool = False
    confidence_weight: float = 0.0


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "rollouts", "policy", "greedy_text", "accumulate"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    drafter: Drafter,
    target_params: dict,
    batch: PackedBatch,
    key: Array,
    cached: tuple[Array, Array] | None = None,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    rollouts: RolloutSettings,
    policy: PolicySettings,
    greedy_text: bool,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One step -> (state, metrics). drafter: configuration, vocabulary and precision; parameters are the state's.

    cached: the target's pass over the batch, where it was made before (`training.features`); enough for exact steps.
    accumulate: microbatches that sampled steps are computed in; the results are those of the whole batch.
    """
    layers, ids_W, embed = drafter.config.feature_layers, drafter.target_ids_W, target_params["embed"]
    behaviour = drafter.replace(params=jax.lax.stop_gradient(state.params))

    def read(batch, cached=None):
        with jax.named_scope("target"):
            return score(target_params, config, layers, ids_W, batch, greedy_text, cached)

    def roll_out(rows):
        batch, key_B = rows
        scored = read(batch)
        with jax.named_scope("rollouts"):
            windows, measured = rollout(key_B, state.step, behaviour, target_params, config, scored, rollouts)
        return scored.windows._replace(probability_BxMxW=None), windows, measured

    metrics: dict[str, Array] = {}
    if policy.exact:
        if accumulate > 1:
            raise ValueError("exact steps take the whole batch at once")
        scored = read(batch, cached)
        with jax.named_scope("rollouts"):
            priority_BxM = _priority(behaviour, embed, config, scored, state.step, rollouts)
        objective = functools.partial(_exact_loss, drafter, embed, priority_BxM, rollouts, policy)
        rows: Any = scored.windows
    else:
        key_B = jax.random.split(key, batch.tokens_BxT.shape[0])
        text, windows, measured = each(roll_out, (batch, key_B), accumulate)
        metrics = summary(windows, measured, text.anchor_mask_BxM)
        counts = windows.valid_BxX.sum(), _counted(windows, rollouts).sum()
        objective = functools.partial(_loss, drafter, target_params, counts, rollouts, policy)
        rows = text, windows
    params, opt_state, signs = state.params, state.opt_state, []
    for _ in range(policy.passes):
        differentiate = functools.partial(jax.grad(objective, has_aux=True), params)
        with jax.named_scope("gradient"):
            gradient, details = summed(differentiate, rows, accumulate)
            gradient = sharding.constrain(gradient, drafter.config)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            signs += [details["loss"], optax.tree.norm(gradient)]
    state = state.advance(params, opt_state, *signs)  # all passes of a step, or none
    metrics |= details | {"gradient_norm": signs[-1], "skipped": state.skipped}
    return sharding.constrain(state, drafter.config), jax.tree.map(sharding.pin, metrics)


def _priority(drafter, embed, config, scored: Scored, step, rollouts: RolloutSettings) -> Array:
    """Weight of the window at each anchor: equal ones, its criticality once ADAW has begun. Mean 1 over the anchors."""
    mask_BxM = scored.windows.anchor_mask_BxM
    if not rollouts.adaw:
        return mask_BxM.astype(jnp.float32)
    g_BxTxE, kv = supervised.prefix(drafter, embed, scored.windows)
    v_BxM = window_means(criticality_of(drafter, embed, config, scored, g_BxTxE, kv), rollouts.window)
    v_BxM = jnp.where(mask_BxM, jnp.where(step >= rollouts.adaw_start, v_BxM, 1.0), 0.0)
    return v_BxM * mask_BxM.sum() / jnp.maximum(v_BxM.sum(), 1e-9)


def _exact_loss(
    drafter, embed, priority_BxM, rollouts: RolloutSettings, policy: PolicySettings, params, text: Windows
):
    drafter, K = drafter.replace(params=params), rollouts.window
    reward_K1 = speedup_reward(jnp.arange(K + 1), K, rollouts.costs)
    steps = supervised.unroll(drafter, embed, text, K)
    value, metrics = window_loss(drafter, steps, reward_K1, policy.kl_weight, priority_BxM)
    if policy.confidence_weight:
        doubt = supervised.confidence_of(drafter, steps)
        value, metrics = value + policy.confidence_weight * doubt, metrics | {"confidence_loss": doubt}
    return value, metrics


def _decisive(windows: Rollout, rollouts: RolloutSettings) -> Array:
    K = windows.token_BxXxK.shape[-1]
    return decisive_tokens(windows.accepted_BxX, K, whole_if_none=rollouts.eta > 0)


def _counted(windows: Rollout, rollouts: RolloutSettings) -> Array:
    return _decisive(windows, rollouts) & windows.valid_BxX[..., None]


def _loss(
    drafter,
    target_params,
    counts: tuple[Array, Array],
    rollouts: RolloutSettings,
    policy: PolicySettings,
    params,
    rows: tuple[Windows, Rollout],
):
    """-(clipped surrogate) + beta KL(target || drafter) on the tokens that count.

    counts: valid windows, and tokens that count, of the whole batch, of which these rows may be a part.
    """
    text, windows = rows
    drafter = drafter.replace(params=params)
    B, X, K = windows.token_BxXxK.shape
    z_BxXxKxW, out_BxXxKxE = redraft(drafter, target_params["embed"], text, windows)
    log_q = jax.nn.log_softmax(z_BxXxKxW / rollouts.rollout_temperature, axis=-1)
    logp_BxXxK = jnp.take_along_axis(log_q, windows.id_BxXxK[..., None], -1)[..., 0]
    surrogate = clipped_surrogate(
        logp_BxXxK.reshape(B * X, K),
        windows.logp_BxXxK.reshape(B * X, K),
        _decisive(windows, rollouts).reshape(B * X, K),
        windows.advantage_BxX.reshape(-1),
        windows.valid_BxX.reshape(-1),
        policy.clip,
        counts[0],
    )
    counted = _counted(windows, rollouts)

    def mean(x):
        return jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(counts[1], 1)

    p_BxXxKxW = restricted(windows.hidden_BxXxKxD, transformer.head(target_params)[drafter.target_ids_W])
    kl = mean(divergence(p_BxXxKxW, z_BxXxKxW))
    entropy = mean(-jnp.sum(jnp.exp(log_q) * log_q, -1))
    value = -surrogate.objective + policy.kl_weight * kl
    head = {}
    if policy.confidence_weight:
        overlap = jnp.minimum(p_BxXxKxW, jax.nn.softmax(z_BxXxKxW)).sum(-1)
        head = {"confidence_loss": mean(confidence_loss(params, drafter.norm(out_BxXxKxE, "norm"), overlap))}
        value += policy.confidence_weight * head["confidence_loss"]
    return value, head | {
        "loss": value,
        "surrogate": surrogate.objective,
        "kl": kl,
        "ratio": surrogate.ratio,
        "ratio_clipped": surrogate.clipped,
        "entropy": entropy,
    }


def redraft(drafter: Drafter, embed_VxD: Array, text: Windows, windows: Rollout) -> tuple[Array, Array]:
    """(logits [B, X, K, W], outputs [B, X, K, E]) of the drafter along windows that were drafted before."""
    g_BxTxE, kv = supervised.prefix(drafter, embed_VxD, text)
    keys = [Prefix(kv, supervised.anchor_mask(text, windows.anchor_BxX))]
    g_BxXxE = jnp.take_along_axis(g_BxTxE, windows.anchor_BxX[..., None], 1)
    position_BxX = jnp.take_along_axis(text.position_BxT, windows.anchor_BxX, 1)
    chain: tuple = ()
    token_BxX, outs = windows.root_BxX, []
    for s in range(windows.token_BxXxK.shape[-1]):
        embed_BxXxE = drafter.embed(embed_VxD, token_BxX)
        out, chain = drafting.step(drafter, g_BxXxE, embed_BxXxE, position_BxX + s, keys, chain, first=s == 0)
        outs.append(out)
        g_BxXxE, token_BxX = drafting.feed(drafter, out), windows.token_BxXxK[..., s]
    out_BxXxKxE = jnp.stack(outs, 2)
    return drafting.logits(drafter, out_BxXxKxE), out_BxXxKxE
