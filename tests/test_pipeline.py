"""The whole job through its command: results, kills and resumes, other settings, bad input. And the loop below it."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train
from ppow_jax import cli, config, files
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.training import corpus, loop, pipeline, results, stages
from ppow_jax.training.checkpoint import Checkpoints
from ppow_jax.training.metrics import VOLATILE, MetricsWriter, NonFiniteError, read_metrics
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.start import find_start, keep_start
from ppow_jax.training.supervised import TrainState
from ppow_jax.training.workdir import open_workdir
from ppow_jax.weights import targets

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = {  # tiny.flags, made smaller still
    "target": "tiny",
    "dtype": "float32",
    "data": "builtin[0:60]",
    "num_answers": 16,
    "held_out": 4,
    "max_prompt_tokens": 96,
    "answer_tokens": 12,
    "answer_slots": 8,
    "answer_chunk": 8,
    "draft_vocab_size": 64,
    "batch_size": 2,
    "row_length": 112,
    "max_anchors": 32,
    "supervised_steps": 24,
    "ttt_steps": 2,
    "warmup_steps": 2,
    "ppow_steps": 16,
    "adaw_start": 4,
    "window": 2,
    "group": 2,
    "windows": 2,
    "gamma": 0.12,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "benchmarks": "builtin",
    "num_prompts": 1,
    "max_new_tokens": 8,
    "cache_features": "true",
}


def arguments(workdir, **changes):
    return [f"--{name}={value}" for name, value in (FLAGS | {"workdir": workdir} | changes).items()]


class Command:
    """`python -m experiments.train` in a process of its own; compiled programs are shared through one cache."""

    def __init__(self, cache, workdir, **changes):
        self.workdir, self.log = pathlib.Path(workdir), cache / f"{time.monotonic_ns()}.log"
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *arguments(workdir, **changes)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> int:
        try:
            return self.process.wait(timeout=600)
        finally:
            self.process.kill()
            print(self.log.read_text())  # pytest shows it where a test fails

    def signal_at(self, stage: str, step: int, signum: int) -> int:
        """Sends a signal once `step` of `stage` is in the metrics; the exit code."""
        while self.process.poll() is None:
            if any(row["stage"] == stage and row["step"] >= step for row in metrics_of(self.workdir)):
                self.process.send_signal(signum)
                break
            time.sleep(0.005)
        return self.finish()


def metrics_of(workdir):
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def state_of(workdir, stage, step):
    """[path, dtype, shape, checksum] of every array of a checkpoint, moments of the optimiser included."""
    with Checkpoints(workdir / stage / "checkpoints") as checkpoints:
        return checkpoints._payload(step)["leaves"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The workdir of an uninterrupted run of every stage."""
    workdir, prompts = tmp_path_factory.mktemp("runs") / "whole", cache / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "What is {i} + 4?"}}\n' for i in (3, 17, 25)))
    assert Command(cache, workdir, benchmarks=prompts).finish() == 0
    return workdir


def test_a_run_leaves_its_results(whole):
    assert {"flags.txt", "report.json", "report.md", "results.png", "curves.png", "metrics.jsonl", "drafter"} <= {
        path.name for path in whole.iterdir()
    }
    assert {"config.json", "model.safetensors"} <= {path.name for path in (whole / "drafter").iterdir()}
    report = json.loads((whole / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["supervised", "ppow"]
    assert report["settings"]["window"] == 2 and report["precision"] == "float32" and report["device"]
    for arm in report["arms"]:
        (row,) = arm["results"]
        assert row["identical"] == row["total"] == row["num_prompts"] == 1
        assert 1 <= row["tau"] <= 3 and row["tau"] == pytest.approx(arm["mean_tau"])
        assert row["speedup"] == pytest.approx(arm["mean_speedup"]) and row["speedup"] > 0
        assert len(row["acceptance_by_position"]) == 2 and len(row["accepted_histogram"]) == 3
    text = (whole / "report.md").read_text()
    assert "supervised" in text and "ppow" in text


def test_the_metrics_of_a_run(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    by_stage = {stage: [row["step"] for row in rows if row["stage"] == stage] for stage in {r["stage"] for r in rows}}
    assert by_stage == {
        "supervised": list(range(1, 25)),
        "supervised_held_out": [0, 6, 12, 18, 24],
        "ppow": list(range(1, 17)),
        "ppow_held_out": [0, 6, 12, 16],
    }
    ppow = [row for row in rows if row["stage"] == "ppow"]
    names = {"reward", "reward_std", "reward_speedup", "reward_proximity", "accepted_length", "accepted_histogram"}
    names |= {"flat_groups", "kl", "ratio", "ratio_clipped", "entropy", "gradient_norm", "criticality", "loss"}
    assert names <= set(ppow[0])
    held_out = [row["held_out_tau_sim"] for row in rows if row["stage"].endswith("_held_out")]
    assert all(1 <= tau <= 3 for tau in held_out)
    # stage 2 begins where the best of stage 1 was
    assert held_out[5] == max(held_out[:5])


def test_kills_and_resumes_change_no_byte(whole, cache, tmp_path):
    """kill -9 in stage 1, SIGTERM and kill -9 in stage 2, stages named one by one: the same drafters, bit for bit."""
    workdir = tmp_path / "run"
    first = Command(cache, workdir, stages="data,supervised")
    assert first.signal_at("supervised", 10, signal.SIGKILL) == -signal.SIGKILL
    assert 10 <= max(row["step"] for row in metrics_of(workdir)) < 24
    assert not (workdir / "drafter_supervised").exists()

    second = Command(cache, workdir, stages="data,supervised,ppow,export")
    assert second.signal_at("ppow", 5, signal.SIGTERM) == 143
    stopped = max(row["step"] for row in metrics_of(workdir) if row["stage"] == "ppow")
    assert 5 <= stopped < 16 and f"ppow: saved after step {stopped} of 16" in second.log.read_text()
    with Checkpoints(workdir / "ppow" / "checkpoints") as checkpoints:
        assert checkpoints.steps[-1] == stopped  # saved, though no step of checkpoint_every

    third = Command(cache, workdir, stages="ppow,export")
    assert third.signal_at("ppow", min(stopped + 3, 15), signal.SIGKILL) == -signal.SIGKILL
    assert f"ppow: going on after step {stopped} of 16" in third.log.read_text()
    assert not (workdir / "drafter").exists()
    assert Command(cache, workdir, stages="ppow,export").finish() == 0

    for stage, step in (("supervised", 24), ("ppow", 16)):
        assert state_of(workdir, stage, step) == state_of(whole, stage, step)
    for name in ("drafter_supervised", "drafter"):
        for file in ("model.safetensors", "config.json"):
            assert (workdir / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)

    def essence(directory):
        rows = read_metrics(directory / "metrics.jsonl")
        return sorted(
            json.dumps({k: v for k, v in row.items() if k not in VOLATILE}, sort_keys=True) for row in rows
        )

    assert essence(workdir) == essence(whole)  # every step once, with the same numbers


# Stages one by one, in this process, on copies of the finished run.


@pytest.fixture
def finished(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "finished"))


@pytest.fixture
def run_here(cache, monkeypatch):
    """Runs stages -> (exit code, the number of prompts of each measurement); nothing is decoded."""

    def run(workdir, stages, stop_in=None, **changes):
        measured = []

        def evaluate(target, drafter, benchmarks, *, stop, **settings):
            if len(measured) == stop_in:
                signal.raise_signal(signal.SIGTERM)
            if stop():
                return []
            measured.append(sum(len(b.prompts) for b in benchmarks))
            return [{"benchmark": b.name, "tau": 1.5, "speedup": 1.25} for b in benchmarks]

        monkeypatch.setattr(results, "evaluate", evaluate)
        argv = arguments(workdir, **{"benchmarks": cache / "prompts.jsonl", "stages": stages} | changes)
        return pipeline.run(config.parse(TrainSettings, argv)), measured

    return run


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def arms_of(workdir):
    return {arm["name"]: arm for arm in json.loads((workdir / "report.json").read_text())["arms"]}


def test_export_alone_takes_the_best_drafter_there_is(whole, finished, run_here, caplog):
    caplog.set_level("INFO")
    for left_over in (".drafter.new", ".drafter.old"):
        (finished / left_over).mkdir()
    (finished / "drafter" / "config.json").unlink()
    assert run_here(finished, "export") == (0, []) and "exported ppow" in caplog.text
    assert weights(finished / "drafter") == weights(whole / "drafter")
    assert (finished / "drafter" / "config.json").exists() and not list(finished.glob(".drafter*"))
    tau = arms_of(whole)["ppow"]["results"][0]["tau"]
    assert f"| {tau:.2f} |" in (finished / "drafter" / "README.md").read_text()

    shutil.rmtree(finished / "ppow")
    assert run_here(finished, "export") == (0, []) and "exported supervised" in caplog.text
    assert weights(finished / "drafter") == weights(whole / "drafter_supervised")

    shutil.rmtree(finished / "supervised")
    for stage in ("export", "evaluate"):
        with pytest.raises(UserError, match=f"--stages={stage}: .* no checkpoint of supervised or ppow"):
            run_here(finished, stage)


def test_evaluate_alone_measures_what_the_stages_left(whole, finished, run_here):
    assert run_here(finished, "evaluate") == (0, [])  # measured before
    assert arms_of(finished) == arms_of(whole)
    assert run_here(finished, "evaluate", num_prompts=2) == (0, [2, 2])
    arms = arms_of(finished)
    assert list(arms) == ["supervised", "ppow"] and arms["ppow"]["mean_tau"] == 1.5
    assert {n: a["drafter"] for n, a in arms.items()} == {n: a["drafter"] for n, a in arms_of(whole).items()}
    shutil.rmtree(finished / "supervised")
    assert run_here(finished, "evaluate", max_new_tokens=9) == (0, [1, 1])
    assert list(arms_of(finished)) == ["start", "ppow"]
    assert "\n| start " in (finished / "report.md").read_text()


def test_a_stop_while_measuring_keeps_the_arms_that_are_done(finished, run_here):
    (finished / "report.json").unlink()
    shutil.rmtree(finished / "drafter")
    assert run_here(finished, "evaluate,export", stop_in=1) == (143, [1])
    assert list(arms_of(finished)) == ["supervised"] and not (finished / "drafter").exists()
    assert run_here(finished, "evaluate,export") == (0, [1])
    assert list(arms_of(finished)) == ["supervised", "ppow"]
    assert "| 1.50 |" in (finished / "drafter" / "README.md").read_text()


def test_stage_2_and_baselines_begin_where_stage_1_ended(finished, run_here, monkeypatch):
    begun = []

    def train(context, drafter, stage="ppow"):
        begun.append((stage, float(drafter.params["fc"][0, 0])))
        return drafter.replace(params=drafter.params | {"fc": drafter.params["fc"] + 1})

    monkeypatch.setattr(stages, "_supervised", train)
    monkeypatch.setattr(stages, "_ppow", train)
    shutil.rmtree(finished / "ppow")
    assert run_here(finished, "ppow,evaluate", baselines="cst") == (0, [1, 1, 1])
    (_, first), *others = begun
    assert begun[0][0] == "supervised"
    assert others == [("ppow", pytest.approx(first + 1)), ("cst", pytest.approx(first + 1))]
    assert list(arms_of(finished)) == ["supervised", "ppow", "cst"]

    begun.clear()
    shutil.rmtree(finished / "supervised")
    assert run_here(finished, "ppow,evaluate", num_prompts=2) == (0, [2, 2])
    assert begun == [("ppow", first)] and list(arms_of(finished)) == ["start", "ppow"]


def test_a_directory_is_replaced_as_a_whole(tmp_path, monkeypatch):
    place = tmp_path / "drafter"

    def write(text, then=None):
        def fill(directory):
            directory.mkdir()
            (directory / "config.json").write_text(text)
            if then:
                raise then

        return fill

    files.replace_directory(place, write("old"))
    with pytest.raises(KeyboardInterrupt):
        files.replace_directory(place, write("half", then=KeyboardInterrupt))
    assert (place / "config.json").read_text() == "old"

    rename = pathlib.Path.rename
    killed = iter([None, KeyboardInterrupt])

    def dying(path, target):
        if error := next(killed):
            raise error
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            files.replace_directory(place, write("new"))
    assert not place.exists()  # none, rather than half of one
    files.replace_directory(place, write("new"))
    assert (place / "config.json").read_text() == "new" and list(tmp_path.iterdir()) == [place]


def test_a_run_keeps_the_drafter_that_it_started_from(whole, tmp_path):
    source = shutil.copytree(whole / "drafter", tmp_path / "source")
    argv = arguments(tmp_path / "run", drafter=source, draft_vocab_size=8192)  # the default: not asked for
    settings, target = config.parse(TrainSettings, argv), targets.load("tiny", "float32")
    start = find_start(settings, tmp_path, target)
    assert start.config.draft_vocab_size == 64
    keep_start(start, tmp_path)
    shutil.rmtree(source)
    again = find_start(settings, tmp_path, target)
    assert again.config == start.config and results.checksum(again) == results.checksum(start)
    assert find_start(dataclasses.replace(settings, drafter=None, draft_vocab_size=9), tmp_path, target) is None


# Bad input: one message, exit code 2, before anything is made or compiled.


def refuse(argv, monkeypatch, capsys):
    """The one line that the command prints before it leaves with exit code 2."""
    targets.load("tiny", "float32")  # what importing transformers says is none of our business
    capsys.readouterr()
    monkeypatch.setattr(cli, "setup_logging", lambda: None)
    monkeypatch.setattr(pipeline, "load_batches", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, TrainSettings, argv=argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 0}, "--window=0: must be at least 1"),
        ({"group": 1}, "--group=1: must be at least 2"),
        ({"draft_vocab_size": 260}, "--draft_vocab_size=260: must be between 1 and the target's vocabulary, 259"),
        ({"window": 12}, "--window=12: must be less than --answer_tokens=12"),
        ({"max_anchors": 200}, "--max_anchors=200: must be at most --row_length=112"),
        ({"windows": 33}, "--windows=33: must be at most --max_anchors=32"),
        ({"held_out": 16}, "--held_out=16: must be less than --num_answers=16"),
        ({"feature_layers": "1,2"}, "--feature_layers=1,2: three ids"),
        ({"feature_layers": "1,2,9"}, "--feature_layers"),
        ({"stages": "ppow,data"}, "--stages=ppow,data: must be some of"),
        ({"rollout_temperature": 0}, "--rollout_temperature=0.0: must be above 0"),
        ({"general_cost": "true", "verify_cost": 0, "gamma": 0}, "--verify_cost=0.0: must be above 0"),
        ({"answer_tokens": 2000}, "--answer_tokens=2000: with the prompt, at most 2048"),
        ({"target": "large"}, "--target=large"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"max_prompt_tokens": 3}, "--data=builtin[0:60]: 0 prompts of at most 3 tokens"),
        ({"benchmarks": "missing.jsonl"}, "missing.jsonl"),
        ({"benchmarks": ""}, "--benchmarks: must name one at least"),
        ({"drafter": "missing"}, "--drafter=missing: there is no such directory"),
        ({"drafter": "auto"}, "--drafter=auto: there is none for --target=tiny; name a directory, or none"),
        ({"stages": "export"}, "holds no checkpoint of supervised or ppow"),
        ({"adaw_strat": 3}, "--adaw_strat: unknown flag; did you mean --adaw_start?"),
    ],
)
def test_impossible_settings_are_refused(changes, named, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    message = refuse(arguments(workdir, **changes), monkeypatch, capsys)
    assert named in message
    assert not workdir.exists() or not list(workdir.iterdir())  # the mended command may use it


def test_a_workdir_of_other_settings_is_refused(whole, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    message = refuse(arguments(whole, learning_rate=0.5, window=3), monkeypatch, capsys)
    assert f"--workdir={whole}: holds a run with " in message and "--window=2 (now 3)" in message
    assert "--learning_rate" in message and "--group" not in message
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    (tmp_path / ".flags.txt.17.tmp").write_text("what a kill may leave")
    assert open_workdir(config.parse(TrainSettings, arguments(tmp_path))) == tmp_path
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in refuse(arguments(tmp_path), monkeypatch, capsys)
    assert "--workdir: must name the directory" in refuse(arguments("none"), monkeypatch, capsys)


def test_a_drafter_of_another_kind_than_the_flags_ask_for_is_refused(whole, tmp_path, monkeypatch, capsys):
    flags = {"drafter": whole / "drafter", "draft_vocab_size": 65, "feature_layers": "1,2,3", "fc_norm": "true"}
    message = refuse(arguments(tmp_path / "run", **flags), monkeypatch, capsys)
    named = (
        "--draft_vocab_size=65 (it has 64)",
        "--feature_layers=1,2,3 (it has 2,3,4)",
        "--fc_norm=true (it has false)",
    )
    assert f"--drafter={whole / 'drafter'}: cannot be changed by {', '.join(named)}" in message


def test_the_command_itself_refuses_at_once(cache, tmp_path):
    command = Command(cache, tmp_path / "run", window=0)
    assert command.finish() == 2
    assert command.log.read_text() == "error: --window=0: must be at least 1\n"


# Held-out examples.


def test_whole_conversations_are_held_out():
    def example(conversation, turn):
        return Example(np.zeros(3, np.int32), np.ones(3, bool), f"a turn b:{conversation} turn {turn}")

    examples = [example(c, t) for c in range(20) for t in (0, 2)]
    held_out, rest = corpus.split(examples, 8, seed=1)
    sources = [{e.source.rsplit(" turn ", 1)[0] for e in part} for part in (held_out, rest)]
    assert len(held_out) == 8 and len(rest) == 32 and not sources[0] & sources[1]
    assert [e.source for e in corpus.split(examples, 8, seed=1)[0]] == [e.source for e in held_out]
    assert [e.source for e in corpus.split(examples, 8, seed=2)[0]] != [e.source for e in held_out]
    assert len(corpus.split(examples, 1, seed=0)[0]) == 2  # at least one conversation


# The loop, with a step that needs no compiling.


def fake_loop(poison=None, **changes):
    def step(state, index, batch):
        assert batch == index + 7
        bad = poison is not None and index in np.atleast_1d(poison)
        loss = float("nan") if bad else 1.0 / (index + 1)
        params = {"w": state.params["w"] * 0.9 + index}
        state = state.advance(params, state.opt_state, jnp.float32(loss))
        return state, {"loss": loss, "parts": np.arange(2) * loss, "skipped": state.skipped}

    def measure(params):
        return {"tau": -abs(float(params["w"][0]) - 8.0)}  # best in mid-run

    base = loop.Loop(
        "stage", 13, lambda i: i + 7, step, measure, score="tau", checkpoint_every=3, evaluate_every=4, position=7
    )
    return dataclasses.replace(base, **changes)


def run_loop(directory, made=None, stop=None):
    state = TrainState.create({"w": jnp.ones(3)}, optax.sgd(1.0))
    with MetricsWriter(directory) as metrics:
        return loop.run(made or fake_loop(), state, directory / "stage", metrics, stop or StopSignal())


def essentials(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return sorted((row["stage"], row["step"], row.get("loss", row.get("tau"))) for row in rows)


class StopAfter(StopSignal):
    """Asks to stop when it was looked at n times."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    params, complete = run_loop(directory)
    assert complete
    return directory, params


def test_the_best_parameters_are_returned(uninterrupted):
    directory, params = uninterrupted
    taus = {row["step"]: row["tau"] for row in read_metrics(directory / "metrics.jsonl") if "tau" in row}
    assert list(taus) == [0, 4, 8, 12, 13]
    w, expected = 1.0, {}
    for index in range(13):
        w = w * 0.9 + index
        expected[index + 1] = w
    best = max(taus, key=taus.get)
    assert best == 4  # neither the first nor the last
    np.testing.assert_allclose(params["w"], expected[best], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 12])
def test_a_stopped_loop_goes_on_where_it_was(uninterrupted, tmp_path, steps):
    _, complete = run_loop(tmp_path, stop=StopAfter(steps))
    assert not complete
    with Checkpoints(tmp_path / "stage" / "checkpoints") as checkpoints:
        assert checkpoints.steps[-1] == steps
    params, complete = run_loop(tmp_path)
    assert complete and essentials(tmp_path) == essentials(uninterrupted[0])
    np.testing.assert_array_equal(params["w"], uninterrupted[1]["w"])
    assert run_loop(tmp_path)[1] and essentials(tmp_path) == essentials(uninterrupted[0])  # finished work stays


def test_a_killed_loop_goes_on_from_its_last_checkpoint(uninterrupted, tmp_path):
    """Killed in step 9: steps 7 and 8 come again, and step 8 is not measured into the metrics twice."""
    whole = fake_loop()

    def step(state, index, batch):
        if index == 8:
            raise KeyboardInterrupt
        return whole.step(state, index, batch)

    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path, fake_loop(step=step))
    params, complete = run_loop(tmp_path)
    assert complete and essentials(tmp_path) == essentials(uninterrupted[0])
    np.testing.assert_array_equal(params["w"], uninterrupted[1]["w"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(uninterrupted, tmp_path):
    message = r"stage: step 8: loss is nan, parts is \[nan, nan\]; the last good checkpoint is .*/checkpoints/6$"
    with pytest.raises(NonFiniteError, match=message):
        run_loop(tmp_path, fake_loop(poison=7))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 8 and np.isnan(rows[-1]["loss"])  # written before it stopped
    with Checkpoints(tmp_path / "stage" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [3, 6]
    assert run_loop(tmp_path)[1] and essentials(tmp_path) == essentials(uninterrupted[0])
