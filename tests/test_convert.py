"""`experiments.convert` as its users meet it: its three commands, their help, their mistakes, their exit codes."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small_world as world
from golden import models
from safetensors.numpy import load_file, save_file

from experiments import convert
from ppow_jax import cli
from ppow_jax.evaluation import self_check
from ppow_jax.inference import decoding
from ppow_jax.models import transformer
from ppow_jax.models.families import Experts
from ppow_jax.training import initialise
from ppow_jax.weights import huggingface, targets
from ppow_jax.weights.drafters import export_drafter, import_drafter

SHIPPED = Path(__file__).parents[1] / "drafters" / "smollm2-135m"


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.run_command(convert.COMMANDS, [str(x) for x in argv])
    return left.value.code or 0


@functools.cache
def target() -> targets.Target:
    return targets.Target("small", world.CONFIG, world.target_params(), None)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A drafter for `target()`, of random weights."""
    config = initialise.drafter_config(world.CONFIG, 20, world.FEATURE_LAYERS)
    params = models.drafter_params(config)
    export_drafter(tmp_path / "drafter", config, params, np.arange(20), dtype="float32", target_name="small")
    return tmp_path / "drafter"


def write_trained(directory: Path, **changes) -> Path:
    """A drafter that was trained for `target()`, described as it is but for the changes."""
    made = world.trained()
    config, ids_W = dataclasses.replace(made.config, **changes), np.asarray(made.target_ids_W)
    export_drafter(directory, config, made.params, ids_W, dtype="float32", target_name="small")
    return directory


@pytest.fixture
def small(monkeypatch):
    """`--target=small` is `target()`, and its prompts are those that it knows."""
    prompts = [example.tokens[~example.answer_mask] for example in world.examples()[:4]]
    numbers = iter(range(1 << 20))
    monkeypatch.setattr(targets, "load", lambda name, dtype="float32": target())
    monkeypatch.setattr(self_check, "encode_prompt", lambda *_: prompts[next(numbers) % 4])


VERIFY = ("verify", "--target=small", "--max_new_tokens=20", "--window=3")


# What the commands say.


def test_inspect_a_drafter(capsys):
    assert run("inspect", SHIPPED) == 0
    said = capsys.readouterr().out
    for line in (
        "kind             EAGLE-3 drafter",
        "flat, names midlayer.*, model.safetensors (24.5 MB)",
        "target           HuggingFaceTB/SmolLM2-135M-Instruct",
        "12.17 million (bfloat16)",
        "inputs of layers 2, 15, 27 = outputs of layers 1, 14, 26",
        "12288 of 49152 tokens",
    ):
        assert line in said


def test_inspect_a_target(tmp_path, capsys):
    config = models.TARGETS["tied"]
    huggingface.save_target(tmp_path, config, transformer.init(jax.random.key(0), config))
    assert run("inspect", tmp_path) == 0
    said = capsys.readouterr().out
    assert "target, LlamaForCausalLM" in said and "40, the embedding is the head" in said
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.norm.weight": np.ones(23, np.float32)}, tmp_path / "model.safetensors")
    assert run("inspect", tmp_path) == 2
    assert "model.norm.weight: has shape [23], the config requires [24]" in capsys.readouterr().err


def test_inspect_a_mixture_of_experts(tmp_path, capsys):
    experts = Experts(number=4, per_token=2, intermediate_size=10, normalize=True, layers=(1, 2))
    config = dataclasses.replace(
        models.TARGETS["untied"], architecture="Qwen3MoeForCausalLM", qk_norm=True, experts=experts
    )
    huggingface.save_target(tmp_path, config, transformer.init(jax.random.key(0), config))
    assert run("inspect", tmp_path) == 0
    said = capsys.readouterr().out
    assert "2 of 4 for each token, 10 wide each, in 2 layers" in said and "queries and keys normed" in said


def test_inspect_shows_what_the_files_leave_open(directory, capsys):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if "eagle" not in k}))
    assert run("inspect", directory) == 0
    assert "not in the files: 2, N//2, N-3 of the target's N layers" in capsys.readouterr().out


def test_there_and_back(tmp_path, directory, capsys):
    shutil.copy(SHIPPED / "README.md", directory)
    there, back = tmp_path / "there", tmp_path / "back"
    assert run("convert", "--format=speculators", f"--output={there}", directory) == 0
    assert run("convert", there, "--format=flat", "--output", back) == 0
    assert (back / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert (back / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert import_drafter(there).format == "speculators"
    card = (there / "README.md").read_text()
    assert "| mt_bench" in card and "make" in card  # the figures, and how it was made
    assert "The files have the speculators layout" in card and "sglang" not in card
    assert "Converted to the speculators format" in card
    assert "The files have the flat EAGLE-3 layout" in (back / "README.md").read_text()
    assert run("convert", "--format=flat", f"--output={back}", there) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_the_base_model_goes_with_the_files(tmp_path, directory):
    assert run("convert", "--format=speculators", f"--output={tmp_path / 'a'}", SHIPPED) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    verifier = {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier
    assert config["transformer_layer_config"]["rms_norm_eps"] == 1e-5
    there = tmp_path / "b"
    assert run("convert", "--format=flat", "--base_model=me/small", f"--output={there}", directory) == 0
    assert json.loads((there / "config.json").read_text())["target_name_or_path"] == "me/small"


def test_a_base_model_that_is_no_hub_name_is_refused(tmp_path, directory, capsys):
    assert run("convert", "--format=flat", "--base_model=small", f"--output={tmp_path / 'c'}", directory) == 2
    assert "--base_model=small: must be OWNER/NAME" in capsys.readouterr().err


def test_another_type_of_weights(tmp_path, directory):
    assert run("convert", "--format=flat", "--dtype=float16", f"--output={tmp_path / 'half'}", directory) == 0
    stored = import_drafter(tmp_path / "half")
    assert {value.dtype for value in stored.params.values()} == {np.dtype(np.float16)}


def test_a_copy_of_the_targets_embedding_is_left_out_beside_the_target(tmp_path, directory, small):
    tensors = load_file(directory / "model.safetensors")
    copy = {"embed_tokens.weight": np.asarray(target().params["embed"], np.float32)}
    save_file(tensors | copy, directory / "model.safetensors")
    assert run("convert", "--format=flat", f"--output={tmp_path / 'kept'}", directory) == 0
    assert run("convert", "--format=flat", "--target=small", f"--output={tmp_path / 'left'}", directory) == 0
    assert load_file(tmp_path / "kept" / "model.safetensors").keys() - tensors.keys() == copy.keys()
    assert load_file(tmp_path / "left" / "model.safetensors").keys() == tensors.keys()


# The self-check.


@pytest.mark.full
def test_verify_a_drafter_that_helps(tmp_path, small, capsys):
    assert run(*VERIFY, write_trained(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "4 of 4 answers are those of plain decoding" in said and "refused" not in said
    others = [line for line in said.splitlines() if line.startswith("otherwise")]
    tau = float(said.split(" tokens per verification")[0].split()[-1])
    for line in others:
        other = float(line.split("tau would be ")[1].split()[0])
        assert ("within noise" in line) == (max(tau, other) / min(tau, other) < self_check.CLEARLY) or other == tau


@pytest.mark.full
def test_verify_finds_a_drafter_that_is_read_in_another_way_than_it_was_trained(tmp_path, small, capsys, monkeypatch):
    tau = self_check.self_check(target(), world.trained(), window=3, max_new_tokens=20).tau
    monkeypatch.setattr(self_check, "LEAST_TAU", tau - 0.01)  # the difference is small on a target as small as this
    monkeypatch.setattr(self_check, "CLEARLY", 1.0)
    assert run(*VERIFY, write_trained(tmp_path, norm_before_residual=True)) == 1
    said = capsys.readouterr().out
    assert "refused: tau is below" in said
    assert f"with norm_before_residual = false tau is {tau:.2f}: that is how it was trained" in said


def test_layers_off_by_one_are_tried():
    config = dataclasses.replace(world.drafter().config, feature_layers=(1, 2, 3))
    shifted = self_check._shifted(config, 4)
    assert [x.feature_layers for x in shifted.values()] == [(2, 3, 4), (0, 1, 2)]
    assert list(shifted)[0] == "target layers one higher, inputs of 2, 3, 4,"
    assert len(self_check._shifted(config, 3)) == 1  # there is no layer above the highest


def test_every_reading_of_the_layers_is_tried():
    config = dataclasses.replace(world.drafter().config, feature_layers=(3, 5, 20))
    readings = self_check._readings(config, 30)
    wanted = [(4, 6, 21), (2, 4, 19), (2, 15, 27), (1, 14, 26)]
    assert [x.feature_layers for x in readings.values()] == wanted
    assert list(readings)[2:] == [
        "the usual target layers, inputs of 2, 15, 27,",
        "the usual target layers, one lower, inputs of 1, 14, 26,",
    ]
    usual = dataclasses.replace(config, feature_layers=(2, 15, 27))
    assert [x.feature_layers for x in self_check._readings(usual, 30).values()] == [(3, 16, 28), (1, 14, 26)]


def test_the_best_reading_is_found_by_its_tau(monkeypatch):
    """All of them are compared, though another one is better already."""
    accepted = {(3, 5, 6): 1, (4, 6, 7): 6, (2, 4, 5): 2, (2, 3, 4): 8, (1, 2, 3): 3}  # of 10 tokens, per reading
    config = dataclasses.replace(world.drafter().config, feature_layers=(3, 5, 6))
    deep = dataclasses.replace(target(), config=dataclasses.replace(world.CONFIG, num_layers=7))

    def decode(target_, drafter, prompts, how, ids):
        n = 0 if drafter is None else accepted[drafter.config.feature_layers]
        counts = np.array([[10 - n, n, 0, 0, 0]] * len(prompts))
        answer = np.asarray(world.drafter().target_ids_W)  # all of it in the draft vocabulary
        return decoding.Decoded([answer] * len(prompts), counts, 40, 1.0, 1.0, np.zeros(2), np.zeros(2))

    monkeypatch.setattr(self_check.decoding, "decode", decode)
    monkeypatch.setattr(self_check, "encode_prompt", lambda *_: np.arange(3))
    check = self_check.self_check(deep, world.drafter().replace(config=config))
    assert check.tau == pytest.approx(1.1) and not check.passed
    assert sorted(round(tau, 2) for tau in check.otherwise.values()) == [1.2, 1.3, 1.6, 1.8]
    first, *others = check.advice().splitlines()
    assert first == "  - with the usual target layers, inputs of 2, 3, 4, tau is 1.80: that is how it was trained"
    assert len(others) == 3 and "higher, inputs of 4, 6, 7, tau is 1.60, which is better too" in others[0]


def test_a_drafter_that_uses_its_targets_head(tmp_path, small, capsys):
    """inspect says so, convert needs the target for it, and then writes the head."""
    config = initialise.drafter_config(world.CONFIG, 61, world.FEATURE_LAYERS)
    export_drafter(tmp_path / "d", config, models.drafter_params(config), np.arange(61), dtype="float32")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, tmp_path / "d" / "model.safetensors")
    assert run("inspect", tmp_path / "d") == 0 and "head of the target" in capsys.readouterr().out
    argv = ("convert", "--format=speculators", f"--output={tmp_path / 'out'}", tmp_path / "d")
    assert run(*argv) == 2
    assert "has no head of its own: name the target whose head it uses, --target" in capsys.readouterr().err
    assert run(*argv, "--target=small") == 0
    head = transformer.head(target().params)
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)


def test_what_a_check_makes_of_its_figures():
    check = self_check.SelfCheck(1.5, 10, 40, 4, 4, 0.9, {"layers one lower": 1.53, "layers one higher": 1.2})
    assert check.passed and not check.better
    check = dataclasses.replace(check, otherwise={"layers one lower": 1.8})
    assert check.helps and not check.passed
    assert check.advice() == "  - with layers one lower tau is 1.80: that is how it was trained"
    check = dataclasses.replace(check, tau=1.01, otherwise={"layers one lower": 1.03})
    assert not check.helps and not check.better and "off by one" in check.advice()


def test_verify_finds_a_wrong_vocabulary(tmp_path, small, capsys):
    """d2t names tokens that the target hardly writes."""
    made, written = world.trained(), np.concatenate([x.tokens[x.answer_mask] for x in world.examples()])
    rare = np.sort(np.argsort(np.bincount(written, minlength=61), kind="stable")[:20])
    export_drafter(tmp_path, made.config, made.params, rare, dtype="float32")
    assert run(*VERIFY, tmp_path) == 1
    said = capsys.readouterr().out
    assert "refused: tau is below 1.05" in said and "of the tokens that the target writes: a wrong d2t" in said


def test_verify_refuses_what_does_not_fit(tmp_path, small, capsys):
    assert run("verify", "--target=small", SHIPPED) == 2
    said = capsys.readouterr().err
    assert "must be three ascending ids of 0..3 (the target has 3 layers)" in said and "--drafter" not in said


# Help and mistakes.


def test_help(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "usage: python -m experiments.convert COMMAND" in said
    for word in convert.COMMANDS:
        assert f"\n  {word}" in said
        assert run(word, "--help") == 0
        said_of_word = capsys.readouterr().out
        what = "NAME" if word == "fetch" else "DIRECTORY"
        assert f"usage: python -m experiments.convert {word} {what} [--name=value ...]" in said_of_word
        assert said_of_word.startswith(convert.COMMANDS[word][0].__doc__.splitlines()[0])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "no command (the first argument must be one of inspect, verify, convert"),
        (("inspct", "x"), "'inspct': unknown command; did you mean inspect?"),
        (("--target=x",), "'--target=x': unknown command"),
        (("inspect",), "DIRECTORY: must be named"),
        (("inspect", "no/such"), "no/such: there is no such directory"),
        (("inspect", "docs", "more"), "'more': unexpected argument"),
        (("inspect", "docs", "--traget=x"), "--traget: unknown flag"),
        (("inspect", "docs"), "docs/config.json: cannot be read"),
        (("verify", str(SHIPPED)), "--target: must be named"),
        (("verify", "--taget=x", str(SHIPPED)), "--taget: unknown flag; did you mean --target?"),
        (("verify", "--target=nothing", str(SHIPPED)), "--target=nothing: neither a file"),
        (("convert", str(SHIPPED), "--output=o"), "--format: must be named, flat or speculators"),
        (("convert", str(SHIPPED), "--format=flet", "--output=o"), "did you mean flat?"),
        (("convert", str(SHIPPED), "--format=flat"), "--output: must be named"),
        (("convert", str(SHIPPED), "--format=flat", f"--output={SHIPPED}"), "must be another directory"),
    ],
)
def test_mistakes(argv, said, capsys, monkeypatch):
    monkeypatch.chdir(SHIPPED.parents[1])
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and "Traceback" not in err
