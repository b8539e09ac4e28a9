"""The whole job through its command: results, kills and resumes, stages one by one."""

import dataclasses
import errno
import json
import pathlib
import shutil
import signal

import killed_runs
import numpy as np
import pytest
import small_run
from killed_runs import Death
from small_run import arguments, assert_same_results, metrics_of

from ppow_jax import files, flags
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.training import pipeline, results, stages, texts
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.training.run.metrics import NonFiniteError, read_metrics
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.start import find_start, keep_start
from ppow_jax.weights import targets


@pytest.fixture(scope="module")
def whole():
    """The workdir of an uninterrupted run of every stage."""
    return small_run.whole()


def test_a_run_leaves_its_results(whole):
    assert {"flags.txt", "report.json", "report.md", "results.png", "curves.png", "metrics.jsonl", "drafter"} <= {
        path.name for path in whole.iterdir()
    }
    files_there = {path.name for path in (whole / "drafter").iterdir()}
    assert {"config.json", "model.safetensors"} <= files_there
    report = json.loads((whole / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["supervised", "ppow"]
    assert report["settings"]["window"] == 2 and report["precision"] == "float32" and report["device"]
    for arm in report["arms"]:
        (row,) = arm["results"]
        assert row["mode"] == "adaptive" and row["tree"] == {"branch": 3, "depth": 2, "nodes": 12}
        assert row["identical"] == row["total"] == row["num_prompts"] == 1
        assert 1 <= row["tau"] <= 3 and row["tau"] == pytest.approx(arm["mean_tau"])
        assert row["speedup"] == pytest.approx(arm["mean_speedup"]) and row["speedup"] > 0
        assert len(row["acceptance_by_position"]) == 2 and len(row["accepted_histogram"]) == 3
    text = (whole / "report.md").read_text()
    assert "supervised" in text and "ppow" in text
    assert "(results.png)" in text and "(curves.png)" in text  # as they lie beside it


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


def test_kills_and_resumes_change_no_byte(whole, tmp_path):
    """kill -9 in stage 1, SIGTERM in stage 2, both before a chosen change of a file: the same drafters, bit for bit."""
    workdir, place = tmp_path / "run", tmp_path / "process"
    place.mkdir()

    def run(stages, death=None):
        return killed_runs.live(arguments(workdir, stages=stages), small_run.cache(), place, death)

    killed = run("data,supervised", Death(change=1, pattern=r"os.rename supervised/checkpoints/12\.orbax"))
    assert killed.code == -signal.SIGKILL, killed.log
    assert 12 <= max(row["step"] for row in metrics_of(workdir)) < 24
    assert not (workdir / "drafter_supervised").exists()

    stop = Death(change=1, pattern=r"os.rename ppow/checkpoints/4\.orbax", signum=signal.SIGTERM)
    stopped = run("data,supervised,ppow,export", stop)
    assert stopped.code == 143, stopped.log
    assert "supervised: resuming after step 8 of 24" in stopped.log  # 12 was not in place
    last = max(row["step"] for row in metrics_of(workdir) if row["stage"] == "ppow")
    assert 4 <= last < 16 and f"ppow: stopped; saved after step {last} of 16" in stopped.log
    with Checkpoints(workdir / "ppow" / "checkpoints") as checkpoints:
        assert checkpoints.steps[-1] == last

    resumed = run("ppow,export")
    assert resumed.code == 0 and f"ppow: resuming after step {last} of 16" in resumed.log
    assert_same_results(workdir, whole)


# Stages one by one, in this process, on copies of the finished run.


@pytest.fixture
def finished(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "finished"))


@pytest.fixture
def run_here(monkeypatch):
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
        return pipeline.run(small_run.settings(workdir, stages=stages, **changes)), measured

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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NonFiniteError("supervised: step 7: loss is nan"), 3),
        (OSError(errno.ENOSPC, "No space left", "metrics.jsonl"), r"No space left \(metrics.jsonl\)"),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_what_ends_a_stage_ends_the_run_with_a_clear_word(finished, run_here, monkeypatch, caplog, error, expected):
    def fail(*_):
        raise error

    monkeypatch.setattr(stages.loop, "run", fail)
    if expected == 3:
        assert run_here(finished, "ppow") == (3, []) and "error: supervised: step 7: loss is nan" in caplog.text
    elif expected is OSError:
        with pytest.raises(OSError, match="Input/output error"):
            run_here(finished, "ppow")
    else:
        with pytest.raises(UserError, match=f"--workdir={finished}: {expected}; what was finished is kept"):
            run_here(finished, "ppow")


def test_stage_2_and_baselines_begin_where_stage_1_ended(finished, run_here, monkeypatch):
    begun = []

    def train(context, drafter, plan, updates, data):
        begun.append((plan.stage, float(drafter.params["fc"][0, 0])))
        return drafter.replace(params=drafter.params | {"fc": drafter.params["fc"] + 1})

    monkeypatch.setattr(stages, "_train", train)
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
    settings, target = flags.parse(TrainSettings, argv), targets.load("tiny", "float32")
    start = find_start(settings, tmp_path, target)
    assert start.config.draft_vocab_size == 64
    keep_start(start, tmp_path)
    shutil.rmtree(source)
    again = find_start(settings, tmp_path, target)
    assert again.config == start.config and results.checksum(again) == results.checksum(start)
    assert find_start(dataclasses.replace(settings, drafter=None, draft_vocab_size=9), tmp_path, target) is None


# Held-out examples.


def test_whole_conversations_are_held_out():
    def example(conversation, turn):
        return Example(np.zeros(3, np.int32), np.ones(3, bool), f"a turn b:{conversation} turn {turn}")

    examples = [example(c, t) for c in range(20) for t in (0, 2)]
    held_out, rest = texts.split(examples, (8,), seed=1)
    sources = [{e.source.rsplit(" turn ", 1)[0] for e in part} for part in (held_out, rest)]
    assert len(held_out) == 8 and len(rest) == 32 and not sources[0] & sources[1]
    assert [e.source for e in texts.split(examples, (8,), seed=1)[0]] == [e.source for e in held_out]
    assert [e.source for e in texts.split(examples, (8,), seed=2)[0]] != [e.source for e in held_out]
    assert len(texts.split(examples, (1,), seed=0)[0]) == 2  # at least one conversation
