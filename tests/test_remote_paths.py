"""Directories in buckets: read, written and refused, against a stand-in of Google's storage; a run there, killed."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_run
import storage_stand_in
from storage_stand_in import BUCKET

from ppow_jax import cli, files, flags
from ppow_jax.corpus.answer_pack import prompt_key, read_packs, write_pack
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.study.settings import StudySettings
from ppow_jax.training import start, workdir
from ppow_jax.training.run.clock import Clock, read_attempts
from ppow_jax.training.run.metrics import VOLATILE, MetricsWriter, NoMetrics, read_metrics
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import targets

RUN = f"gs://{BUCKET}/runs/a"
ROWS = [(1, {"loss": 2.0}), (2, {"loss": 1.0}), (3, {"loss": 0.5})]
gcs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs: pip install 'ppow_jax[gcs]'")


@pytest.fixture(scope="module")
def module_storage():
    """A stand-in that this process uses: gcsfs looks for it when it first opens a bucket."""
    with storage_stand_in.serving() as (storage, environment), pytest.MonkeyPatch.context() as patch:
        for name in storage_stand_in.VARIABLES:
            patch.setenv(name, environment[name])
        yield storage


@pytest.fixture
def storage(module_storage, tmp_path, monkeypatch):
    """The stand-in, empty. An address that is taken for a path of this machine would leave files in the folder."""
    monkeypatch.chdir(tmp_path)
    module_storage.objects[BUCKET].clear()
    yield module_storage
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]


@pytest.mark.parametrize(
    ("path", "remote"),
    [("gs://bucket/run", True), ("s3://b", True), ("memory://x", True), ("runs/a", False), ("/tmp/gs:/x", False)],
)
def test_addresses(path, remote):
    assert files.is_remote(path) == remote


@pytest.mark.parametrize(
    ("call", "flag"),
    [
        (lambda: StudySettings(workdir="gs://bucket/a", drafter="auto", test_answers=9), "--workdir=gs://bucket/a"),
        (lambda: cli.check_output("--output", "gs://bucket/a.json"), "--output=gs://bucket/a.json"),
        (lambda: files.writable_directory("gs://bucket/x"), "gs://bucket/x"),
    ],
)
def test_other_files_are_written_to_this_machine_only(call, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == f"{flag}: {files.LOCAL}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "address", ["s3://bucket/run", "memory://run", "gs://bucket", "gs://", "gs:///run", "gs://bucket/../run"]
)
def test_a_workdir_is_here_or_a_directory_in_a_bucket(address):
    with pytest.raises(UserError, match="must be a directory of this machine, or gs://BUCKET/NAME") as caught:
        TrainSettings(workdir=address)
    assert str(caught.value).startswith(f"--workdir={address}: ")


def test_a_missing_extra_and_a_useless_flag_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--workdir=gs://b/run: needs .* pip install 'ppow_jax\[gcs\]'"):
        TrainSettings(workdir="gs://b/run")
    with pytest.raises(UserError, match="--scratch=/tmp/x: is only for a --workdir of gs://"):
        TrainSettings(workdir="runs/a", scratch="/tmp/x")


def test_compiled_programs_may_lie_in_a_bucket(monkeypatch):
    """JAX writes there itself; nothing is created here."""
    found = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.update({name: value}))
    cli.keep_compiled("gs://bucket/compiled")
    assert found["jax_compilation_cache_dir"] == "gs://bucket/compiled"


@gcs
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("gs://none/run", "there is no such bucket"),
        ("gs://closed/run", "OSError: Forbidden: {place} the caller has no storage.objects access to closed"),
    ],
)
def test_a_bucket_that_cannot_be_reached_gets_one_line(storage, address, reason):
    storage.forbidden.add("closed")
    for call in (workdir.fix_date, workdir.open_workdir):
        if call is workdir.open_workdir or "closed" in address:  # a bucket that is missing holds no run, either
            with pytest.raises(UserError) as caught:
                call(TrainSettings(workdir=address))
            words = re.escape(reason).replace(r"\{place\}", r"\S+")
            assert re.match(rf"{address}: cannot be reached \({words}", str(caught.value)), caught.value
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be reached"):
        files.write_atomic(f"{address}/a", "text")


@gcs
def test_files_of_a_bucket(storage, tmp_path):
    """Written in one piece, seen at once even by those who looked before, exchanged as directories, and copied here."""
    directory = files.open_directory(RUN)
    assert storage.names() == []  # the probe is removed
    path = directory / "costs.json"
    assert not path.exists()
    storage.objects[BUCKET]["runs/a/costs.json"] = b"by another process", 1
    assert path.read_text() == "by another process"
    files.write_atomic(path, "ü")
    assert storage.content("runs/a/costs.json") == "ü".encode()

    def write(names):
        def into(new):
            new.mkdir()
            for name in names:
                (new / name).write_text(name)

        return into

    changes = []
    storage.before = lambda method, name: changes.append((method, os.path.basename(name)))
    files.replace_directory(directory / "drafter", write(["config.json", "old"]))
    files.replace_directory(directory / "drafter", write(["config.json", "model"]))
    storage.before = lambda method, name: None
    assert changes == [
        *(("PUT", "old"), ("PUT", "config.json")),
        *(("DELETE", "config.json"), ("DELETE", "old"), ("PUT", "model"), ("PUT", "config.json")),
    ]
    with files.on_this_machine(directory / "drafter") as copy:
        assert {file.name: file.read_text() for file in copy.iterdir()} == {n: n for n in ("config.json", "model")}
    assert not copy.exists()
    files.clear_left_over(directory)


@gcs
def test_metrics_in_a_bucket(storage, tmp_path):
    """The object has the rows up to the last `sync`; a run that was killed later resumes with these."""
    lost = MetricsWriter(RUN, scratch=tmp_path)
    for step, row in ROWS[:2]:
        lost.write(step, "ppow", row)
    lost.sync()
    lost.write(*ROWS[2][:1], "ppow", ROWS[2][1])
    assert len(read_metrics(f"{RUN}/metrics.jsonl")) == 2
    with MetricsWriter(RUN, scratch=tmp_path) as metrics:  # the kill: no close
        assert [row["step"] for row in metrics.resume("ppow", 1)] == [1]
        for step, row in ROWS[1:]:
            metrics.write(step, "ppow", row)
    assert [(row["step"], {"loss": row["loss"]}) for row in read_metrics(f"{RUN}/metrics.jsonl")] == ROWS
    assert [row["step"] for row in NoMetrics(RUN).resume("ppow", 2)] == [1, 2]
    lost._file.close()


@gcs
def test_attempts_in_a_bucket(storage):
    """One line per attempt, however many heartbeats."""
    path = files.at(RUN) / "attempts.jsonl"
    for attempt in range(2):
        clock = Clock(path)
        for _ in range(3):
            clock.add("step", 1.0)
            clock.beat(now=True)
        assert len(path.read_text().splitlines()) == attempt + 1 == len(read_attempts(path))
        clock._attempt += "x"
    assert [attempt["start"]["step"] for attempt in read_attempts(path)] == [3.0, 3.0]


@gcs
def test_the_workdir_and_its_scratch_directory(storage, tmp_path, monkeypatch):
    settings = TrainSettings(workdir=RUN, scratch=str(tmp_path / "scratch"))
    assert workdir.scratch_of(settings) == tmp_path / "scratch" / BUCKET / "runs" / "a" / "process-0"
    assert workdir.scratch_of(TrainSettings(workdir=str(tmp_path))) is None
    with workdir.hold_workdir(settings) as held, pytest.raises(UserError, match="another command is running there"):
        assert str(held) == RUN
        with workdir.hold_workdir(settings):
            pass
    flags.write_flagfile(held / "flags.txt", workdir.fix_date(settings))
    assert flags.read_flagfile(TrainSettings, f"{RUN}/flags.txt").workdir == RUN
    with pytest.raises(UserError, match=r"holds a run with --seed=0 \(now 1\)"):
        workdir.open_workdir(TrainSettings(workdir=RUN, seed=1))
    storage.objects[BUCKET]["runs/other/file"] = b"", 1
    with pytest.raises(UserError, match="is not empty and holds no run"):
        workdir.open_workdir(TrainSettings(workdir=f"gs://{BUCKET}/runs/other"))


@gcs
def test_only_finished_checkpoints_count(storage):
    """Orbax gives a folder its last file, commit_success.txt, when all others are there."""
    storage.objects[BUCKET]["runs/a/supervised/best/1/state/x"] = b"", 1
    assert not workdir.has_best(files.at(RUN), "supervised")
    storage.objects[BUCKET]["runs/a/supervised/best/1/commit_success.txt"] = b"", 1
    assert workdir.has_best(files.at(RUN), "supervised") and not workdir.has_best(files.at(RUN), "ppow")


@gcs
def test_the_first_drafter_of_a_run_in_a_bucket(storage, tmp_path):
    """It is copied there, and read from there when the run resumes, whatever became of the original."""
    shutil.copytree(small_run.whole() / "drafter", tmp_path / "given")
    settings = small_run.settings(RUN, drafter=tmp_path / "given")
    target = targets.load("tiny", "float32")
    given = start.find_start(settings, files.at(RUN), target)
    start.keep_start(given, files.at(RUN))
    shutil.rmtree(tmp_path / "given")
    kept = start.find_start(settings, files.at(RUN), target)
    assert kept.config == given.config
    jax.tree.map(np.testing.assert_array_equal, kept.params, given.params)
    storage.objects[BUCKET].pop("runs/a/drafter_start/config.json")  # a kill before the last object
    with pytest.raises(UserError, match="--drafter=.*given: there is no such directory"):
        start.find_start(settings, files.at(RUN), target)


@gcs
def test_answers_of_a_run_in_a_bucket(storage):
    prompt, answer = np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)
    example = Example(np.concatenate([prompt, answer]), np.arange(8) >= 5, "x")
    write_pack(f"{RUN}/answers.npz", [example], {"target": "t"})
    np.testing.assert_array_equal(read_packs([f"{RUN}/answers.npz"], {"target": "t"})[prompt_key(prompt)], answer)
    with pytest.raises(UserError, match=f"--answers_from={RUN}/none.npz: cannot be read"):
        read_packs([f"{RUN}/none.npz"], {"target": "t"})


@pytest.fixture
def train(tmp_path):
    """A function that runs `experiments.train` in processes of their own -> (exit codes, logs).

    scratch: number of the scratch directory. death: the object before whose change the first process is killed.
    """
    with storage_stand_in.serving() as (storage, environment):
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(small_run.cache()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(small_run.ROOT),
        }

        def train(scratch, death=None, processes=1, **changes):
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                together = {"coordinator": f"localhost:{probe.getsockname()[1]}", "num_processes": processes}
            command = [sys.executable, "-m", "experiments.train"]
            command += small_run.arguments(RUN, scratch=tmp_path / f"scratch{scratch}", **changes)
            logs, running = [tmp_path / f"log{i}" for i in range(processes)], []
            for i, path in enumerate(logs):
                mine = together | {"process_id": i} if processes > 1 else {}
                argv = [*command, *(f"--{name}={value}" for name, value in mine.items())]
                with open(path, "w") as log:
                    running.append(subprocess.Popen(argv, env=environment, cwd=tmp_path, stdout=log, stderr=log))

            def before(_, name):
                if name == death:
                    os.kill(running[0].pid, signal.SIGKILL)
                    raise ConnectionError

            storage.before = before
            codes = [process.wait(1200) for process in running]
            texts = [path.read_text() for path in logs]
            print(*texts)  # pytest shows it where a test fails
            for path in logs:
                path.unlink()
            return codes, texts

        train.storage = storage
        yield train
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]


@gcs
@pytest.mark.full
def test_a_run_in_a_bucket_that_is_killed_ends_like_one_on_this_machine(train, tmp_path):
    """Killed as answers are written, and as the last file of a checkpoint is; resumed on other machines, whose scratch
    directories are empty: answers, checkpoints, metrics and drafters are those of an undisturbed run, bit for bit.
    """
    codes, _ = train(0, "runs/a/answers/chunk-00001.json")
    assert codes == [-signal.SIGKILL]
    codes, _ = train(1, "runs/a/supervised/checkpoints/12/commit_success.txt")
    assert codes == [-signal.SIGKILL]
    assert "runs/a/supervised/checkpoints/12/commit_success.txt" not in train.storage.names()
    codes, logs = train(2)
    assert codes == [0] and "supervised: resuming after step 8 of 24" in logs[0]
    train.storage.copy_to(tmp_path / "run", "runs/a")
    for part in ("features", "features_held_out"):  # these are not kept in the bucket
        assert not (tmp_path / "run" / part).exists()
        os.rename(tmp_path / "scratch2" / BUCKET / "runs" / "a" / "process-0" / part, tmp_path / "run" / part)
    small_run.assert_same_results(tmp_path / "run", small_run.whole())


@gcs
@pytest.mark.slow
def test_two_processes_share_nothing_but_the_bucket(train, tmp_path):
    """One is killed, which ends the other, and the second loses its disk; they resume, and end like one process."""
    stages = {"stages": "data,supervised"}
    codes, _ = train(0, "runs/a/supervised/checkpoints/12/commit_success.txt", processes=2, **stages)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, None)
    disks = tmp_path / "scratch0" / BUCKET / "runs" / "a"
    stored = [(disks / f"process-{i}" / "features" / "features.bin").read_bytes() for i in range(2)]
    assert stored[0] == stored[1] and any(stored[0])
    shutil.rmtree(disks / "process-1")
    codes, logs = train(0, processes=2, **stages)
    assert codes == [0, 0] and "supervised: resuming after step 8 of 24" in logs[0] and "resuming" not in logs[1]
    assert (disks / "process-1" / "features" / "features.bin").read_bytes() == stored[0]
    train.storage.copy_to(tmp_path / "run", "runs/a")
    ours, theirs = ([row for row in small_run.metrics_of(d)] for d in (tmp_path / "run", small_run.whole()))
    theirs = [row for row in theirs if row["stage"].startswith("supervised")]
    assert [(row["stage"], row["step"]) for row in ours] == [(row["stage"], row["step"]) for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        for name in set(row) - {"stage", *VOLATILE}:
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
