"""Initialisation of a new drafter: its draft vocabulary, and parameters from the target's own head and last layer."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.models import stack, transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import DrafterConfig, check_feature_layers, default_feature_layers


def choose_vocabulary(examples: Sequence[Example], vocab_size: int, size: int) -> np.ndarray:
    """The `size` most frequent answer tokens, ascending int32; ties and unseen tokens by lowest id."""
    count_V = np.zeros(vocab_size, np.int64)
    for example in examples:
        count_V += np.bincount(example.tokens[example.answer_mask], minlength=vocab_size)
    return np.sort(np.argsort(-count_V, kind="stable")[:size]).astype(np.int32)


def drafter_config(
    target: ModelConfig, draft_vocab_size: int, feature_layers: Sequence[int] = (), fc_norm: bool = False
) -> DrafterConfig:
    """Config of a drafter with one layer of the target's width.

    feature_layers: "input of layer" ids, by default (2, N//2, N-3).
    Raises UserError for a vocabulary larger than the target's or impossible layers.
    """
    if not 1 <= draft_vocab_size <= target.vocab_size:
        raise UserError(
            f"--draft_vocab_size={draft_vocab_size}: must be between 1 and the target's vocabulary, {target.vocab_size}"
        )
    layers = tuple(feature_layers) or default_feature_layers(target.num_layers)
    check_feature_layers(layers, target.num_layers, "--feature_layers")
    low, middle, high = layers
    return DrafterConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        rope_scaling=target.rope_scaling,
        max_position_embeddings=target.max_position_embeddings,
        target_hidden_size=target.hidden_size,
        feature_layers=(low, middle, high),
        fc_norm=fc_norm,
        norm_output=fc_norm,
    )


def from_target(
    key: jax.Array,
    config: DrafterConfig,
    target_params: dict,
    target_ids_W: np.ndarray,
    feature_scale: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
) -> Drafter:
    """A drafter initialised from the target's last layer and head, applied to the highest feature.

    The fusion passes the highest feature through, plus small random parts of all three (made equally small by
    feature_scale, see there); the layer's feature half, its MLP, its norms and the head are the target's, so everything
    stays in the basis and at the scale of the target's residual stream; only the embedding half is new. With fc_norm
    the features are normed, and the layer's output is scaled down accordingly. A drafter whose sizes differ from the
    target's keeps random values where shapes do not fit, as does the MLP if the target has experts.
    """
    last, head_WxD = stack.layer(target_params["layers"], -1), transformer.head(target_params)[target_ids_W]
    make = functools.partial(_start, config=config, feature_scale=feature_scale)
    params = sharding.born(make, key, last, target_params["norm"], head_WxD, config=config)
    return Drafter(config=config, params=params, target_ids_W=sharding.place(jnp.asarray(target_ids_W)))


def _start(key: jax.Array, last: dict, norm_D, head_WxD, *, config: DrafterConfig, feature_scale) -> dict:
    params = drafting.init(key, config)
    last = {name: x for name, x in last.items() if x.ndim < 3}
    last, norm_D, head_WxD = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (last, norm_D, head_WxD))
    E, D = config.hidden_size, config.target_hidden_size
    scale = np.ones(3) if config.fc_norm else np.asarray(feature_scale) / feature_scale[2]
    params["fc"] *= (3 * D) ** -0.5 / 0.02 * 0.1 / np.repeat(scale, D).astype(np.float32)
    if E == D:
        params["fc"] = params["fc"].at[:, 2 * D :].add(np.eye(D, dtype=np.float32))
        added = np.float32(1.0 / feature_scale[2] if config.fc_norm else 1.0)
        start = {
            "hidden_norm": last["input_norm"],
            "o_proj": last["o_proj"] * added,
            "post_norm": last["post_norm"],
            **{name: last[name] for name in ("gate_proj", "up_proj") if name in last},
            "norm": norm_D,
            "lm_head": head_WxD,
        }
        if "down_proj" in last:  # a mixture of experts has no single MLP to copy
            start["down_proj"] = last["down_proj"] * added
        params |= {name: x for name, x in start.items() if params[name].shape == x.shape}
        for name in ("q_proj", "k_proj", "v_proj"):
            if params[name].shape[0] == last[name].shape[0]:
                params[name] = params[name].at[:, E:].set(_without_norm(last, name))
    return params


def _without_norm(last: dict[str, jax.Array], name: str) -> jax.Array:
    """The target's matrix for a layer without norms of queries and keys: if the target has these norms, the matrix is
    scaled so that queries and keys of a typical input have the same size as with them.
    """
    scale_d = last.get(name.replace("proj", "norm"))
    if scale_d is None:
        return last[name]
    w_HxdxD = last[name].reshape(-1, len(scale_d), last[name].shape[1])
    size_Hx1x1 = jnp.sqrt(jnp.mean(jnp.sum((w_HxdxD * last["input_norm"]) ** 2, -1), -1))[:, None, None]
    return (w_HxdxD / jnp.maximum(size_Hx1x1, 1e-6) * scale_d[:, None]).reshape(last[name].shape)


def feature_scale(features_NxF: np.ndarray) -> np.ndarray:
    """Typical root mean square of each of the three features: the median over tokens.

    A plain mean is useless here: the first token of a text has activations a thousand times larger.
    """
    three = np.asarray(features_NxF, np.float32).reshape(len(features_NxF), 3, -1)
    return np.median(np.sqrt(np.mean(three**2, axis=-1)), axis=0)


def channel_scale(features_NxF: np.ndarray) -> np.ndarray:
    """Root mean square of each feature channel, [F], over ordinary tokens (see `feature_scale`)."""
    three = np.asarray(features_NxF, np.float32).reshape(len(features_NxF), 3, -1)
    size_Nx3 = np.sqrt(np.mean(three**2, axis=-1))
    ordinary_N = (size_Nx3 < 4 * np.median(size_Nx3, axis=0)).all(-1)
    return np.sqrt(np.mean(three[ordinary_N] ** 2, axis=0)).reshape(-1) + 1e-6
