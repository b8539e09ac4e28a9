"""Mutated configs and tokenizers of targets and drafters: one line that refuses, or what the files now say.

What is loaded is compared with the files by another reading of them, kept as simple as possible here.
"""

import contextlib
import dataclasses
import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from config_mutations import edited, mutate
from golden import models
from tokenizers import Tokenizer

from ppow_jax.data.encoding import tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.models.rope import Linear, Yarn
from ppow_jax.training import initialise
from ppow_jax.weights import huggingface, targets, tiny
from ppow_jax.weights.drafters import export_drafter, import_drafter
from ppow_jax.weights.feature_layers import LAYER_IDS

FEW, MANY = range(3), range(3, 50)
TEXT = "Where are the 12 ducks?\n\tÄh – over there."
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
LLAMA = dataclasses.replace(tiny.CONFIG, **SIZES, tie_word_embeddings=False)
QWEN = dataclasses.replace(
    LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True, rope_scaling=Yarn(2.0, 1024, 1.1), sliding_window=64,
    sliding_layers=(1, 3),
)  # fmt: skip
TARGETS = {"llama": LLAMA, "qwen2": QWEN, "linear": dataclasses.replace(LLAMA, rope_scaling=Linear(2.0))}
DRAFTER = initialise.drafter_config(TARGETS["linear"], 40)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Targets with their tokenizers, and a drafter in both formats."""
    root = tmp_path_factory.mktemp("sound")
    for name, config in TARGETS.items():
        huggingface.save_target(root / name, config, transformer.init(jax.random.key(0), config))
        tiny_tokenizer().save_pretrained(root / name)
        generation = {"eos_token_id": [258], "pad_token_id": 256, "temperature": 0.6, "do_sample": True}
        (root / name / "generation_config.json").write_text(json.dumps(generation))
    for format in ("flat", "speculators"):
        params, ids = models.drafter_params(DRAFTER), np.r_[0:30, 60:70]
        export_drafter(root / format, DRAFTER, params, ids, dtype="float32", format=format)
    return root


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """A hang becomes an error; seconds of processor time."""

    def stop(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def given(config: dict, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def check_layer(config: dict, loaded: ModelConfig | DrafterConfig, defaults: dict) -> None:
    """Compares the fields that both kinds of models read with the JSON: sizes and rotary settings."""
    heads = given(config, "num_attention_heads", defaults.get("num_attention_heads"))
    assert loaded.num_heads == heads
    assert loaded.hidden_size == given(config, "hidden_size", defaults.get("hidden_size"))
    assert loaded.intermediate_size == given(config, "intermediate_size", defaults.get("intermediate_size"))
    assert loaded.vocab_size == given(config, "vocab_size", defaults.get("vocab_size"))
    assert loaded.num_kv_heads == given(config, "num_key_value_heads", defaults.get("num_key_value_heads", heads))
    assert loaded.head_dim == given(config, "head_dim", loaded.hidden_size // heads)
    assert loaded.rms_norm_eps == given(config, "rms_norm_eps", 1e-6)
    for key, plain in (("hidden_act", "silu"), ("quantization_config", None), ("partial_rotary_factor", 1)):
        assert given(config, key, plain) == plain
    entries = [x for x in (config.get("rope_scaling"), config.get("rope_parameters")) if x is not None]
    thetas = {x["rope_theta"] for x in (config, *entries) if x.get("rope_theta") is not None}
    assert {loaded.rope_theta} == (thetas or {10000.0})
    kinds = {kind for x in entries for kind in (x.get("rope_type"), x.get("type")) if kind not in (None, "default")}
    factors = {x["factor"] for x in entries if x.get("factor") is not None}
    if not kinds:
        assert loaded.rope_scaling is None and factors <= {1}
    elif kinds != {"dynamic"}:
        assert {type(loaded.rope_scaling).__name__.lower()} == {"factors" if k == "longrope" else k for k in kinds}
        assert kinds == {"longrope"} or loaded.rope_scaling.factor in factors


def check_target(directory: Path) -> None:
    target = targets.load(str(directory), "float32")
    config, loaded = huggingface.read_json(directory / "config.json"), target.config
    check_layer(config, loaded, {})
    assert [loaded.architecture] == config["architectures"]
    assert loaded.num_layers == config["num_hidden_layers"]
    assert loaded.tie_word_embeddings == given(config, "tie_word_embeddings", False)
    assert loaded.max_position_embeddings >= given(config, "max_position_embeddings", 2048)
    slides = "sliding_attention" in given(config, "layer_types", []) or given(config, "use_sliding_window", False)
    assert loaded.sliding_window == (config["sliding_window"] if loaded.sliding_layers else None)
    assert slides or not loaded.sliding_layers
    ends = given(config, "eos_token_id", [])
    assert set(ends if isinstance(ends, list) else [ends]) <= set(loaded.eos_token_ids)
    assert all(type(i) is int and 0 <= i < 259 for i in loaded.eos_token_ids)
    params = transformer.init(jax.random.key(0), TARGETS[loaded_name(loaded)])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, target.params, params)))
    check_tokenizer(directory, target.tokenizer)


def loaded_name(config: ModelConfig) -> str:
    return "qwen2" if config.qkv_bias else "llama"  # `linear` has the weights of `llama`


def check_tokenizer(directory: Path, tokenizer: Any) -> None:
    """The text's tokens are those of the library below, which reads tokenizer.json alone."""
    data = (directory / "tokenizer.json").read_text(encoding="utf-8")
    ids = Tokenizer.from_str(data).encode(TEXT, add_special_tokens=False).ids
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.eos_token_id is None or 0 <= tokenizer.eos_token_id < len(tokenizer)


def check_drafter(directory: Path) -> None:
    stored = import_drafter(directory, num_target_layers=7)
    config, loaded = huggingface.read_json(directory / "config.json"), stored.config
    layer = config.get("transformer_layer_config", config)
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    check_layer(layer, loaded, sizes if layer is not config else {})
    assert loaded.num_layers == 1 and stored.format == ("flat" if layer is config else "speculators")
    assert loaded.norm_before_residual == given(config, "norm_before_residual", layer is not config)
    assert loaded.norm_output == given(config, "norm_output", False)
    assert not given(layer, "use_sliding_window", False) or layer["sliding_window"] >= loaded.max_position_embeddings
    assert set(given(layer, "layer_types", [])) <= {"full_attention"} and layer.get("attention_chunk_size") is None
    eagle = given(config, "eagle_config", {}) if layer is config else {}
    named = [x[LAYER_IDS] for x in (config, eagle) if x.get(LAYER_IDS)]
    readings = {tuple(i + shift for i in ids) for ids in named for shift in (0, 1)} or {(2, 3, 4)}
    assert loaded.feature_layers in readings
    params = models.drafter_params(DRAFTER)
    assert all(np.array_equal(stored.params[name], value) for name, value in params.items())
    assert stored.params.keys() == params.keys() and stored.target_ids_W.tolist() == [*range(30), *range(60, 70)]


def rope_edits(rng: random.Random, config: dict) -> dict:
    """Edits of the rotary settings alone, in the places and spellings that there are."""
    inner = config.get("transformer_layer_config", config)
    old = given(inner, "rope_scaling", {"rope_type": "default"})
    other = rng.choice(("rope_parameters", "rope_scaling"))
    inner[other] = edited(rng, dict(old)) if rng.random() < 0.7 else rng.choice((None, {}, {"rope_type": "default"}))
    if rng.random() < 0.4 and isinstance(inner[other], dict):
        inner[other]["rope_theta"] = rng.choice((None, 10000.0, inner.get("rope_theta"), 5e5))
    if rng.random() < 0.3:
        inner["rope_theta"] = rng.choice((None, 10000, "10000", 0, 5e5))
    return inner if inner is config else config | {"transformer_layer_config": inner}


# kind -> (directories, file, check, edits)
KINDS = {
    "llama's config": ("llama", "config.json", check_target, edited),
    "qwen2's config": ("qwen2", "config.json", check_target, edited),
    "linear's rope": ("linear", "config.json", check_target, rope_edits),
    "yarn's rope": ("qwen2", "config.json", check_target, rope_edits),
    "generation config": ("llama", "generation_config.json", check_target, edited),
    "tokenizer": ("llama", "tokenizer.json", check_target, edited),
    "tokenizer config": ("llama", "tokenizer_config.json", check_target, edited),
    "flat drafter": ("flat", "config.json", check_drafter, edited),
    "speculators drafter": ("speculators", "config.json", check_drafter, edited),
    "flat drafter's rope": ("flat", "config.json", check_drafter, rope_edits),
}


def run(sound: Path, tmp_path: Path, kind: str, seeds: range) -> tuple[int, int]:
    """Mutates one file again and again -> (how often it was loaded, how often refused)."""
    name, file, check, edit = KINDS[kind]
    loaded = refused = 0
    directory = Path(shutil.copytree(sound / name, tmp_path / "broken"))
    whole = (directory / file).read_bytes()
    for seed in seeds:
        data = mutate(random.Random(f"{kind} {seed}"), whole, edit)
        (directory / file).write_bytes(data)
        try:
            with seconds(30):
                check(directory)
        except UserError as error:
            refused += 1
            assert str(directory) in str(error) and str(error).count("\n") <= 60
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}\n{data[:2000]!r}") from error
        else:
            loaded += 1
    return loaded, refused


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_and_a_few_mutations(sound, tmp_path, kind):
    KINDS[kind][2](sound / KINDS[kind][0])
    assert sum(run(sound, tmp_path, kind, FEW)) == len(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations(sound, tmp_path, kind):
    loaded, refused = run(sound, tmp_path, kind, MANY)
    least = 0 if kind == "generation config" else 5  # most of what that file says is about sampling, and not read
    assert loaded >= 3 and refused >= least, (loaded, refused)
