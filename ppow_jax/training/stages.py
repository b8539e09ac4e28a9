"""Stages 1 and 2, and the order in which their drafters build on each other."""

import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import optax

from ppow_jax import distributed, files, flags, sharding
from ppow_jax.corpus.features import Cached, FeatureStore
from ppow_jax.data.batches import Batches, PackedBatch
from ppow_jax.inference.costs import measure_costs
from ppow_jax.models.drafter import Drafter, cast
from ppow_jax.objectives.expected import ExactSettings
from ppow_jax.objectives.head_loss import DraftRule
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.speculation.settings import chain
from ppow_jax.training.acceptance import decoded_acceptance
from ppow_jax.training.context import RunContext
from ppow_jax.training.optimizers import make_optimizer
from ppow_jax.training.replays import feature_store
from ppow_jax.training.results import export_arm
from ppow_jax.training.run import loop
from ppow_jax.training.run.checkpoint import Best
from ppow_jax.training.run.preemption import Stopped
from ppow_jax.training.run.profile import Profile
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.start import new_drafter
from ppow_jax.training.steps import ppow_exact, ppow_sampled, supervised
from ppow_jax.training.steps.rollout import RolloutSettings
from ppow_jax.training.steps.state import TrainState
from ppow_jax.training.workdir import has_best

log = logging.getLogger(__name__)


def train_arms(context: RunContext, start: Drafter | None) -> dict[str, Drafter]:
    """The drafters of this run by the name of their stage: trained if the stage was chosen, else read back.

    Stage 2 and the baselines start from the result of stage 1. In a run without stage 1 they start from the first
    drafter, which is then an arm of its own, "start".
    """
    s, chosen = context.settings, set(context.settings.stages)
    if "ppow" in chosen:
        chosen |= set(s.baselines)
        if (context.workdir / "supervised").exists():
            chosen.add("supervised")  # stage 2 waits for its end
    first = start or new_drafter(context)
    stage_1 = _arm(context, "supervised", first, chosen)
    if "supervised" in chosen:
        with context.clock.stage("export"):
            export_arm(context, "supervised", stage_1, "drafter_supervised")
    arms = {"supervised": stage_1} if stage_1 else {"start": first}
    for name in ("ppow", *s.baselines):
        arms[name] = _arm(context, name, stage_1 or first, chosen)
    return {name: drafter for name, drafter in arms.items() if drafter is not None}


def train_stage_2(context: RunContext, start: Drafter, stage: str) -> Drafter:
    """Trains a drafter with stage `ppow`, or with the baseline `cst`."""
    return {"cst": _cst, "ppow": _ppow}[stage](context, start)


def _arm(context: RunContext, stage: str, begin: Drafter, chosen: set[str]) -> Drafter | None:
    """Result of a stage that starts from `begin`; for a stage that was not chosen, its best checkpoint, or None."""
    if stage in chosen:
        return _supervised(context, begin) if stage == "supervised" else train_stage_2(context, begin, stage)
    if not has_best(context.workdir, stage):
        return None
    with Best(context.workdir / stage / "best") as best:
        step, params, _ = best.restore(sharding.like(begin.params))
    log.info("%s: finished before; its best checkpoint is that of step %d", stage, step)
    return begin.replace(params=params)


def _supervised(context: RunContext, drafter: Drafter) -> Drafter:
    """Stage 1."""
    s = context.settings
    plan = _Plan("supervised", s.supervised_steps, s.learning_rate, s.warmup_steps, 0.0)
    return _train(
        context, drafter, plan, _supervised_step(context, drafter, plan, s.ttt_steps), _stage_1_data(context, drafter)
    )


def _cst(context: RunContext, drafter: Drafter) -> Drafter:
    """Continued supervised training: as many steps as stage 2, of as many draft steps, on the same batches."""
    s = context.settings
    rate = s.ppow_learning_rate if s.cst_learning_rate is None else s.cst_learning_rate
    plan = _Plan("cst", s.ppow_steps, rate, s.ppow_warmup_steps, s.average_decay)
    return _train(
        context, drafter, plan, _supervised_step(context, drafter, plan, s.window), _stage_2_data(context, drafter)
    )


def _ppow(context: RunContext, drafter: Drafter) -> Drafter:
    """Stage 2, with the chosen estimator."""
    s = context.settings
    plan = _Plan("ppow", s.ppow_steps, s.ppow_learning_rate, s.ppow_warmup_steps, s.average_decay, s.passes)
    step = _exact_step if s.estimator == "exact" else _sampled_step
    data = _stage_2_data(context, drafter, cached=s.estimator == "exact")  # sampled windows need the target's keys
    return _train(context, drafter, plan, step(context, drafter, plan), data)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Training schedule of a stage. steps: optimizer steps; passes: updates in each."""

    stage: str
    steps: int
    rate: float
    warmup: int
    average_decay: float
    passes: int = 1

    def optimizer(self, context: RunContext, drafter: Drafter) -> optax.GradientTransformation:
        return make_optimizer(context, drafter, self.rate, self.steps * self.passes, self.warmup)


@dataclasses.dataclass(frozen=True)
class _Data:
    """at: step index -> (batch, the target's features of it if they are stored). offset: index of the first batch."""

    at: Callable[[int], tuple[PackedBatch, Cached | None]]
    offset: int


def _stage_1_data(context: RunContext, drafter: Drafter) -> _Data:
    return _data(context, drafter, context.corpus.train, "features", 0, context.settings.cache_features)


def _stage_2_data(context: RunContext, drafter: Drafter, cached: bool = True) -> _Data:
    """Fresh answers from their beginning; those of stage 1 from where it stopped."""
    s, corpus = context.settings, context.corpus
    cached &= s.cache_features
    if corpus.fresh is not corpus.train:
        return _data(context, drafter, corpus.fresh, "features_fresh", 0, cached)
    offset = s.supervised_steps if (context.workdir / "supervised").exists() else 0
    return _data(context, drafter, corpus.train, "features", offset, cached)


def _data(context: RunContext, drafter: Drafter, batches: Batches, name: str, offset: int, cached: bool) -> _Data:
    store = _features(context, drafter, batches, name) if cached else None

    def at(index: int):
        batch = batches.at(offset + index)
        return batch, store.at(offset + index, batch) if store else None

    return _Data(at, offset)


def _features(context: RunContext, drafter: Drafter, batches: Batches, name: str) -> FeatureStore:
    with context.clock.stage("features"):
        return feature_store(context, name, batches, drafter.config.feature_layers)


Step = Callable[[TrainState, int, tuple[PackedBatch, Cached | None]], tuple[TrainState, dict[str, Any]]]


def _supervised_step(context: RunContext, drafter: Drafter, plan: _Plan, draft_steps: int) -> tuple[Any, Step]:
    s = context.settings
    static = {
        "steps": draft_steps,
        "loss": supervised_loss(s),
        "answers_are_greedy": context.answers_are_greedy,
        "accumulate": s.accumulate,
    }
    optimizer, step = _program(context, drafter, plan, supervised.train_step, **static)
    return optimizer, lambda state, _, data: step(state, *data)


def _exact_step(context: RunContext, drafter: Drafter, plan: _Plan) -> tuple[Any, Step]:
    s = context.settings
    static = {
        "rollouts": rollout_settings(s, _costs(context, drafter), context.answers_are_greedy),
        "exact": exact_settings(s),
    }
    optimizer, step = _program(context, drafter, plan, ppow_exact.train_step, **static)
    return optimizer, lambda state, _, data: step(state, *data)


def _sampled_step(context: RunContext, drafter: Drafter, plan: _Plan) -> tuple[Any, Step]:
    s = context.settings
    static = {
        "rollouts": rollout_settings(s, _costs(context, drafter), context.answers_are_greedy),
        "policy": ppow_sampled.PolicySettings(s.clip, s.kl_weight, s.passes),
        "answers_are_greedy": context.answers_are_greedy,
        "accumulate": s.accumulate,
    }
    optimizer, step = _program(context, drafter, plan, ppow_sampled.train_step, **static)
    key = jax.random.fold_in(jax.random.key(s.seed), 2)
    return optimizer, lambda state, index, data: step(state, data[0], jax.random.fold_in(key, index))


def _program(
    context: RunContext, drafter: Drafter, plan: _Plan, train_step: Callable, **static: Any
) -> tuple[Any, Any]:
    """(the optimizer, a step: the training state and the rows of a batch -> the next state and metrics).

    The step is given the drafter's configuration and vocabulary; its parameters are the training state's.
    """
    optimizer, target = plan.optimizer(context, drafter), context.target
    spec = drafter.replace(compute_dtype=context.compute_dtype, remat=context.settings.remat).spec
    static |= {"config": target.config, "optimizer": optimizer, "average_decay": plan.average_decay}
    return optimizer, lambda state, *rows: train_step(state, spec, target.params, *sharding.place(rows), **static)


def exact_settings(s: TrainSettings) -> ExactSettings:
    """Settings of the objective of --estimator=exact."""
    rule = DraftRule(s.rollout_temperature, s.rivals)
    weights = s.kl_weight, s.supervised_weight, supervised_loss(s)
    return ExactSettings(rule, s.horizon, s.divide_by_std, *weights, s.lookup_discount)


def supervised_loss(s: TrainSettings) -> SupervisedLoss:
    """The loss of stage 1, of continued supervised training, and beside the exact estimator's reward."""
    return SupervisedLoss(s.supervised_loss, s.step_weights, s.ttt_decay)


def rollout_settings(s: TrainSettings, costs: CostModel, answers_are_greedy: bool) -> RolloutSettings:
    """Settings of stage 2's rollouts. answers_are_greedy: the target wrote the answers at temperature 0."""
    return RolloutSettings(
        window=s.window,
        group=s.group,
        windows=s.windows,
        rollout_temperature=s.rollout_temperature,
        verify_temperature=0.0 if s.acceptance == "greedy" else s.acceptance_temperature,
        eta=s.eta,
        eps=s.eps,
        adaw=s.adaw,
        adaw_start=s.adaw_start,
        greedy_reference=not answers_are_greedy,
        costs=costs,
        divide_by_std=s.divide_by_std,
    )


def _costs(context: RunContext, drafter: Drafter) -> CostModel:
    """Costs from the flags; missing ones are measured once per workdir, so that a resumed run has the same rewards."""
    s = context.settings
    gamma, verify = s.gamma, s.verify_cost if s.general_cost else 1.0  # the paper's reward uses no other
    if gamma is None or verify is None:
        measured = _measured_costs(context, drafter)
        gamma = round(measured["gamma"], 4) if gamma is None else gamma
        verify = round(measured["verify_ratio"], 4) if verify is None else verify
    log.info("ppow: in the reward, a draft step costs %.3f steps of plain decoding, a verification %.3f", gamma, verify)
    return CostModel(gamma, s.general_cost, verify, s.rollback_cost, s.bonus)


def _measured_costs(context: RunContext, drafter: Drafter) -> dict[str, float]:
    s, path = context.settings, context.shared / "costs.json"
    known = path.exists()
    distributed.wait("costs")  # no process writes before all have looked
    if not known:
        costs = measure_costs(context.target, cast(drafter, s.dtype), chain(s.window), s.row_length)
        measured = dataclasses.asdict(costs) | {"gamma": costs.gamma, "verify_ratio": costs.verify_ratio}
        distributed.by_leader(lambda: files.write_atomic(path, json.dumps(measured, indent=1)))
    return json.loads(path.read_text())


def _train(
    context: RunContext, drafter: Drafter, plan: _Plan, updates: tuple[optax.GradientTransformation, Step], data: _Data
) -> Drafter:
    """Runs a stage to its end -> its best drafter."""
    if context.stop.requested:
        raise Stopped
    s = context.settings
    drafter = drafter.replace(compute_dtype=context.compute_dtype, remat=s.remat)
    about = {"seed": s.seed, "settings": {spec.name: getattr(s, spec.name) for spec in flags.specs(type(s))}}
    stage, (optimizer, step) = plan.stage, updates
    stage_loop = loop.Loop(
        stage=stage,
        total=plan.steps,
        data=data.at,
        step=step,
        measure=_measure(context, drafter),
        score="held_out_tau_sim" if s.select == "last" else f"held_out_{s.select}",
        select=s.select,
        checkpoint_every=s.checkpoint_every,
        evaluate_every=s.evaluate_every,
        skip_nonfinite=s.skip_nonfinite,
        position=data.offset,
        about=about,
    )
    state = TrainState.create(drafter.params, optimizer, drafter.config, averaged=plan.average_decay > 0)
    traces = (context.scratch or context.workdir) / "profile" / stage
    profile = Profile(traces if s.profile_steps and not traces.exists() else None, *s.profiled)
    with context.clock.stage(stage):
        params, complete = loop.run(
            stage_loop, state, context.workdir / stage, context.metrics, context.stop, context.clock, profile
        )
    if not complete:
        raise Stopped
    return drafter.replace(params=params, compute_dtype=None, remat="none")


def _measure(context: RunContext, drafter: Drafter):
    """parameters -> acceptance on held-out answers, simulated (from stored features, if there are any) and decoded."""
    s, held_out = context.settings, context.corpus.held_out
    data = _data(context, drafter, held_out, "features_held_out", 0, s.cache_features)
    batches = [sharding.place(data.at(i)) for i in range(held_out.steps_of_epochs(1))]
    decoded = decoded_acceptance(context, drafter) if s.decodes else lambda params: {}

    def measure(params: dict) -> dict:
        return decoded(params) | supervised.evaluate(
            drafter.replace(params=params),
            context.target.params,
            batches,
            config=context.target.config,
            K=s.window,
            answers_are_greedy=s.answer_temperature == 0,
        )

    return measure
