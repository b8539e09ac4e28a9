"""Stages 1 and 2, and which drafters they make of which."""

import dataclasses
import functools
import json
import logging

import jax

from ppow_jax import config as config_lib
from ppow_jax import distributed, files, sharding
from ppow_jax.evaluation.measure import measure_costs
from ppow_jax.models import confidence
from ppow_jax.models.drafter import Drafter
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.speculation.settings import chain
from ppow_jax.training import loop, ppow, supervised
from ppow_jax.training.checkpoint import Best
from ppow_jax.training.context import Context, Stopped
from ppow_jax.training.features import FeatureStore
from ppow_jax.training.optimizers import make_optimizer
from ppow_jax.training.profile import Profile
from ppow_jax.training.results import cast, export_arm
from ppow_jax.training.rollout import RolloutSettings
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.start import new_drafter
from ppow_jax.training.workdir import has_best

log = logging.getLogger(__name__)


def train_arms(context: Context, start: Drafter | None) -> dict[str, Drafter]:
    """The drafters of this run by the name of their stage: trained where the stage was chosen, else read back.

    Stage 2 and the baselines begin where stage 1 ended. In a run without stage 1 they begin at the first drafter, which
    then is an arm of its own, "start".
    """
    s, chosen = context.settings, set(context.settings.stages)
    if "ppow" in chosen:
        chosen |= set(s.baselines)
        if (context.workdir / "supervised").exists():
            chosen.add("supervised")  # stage 2 waits for its end
    first = start or new_drafter(context)
    if s.confidence_head and not confidence.has_head(first.params):
        first = first.replace(params=first.params | confidence.init(first.config.hidden_size))
    stage_1 = _arm(context, "supervised", first, chosen)
    if "supervised" in chosen:
        with context.clock.stage("export"):
            export_arm(context, "supervised", stage_1, "drafter_supervised")
    arms = {"supervised": stage_1} if stage_1 else {"start": first}
    for name in ("ppow", *s.baselines):
        arms[name] = _arm(context, name, stage_1 or first, chosen)
    return {name: drafter for name, drafter in arms.items() if drafter is not None}


def _arm(context: Context, stage: str, begin: Drafter, chosen: set[str]) -> Drafter | None:
    """What a stage makes of `begin`; of a stage that was not chosen, its best checkpoint, or None."""
    if stage in chosen:
        return _ppow(context, begin) if stage == "ppow" else _supervised(context, begin, stage)
    if not has_best(context.workdir, stage):
        return None
    with Best(context.workdir / stage / "best") as best:
        step, params, _ = best.restore(sharding.like(begin.params))
    log.info("%s: best checkpoint, of step %d, read back", stage, step)
    return begin.replace(params=params)


def _supervised(context: Context, drafter: Drafter, stage: str) -> Drafter:
    """Stage 1; or as `cst`, continued supervised training for as many steps and at the rate of stage 2."""
    s = context.settings
    total, rate, warmup = s.supervised_steps, s.learning_rate, s.warmup_steps
    if stage == "cst":
        total, rate, warmup = s.ppow_steps, s.ppow_learning_rate, 0
    optimizer = make_optimizer(context, drafter, rate, total, warmup)
    step = functools.partial(
        supervised.train_step,
        config=context.target.config,
        optimizer=optimizer,
        steps=s.ttt_steps,
        decay=s.ttt_decay,
        greedy_text=context.greedy_text,
        accumulate=s.accumulate,
        confidence_weight=_confidence_weight(context),
    )
    shell = drafter.replace(params={}, mixed=context.mixed, remat=s.remat)
    offset = s.supervised_steps if stage == "cst" else 0

    store = _features(context, drafter) if s.cache_features else None

    def one(state, index, data):
        return step(state, shell, context.target.params, *sharding.place(data))

    return _train(context, drafter, stage, _data(context, store, offset), one, total, optimizer, offset)


def _data(context: Context, store: FeatureStore | None, offset: int):
    """index -> (batch, the target's features of it where they are kept)."""

    def data(index: int):
        batch = context.train.at(offset + index)
        return batch, store.at(offset + index, batch) if store else None

    return data


def _confidence_weight(context: Context) -> float:
    return context.settings.confidence_weight if context.settings.confidence_head else 0.0


def _features(context: Context, drafter: Drafter) -> FeatureStore:
    target, stop = context.target, context.stop
    with context.clock.stage("features"):
        store = FeatureStore(
            context.workdir / "features",
            context.train,
            target.params,
            target.config,
            drafter.config.feature_layers,
            lambda: stop.requested,
        )
    if not store.complete:
        raise Stopped
    return store


def _ppow(context: Context, drafter: Drafter) -> Drafter:
    s = context.settings
    optimizer = make_optimizer(context, drafter, s.ppow_learning_rate, s.ppow_steps * s.passes, 0)
    rollouts = rollout_settings(s, _costs(context, drafter), context.greedy_text)
    step = functools.partial(
        ppow.train_step,
        config=context.target.config,
        optimizer=optimizer,
        rollouts=rollouts,
        policy=ppow.PolicySettings(
            s.clip,
            s.kl_weight,
            s.passes,
            exact=s.estimator == "exact",
            confidence_weight=_confidence_weight(context),
        ),
        greedy_text=context.greedy_text,
        accumulate=s.accumulate,
    )
    shell = drafter.replace(params={}, mixed=context.mixed, remat=s.remat)
    key = jax.random.fold_in(jax.random.key(s.seed), 2)
    offset = s.supervised_steps if (context.workdir / "supervised").exists() else 0  # go on in the data
    store = _features(context, drafter) if s.cache_features and s.estimator == "exact" else None  # sampled: needs keys

    def one(state, index, data):
        batch, cached = data
        rows = batch, jax.random.fold_in(key, index), cached
        return step(state, shell, context.target.params, *sharding.place(rows))

    return _train(context, drafter, "ppow", _data(context, store, offset), one, s.ppow_steps, optimizer, offset)


def rollout_settings(s: TrainSettings, costs: CostModel, greedy_text: bool) -> RolloutSettings:
    """Stage 2's rollouts. greedy_text: the target wrote the answers at temperature 0."""
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
        greedy_reference=not greedy_text,
        costs=costs,
    )


def _costs(context: Context, drafter: Drafter) -> CostModel:
    """The flags' costs; what they leave open is measured here, once a workdir: a resumed run has the same rewards."""
    s = context.settings
    gamma, verify = s.gamma, s.verify_cost if s.general_cost else 1.0  # the paper's reward knows no other
    if gamma < 0 or verify < 0:
        measured = _measured_costs(context, drafter)
        gamma = gamma if gamma >= 0 else round(measured["gamma"], 4)
        verify = verify if verify >= 0 else round(measured["verify_ratio"], 4)
    log.info("ppow: the reward counts a draft step as %.3f steps of the target, a verification as %.3f", gamma, verify)
    return CostModel(gamma, s.general_cost, verify, s.rollback_cost, s.bonus)


def _measured_costs(context: Context, drafter: Drafter) -> dict[str, float]:
    s, path = context.settings, context.workdir / "costs.json"
    known = path.exists()
    distributed.wait("costs")  # all have looked before one writes
    if not known:
        costs = measure_costs(context.target, cast(drafter, s.dtype), chain(s.window), s.row_length)
        measured = dataclasses.asdict(costs) | {"gamma": costs.gamma, "verify_ratio": costs.verify_ratio}
        distributed.by_leader(lambda: files.write_atomic(path, json.dumps(measured, indent=1)))
    return json.loads(path.read_text())


def _train(context: Context, drafter: Drafter, stage: str, data, step, total: int, optimizer, offset: int) -> Drafter:
    """Runs a stage to its end -> its best drafter. offset: the batch of the data that it begins with."""
    if context.stop.requested:
        raise Stopped
    s = context.settings
    drafter = drafter.replace(mixed=context.mixed, remat=s.remat)
    about = {"seed": s.seed, "settings": {spec.name: getattr(s, spec.name) for spec in config_lib.specs(type(s))}}
    stage_loop = loop.Loop(
        stage=stage,
        total=total,
        data=data,
        step=step,
        measure=_measure(context, drafter),
        score="held_out_confidence" if s.confidence_only else "held_out_tau_sim",
        checkpoint_every=s.checkpoint_every,
        evaluate_every=s.evaluate_every,
        skip_nonfinite=s.skip_nonfinite,
        position=offset,
        about=about,
    )
    state = supervised.TrainState.create(drafter.params, optimizer, drafter.config)
    traces = context.workdir / "profile" / stage
    profile = Profile(traces if s.profile_steps and not traces.exists() else None, *s.profiled)
    with context.clock.stage(stage):
        params, complete = loop.run(
            stage_loop, state, context.workdir / stage, context.metrics, context.stop, context.clock, profile
        )
    if not complete:
        raise Stopped
    return drafter.replace(params=params, mixed=False, remat="none")


def _measure(context: Context, drafter: Drafter):
    """parameters -> simulated acceptance on the held-out answers."""
    s = context.settings
    number = context.held_out.steps_of_epochs(1)
    batches = [sharding.place(context.held_out.at(i)) for i in range(number)]

    def measure(params: dict) -> dict:
        return supervised.evaluate(
            drafter.replace(params=params),
            context.target.params,
            batches,
            config=context.target.config,
            K=s.window,
            greedy_text=s.answer_temperature == 0,
        )

    return measure
