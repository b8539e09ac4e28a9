"""Stage 1: one training step, and the simulated acceptance length by which its checkpoints are chosen."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppow_jax import sharding
from ppow_jax.corpus.target_pass import restricted, score
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, DrafterSpec
from ppow_jax.objectives import supervised
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.training.steps.accumulate import each, summed
from ppow_jax.training.steps.state import TrainState

Array = jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "steps", "loss", "answers_are_greedy", "accumulate", "average_decay"),
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
    steps: int,
    loss: SupervisedLoss,
    answers_are_greedy: bool,
    accumulate: int = 1,
    average_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
    """Target pass, training-time test over `steps` steps with this loss, gradient, update -> (state, metrics).

    spec: of the drafter, whose parameters are the state's. cached: the
    target's pass over the batch, if computed before (`corpus.features`). accumulate: number of microbatches per step;
    the results are those of the whole batch. average_decay: decay of the state's parameter average, if it has one.
    """
    layers, ids_W = spec.config.feature_layers, spec.target_ids_W

    def read(rows):
        """The target's pass; its distributions, the largest part, are recomputed for each microbatch."""
        batch, cached = rows
        with jax.named_scope("target"):
            scored = score(target_params, config, layers, ids_W, batch, answers_are_greedy, cached)
        return scored.windows._replace(probability_BxMxW=None), scored.hidden_BxMxD

    def objective(params, rows):
        windows, hidden_BxMxD = rows
        head_WxD = transformer.head(target_params)[ids_W]
        windows = windows._replace(probability_BxMxW=restricted(hidden_BxMxD, head_WxD))
        scores = supervised.training_time_test(
            spec.with_params(params), target_params["embed"], windows, steps, loss, counts_S
        )
        return scores.total.sum(), supervised.Totals.of(scores)

    def differentiate(rows):
        with jax.named_scope("gradient"):
            value, gradient = jax.value_and_grad(objective, has_aux=True)(state.params, rows)
            return value, sharding.constrain(gradient, spec.config)

    rows = each(read, (batch, cached), accumulate)
    windows = rows[0]
    counts_S = supervised.counts(windows, steps)
    (value, totals), gradient = summed(differentiate, rows, accumulate)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradient)
        state = state.advance(params, opt_state, value, gradient_norm, decay=average_decay)
        state = sharding.constrain(state, spec.config)
    metrics = {
        "loss": value,
        "loss_by_step": totals.loss_S / jnp.maximum(totals.known_S, 1),
        "accuracy_by_step": totals.match_S / jnp.maximum(totals.valid_S, 1),
        "acceptance_by_step": totals.accepted_S / jnp.maximum(totals.reached_S, 1),
        "tau_sim": supervised.simulated_length(totals.accepted_S, totals.reached_S),
        "gradient_norm": gradient_norm,
        "skipped": state.skipped,
        "outside_vocabulary": 1
        - ((windows.label_BxM >= 0) & windows.anchor_mask_BxM).sum()
        / jnp.maximum(windows.anchor_mask_BxM.sum(), 1),
        "answer_tokens": windows.anchor_mask_BxM.sum(),
    }
    return state, jax.tree.map(sharding.pin, metrics)


@functools.partial(jax.jit, static_argnames=("config", "K", "answers_are_greedy"))
def _evaluate_batch(
    drafter: Drafter,
    target_params: dict,
    batch: PackedBatch,
    cached: tuple[Array, Array] | None,
    *,
    config: ModelConfig,
    K: int,
    answers_are_greedy: bool,
):
    layers = drafter.config.feature_layers
    windows = score(target_params, config, layers, drafter.target_ids_W, batch, answers_are_greedy, cached).windows
    scores = supervised.training_time_test(drafter, target_params["embed"], windows, K, SupervisedLoss())
    return jax.tree.map(sharding.pin, supervised.Totals.of(scores))


def evaluate(
    drafter: Drafter,
    target_params: dict,
    batches: Sequence[tuple[PackedBatch, tuple[Any, Any] | None]],
    *,
    config: ModelConfig,
    K: int,
    answers_are_greedy: bool,
) -> dict[str, Any]:
    """Simulated greedy-chain tau of windows of K tokens on held-out batches, with its parts by step.

    batches: each with the target's features of it if they are stored (`corpus.features`), or None.
    """
    sums = [
        _evaluate_batch(drafter, target_params, *batch, config=config, K=K, answers_are_greedy=answers_are_greedy)
        for batch in batches
    ]
    totals = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(sums))
    return {
        "held_out_tau_sim": float(supervised.simulated_length(totals.accepted_S, totals.reached_S)),
        "held_out_acceptance_by_step": totals.accepted_S / totals.reached_S.clip(1),
        "held_out_overlap_by_step": totals.overlap_S / totals.valid_S.clip(1),
        "held_out_loss": float(totals.loss_S[0] / totals.known_S[0].clip(1)),
    }
