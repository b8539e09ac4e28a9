"""`experiments.convert inspect` of targets in every form, and of the folder of a training run."""

import json
from pathlib import Path

import pytest
from gguf_files import write

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.study import summary
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import targets


def lines(text: str) -> list[list[str]]:
    return [line.split(maxsplit=1) for line in text.splitlines()]


def test_a_gguf_file(tmp_path, monkeypatch):
    path = write(tmp_path / "small.gguf")
    found = summary.text(str(path))
    assert ["kind", "target, LlamaForCausalLM"] in lines(found)
    assert "GGUF, small.gguf (" in found and "tensors F32" in found and "128 positions" in found
    monkeypatch.setitem(targets.EMBEDDED, "small", "small.gguf")
    monkeypatch.setattr(targets, "embedded_file", lambda name: path)
    assert summary.text("small") == found  # by its name


def test_a_training_run(tmp_path):
    settings = TrainSettings(workdir=str(tmp_path), target="tiny", ppow_steps=8, supervised_steps=4)
    flags.write_flagfile(tmp_path / "flags.txt", settings)
    rows = [{"stage": "supervised", "step": 4, "loss": 2.5}, {"stage": "ppow", "step": 5, "loss": 1.25}]
    text = "\n".join(map(json.dumps, [*rows, {"stage": "ppow_held_out", "step": 5}]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"stage": "pp')
    (tmp_path / "report.json").write_text(json.dumps({"headline": "ppow is faster."}))
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "config.json").write_text("{}")
    found = summary.text(str(tmp_path))
    assert lines(found)[0] == ["kind", "training run, target tiny"]
    for part in (
        "--supervised_steps=4",
        "--ppow_steps=8",
        "supervised: step 4 of 4, loss 2.500",
        "ppow: step 5 of 8, loss 1.250",
        "ppow is faster.",
        f"{tmp_path / 'drafter'} (",
    ):
        assert part in found
    assert "--window" not in found  # a default


@pytest.mark.parametrize("name", ["nowhere", "owner/model"])
def test_other_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: there is no such directory or file.*smollm2-135m"):
        summary.text(name)
    Path("file").write_text("x")
    with pytest.raises(UserError, match="^file: is a file, and no GGUF file"):
        summary.text("file")
