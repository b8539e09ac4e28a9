"""The frozen target's pass over a packed batch: features, its restricted distribution, and its keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.data.batches import PackedBatch
from ppow_jax.models import transformer
from ppow_jax.models.attention_backends import Packed
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.layers import KV, linear
from ppow_jax.models.stack import StackedKV
from ppow_jax.models.vocabulary import Survey, survey
from ppow_jax.objectives.supervised import AnchorRows

Array = jax.Array


class Scored(NamedTuple):
    """windows: see `AnchorRows`. survey: per anchor (flattened to B*M), over the whole vocabulary. kv: the target's
    keys of the rows, per run of layers. hidden_BxMxD: the final hidden state that verifies the anchor's first step.
    """

    windows: AnchorRows
    survey: Survey
    kv: tuple[KV | StackedKV, ...]
    hidden_BxMxD: Array


def restricted(hidden: Array, head_WxD: Array, temperature: float = 1.0) -> Array:
    """The target's distribution [..., W] over the draft vocabulary, renormalised."""
    return jax.nn.softmax(linear(hidden, head_WxD) / temperature, axis=-1)


def draft_ids(target_ids_W: Array, vocab_size: int) -> Array:
    """id_V: the draft id of each target id, -1 where the draft vocabulary has none."""
    W = target_ids_W.shape[0]
    return jnp.full(vocab_size, -1, jnp.int32).at[target_ids_W].set(jnp.arange(W, dtype=jnp.int32))


def read_rows(params: dict, config: ModelConfig, batch: PackedBatch, layers: tuple[int, ...]) -> transformer.Outputs:
    """The target's pass over packed rows; layers: those whose inputs become the features."""
    mask = Packed(batch.segment_BxT)
    return transformer.forward(params, config, batch.tokens_BxT, batch.position_BxT, mask, feature_layers=layers)


def score(
    params: dict,
    config: ModelConfig,
    feature_layers: tuple[int, ...],
    target_ids_W: Array,
    batch: PackedBatch,
    answers_are_greedy: bool,
    cached: tuple[Array, Array] | None = None,
) -> Scored:
    """Runs the target over the rows once; everything here is constant for the drafter's gradient.

    answers_are_greedy: the target wrote the answers at temperature 0, so that the text itself is its argmax, and no
    pass over the whole vocabulary is needed. cached: (features_BxTxF, hidden_BxMxD) from an earlier pass; the result
    then has no keys.
    """
    params = jax.lax.stop_gradient(params)
    batch = PackedBatch(*map(jnp.asarray, batch))
    last = batch.tokens_BxT.shape[1] - 1
    verifier_BxM = jnp.minimum(batch.anchor_BxM + 1, last)
    kv: tuple[KV | StackedKV, ...] = ()
    if cached is not None:
        features_BxTxF, hidden_BxMxD = cached
    else:
        out = read_rows(params, config, batch, feature_layers)
        features_BxTxF, kv = out.features_BxSxF, out.kv
        hidden_BxMxD = jnp.take_along_axis(out.hidden_BxSxD, verifier_BxM[..., None], 1)
    B, M = batch.anchor_BxM.shape
    head_VxD = transformer.head(params)
    z_BxMxW = linear(hidden_BxMxD, head_VxD[target_ids_W])
    surveyed = survey(hidden_BxMxD.reshape(B * M, -1), head_VxD)
    target_BxM = surveyed.argmax_N.reshape(B, M)
    if answers_are_greedy:
        target_BxM = jnp.take_along_axis(batch.tokens_BxT, jnp.minimum(verifier_BxM + 1, last), 1)
    windows = AnchorRows(
        features_BxTxF=features_BxTxF,
        tokens_BxT=batch.tokens_BxT,
        segment_BxT=batch.segment_BxT,
        position_BxT=batch.position_BxT,
        anchor_BxM=batch.anchor_BxM,
        anchor_mask_BxM=batch.anchor_mask_BxM,
        label_BxM=draft_ids(target_ids_W, config.vocab_size)[target_BxM],
        probability_BxMxW=jax.nn.softmax(z_BxMxW, axis=-1),
        mass_BxM=jnp.exp(jax.nn.logsumexp(z_BxMxW, axis=-1) - surveyed.logsumexp_N.reshape(B, M)),
        entropy_BxM=surveyed.entropy_N.reshape(B, M),
    )
    return Scored(windows, surveyed, kv, hidden_BxMxD)
