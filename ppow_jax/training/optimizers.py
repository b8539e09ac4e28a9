"""The optimizer of both stages."""

import functools
from collections.abc import Sequence

import numpy as np
import optax
import optax.contrib

from ppow_jax.models.drafter import Drafter
from ppow_jax.training import initialise
from ppow_jax.training.context import RunContext
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.start import features_seen

# Matrices that Muon orthogonalises. Fusion (channels of very different size) and head (a row per token) use Adam.
_MUON = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_optimizer(context: RunContext, drafter: Drafter, peak: float, steps: int, warmup: int):
    """The optimizer of a run's drafter, see `optimizer`; feature scales are measured on the run's data."""
    scale_F = None
    if not (drafter.config.fc_norm or drafter.config.norm_before_fc):
        scale_F = initialise.channel_scale(features_seen(context, drafter.config.feature_layers))
    return optimizer(context.settings, list(drafter.params), peak, steps, warmup, scale_F)


def optimizer(
    settings: TrainSettings,
    names: Sequence[str],
    peak: float,
    steps: int,
    warmup: int,
    channel_scale_F: np.ndarray | None = None,
) -> optax.GradientTransformation:
    """AdamW, or Muon for the layer's own matrices, with warm-up and a cosine decay to a tenth.

    names: of the drafter's parameters. channel_scale_F: scales of raw fusion features, whose channels differ in
    size by a factor of a thousand: the fusion's step is divided by the scale of the channel, which equals Adam on
    features of unit size without changing the drafter's format.
    """
    scale = None if channel_scale_F is None else np.asarray(channel_scale_F, np.float32).tobytes()
    return _made(settings.optimizer, settings.clip_norm, tuple(names), peak, steps, min(warmup, steps - 1), scale)


@functools.lru_cache(32)  # equal optimizers are one object, so that runs that differ only in their seed share programs
def _made(
    kind: str, clip_norm: float, names: tuple[str, ...], peak: float, steps: int, warmup: int, scale: bytes | None
) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps, peak / 10)
    return _update_rule(kind, clip_norm, names, schedule, scale)


@functools.lru_cache(32)
def constant_rate(
    kind: str, clip_norm: float, names: tuple[str, ...], rate: float, warmup: int, scale: bytes | None
) -> optax.GradientTransformation:
    """The optimizer of a training without end: a linear warm-up, then one rate.

    kind: muon or adamw. warmup: its steps, at least 1. scale: of fusion channels, float32 as bytes; see `optimizer`.
    Steps on one row are short, and Muon's Newton-Schulz iterations take most of their time: it makes 3 in place of 5.
    """
    return _update_rule(kind, clip_norm, names, optax.linear_schedule(rate / warmup, rate, warmup), scale, iterations=3)


def _update_rule(
    kind: str,
    clip_norm: float,
    names: tuple[str, ...],
    schedule: optax.Schedule,
    scale: bytes | None,
    iterations: int = 5,
) -> optax.GradientTransformation:
    update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)
    if kind == "muon":
        muon = optax.contrib.muon(
            schedule,
            ns_steps=iterations,
            consistent_rms=0.2,  # makes a step as large as Adam's (2502.16982)
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(),
        )
        labels = {name: "muon" if name.split(".")[-1] in _MUON else "adamw" for name in names}
        update = optax.partition({"muon": muon, "adamw": update}, labels)
    parts = [optax.clip_by_global_norm(clip_norm), update]
    if scale is not None:
        inverse_F = 1.0 / np.frombuffer(scale, np.float32)
        parts.append(optax.stateless(lambda updates, _: updates | {"fc": updates["fc"] * inverse_F}))
    return optax.chain(*parts)
