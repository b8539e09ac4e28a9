"""Nothing is lost: runs that are killed or stopped end bit-identical to one that nobody disturbed.

    python -m pytest -m slow -s tests/test_kills.py   # 30 kills and 10 stops of tiny.flags itself
"""

import re
import shutil
import signal

import mortal
import numpy as np
import pytest
import safetensors.numpy
import small_run
from mortal import Death


def test_kills_between_writing_and_renaming_change_no_byte(tmp_path):
    """Answers written but not in place, a checkpoint of stage 1 likewise, and a drafter."""
    place = tmp_path / "life"
    place.mkdir()
    for pattern in (
        r"os.rename answers/\.chunk-00001",
        r"os.rename supervised/checkpoints/8\.orbax-checkpoint-tmp$",
        r"os.rename \.drafter\.new",
    ):
        life = mortal.live(
            small_run.arguments(tmp_path / "run"), small_run.cache(), place, Death(change=1, pattern=pattern)
        )
        assert life.code == -signal.SIGKILL, life.log
        assert re.search(pattern, life.changes[-1])
    assert "supervised: going on after step 4 of 24" in life.log  # 8 was not in place
    life = mortal.live(small_run.arguments(tmp_path / "run"), small_run.cache(), place)
    assert life.code == 0, life.log
    small_run.assert_same_results(tmp_path / "run", small_run.whole())


def test_nan_in_a_step_stops_the_run_or_is_skipped(tmp_path):
    """The kept features of one example turn to nan: every step that sees it is bad."""
    workdir, place = tmp_path / "run", tmp_path / "life"
    place.mkdir()
    shutil.copytree(small_run.whole(), workdir)
    for made in ("supervised", "ppow", "drafter", "drafter_supervised"):
        shutil.rmtree(workdir / made)
    features = np.memmap(workdir / "features" / "features.bin", np.float32, "r+")
    features[:1000] = np.nan
    features.flush()

    def train(**changes):
        argv = small_run.arguments(workdir, stages="data,supervised", **changes)
        return mortal.live(argv, small_run.cache(), place)

    def steps():
        return [row for row in small_run.metrics_of(workdir) if row["stage"] == "supervised"]

    life = train()
    last = steps()[-1]
    assert life.code == 3 and np.isnan(last["loss"]) and last["skipped"] == 1
    assert f"supervised: step {last['step']}: loss is nan" in life.log and "the last good checkpoint is " in life.log
    life = train(skip_nonfinite=24)
    assert life.code == 0, life.log
    bad = [np.isnan(row["loss"]) for row in steps()]
    assert len(bad) == 24 and 1 < sum(bad) < 24 and bad[last["step"] - 1]
    assert [row["skipped"] for row in steps()] == np.cumsum(bad).tolist()
    weights = safetensors.numpy.load_file(workdir / "drafter_supervised" / "model.safetensors")
    assert all(np.isfinite(np.asarray(value, np.float32)).all() for value in weights.values())


# The long versions.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(arguments without a workdir, cache, workdir of the undisturbed run, its changes, a place for lives)."""
    directory = tmp_path_factory.mktemp("tiny")
    cache, place = directory / "compiled", directory / "life"
    for path in (cache, place):
        path.mkdir()
    argv = [f"--flagfile={small_run.TINY}", "--stages=data,supervised,ppow,export"]
    life = mortal.live([*argv, f"--workdir={directory / 'whole'}"], cache, place)
    assert life.code == 0, life.log
    return argv, cache, directory / "whole", life.changes, place


def stage_of(log: str) -> str:
    """How far a process had come when it ended: the last stage that its log speaks of."""
    found = re.findall(r" (answers|features|supervised|ppow|measuring|exported)\b", log)
    return found[-1] if found else "start"


@pytest.mark.slow
def test_thirty_random_kills_change_no_byte(tiny, tmp_path):
    """Each run is killed again and again until it comes to its end; every second kill is a change of a file."""
    argv, cache, whole, changes, place = tiny
    rng, kills, runs = np.random.default_rng(0), [], 0
    while len(kills) < 30:
        runs += 1
        workdir = tmp_path / f"run{runs}"
        while True:
            if len(kills) % 2:
                death = Death(seconds=float(rng.uniform(1.0, 40.0)))
            else:
                death = Death(change=int(rng.integers(1, len(changes) // 3)))
            life = mortal.live([*argv, f"--workdir={workdir}"], cache, place, death)
            if life.code == 0:
                break
            assert life.code == -signal.SIGKILL, life.log
            kills.append((runs, stage_of(life.log), death, life.changes[-1:]))
            print(len(kills), *kills[-1], flush=True)
        small_run.assert_same_results(workdir, whole)
    print(f"{len(kills)} kills in {runs} runs, all of them bit-identical", flush=True)


@pytest.mark.slow
def test_ten_stops_lose_no_step(tiny, tmp_path):
    """SIGTERM before random changes of files: exit code 143, and the next process goes on behind the last step."""
    argv, cache, whole, changes, place = tiny
    rng, stops, runs = np.random.default_rng(1), [], 0
    while len(stops) < 10:
        runs += 1
        workdir = tmp_path / f"run{runs}"
        while True:
            before = {(row["stage"], row["step"]): row["time"] for row in small_run.metrics_of(workdir)}
            death = Death(change=int(rng.integers(1, len(changes) // 4)), signum=signal.SIGTERM)
            life = mortal.live([*argv, f"--workdir={workdir}"], cache, place, death)
            after = {(row["stage"], row["step"]): row["time"] for row in small_run.metrics_of(workdir)}
            assert {key: after.get(key) for key in before if "held_out" not in key[0]} == {
                key: time for key, time in before.items() if "held_out" not in key[0]
            }  # no step came a second time
            if life.code == 0:
                break
            assert life.code == 143, life.log
            stops.append((runs, stage_of(life.log), death.change))
            print(len(stops), *stops[-1], flush=True)
        small_run.assert_same_results(workdir, whole)
    print(f"{len(stops)} stops in {runs} runs, no step lost", flush=True)
