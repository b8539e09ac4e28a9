"""Tokens that the target has no embedding for: one line in every program, before anything is computed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import models
from small_configs import NARROW_TINY as TARGET

from experiments import evaluate, generate, train
from ppow_jax import cli
from ppow_jax.data.encoding import tiny_tokenizer
from ppow_jax.data.known_ids import require_known
from ppow_jax.errors import UserError
from ppow_jax.evaluation import self_check
from ppow_jax.inference import decoding
from ppow_jax.inference.model import Model
from ppow_jax.models import transformer
from ppow_jax.speculation.settings import chain
from ppow_jax.training import initialise
from ppow_jax.weights import huggingface, targets
from ppow_jax.weights.drafters import export_drafter

SAID = "token id 259 ('<extra>') is outside the target's embedding of 259 rows"


def test_ids_within_and_beyond():
    require_known([0, 258], 259, "x")
    require_known([], 259, "x")
    for ids, first in (([1, 259], 259), ([-1], -1), (np.array([[300]]).ravel(), 300)):
        with pytest.raises(UserError, match=f"x: token id {first} is outside the target's embedding of 259 rows"):
            require_known(ids, 259, "x")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A target whose tokenizer got a token that its weights did not."""
    path, tokenizer = tmp_path_factory.mktemp("target"), tiny_tokenizer()
    huggingface.save_target(path, TARGET, transformer.init(jax.random.key(0), TARGET))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def nothing_computed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was computed")

    monkeypatch.setattr(decoding.batch.generate, "prefill", refuse)


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def fails(module, settings, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as left:
        cli.run(module.main, settings, argv=[str(x) for x in argv])
    assert left.value.code == 2
    err = capsys.readouterr().err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and SAID in said
    return said


def test_the_target_warns_when_it_is_loaded(directory, caplog):
    target = targets.load(str(directory), "float32")
    assert "the tokenizer has 260 tokens, the embedding 259 rows" in caplog.text and "'<extra>'" in caplog.text
    assert target.tokenizer("say <extra>")["input_ids"][-1] == 259


@pytest.mark.parametrize("raw", [True, False])
def test_generate(directory, capsys, nothing_computed, raw):
    flags = (f"--target={directory}", "--drafter=none", "--prompt=say <extra> now", f"--raw={str(raw).lower()}")
    assert fails(generate, generate.Settings, capsys, *flags).startswith("error: prompt: ")


def test_evaluate_looks_at_every_benchmark_first(directory, tmp_path, capsys, nothing_computed):
    good = lines(tmp_path / "good.jsonl", {"prompt": "hello"})
    bad = lines(tmp_path / "bad.jsonl", {"prompt": "hello"}, {"messages": _turns("hi", "yes", "say <extra>")})
    config = initialise.drafter_config(TARGET, 30)
    export_drafter(tmp_path / "head", config, models.drafter_params(config), np.arange(30))
    flags = (f"--target={directory}", f"--drafter={tmp_path / 'head'}", f"--benchmarks={good},{bad}")
    assert "bad.jsonl:2" in fails(evaluate, evaluate.Settings, capsys, *flags)


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("flag", ["data", "recorded", "benchmarks"])
def test_train(directory, tmp_path, capsys, nothing_computed, flag):
    records = [{"messages": _turns(f"hello {i}", "well <extra>")} for i in range(9)]
    if flag != "recorded":
        records = [{"prompt": f"say <extra> {i}"} for i in range(9)]
    path = lines(tmp_path / "chats.jsonl", *records)
    flags = {"target": directory, "workdir": tmp_path / "w", flag: path, "max_prompt_tokens": 80, "answer_tokens": 8}
    flags |= {"stages": "data,supervised,evaluate"}
    flags = {"num_answers": 8, "held_out": 1, "row_length": 96, "feature_layers": "0,1,2"} | flags
    tiny = Path(__file__).parents[1] / "experiments" / "configs" / "tiny.flags"
    argv = (f"--flagfile={tiny}", *(f"--{name}={value}" for name, value in flags.items()))
    assert "chats.jsonl:" in fails(train, train.TrainSettings, capsys, *argv)
    assert not list(tmp_path.glob("w/answers/chunk-*"))


def test_the_library_and_the_self_check(directory, nothing_computed):
    target = targets.load(str(directory), "float32")
    with pytest.raises(UserError, match="prompt 1: .*token id 259"):
        Model(target).generate(["hello", "<extra>"])
    with pytest.raises(UserError, match="token id 259"):
        Model(target).chat("<extra>")
    with pytest.raises(UserError, match="prompt 0: token id 300"):
        decoding.decode(target, None, [np.array([1, 300])], decoding.Decoding(chain(2)))
    target.tokenizer.chat_template = "<extra>" + target.tokenizer.chat_template  # a template of another model
    with pytest.raises(UserError, match="token id 259"):
        self_check.self_check(target, None)
