"""Measurements of training: a step of stage 1, and one of PPOW, on rows of random tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.bench import work
from ppow_jax.bench.subjects import Subject
from ppow_jax.bench.timing import Bench, Row, compiled, median_seconds
from ppow_jax.bench.work import Work
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models.drafter import DrafterSpec
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.training import stages
from ppow_jax.training.optimizers import optimizer
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.steps import ppow_sampled, supervised
from ppow_jax.training.steps.state import TrainState


def supervised_step(bench: Bench, subject: Subject, settings: TrainSettings) -> Row:
    """A step of stage 1."""
    s = settings
    spec, state, update, batch = _inputs(subject, s)
    static = {"steps": s.ttt_steps, "loss": stages.supervised_loss(s)}
    flops = work.supervised_step(subject.target.config, spec.config, _rows(s), s.ttt_steps)
    return _row(bench, subject, s, "supervised", supervised.train_step, flops, (state, spec, batch), update, static)


def ppow_step(bench: Bench, subject: Subject, settings: TrainSettings) -> Row:
    """A step of stage 2 with the sampled estimator."""
    s = settings
    spec, state, update, batch = _inputs(subject, s)
    static = {
        "rollouts": stages.rollout_settings(s, CostModel(0.1), answers_are_greedy=True),
        "policy": ppow_sampled.PolicySettings(s.clip, s.kl_weight, s.passes),
    }
    flops = work.ppow_step(subject.target.config, spec.config, _rows(s), s.windows, s.group, s.window)
    arguments = state, spec, batch, sharding.place({"key": jax.random.key(0)})["key"]
    return _row(bench, subject, s, "ppow", ppow_sampled.train_step, flops, arguments, update, static)


def _rows(s: TrainSettings) -> work.Rows:
    return work.Rows(s.batch_size, s.row_length, s.max_anchors)


def _inputs(subject: Subject, s: TrainSettings) -> tuple[DrafterSpec, TrainState, Any, PackedBatch]:
    """(the drafter without parameters, the training state, the optimizer, a batch)."""
    drafter = subject.drafter
    spec = drafter.spec.replace(compute_dtype="bfloat16" if s.dtype == "bfloat16" else None, remat=s.remat)
    update = optimizer(s, list(drafter.params), s.learning_rate, s.supervised_steps, s.warmup_steps)
    state = TrainState.create(drafter.params, update, drafter.config)
    B, T, M = s.batch_size, s.row_length, s.max_anchors
    tokens = np.random.default_rng(0).integers(0, subject.target.config.vocab_size, (B, T))
    batch = PackedBatch(
        tokens_BxT=tokens.astype(np.int32),
        segment_BxT=np.ones((B, T), np.int32),
        position_BxT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        anchor_BxM=np.tile(np.arange(T - 2 - M, T - 2, dtype=np.int32), (B, 1)),
        anchor_mask_BxM=np.ones((B, M), bool),
    )
    return spec, state, update, sharding.place(jax.tree.map(jnp.asarray, batch))


def _row(
    bench: Bench, subject: Subject, s: TrainSettings, part: str, step: Any, flops: float, arguments: tuple, update: Any,
    static: dict[str, Any],
) -> Row:  # fmt: skip
    state, spec, *data = arguments
    target = subject.target
    static |= {"config": target.config, "optimizer": update, "answers_are_greedy": True, "accumulate": s.accumulate}
    program = compiled(step, state, spec, target.params, *data, **static)

    def once(state: TrainState) -> TrainState:
        return program.call(state, spec, target.params, *data)[0]

    seconds = median_seconds(once, state, bench.repetitions)
    row = bench.row(part, seconds, Work(flops), batch=s.batch_size, width=s.row_length, **program.columns())
    return row | {"tokens_per_second": s.batch_size * s.row_length / seconds}


def settings(dtype: str, **sizes: Any) -> TrainSettings:
    """Settings of the measured steps: those of a training run with these sizes."""
    return dataclasses.replace(TrainSettings(dtype=dtype, gamma=0.1, warmup_steps=1, supervised_steps=100), **sizes)
