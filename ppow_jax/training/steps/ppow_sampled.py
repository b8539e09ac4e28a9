"""Stage 2 as published, one step as one XLA program: score, choose, roll out, verify, reward, differentiate, update."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import optax

from ppow_jax import sharding
from ppow_jax.corpus.target_pass import restricted, score
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, DrafterSpec
from ppow_jax.objectives import supervised
from ppow_jax.objectives.criticality import divergence
from ppow_jax.objectives.policy import clipped_surrogate, decision_logp
from ppow_jax.objectives.supervised import AnchorRows
from ppow_jax.training.steps.accumulate import each, summed
from ppow_jax.training.steps.rollout import Rollout, RolloutSettings, rollout, summary
from ppow_jax.training.steps.state import TrainState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """Hashable. clip: of the window's probability ratio. kl_weight: beta of KL(target || drafter). passes: optimizer
    passes over the rollouts of a step.
    """

    clip: float
    kl_weight: float
    passes: int


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "rollouts", "policy", "answers_are_greedy", "accumulate", "average_decay"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    spec: DrafterSpec,
    target_params: dict,
    batch: PackedBatch,
    key: Array,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    rollouts: RolloutSettings,
    policy: PolicySettings,
    answers_are_greedy: bool,
    accumulate: int = 1,
    average_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """One step -> (state, metrics). spec: of the drafter, whose parameters are the state's.

    accumulate: number of microbatches per step; the results are those of the whole batch. average_decay: decay of the
    state's parameter average, if it has one.
    """
    layers, ids_W = spec.config.feature_layers, spec.target_ids_W
    behaviour = spec.with_params(jax.lax.stop_gradient(state.params))

    def roll_out(rows):
        batch, key_B = rows
        with jax.named_scope("target"):
            scored = score(target_params, config, layers, ids_W, batch, answers_are_greedy)
        with jax.named_scope("rollouts"):
            windows, measured = rollout(key_B, state.step, behaviour, target_params, config, scored, rollouts)
        return scored.windows._replace(probability_BxMxW=None), windows, measured

    key_B = jax.random.split(key, batch.tokens_BxT.shape[0])
    text, windows, measured = each(roll_out, (batch, key_B), accumulate)
    metrics = summary(windows, measured, text.anchor_mask_BxM)
    counts = windows.valid_BxX.sum(), _counted(windows).sum()
    objective = functools.partial(_loss, spec, target_params, counts, rollouts, policy)
    rows = text, windows
    params, opt_state, signs = state.params, state.opt_state, []
    for _ in range(policy.passes):
        differentiate = functools.partial(jax.grad(objective, has_aux=True), params)
        with jax.named_scope("gradient"):
            gradient, details = summed(differentiate, rows, accumulate)
            gradient = sharding.constrain(gradient, spec.config)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            signs += [details["loss"], optax.tree.norm(gradient)]
    state = state.advance(params, opt_state, *signs, decay=average_decay)  # all passes of a step, or none
    metrics |= details | {"gradient_norm": signs[-1], "skipped": state.skipped}
    return sharding.constrain(state, spec.config), jax.tree.map(sharding.pin, metrics)


def _counted(windows: Rollout) -> Array:
    return windows.decisive_BxXxK & windows.valid_BxX[..., None]


def _loss(
    spec: DrafterSpec,
    target_params,
    counts: tuple[Array, Array],
    rollouts: RolloutSettings,
    policy: PolicySettings,
    params,
    rows: tuple[AnchorRows, Rollout],
):
    """-(clipped surrogate) + beta KL(target || drafter) on the tokens that count.

    counts: numbers of valid windows, and of tokens that count, in the whole batch, of which these rows may be a part.
    """
    text, windows = rows
    drafter = spec.with_params(params)
    B, X, K = windows.token_BxXxK.shape
    z_BxXxKxW = redraft(drafter, target_params["embed"], text, windows)
    log_q = jax.nn.log_softmax(z_BxXxKxW / rollouts.rollout_temperature, axis=-1)
    logp_BxXxK = jnp.take_along_axis(log_q, windows.id_BxXxK[..., None], -1)[..., 0]
    old_BxXxK = windows.logp_BxXxK
    if rollouts.verify_temperature > 0:  # the draft probability also affects acceptance
        decided = functools.partial(decision_logp, target_logp=windows.target_logp_BxXxK, accepted=windows.accepted_BxX)
        logp_BxXxK, old_BxXxK = decided(logp_BxXxK), decided(old_BxXxK)
    surrogate = clipped_surrogate(
        logp_BxXxK.reshape(B * X, K),
        old_BxXxK.reshape(B * X, K),
        windows.decisive_BxXxK.reshape(B * X, K),
        windows.advantage_BxX.reshape(-1),
        windows.valid_BxX.reshape(-1),
        policy.clip,
        counts[0],
    )
    counted = _counted(windows)

    def mean(x):
        return jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(counts[1], 1)

    p_BxXxKxW = restricted(windows.hidden_BxXxKxD, transformer.head(target_params)[drafter.target_ids_W])
    kl = mean(divergence(p_BxXxKxW, z_BxXxKxW))
    entropy = mean(-jnp.sum(jnp.exp(log_q) * log_q, -1))
    value = -surrogate.objective + policy.kl_weight * kl
    return value, {
        "loss": value,
        "surrogate": surrogate.objective,
        "kl": kl,
        "ratio": surrogate.ratio,
        "ratio_clipped": surrogate.clipped,
        "entropy": entropy,
    }


def redraft(drafter: Drafter, embed_VxD: Array, text: AnchorRows, windows: Rollout) -> Array:
    """logits_BxXxKxW of the current drafter along previously drafted windows."""
    anchors = supervised.anchors_at(text, *supervised.prefix(drafter, embed_VxD, text), windows.anchor_BxX)
    drafted = (windows.token_BxXxK[..., s] for s in range(windows.token_BxXxK.shape[-1] - 1))
    outs = list(drafting.unroll(drafter, embed_VxD, anchors, itertools.chain([windows.root_BxX], drafted)))
    return drafting.logits(drafter, jnp.stack(outs, 2))
