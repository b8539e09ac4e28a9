"""The main job, stage by stage: data, supervised, ppow, evaluate, export. `run` reads from top to bottom."""

import dataclasses
import functools
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from ppow_jax import config as config_lib
from ppow_jax import files
from ppow_jax.data.batches import Batches, PackedBatch
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import Example, encode_conversation
from ppow_jax.errors import UserError
from ppow_jax.evaluation import report
from ppow_jax.evaluation.benchmarks import Benchmark, load_benchmark
from ppow_jax.evaluation.loading import find_drafter, load_drafter
from ppow_jax.evaluation.measure import environment, evaluate, measure_costs
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.transformer import forward
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.speculation.settings import chain
from ppow_jax.training import answers, initialise, loop, ppow, supervised
from ppow_jax.training.checkpoint import Best
from ppow_jax.training.features import FeatureStore
from ppow_jax.training.metrics import MetricsWriter, read_metrics
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.rollout import RolloutSettings
from ppow_jax.training.scoring import row_mask
from ppow_jax.training.settings import FREE, TrainSettings
from ppow_jax.weights import targets
from ppow_jax.weights.card import write_card
from ppow_jax.weights.eagle3 import export_drafter
from ppow_jax.weights.targets import DTYPES, Target

log = logging.getLogger(__name__)

TRAINED = ("supervised", "ppow")  # the stages that make a drafter


class Stopped(Exception):
    """A signal asked the run to stop; what it has done is saved."""


def run(settings: TrainSettings) -> int:
    """Runs the chosen stages, or goes on with them; returns the exit code.

    Raises UserError for bad settings, data or files, before anything is compiled where that can be known.
    """
    workdir = _open_workdir(settings)
    benchmarks = _benchmarks(settings)
    target = targets.load(settings.target, settings.dtype)
    start = _start(settings, workdir, target)
    jobs = _jobs(settings, target)
    config_lib.write_flagfile(workdir / "flags.txt", settings)  # only now: settings that fail bind no workdir
    _keep_start(start, workdir)
    with StopSignal() as stop, MetricsWriter(workdir) as metrics:
        try:
            train, held_out = _data(settings, workdir, target, jobs, stop)
            context = _Context(settings, workdir, target, train, held_out, metrics, stop)
            if set(settings.stages) <= {"data"}:
                return 0
            arms = _arms(context, start)
            if "evaluate" in settings.stages:
                _evaluate(context, arms, benchmarks)
            if "export" in settings.stages:
                best = "ppow" if "ppow" in arms else "supervised"
                _export(context, best, arms[best], "drafter")
        except Stopped:
            log.warning("stopped; the same command goes on from here")
            return stop.exit_code
    return 0


@dataclasses.dataclass(frozen=True)
class _Context:
    settings: TrainSettings
    workdir: Path
    target: Target
    train: Batches
    held_out: Batches
    metrics: MetricsWriter
    stop: StopSignal

    @property
    def greedy_text(self) -> bool:
        """Whether every answer is the target's own at temperature 0."""
        return self.settings.answer_temperature == 0 and not self.settings.recorded

    @property
    def mixed(self) -> bool:
        return self.settings.dtype == "bfloat16"


def _open_workdir(settings: TrainSettings) -> Path:
    """Creates the workdir, or checks that it holds a run of the same settings."""
    config_lib.require(bool(settings.workdir), "--workdir: must name the directory for everything that the run writes")
    workdir = files.writable_directory(settings.workdir)
    flagfile = workdir / "flags.txt"
    if flagfile.exists():
        before = config_lib.read_flagfile(TrainSettings, flagfile)
        changed = config_lib.differences(before, settings, ignore=FREE)
        if changed:
            raise UserError(
                f"--workdir={settings.workdir}: holds a run with {', '.join(changed)}; take another directory"
            )
    elif any(not path.name.startswith(".") for path in workdir.iterdir()):
        raise UserError(
            f"--workdir={settings.workdir}: is not empty and holds no run (no flags.txt); take another directory"
        )
    stages, trained = set(settings.stages), [s for s in TRAINED if _has_best(workdir, s)]
    if stages & {"evaluate", "export"} and not stages & set(TRAINED) and not trained:
        rule = f"--workdir={settings.workdir} holds no checkpoint of {' or '.join(TRAINED)}; name a stage that trains"
        raise UserError(f"--stages={','.join(settings.stages)}: {rule}")
    return workdir


def _benchmarks(settings: TrainSettings) -> list[Benchmark]:
    if "evaluate" not in settings.stages:
        return []
    names = settings.benchmarks
    config_lib.require(bool(names), "--benchmarks: must name one at least, for --stages=evaluate")
    return [load_benchmark(name, settings.num_prompts, settings.seed, settings.benchmark_dir) for name in names]


def _start(settings: TrainSettings, workdir: Path, target: Target) -> Drafter | None:
    """The drafter that --drafter names, in float32; None where a new one is wanted.

    Raises UserError when there is none, and for flags that a new drafter, or this one, cannot have.
    """
    if settings.drafter is None:
        initialise.drafter_config(target.config, settings.draft_vocab_size, settings.feature_layers)
        return None
    kept = workdir / "drafter_start"
    directory = kept if kept.exists() else find_drafter(settings.drafter, settings.target)
    rule = f"there is none for --target={settings.target}; name a directory, or none for a new drafter"
    config_lib.require(directory is not None, f"--drafter={settings.drafter}: {rule}")
    drafter = load_drafter(directory, target, "float32")
    others = []
    for spec in config_lib.specs(TrainSettings):
        if spec.name in ("draft_vocab_size", "feature_layers", "fc_norm"):
            asked, its = getattr(settings, spec.name), getattr(drafter.config, spec.name)
            if asked not in (spec.default, its):
                others.append(f"--{spec.name}={spec.format(asked)} (it has {spec.format(its)})")
    rule = f"cannot be changed by {', '.join(others)}; leave these flags out"
    config_lib.require(not others, f"--drafter={settings.drafter}: {rule}")
    return drafter


def _keep_start(start: Drafter | None, workdir: Path) -> None:
    """Copies the drafter to start from: the run goes on with it, whatever becomes of the original."""
    directory = workdir / "drafter_start"
    if start is not None and not directory.exists():
        ids_W = np.asarray(start.target_ids_W)
        _replace_directory(
            directory, lambda new: export_drafter(new, start.config, start.params, ids_W, dtype="float32")
        )


# Data.


def _jobs(settings: TrainSettings, target: Target) -> list[answers.Job]:
    longest = settings.max_prompt_tokens + settings.answer_tokens
    limit = target.config.max_position_embeddings
    config_lib.require(longest <= limit, f"--answer_tokens={settings.answer_tokens}: with the prompt, at most {limit}")
    conversations = load_conversations(settings.data)
    jobs = answers.collect_jobs(target.tokenizer, conversations, _answer_settings(settings), settings.num_answers)
    if len(jobs) <= settings.held_out:
        raise UserError(
            f"--data={settings.data}: {len(jobs)} prompts of at most {settings.max_prompt_tokens} tokens, "
            f"but --held_out={settings.held_out} are kept aside"
        )
    return jobs


def _answer_settings(settings: TrainSettings) -> answers.AnswerSettings:
    return answers.AnswerSettings(
        source=settings.data,
        target=settings.target,
        dtype=settings.dtype,
        temperature=settings.answer_temperature,
        max_new_tokens=settings.answer_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        turns=settings.turns,
        seed=settings.seed,
        slots=settings.answer_slots,
        chunk=settings.answer_chunk,
    )


def _data(settings, workdir: Path, target: Target, jobs, stop: StopSignal) -> tuple[Batches, Batches]:
    """The training and the held-out batches; answers that are missing are generated."""
    examples = answers.regenerate(
        workdir / "answers",
        target.params,
        target.config,
        jobs,
        _answer_settings(settings),
        lambda: stop.requested,
    )
    if stop.requested:
        raise Stopped
    held_out, train = split(examples, settings.held_out, settings.seed)
    if settings.recorded:
        train += _recorded(settings, target)
    shape = {
        "batch_size": settings.batch_size,
        "row_length": settings.row_length,
        "max_anchors": settings.max_anchors,
    }
    tokens = sum(int(e.answer_mask.sum()) for e in train)
    log.info("data: %d examples with %d answer tokens; %d held out", len(train), tokens, len(held_out))
    return Batches(train, seed=settings.seed, **shape), Batches(held_out, seed=settings.seed, **shape)


def split(examples: list[Example], number: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(held out, the rest): whole conversations, about `number` examples of them."""
    conversations = sorted({_conversation(e) for e in examples})
    order = np.random.default_rng(seed).permutation(len(conversations))
    share = max(1, round(number * len(conversations) / len(examples)))
    chosen = {conversations[i] for i in order[:share]}
    return [e for e in examples if _conversation(e) in chosen], [e for e in examples if _conversation(e) not in chosen]


def _conversation(example: Example) -> str:
    return example.source.rsplit(" turn ", 1)[0]


def _recorded(settings: TrainSettings, target: Target) -> list[Example]:
    conversations = load_conversations(settings.recorded, settings.num_recorded or None)
    encoded = (encode_conversation(target.tokenizer, c, settings.row_length) for c in conversations)
    return [example for example in encoded if example is not None]


# Stages 1 and 2.


def _arms(context: _Context, start: Drafter | None) -> dict[str, Drafter]:
    """The drafters of this run by the name of their stage: trained where the stage was chosen, else read back.

    Stage 2 and the baselines begin where stage 1 ended. In a run without stage 1 they begin at the first drafter, which
    then is an arm of its own, "start".
    """
    s, chosen = context.settings, set(context.settings.stages)
    if "ppow" in chosen:
        chosen |= set(s.baselines)
        if (context.workdir / "supervised").exists():
            chosen.add("supervised")  # stage 2 waits for its end
    first = start or _new_drafter(context)
    stage_1 = _arm(context, "supervised", first, chosen)
    if "supervised" in chosen:
        _export(context, "supervised", stage_1, "drafter_supervised")
    arms = {"supervised": stage_1} if stage_1 else {"start": first}
    for name in ("ppow", *s.baselines):
        arms[name] = _arm(context, name, stage_1 or first, chosen)
    return {name: drafter for name, drafter in arms.items() if drafter is not None}


def _arm(context: _Context, stage: str, begin: Drafter, chosen: set[str]) -> Drafter | None:
    """What a stage makes of `begin`; of a stage that was not chosen, its best checkpoint, or None."""
    if stage in chosen:
        return _ppow(context, begin) if stage == "ppow" else _supervised(context, begin, stage)
    if not _has_best(context.workdir, stage):
        return None
    with Best(context.workdir / stage / "best") as best:
        step, params, _ = best.restore(jax.eval_shape(lambda: begin.params))
    log.info("%s: best checkpoint, of step %d, read back", stage, step)
    return begin.replace(params=params)


def _has_best(workdir: Path, stage: str) -> bool:
    return any(path.name.isdigit() for path in (workdir / stage / "best").glob("*"))


def _features_seen(context: _Context, layers: tuple[int, ...]) -> np.ndarray:
    """The target's features [N, F] of the first batch's tokens: what their sizes are measured on."""
    target, batch = context.target, context.train.at(0)
    features_BxTxF = _look(target.params, batch, config=target.config, layers=layers)
    return np.asarray(features_BxTxF)[batch.segment_BxT > 0]


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _look(params: dict, batch: PackedBatch, *, config: ModelConfig, layers: tuple[int, ...]):
    mask = row_mask(batch.segment_BxT)
    out = forward(params, config, batch.tokens_BxT, batch.position_BxT, mask, feature_layers=layers)
    return out.features_BxSxF


def _new_drafter(context: _Context) -> Drafter:
    s, target = context.settings, context.target
    config = initialise.drafter_config(target.config, s.draft_vocab_size, s.feature_layers, s.fc_norm)
    ids_W = initialise.choose_vocabulary(context.train.examples, target.config.vocab_size, s.draft_vocab_size)
    scale = initialise.feature_scale(_features_seen(context, config.feature_layers))
    return initialise.new_drafter(jax.random.key(s.seed), config, target.params, ids_W, scale)


# What Muon orthogonalises. The fusion sees channels of very different size, and the head has a row per token: Adam's.
_MUON = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _optimizer(context: _Context, drafter: Drafter, peak: float, steps: int, warmup: int):
    """AdamW, or Muon for the layer's own matrices, with warm-up and a cosine to a tenth.

    The fusion sees raw features, whose channels differ in size by a factor of a thousand: its step is divided by the
    size of the channel, which is Adam on features of unit size without changing the drafter's format.
    """
    warmup = min(warmup, steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps, peak / 10)
    update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)
    if context.settings.optimizer == "muon":
        muon = optax.contrib.muon(
            schedule, consistent_rms=0.2, muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
        )  # a step as large as Adam's (2502.16982)
        labels = {name: "muon" if name in _MUON else "adamw" for name in drafter.params}
        update = optax.partition({"muon": muon, "adamw": update}, labels)
    parts = [optax.clip_by_global_norm(context.settings.clip_norm), update]
    if not drafter.config.fc_norm:
        features_NxF = _features_seen(context, drafter.config.feature_layers)
        inverse_F = jnp.asarray(1.0 / initialise.channel_scale(features_NxF), jnp.float32)
        parts.append(optax.stateless(lambda updates, _: updates | {"fc": updates["fc"] * inverse_F}))
    return optax.chain(*parts)


def _measure(context: _Context, drafter: Drafter):
    """parameters -> simulated acceptance on the held-out answers."""
    s = context.settings
    number = context.held_out.steps_of_epochs(1)
    batches = [context.held_out.at(i) for i in range(number)]

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


def _train(context: _Context, drafter: Drafter, stage: str, step, total: int, optimizer) -> Drafter:
    drafter = drafter.replace(mixed=context.mixed)
    s = context.settings
    stage_loop = loop.Loop(
        stage=stage,
        total=total,
        step=step,
        measure=_measure(context, drafter),
        score="held_out_tau_sim",
        checkpoint_every=s.checkpoint_every,
        evaluate_every=s.evaluate_every,
    )
    state = supervised.TrainState.create(drafter.params, optimizer)
    params, complete = loop.run(stage_loop, state, context.workdir / stage, context.metrics, context.stop)
    if not complete:
        raise Stopped
    return drafter.replace(params=params, mixed=False)


def _supervised(context: _Context, drafter: Drafter, stage: str) -> Drafter:
    """Stage 1; or as `cst`, continued supervised training for as many steps and at the rate of stage 2."""
    s = context.settings
    total, rate, warmup = s.supervised_steps, s.learning_rate, s.warmup_steps
    if stage == "cst":
        total, rate, warmup = s.ppow_steps, s.ppow_learning_rate, 0
    optimizer = _optimizer(context, drafter, rate, total, warmup)
    step = functools.partial(
        supervised.train_step,
        config=context.target.config,
        optimizer=optimizer,
        steps=s.ttt_steps,
        decay=s.ttt_decay,
        greedy_text=context.greedy_text,
    )
    shell = drafter.replace(params={}, mixed=context.mixed)
    offset = s.supervised_steps if stage == "cst" else 0

    store = _features(context, drafter) if s.cache_features else None

    def one(state, index):
        batch = context.train.at(offset + index)
        cached = store.at(offset + index, batch) if store else None
        return step(state, shell, context.target.params, batch, cached)

    return _train(context, drafter, stage, one, total, optimizer)


def _features(context: _Context, drafter: Drafter) -> FeatureStore:
    target, stop = context.target, context.stop
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


def _ppow(context: _Context, drafter: Drafter) -> Drafter:
    s = context.settings
    optimizer = _optimizer(context, drafter, s.ppow_learning_rate, s.ppow_steps * s.passes, 0)
    rollouts = RolloutSettings(
        window=s.window,
        group=s.group,
        windows=s.windows,
        rollout_temperature=s.rollout_temperature,
        verify_temperature=0.0 if s.acceptance == "greedy" else s.acceptance_temperature,
        eta=s.eta,
        eps=s.eps,
        adaw=s.adaw,
        adaw_start=s.adaw_start,
        greedy_reference=not context.greedy_text,
        costs=CostModel(_gamma(context, drafter), s.general_cost, s.verify_cost, s.rollback_cost, s.bonus),
    )
    step = functools.partial(
        ppow.train_step,
        config=context.target.config,
        optimizer=optimizer,
        rollouts=rollouts,
        policy=ppow.PolicySettings(s.clip, s.kl_weight, s.passes),
        greedy_text=context.greedy_text,
    )
    shell = drafter.replace(params={}, mixed=context.mixed)
    key = jax.random.fold_in(jax.random.key(s.seed), 2)
    offset = s.supervised_steps if (context.workdir / "supervised").exists() else 0  # go on in the data

    def one(state, index):
        batch = context.train.at(offset + index)
        return step(state, shell, context.target.params, batch, jax.random.fold_in(key, index))

    return _train(context, drafter, "ppow", one, s.ppow_steps, optimizer)


def _gamma(context: _Context, drafter: Drafter) -> float:
    """The flag's gamma, or the one measured here: once a workdir, so that a resumed run has the same rewards."""
    s = context.settings
    if s.gamma >= 0:
        return s.gamma
    path = context.workdir / "costs.json"
    if not path.exists():
        costs = measure_costs(context.target, cast(drafter, s.dtype), chain(s.window), s.row_length)
        measured = dataclasses.asdict(costs) | {"gamma": costs.gamma, "verify_ratio": costs.verify_ratio}
        files.write_atomic(path, json.dumps(measured, indent=1))
    gamma = round(json.loads(path.read_text())["gamma"], 4)
    log.info("ppow: a draft step costs %.3f steps of the target here (--gamma)", gamma)
    return gamma


# Results.


def cast(drafter: Drafter, dtype: str) -> Drafter:
    """The drafter as decoding wants it: matrices in `dtype`, norms in float32."""
    params = {k: v if "norm" in k else jnp.asarray(v, DTYPES[dtype]) for k, v in drafter.params.items()}
    return drafter.replace(params=params, mixed=False)


def _export(context: _Context, arm: str, drafter: Drafter, name: str) -> None:
    """Writes workdir/name, with a model card that has the arm's figures where this very drafter was measured."""
    s, workdir = context.settings, context.workdir
    measured = _former_arms(workdir).get(arm, {})
    figures = measured["results"] if measured.get("drafter") == _checksum(drafter) else []

    def write(directory: Path) -> None:
        params, ids_W = jax.device_get(drafter.params), np.asarray(drafter.target_ids_W)
        export_drafter(directory, drafter.config, params, ids_W, target_name=s.target)
        write_card(
            directory,
            title=f"EAGLE-3 drafter for {s.target}",
            target=s.target,
            figures=figures,
            command=f"python -m experiments.train --flagfile={workdir.name}/flags.txt",
        )

    _replace_directory(workdir / name, write)
    log.info("exported %s: %s", arm, workdir / name)


def _replace_directory(directory: Path, write: Callable[[Path], object]) -> None:
    """Puts what `write` makes of a path in the place of `directory`; a kill leaves no half of either."""
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    write(new)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _evaluate(context: _Context, arms: dict[str, Drafter], benchmarks: list[Benchmark]) -> None:
    """Measures every arm, prints the table, writes report.json, report.md and plots.

    An arm that report.json has already, of the same drafter under the same conditions, is not measured again.
    """
    s, workdir = context.settings, context.workdir
    about, speculations = environment(s.dtype), [chain(s.window)]
    conditions = zlib.crc32(repr((about, s.target, speculations, s.max_new_tokens, benchmarks)).encode())
    settings = {spec.name: getattr(s, spec.name) for spec in config_lib.specs(TrainSettings)}
    former, done = _former_arms(workdir), []
    for name, drafter in arms.items():
        made_of = {"drafter": _checksum(drafter), "conditions": conditions}
        arm = former.get(name, {})
        if {key: arm.get(key) for key in made_of} == made_of:
            log.info("%s: measured before (without report.json, it would be measured again)", name)
        else:
            log.info("measuring %s", name)
            rows = evaluate(
                context.target,
                cast(drafter, s.dtype),
                benchmarks,
                speculations=speculations,
                max_new_tokens=s.max_new_tokens,
                skip_long_prompts=True,
                stop=lambda: context.stop.requested,
            )
            if not rows:
                raise Stopped
            arm = report.arm(name, rows) | made_of
        done.append(arm)
        result = about | {"settings": settings, "arms": done}
        report.write_json(workdir / "report.json", result)
    report.plot_results(workdir / "results.png", result)
    curves = ("loss", "held_out_tau_sim", "reward", "accepted_length", "kl", "flat_groups")
    report.plot_curves(workdir / "curves.png", read_metrics(workdir / "metrics.jsonl"), curves)
    report.write_markdown(workdir / "report.md", result, ["results.png", "curves.png"])
    print(report.result_table(result))
    print(f"\nreport and plots: {workdir}")


def _former_arms(workdir: Path) -> dict[str, dict]:
    """The arms in report.json, by name."""
    path = workdir / "report.json"
    return {arm["name"]: arm for arm in json.loads(path.read_text())["arms"]} if path.exists() else {}


def _checksum(drafter: Drafter) -> int:
    """Of all that makes a drafter: equal for equal ones."""
    checksum = zlib.crc32(np.asarray(drafter.target_ids_W), zlib.crc32(repr(drafter.config).encode()))
    for _, value in sorted(drafter.params.items()):
        checksum = zlib.crc32(np.ascontiguousarray(value), checksum)
    return checksum
