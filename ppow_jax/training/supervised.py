"""Stage 1: one training step, and the simulated acceptance length by which its checkpoints are chosen."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppow_jax.data.batches import PackedBatch
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.objectives import supervised
from ppow_jax.training.scoring import score

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """step (int32), the drafter's float32 parameters, the optimizer's state, and the updates skipped so far (int32)."""

    step: Array
    params: dict
    opt_state: Any
    skipped: Array

    @classmethod
    def create(cls, params: dict, optimizer: optax.GradientTransformation) -> "TrainState":
        """Step 0, with the parameters copied to float32."""
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        step, skipped = jnp.zeros((2, 1), jnp.int32)  # two buffers: both are donated
        return cls(step[0], params, optimizer.init(params), skipped[0])

    def advance(self, params: dict, opt_state: Any, *values: Array) -> "TrainState":
        """The state after a step; an update is skipped, and counted, where a value or a parameter is not finite.

        values: scalars that tell, such as loss and gradient norm. No branch on the host: selects inside the step.
        """
        finite = jnp.isfinite(jnp.stack([*values, optax.tree.norm(params)])).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (self.params, self.opt_state)
        )
        return TrainState(self.step + 1, params, opt_state, self.skipped + ~finite)


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "steps", "decay", "greedy_text"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    drafter: Drafter,
    target_params: dict,
    batch: PackedBatch,
    cached: tuple[Array, Array] | None = None,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    steps: int,
    decay: float,
    greedy_text: bool,
) -> tuple[TrainState, dict[str, Array]]:
    """Target pass, training-time test over `steps` steps, gradient, update -> (state, metrics).

    drafter: gives configuration, vocabulary and precision; its parameters are replaced by the state's. cached: the
    target's pass over the batch, where it was made before (`training.features`).
    """
    layers = drafter.config.feature_layers
    with jax.named_scope("target"):
        windows = score(target_params, config, layers, drafter.target_ids_W, batch, greedy_text, cached).windows

    def objective(params):
        scores = supervised.training_time_test(
            drafter.replace(params=params), target_params["embed"], windows, steps, decay
        )
        return scores.total.sum(), scores

    with jax.named_scope("gradient"):
        (value, scores), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradient)
        state = state.advance(params, opt_state, value, gradient_norm)
    accepted_S, reached_S = supervised.chain_counts(scores)
    metrics = {
        "loss": value,
        "loss_by_step": supervised.mean_loss(scores),
        "accuracy_by_step": (scores.match & scores.valid).sum((1, 2))
        / jnp.maximum(scores.valid.sum((1, 2)), 1),
        "acceptance_by_step": accepted_S / jnp.maximum(reached_S, 1),
        "tau_sim": supervised.simulated_length(accepted_S, reached_S),
        "gradient_norm": gradient_norm,
        "skipped": state.skipped,
        "outside_vocabulary": 1
        - ((windows.label_BxM >= 0) & windows.anchor_mask_BxM).sum()
        / jnp.maximum(windows.anchor_mask_BxM.sum(), 1),
        "answer_tokens": windows.anchor_mask_BxM.sum(),
    }
    return state, metrics


@functools.partial(jax.jit, static_argnames=("config", "K", "greedy_text"))
def _evaluate_batch(
    drafter: Drafter,
    target_params: dict,
    batch: PackedBatch,
    *,
    config: ModelConfig,
    K: int,
    greedy_text: bool,
):
    layers = drafter.config.feature_layers
    windows = score(target_params, config, layers, drafter.target_ids_W, batch, greedy_text).windows
    scores = supervised.training_time_test(drafter, target_params["embed"], windows, K, decay=1.0)
    count_S = scores.valid.sum((1, 2))
    overlap_S = jnp.sum(jnp.where(scores.valid, scores.overlap, 0.0), (1, 2))
    loss_S = jnp.sum(jnp.where(scores.valid & scores.known, scores.loss, 0.0), (1, 2))
    known_S = (scores.valid & scores.known).sum((1, 2))
    return *supervised.chain_counts(scores), overlap_S, count_S, loss_S, known_S


def evaluate(
    drafter: Drafter,
    target_params: dict,
    batches: list[PackedBatch],
    *,
    config: ModelConfig,
    K: int,
    greedy_text: bool,
) -> dict[str, Any]:
    """Simulated greedy-chain tau of windows of K tokens on held-out batches, with its parts by step."""
    sums = [
        _evaluate_batch(drafter, target_params, batch, config=config, K=K, greedy_text=greedy_text)
        for batch in batches
    ]
    totals = (np.sum(parts, axis=0) for parts in zip(*jax.device_get(sums), strict=True))
    accepted_S, reached_S, overlap_S, count_S, loss_S, known_S = totals
    return {
        "held_out_tau_sim": float(supervised.simulated_length(accepted_S, reached_S)),
        "held_out_acceptance_by_step": accepted_S / reached_S.clip(1),
        "held_out_overlap_by_step": overlap_S / count_S.clip(1),
        "held_out_loss": float(loss_S[0] / max(known_S[0], 1)),
    }
