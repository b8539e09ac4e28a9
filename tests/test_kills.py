"""Nothing is lost: runs that are killed or stopped end bit-identical to one that nobody disturbed.

    python -m pytest -m slow -s tests/test_kills.py   # 30 kills and 10 stops of tiny.flags itself
"""

import re
import shutil
import signal

import killed_runs
import numpy as np
import pytest
import safetensors.numpy
import small_run
from killed_runs import Death


@pytest.mark.full
def test_kills_between_writing_and_renaming_change_no_byte(tmp_path):
    """Answers written but not in place, a checkpoint of stage 1 likewise, and a drafter."""
    place = tmp_path / "life"
    place.mkdir()
    for pattern in (
        r"os.rename answers/\.chunk-00001",
        r"os.rename supervised/checkpoints/8\.orbax-checkpoint-tmp$",
        r"os.rename \.drafter\.new",
    ):
        life = killed_runs.live(
            small_run.arguments(tmp_path / "run"), small_run.cache(), place, Death(change=1, pattern=pattern)
        )
        assert life.code == -signal.SIGKILL, life.log
        assert re.search(pattern, life.changes[-1])
    assert "supervised: resuming after step 4 of 24" in life.log  # 8 was not in place
    life = killed_runs.live(small_run.arguments(tmp_path / "run"), small_run.cache(), place)
    assert life.code == 0, life.log
    small_run.assert_same_results(tmp_path / "run", small_run.whole())


@pytest.mark.full
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
        return killed_runs.live(argv, small_run.cache(), place)

    def steps():
        return [row for row in small_run.metrics_of(workdir) if row["stage"] == "supervised"]

    life = train()
    last = steps()[-1]
    assert life.code == 3 and np.isnan(last["loss"]) and last["skipped"] == 1
    assert re.search(rf"supervised: step {last['step']}: .*loss is nan.*; the last good checkpoint is ", life.log)
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
    life = killed_runs.live([*argv, f"--workdir={directory / 'whole'}"], cache, place)
    assert life.code == 0, life.log
    return argv, cache, directory / "whole", life.changes, place


def stage_of(log: str) -> str:
    """The progress of a process when it ended: the last stage that its log speaks of."""
    found = re.findall(r" (answers|features|supervised|ppow|exported)\b", log)
    return found[-1] if found else "start"


def steps(workdir):
    """When each step was written into the metrics."""
    rows = small_run.metrics_of(workdir)
    return {(row["stage"], row["step"]): row["time"] for row in rows if not row["stage"].endswith("_held_out")}


def lives(tiny, directory, number, choose):
    """Lives of runs that are ended again and again, `number` times in all -> (life, steps before, steps after).

    choose: number of ends so far -> Death. A run that comes to its own end must equal the undisturbed one.
    """
    argv, cache, whole, _, place = tiny
    ended = run = 0
    while ended < number:
        run += 1
        workdir, code = directory / f"run{run}", None
        while code != 0:
            before, death = steps(workdir), choose(ended)
            life = killed_runs.live([*argv, f"--workdir={workdir}"], cache, place, death)
            code = life.code
            if code != 0:
                ended += 1
                print(ended, run, stage_of(life.log), death, *life.changes[-1:], flush=True)
            yield life, before, steps(workdir)
        small_run.assert_same_results(workdir, whole)
    print(f"{ended} ends in {run} runs, all of them bit-identical", flush=True)


@pytest.mark.slow
def test_thirty_random_kills_change_no_byte(tiny, tmp_path):
    """At random changes of files: early ones and any by turns."""
    rng = np.random.default_rng(0)

    def choose(ended):
        return Death(change=int(rng.integers(1, len(tiny[3]) // (1 if ended % 2 else 3))))

    for life, *_ in lives(tiny, tmp_path, 30, choose):
        assert life.code in (0, -signal.SIGKILL), life.log


@pytest.mark.slow
def test_ten_stops_lose_no_step(tiny, tmp_path):
    """SIGTERM at random changes of files: exit code 143, and no step comes a second time."""
    rng = np.random.default_rng(1)

    def choose(_):
        return Death(change=int(rng.integers(1, len(tiny[3]) // 4)), signum=signal.SIGTERM)

    for life, before, after in lives(tiny, tmp_path, 10, choose):
        assert life.code in (0, 143), life.log
        assert {step: after.get(step) for step in before} == before
