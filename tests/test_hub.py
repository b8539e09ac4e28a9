"""Drafters to and from a local stand-in of the hub, with `experiments.convert push`, `fetch` and `convert`."""

import json
import shutil
import time
from pathlib import Path

import hub_stand_in
import huggingface_hub
import pytest
import yaml
from eagle3_files import make_drafter
from huggingface_hub.utils import close_session

from experiments import convert
from ppow_jax import cli
from ppow_jax.weights import card
from ppow_jax.weights.drafters import import_drafter

NAME = "me/small-eagle3"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of huggingface_hub's own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Path(make_drafter(tmp_path_factory.mktemp("made") / "small"))


@pytest.fixture
def drafter(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "drafter"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in.in_place(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def run(capsys):
    """Runs `experiments.convert` -> (exit code, standard output, last line of standard error)."""

    def call(*argv):
        begin = time.monotonic()
        with pytest.raises(SystemExit) as left:
            cli.run_command(convert.COMMANDS, [str(x) for x in argv])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if left.value.code:
            assert len(errors) == 1, err
            assert time.monotonic() - begin < 15  # no half a minute of repeated requests
        return left.value.code or 0, out, (errors or [""])[0]

    return call


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_there_and_back(run, hub, drafter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "writer")
    figures = tmp_path / "result.json"
    row = {"benchmark": "gsm8k", "mode": "chain", "window": 4, "tau": 2.5, "speedup": 1.75, "temperature": 0.0}
    figures.write_text(json.dumps({"schema": 1, "results": [row]}))
    code, out, err = run(
        "push", f"--push_to_hub={NAME}", "--base_model=owner/target", "--license=mit", f"--figures={figures}", drafter
    )
    assert code == 0, err
    assert f"{hub.url}/{NAME}: uploaded from {drafter}" in out and "EAGLE-3 drafter" in out
    assert set(hub.models[NAME]) == {"config.json", "model.safetensors", "README.md"} and NAME not in hub.private
    assert hub.models[NAME]["model.safetensors"] == (drafter / "model.safetensors").read_bytes()
    said = hub.models[NAME]["README.md"].decode()
    assert front(said) == {
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["eagle3", "speculative-decoding", "draft-model", "vllm", "sglang"],
        "base_model": "owner/target",
    }
    assert "| gsm8k | chain | 0.0 | – | 4 | 2.50 | 1.75 |" in said and "vllm serve owner/target" in said

    monkeypatch.delenv("HF_TOKEN")
    code, out, err = run("fetch", NAME, f"--output={tmp_path / 'new' / 'fetched'}")
    assert code == 0, err
    fetched = tmp_path / "new" / "fetched"
    assert sorted(path.name for path in fetched.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in fetched.parent.iterdir()) == ["fetched"]
    assert (fetched / "model.safetensors").read_bytes() == (drafter / "model.safetensors").read_bytes()
    assert import_drafter(fetched).config == import_drafter(drafter).config
    assert "flat, names midlayer.*" in out and "warning: sglang-jax would silently misread fc_norm" in out


def test_a_converted_drafter_is_pushed(run, hub, drafter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "writer")
    code, out, err = run(
        "convert", "--format=speculators", f"--output={tmp_path / 'out'}", f"--push_to_hub={NAME}", drafter
    )
    assert code == 0, err
    assert json.loads(hub.models[NAME]["config.json"])["speculators_model_type"] == "eagle3"
    assert "speculators" in front(hub.models[NAME]["README.md"].decode())["tags"]
    code, _, err = run("push", f"--push_to_hub={NAME}", "--private", drafter)  # replaces the files of one that exists
    assert code == 0, err
    assert "speculators_model_type" not in json.loads(hub.models[NAME]["config.json"]) and NAME not in hub.private


def test_a_card_keeps_what_it_says(drafter):
    text = "---\nlicense: llama3.1\ntags:\n- mine\nlanguage: de\nbase_model: a/b\n---\n\n# Title\n\nA text.\n"
    (drafter / "README.md").write_text(text)
    card.complete(drafter, format="flat", base_model=None, license=None)
    after = (drafter / "README.md").read_text()
    found = front(after)
    assert found["license"] == "llama3.1" and found["language"] == "de" and found["base_model"] == "a/b"
    assert found["tags"] == ["mine", "eagle3", "speculative-decoding", "draft-model", "vllm", "sglang"]
    assert "# Title\n\nA text." in after
    card.complete(drafter, format="flat", base_model="c/d", license="mit")
    assert (drafter / "README.md").read_text() == after.replace("a/b", "c/d").replace("llama3.1", "mit")
    (drafter / "README.md").write_text("# No front matter\n")
    with pytest.raises(card.UserError, match="names no licence: give one, --license=apache-2.0"):
        card.complete(drafter, format="flat", base_model=None, license=None)
    (drafter / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(card.UserError, match="front matter cannot be read"):
        card.complete(drafter, format="flat", base_model=None, license="mit")


NAMES = ("small", "me/", "me/a b", "me/../x", "https://hub/me/a", "me/a--b", "-me/a")


@pytest.mark.parametrize("name", NAMES)
def test_names(name, run, drafter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "writer")
    assert run("push", f"--push_to_hub={name}", drafter)[2].startswith(f"error: --push_to_hub={name}: must be OWNER/")
    assert run("fetch", "--output=new", "--", name)[0] == 2


def test_errors_of_push(run, hub, drafter, tmp_path, monkeypatch):
    code, _, err = run("push", f"--push_to_hub={NAME}", drafter)
    assert code == 2 and err.startswith(f"error: --push_to_hub={NAME}: there is no token for the hub; make one")
    code, _, err = run("convert", "--format=flat", f"--output={tmp_path / 'out'}", f"--push_to_hub={NAME}", drafter)
    assert code == 2 and "there is no token" in err and not (tmp_path / "out").exists()
    assert hub.requests == []  # nothing was asked for

    monkeypatch.setenv("HF_TOKEN", "reader")
    code, _, err = run("push", f"--push_to_hub={NAME}", drafter)
    assert code == 2 and err.startswith(f"error: --push_to_hub={NAME}: the token has no right to write there (403)")
    monkeypatch.setenv("HF_TOKEN", "unknown")
    code, _, err = run("push", f"--push_to_hub={NAME}", drafter)
    assert code == 2 and err.startswith(f"error: --push_to_hub={NAME}: the hub does not know the token (401)")
    hub.status = 418
    code, _, err = run("push", f"--push_to_hub={NAME}", drafter)
    assert code == 2 and err == f"error: --push_to_hub={NAME}: the hub refused (418): out of order"
    assert hub.models == {}


def test_errors_of_fetch(run, hub, tmp_path, monkeypatch):
    output = tmp_path / "new" / "out"
    fetch = ("fetch", NAME, f"--output={output}")
    missing = f"error: {NAME}: the hub has no such model, or it is private and the token may not read it"
    assert run(*fetch)[2] == missing
    hub.models[NAME] = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "README.md": b"# A target"}
    assert run(*fetch)[2] == f"error: {NAME}: is no drafter: its config.json describes another kind of model"
    hub.private.add(NAME)
    assert run(*fetch)[2] == missing
    hub.private.clear()
    hub.gated.add(NAME)
    assert run(*fetch)[2].startswith(f"error: {NAME}: is gated: ask for access at ")
    hub.gated.clear()
    assert run(*fetch, "--revision=old")[2] == f"error: {NAME}: the model has no such revision"
    hub.models[NAME] = {"README.md": b"nothing"}
    assert run(*fetch)[2] == f"error: {NAME}: is no drafter: it has no config.json"
    assert not output.exists() and list(output.parent.iterdir()) == []  # no half of anything
    output.mkdir()
    assert run(*fetch)[2] == f"error: --output={output}: exists already; name another directory"


def test_offline(run, hub, drafter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "writer")
    commands = ("push", f"--push_to_hub={NAME}", drafter), ("fetch", NAME, f"--output={tmp_path / 'out'}")
    nowhere = "http://127.0.0.1:9"
    hub_stand_in.set_endpoint(monkeypatch, nowhere)
    for command in commands:
        code, _, err = run(*command)
        assert code == 2 and f": the hub {nowhere} does not answer (" in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    for command in commands:
        code, _, err = run(*command)
        assert code == 2 and "HF_HUB_OFFLINE is set: the hub is not asked for anything" in err


def test_figures_must_be_a_result_file(tmp_path):
    path = tmp_path / "x.json"
    for text in ('{"results": []}', '{"results": [{"a": 1}]}', '{"arms": []}'):
        path.write_text(text)
        with pytest.raises(card.UserError, match="must be a result file of experiments.evaluate"):
            card.read_figures(path)
