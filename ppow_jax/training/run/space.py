"""Disk space check of a run, before it begins."""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from ppow_jax.corpus.answers import Question
from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.training.run.checkpoint import KEEP, KEEP_BEST
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.workdir import TRAINED
from ppow_jax.weights.targets import DTYPES, Target

log = logging.getLogger(__name__)

_MOMENTS = 2  # of Adam, each as large as the parameters (Muon keeps one for some of them)
_TOKEN = 6  # bytes per token id in an answers file
_SLACK = 16 << 20  # reports, plots, metrics


def needed_bytes(
    settings: TrainSettings, config: DrafterConfig, target: Target, questions: Sequence[Question]
) -> tuple[int, int]:
    """(at least, at most) bytes that all chosen stages write; only the lengths of the answers are unknown."""
    params = jax.eval_shape(lambda key: drafting.init(key, config), jax.random.key(0))
    drafter = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    baselines = settings.baselines if "ppow" in settings.stages else ()
    trained = [stage for stage in TRAINED if stage in settings.stages] + list(baselines)
    surely = sum(_checkpoints(settings, stage) for stage in trained) * drafter + 2 * drafter + _SLACK
    answers = len(questions) * settings.answer_tokens if "data" in settings.stages else 0
    features, features_at_most = _feature_bytes(settings, target, questions)
    return surely + features, surely + answers * _TOKEN + features_at_most


def _feature_bytes(settings: TrainSettings, target: Target, questions: Sequence[Question]) -> tuple[int, int]:
    """(at least, at most) bytes of stored features."""
    exact = "ppow" in settings.stages and settings.estimator == "exact"
    cst = "ppow" in settings.stages and "cst" in settings.baselines
    if not settings.cache_features or not ("supervised" in settings.stages or cst or exact):
        return 0, 0
    tokens = sum(len(question.prompt) for question in questions)
    width = 4 * target.config.hidden_size * jnp.dtype(DTYPES[settings.dtype]).itemsize
    return tokens * width, (tokens + len(questions) * settings.answer_tokens) * width


def _checkpoints(settings: TrainSettings, stage: str) -> int:
    """Peak disk space of a stage's checkpoints, in multiples of the parameters: all kept, plus one of each kind.

    An old checkpoint is deleted only when the new one is complete.
    """
    averages = settings.average_decay > 0 and stage != "supervised"
    return (KEEP + 1) * (1 + _MOMENTS + averages) + (KEEP_BEST + 1)


def check_space(
    settings: TrainSettings,
    workdir: Path,
    config: DrafterConfig,
    target: Target,
    questions: Sequence[Question],
    scratch: Path | None = None,
):
    """Raises UserError if the disk cannot hold what the run certainly writes; warns if space may become scarce.

    Existing contents of the workdir count as written. scratch: the only directory of a run in a bucket that is on this
    machine; it holds the features.
    """
    place, given = (scratch, f"--scratch={scratch}") if scratch else (workdir, f"--workdir={settings.workdir}")
    held = sum(entry.stat().st_size for entry in _files(place))
    features = _feature_bytes(settings, target, questions)
    needed = features if scratch else needed_bytes(settings, config, target, questions)
    surely, at_most = (max(0, number - held) for number in needed)
    free = shutil.disk_usage(place).free
    sizes = f"{_shown(free)} are free, but the run writes"
    if free < surely:
        rule = "take a larger disk, or a smaller --draft_vocab_size, or leave --cache_features out"
        raise UserError(f"{given}: {sizes} {_shown(surely)} at least; {rule}")
    if free < at_most:
        log.warning("%s: %s up to %s", given, sizes, _shown(at_most))


def _files(directory: Path):
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield entry


def _shown(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
