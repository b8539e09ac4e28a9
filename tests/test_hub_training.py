"""`experiments.train --push_to_hub`: refused before training begins, uploaded after the export, never a lost run."""

import shlex
import shutil
import sys

import hub_stand_in
import pytest
import small_run

from experiments import convert, train
from ppow_jax import cli
from ppow_jax.training.settings import TrainSettings

NAME = "me/small-eagle3"
PUSH = f"--push_to_hub={NAME}"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of huggingface_hub's own


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in.in_place(monkeypatch, tmp_path) as hub:
        yield hub


def ended(capsys, run) -> tuple[int, str, list[str]]:
    """(exit code, standard output, the error lines)."""
    with pytest.raises(SystemExit) as left:
        run()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, [line for line in err.splitlines() if line.startswith("error: ")]


def test_what_cannot_be_uploaded_is_refused_before_the_run_begins(hub, monkeypatch, tmp_path, capsys):
    workdir = tmp_path / "run"

    def refused(*flags: str) -> str:
        argv = [*small_run.arguments(workdir), *flags]
        code, _, errors = ended(capsys, lambda: cli.run(train.main, TrainSettings, argv=argv))
        assert code == 2 and len(errors) == 1 and not workdir.exists() and hub.requests == []
        return errors[0]

    assert refused(PUSH).startswith(f"error: {PUSH}: there is no token for the hub; make one that may write at ")
    monkeypatch.setenv("HF_TOKEN", "writer")
    assert refused("--push_to_hub=small").startswith("error: --push_to_hub=small: must be OWNER/NAME")
    stages = "--stages=data,supervised"
    rule = f"error: {PUSH}: needs the stage export, but {stages} does not have it"
    assert refused(PUSH, stages) == rule
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refused(PUSH) == f"error: {PUSH}: needs the package huggingface_hub: pip install huggingface_hub"


@pytest.mark.full
def test_the_drafter_is_uploaded_and_a_failure_loses_nothing(hub, monkeypatch, tmp_path, capsys):
    workdir = tmp_path / "a run"
    shutil.copytree(small_run.whole(), workdir)
    shutil.rmtree(workdir / "drafter")
    monkeypatch.setenv("HF_TOKEN", "writer")
    argv = [*small_run.arguments(workdir), "--stages=export", PUSH]
    hub.status = 418
    code, _, errors = ended(capsys, lambda: cli.run(train.main, TrainSettings, argv=argv))
    again = f"python -m experiments.convert push {PUSH} {shlex.quote(str(workdir / 'drafter'))}"
    reason = f"error: {PUSH}: the hub refused (418): out of order; the run is complete, and its drafter kept"
    assert (code, errors) == (2, [f"{reason}; to upload it: {again}"])
    files = {path.name: path.read_bytes() for path in (workdir / "drafter").iterdir()}
    assert files["model.safetensors"] == (small_run.whole() / "drafter" / "model.safetensors").read_bytes()
    assert hub.models == {}

    hub.status = None
    code, out, errors = ended(capsys, lambda: cli.run(train.main, TrainSettings, argv=argv))
    assert (code, errors) == (0, []) and f"{hub.url}/{NAME}: uploaded from {workdir / 'drafter'}" in out
    assert hub.models[NAME] == files
    assert b"license: apache-2.0" in files["README.md"] and b"- eagle3" in files["README.md"]

    hub.models.clear()
    command = shlex.split(again)[3:]  # what the error told to run
    code, _, errors = ended(capsys, lambda: cli.run_command(convert.COMMANDS, command))
    assert (code, errors) == (0, []) and hub.models[NAME]["model.safetensors"] == files["model.safetensors"]
