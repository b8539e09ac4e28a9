"""Addresses of object stores: refused where files are written, passed on to JAX for compiled programs."""

import jax
import pytest

from ppow_jax import cli, files
from ppow_jax.errors import UserError
from ppow_jax.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("path", "remote"),
    [("gs://bucket/run", True), ("s3://b", True), ("memory://x", True), ("runs/a", False), ("/tmp/gs:/x", False)],
)
def test_addresses(path, remote):
    assert files.is_remote(path) == remote


@pytest.mark.parametrize(
    ("call", "flag"),
    [
        (lambda: TrainSettings(workdir="gs://bucket/run"), "--workdir=gs://bucket/run"),
        (lambda: cli.check_output("--output", "gs://bucket/a.json"), "--output=gs://bucket/a.json"),
        (lambda: files.writable_directory("gs://bucket/x"), "gs://bucket/x"),
    ],
)
def test_files_are_written_to_this_machine_only(call, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == f"{flag}: {files.LOCAL}"
    assert not list(tmp_path.iterdir())


def test_compiled_programs_may_lie_in_a_bucket(monkeypatch):
    """JAX writes there itself; nothing is created here."""
    found = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.update({name: value}))
    cli.keep_compiled("gs://bucket/compiled")
    assert found["jax_compilation_cache_dir"] == "gs://bucket/compiled"
