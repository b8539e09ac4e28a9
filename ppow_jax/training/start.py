"""Initial drafter of a run: one given by --drafter, or a new one."""

import functools
from pathlib import Path

import jax
import numpy as np

from ppow_jax import distributed, files, flags, sharding
from ppow_jax.corpus.target_pass import read_rows
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.training import initialise
from ppow_jax.training.context import RunContext
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights.drafters import export_drafter
from ppow_jax.weights.huggingface import CONFIG
from ppow_jax.weights.loading import find_drafter, load_drafter
from ppow_jax.weights.targets import Target


def find_start(settings: TrainSettings, workdir: Path, target: Target) -> Drafter | None:
    """The drafter given by --drafter, in float32; None if a new one is to be created.

    Raises UserError when it does not exist, and for flags that are inconsistent with a new drafter, or with this one.
    """
    if settings.drafter is None:
        new_config(settings, target)
        return None
    kept = workdir / "drafter_start"
    directory = kept if (kept / CONFIG).exists() else find_drafter(settings.drafter, settings.target)
    rule = f"there is none for --target={settings.target}; name a directory, or none for a new drafter"
    flags.require(directory is not None, f"--drafter={settings.drafter}: {rule}")
    with files.on_this_machine(directory) as local:
        drafter = load_drafter(local, target, "float32", f"--drafter={directory}")
    others = []
    for spec in flags.specs(TrainSettings):
        if spec.name in ("draft_vocab_size", "feature_layers", "fc_norm"):
            asked, its = getattr(settings, spec.name), getattr(drafter.config, spec.name)
            if asked not in (spec.default, its):
                others.append(f"--{spec.name}={spec.format(asked)} (it has {spec.format(its)})")
    rule = f"cannot be changed by {', '.join(others)}; leave these flags out"
    flags.require(not others, f"--drafter={settings.drafter}: {rule}")
    return drafter


def keep_start(start: Drafter | None, workdir: Path) -> None:
    """Copies the initial drafter into the workdir: the run resumes with the copy, even if the original changes."""
    directory = workdir / "drafter_start"
    if start is not None:
        params, ids_W, embed_VxE = sharding.fetch((start.params, start.target_ids_W, start.embed_VxE))

        def write(new: Path) -> None:
            export_drafter(new, start.config, params, ids_W, dtype="float32", embed_VxE=embed_VxE)

        def keep() -> None:
            if not (directory / CONFIG).exists():
                files.replace_directory(directory, write)

        distributed.by_leader(keep)


def new_config(settings: TrainSettings, target: Target) -> DrafterConfig:
    """Configuration of a new drafter; raises UserError where it does not fit the target."""
    s = settings
    return initialise.drafter_config(target.config, s.draft_vocab_size, s.feature_layers, s.fc_norm)


def new_drafter(context: RunContext) -> Drafter:
    """A drafter for this target and these answers (see `initialise.from_target`)."""
    s, target = context.settings, context.target
    config = new_config(s, target)
    ids_W = initialise.choose_vocabulary(context.corpus.train.examples, target.config.vocab_size, s.draft_vocab_size)
    scale = initialise.feature_scale(features_seen(context, config.feature_layers))
    return initialise.from_target(jax.random.key(s.seed), config, target.params, ids_W, scale)


def features_seen(context: RunContext, layers: tuple[int, ...]) -> np.ndarray:
    """The target's features [N, F] of the first batch's tokens, on which feature scales are measured."""
    target, batch = context.target, context.corpus.train.at(0)
    features_BxTxF = _look(target.params, sharding.place(batch), config=target.config, layers=layers)
    return sharding.fetch(features_BxTxF)[batch.segment_BxT > 0]


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _look(params: dict, batch: PackedBatch, *, config: ModelConfig, layers: tuple[int, ...]):
    return read_rows(params, config, batch, layers).features_BxSxF
