"""The programs of online adaptation, each of one fixed shape: the target's pass over a row, a replay, a training step.

The target's pass is made once per row and kept: the replays of all drafters and every training step on the row read it.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppow_jax import sharding
from ppow_jax.corpus.target_pass import read_rows
from ppow_jax.data.batches import PackedBatch
from ppow_jax.evaluation.replay_tables import ChainTable, Plan, read_batch
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, DrafterSpec, cast
from ppow_jax.objectives.expected import ExactSettings
from ppow_jax.objectives.head_loss import DraftRule
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.online.settings import OnlineSettings
from ppow_jax.training import initialise
from ppow_jax.training.optimizers import constant_rate
from ppow_jax.training.steps import ppow_exact, supervised
from ppow_jax.training.steps.rollout import RolloutSettings
from ppow_jax.training.steps.state import TrainState

Array = jax.Array
WARMUP = 2  # training steps: a budget pays for few of them
CLIP_NORM, LOSS = 0.5, SupervisedLoss()  # as in training
TEMPERATURE, GAMMA = 0.5, 0.1  # of the recipe: drafting rule of the reward, cost of a draft step in plain steps


class OnlineState(flax.struct.PyTreeNode):
    """State that adaptation carries from step to step, and saves.

    train: parameters (float32) and optimizer state of the candidate. serving: float32 parameters of the drafter that
    serves, the last one that was found good.
    """

    train: TrainState
    serving: dict


@jax.jit
def master_copy(params: dict) -> dict:
    """Parameters in float32, in buffers of their own."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


@functools.partial(jax.jit, static_argnames=("dtype",))
def serving_copy(params: dict, spec: DrafterSpec, *, dtype: str) -> Drafter:
    """The drafter that decodes with these float32 parameters: matrices in `dtype`, norms in float32."""
    return cast(spec.with_params(params), dtype)


def optimizer_of(settings: OnlineSettings, drafter: Drafter, features_NxF: np.ndarray) -> optax.GradientTransformation:
    """The optimizer of a drafter. features_NxF: the target's features of some text, for the scale of raw channels."""
    scale = None
    if not (drafter.config.fc_norm or drafter.config.norm_before_fc):
        scale = np.asarray(initialise.channel_scale(features_NxF), np.float32).tobytes()
    return constant_rate(settings.optimizer, CLIP_NORM, tuple(drafter.params), settings.learning_rate, WARMUP, scale)


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def read(params: dict, batch: PackedBatch, *, config: ModelConfig, layers: tuple[int, ...]) -> tuple[Array, Array]:
    """The target's pass over a row -> (features_BxTxF, hidden_BxMxD), in the dtype of its matrices."""
    out = read_rows(params, config, batch, layers)
    verifier_BxM = jnp.minimum(batch.anchor_BxM + 1, batch.tokens_BxT.shape[1] - 1)
    hidden_BxMxD = jnp.take_along_axis(out.hidden_BxSxD, verifier_BxM[..., None], 1)
    dtype = transformer.head(params).dtype
    return out.features_BxSxF.astype(dtype), hidden_BxMxD.astype(dtype)


def replay(
    drafter: Drafter, params: dict, batch: PackedBatch, cached: tuple[Array, Array], config: ModelConfig, K: int
) -> np.ndarray:
    """accepted_M: from each anchor of a row, the leading tokens of a greedy chain of K that equal the text."""
    (table,) = read_batch(drafter, params, batch, cached, config=config, plans=(Plan(K),))
    assert isinstance(table, ChainTable)
    return sharding.fetch(table.accepted_A)[0]


def train(
    state: TrainState,
    spec: DrafterSpec,
    params: dict,
    batch: PackedBatch,
    cached: tuple[Array, Array],
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    settings: OnlineSettings,
) -> tuple[TrainState, dict[str, Any]]:
    """One training step on a row with the chosen objective; the state is donated.

    The text's own token is the label at every temperature: where a drafted tree is verified, a node is accepted if
    it equals the token that the target drew. The exact estimator needs greedy answers in training, because a reward is
    then known; here it is the reward on the text as it was drawn.
    """
    rows = state, spec, params, batch, cached
    K = settings.draft_steps
    if settings.objective == "supervised":
        how: dict[str, Any] = {"steps": K, "loss": LOSS, "answers_are_greedy": True}
        return supervised.train_step(*rows, config=config, optimizer=optimizer, **how)
    exact = ExactSettings(DraftRule(TEMPERATURE), supervised_weight=1.0, supervised=LOSS)
    return ppow_exact.train_step(*rows, config=config, optimizer=optimizer, rollouts=_rollouts(K), exact=exact)


def _rollouts(K: int) -> RolloutSettings:
    """Settings of which the exact estimator reads the window and the costs alone."""
    return RolloutSettings(
        window=K,
        group=1,
        windows=1,
        rollout_temperature=TEMPERATURE,
        verify_temperature=0.0,
        eta=0.0,
        eps=0.0,
        adaw=False,
        adaw_start=0,
        greedy_reference=False,
        costs=CostModel(GAMMA),
    )
