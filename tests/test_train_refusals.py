"""Bad input to `experiments.train`: one message, exit code 2, before anything is made or compiled."""

import logging

import pytest
import small_run
from small_run import Command, arguments, settings

from experiments import train
from ppow_jax import cli
from ppow_jax.training import pipeline
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.workdir import fix_date, hold_workdir, open_workdir
from ppow_jax.weights import targets


@pytest.fixture
def whole():
    """The workdir of an uninterrupted run of every stage."""
    return small_run.whole()


def refuse(argv, monkeypatch, capsys):
    """The one line that the command prints before it leaves with exit code 2."""
    targets.load("tiny", "float32")  # what importing transformers says is none of our business
    capsys.readouterr()
    monkeypatch.setattr(cli, "setup_logging", lambda: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those that another test's command left
    monkeypatch.setattr(pipeline, "load_corpus", lambda *_: pytest.fail("it went on"))
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
        (
            {"held_out": 16},
            "--held_out=16, --fresh_answers=0, --test_answers=0: together must be less than --num_answers=16",
        ),
        ({"feature_layers": "1,2"}, "--feature_layers=1,2: three ids"),
        ({"feature_layers": "1,2,9"}, "--feature_layers"),
        ({"stages": "ppow,data"}, "--stages=ppow,data: must be some of"),
        (
            {"estimator": "exact", "rivals": 64, "group": 8, "windows": 6},
            "--rivals=64: must be less than --draft_vocab_size=64",
        ),
        ({"rollout_temperature": 0}, "--rollout_temperature=0.0: must be above 0"),
        ({"general_cost": "true", "verify_cost": 0, "gamma": 0}, "--verify_cost=0.0: must be above 0"),
        ({"answer_tokens": 2000}, "--answer_tokens=2000: with the prompt, at most 2048"),
        ({"target": "large"}, "--target=large"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"max_prompt_tokens": 3}, "--data=builtin[0:60]: 0 prompts of at most 3 tokens"),
        (
            {"data": "builtin[0:9]", "held_out": 8, "fresh_answers": 4},
            "--data=builtin[0:9]: leaves nothing for training; 9 answers of 9 conversations, of which each goes",
        ),
        (
            {"data": "builtin[0:2]", "held_out": 1, "test_answers": 3, "fresh_answers": 2},
            "--data=builtin[0:2]: leaves nothing for --fresh_answers=2 and training; 2 answers of 2 conversations",
        ),
        ({"benchmarks": "missing.jsonl"}, "missing.jsonl"),
        (
            {"estimator": "exact", "group": 8, "windows": 6, "horizon": "answer"},
            "--divide_by_std: --horizon=answer has no deviation to divide by; add --nodivide_by_std",
        ),
        ({"benchmarks": ""}, "--benchmarks: must name one at least"),
        ({"drafter": "missing"}, "--drafter=missing: there is no such directory"),
        ({"drafter": "auto"}, "--drafter=auto: there is none for --target=tiny; name a directory, or none"),
        ({"stages": "export"}, "holds no checkpoint of supervised or ppow"),
        ({"skip_nonfinite": -1}, "--skip_nonfinite=-1: must be at least 0"),
        ({"profile_steps": "5"}, "--profile_steps=5: must be FIRST:LAST, such as 10:13"),
        ({"profile_steps": "7:5"}, "--profile_steps=7:5: must be steps from 1 on, the first not after the last"),
        ({"compilation_cache": "/dev/null/x"}, "--compilation_cache=/dev/null/x: /dev/null/x: must be a directory"),
        (
            {"supervised_loss": "acceptence"},
            "--supervised_loss=acceptence: must be one of cross_entropy, acceptance, hybrid (did you mean acceptance?)",
        ),
        ({"step_weights": "none"}, "--step_weights=none: must be one of decay, acceptance"),
        (
            {"step_weights": "acceptance", "ttt_decay": 0.7},
            "--ttt_decay=0.7: has no effect with --step_weights=acceptance; leave it out",
        ),
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
    assert open_workdir(settings(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in refuse(arguments(tmp_path), monkeypatch, capsys)
    assert "--workdir: must name the directory" in refuse(arguments("none"), monkeypatch, capsys)


def test_a_second_command_in_the_same_workdir_is_refused(whole, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    held = fix_date(settings(whole))
    with hold_workdir(held):
        message = refuse(arguments(whole), monkeypatch, capsys)
        assert f"--workdir={whole}: another command is running there" in message
        assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    with hold_workdir(held) as workdir:
        assert workdir == whole


def test_a_drafter_of_another_kind_than_the_flags_ask_for_is_refused(whole, tmp_path, monkeypatch, capsys):
    flags = {"drafter": whole / "drafter", "draft_vocab_size": 65, "feature_layers": "1,2,3", "fc_norm": "true"}
    message = refuse(arguments(tmp_path / "run", **flags), monkeypatch, capsys)
    named = (
        "--draft_vocab_size=65 (it has 64)",
        "--feature_layers=1,2,3 (it has 2,3,4)",
        "--fc_norm=true (it has false)",
    )
    assert f"--drafter={whole / 'drafter'}: cannot be changed by {', '.join(named)}" in message


def test_the_command_itself_refuses_at_once(tmp_path):
    command = Command(tmp_path / "run", window=0)
    assert command.finish() == 2
    assert command.log.read_text() == "error: --window=0: must be at least 1\n"
