"""Stage 2 without sampling: one PPOW step on the expected reward of every window of the text, as one XLA program.

For text that the target wrote at temperature 0 and greedy acceptance, see `objectives.expected`. The sampled estimator,
as published, is `training.steps.ppow_sampled`; both have the same interface.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from ppow_jax import sharding
from ppow_jax.corpus.target_pass import score
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import DrafterSpec
from ppow_jax.objectives import supervised
from ppow_jax.objectives.expected import ExactSettings, window_loss
from ppow_jax.objectives.rewards import speedup_reward
from ppow_jax.training.steps.looked_up import looked_up
from ppow_jax.training.steps.rollout import RolloutSettings
from ppow_jax.training.steps.state import TrainState

Array = jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "rollouts", "exact", "average_decay"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    spec: DrafterSpec,
    target_params: dict,
    batch: PackedBatch,
    cached: tuple[Array, Array] | None = None,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    rollouts: RolloutSettings,
    exact: ExactSettings,
    average_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """One step -> (state, metrics). spec: of the drafter, whose parameters are the state's.

    cached: the target's pass over the batch, if computed before (`corpus.features`). rollouts: only window, costs
    and ADAW's start are used.
    """
    layers, ids_W, embed_VxD = spec.config.feature_layers, spec.target_ids_W, target_params["embed"]
    with jax.named_scope("target"):
        windows = score(target_params, config, layers, ids_W, batch, True, cached).windows
    K, adaw = rollouts.window, rollouts.adaw & (state.step >= rollouts.adaw_start)
    reward_K1, last_BxM = speedup_reward(jnp.arange(K + 1), K, rollouts.costs), supervised.last_anchors(windows)

    found_BxM = looked_up(batch, K) if exact.lookup_discount else None

    def objective(params):
        mine = spec.with_params(params)
        steps = supervised.unroll(mine, embed_VxD, windows, K)
        return window_loss(mine, steps, last_BxM, reward_K1, exact, adaw, config.vocab_size, found_BxM)

    with jax.named_scope("gradient"):
        gradient, metrics = jax.grad(objective, has_aux=True)(state.params)
        gradient = sharding.constrain(gradient, spec.config)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        state = state.advance(params, opt_state, metrics["loss"], norm, decay=average_decay)
    metrics |= {"gradient_norm": norm, "skipped": state.skipped}
    return sharding.constrain(state, spec.config), jax.tree.map(sharding.pin, metrics)
