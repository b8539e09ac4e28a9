"""Small EAGLE-3 drafters of every kind, their parameters, and edits of their files."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import small_configs
from safetensors.numpy import load_file, save_file

from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter_config import DrafterConfig, parameter_shapes
from ppow_jax.models.rope import Llama3, Yarn
from ppow_jax.weights import tiny
from ppow_jax.weights.drafters import export_drafter

V, W, E = 20, 6, 8
IDS = np.array([1, 2, 5, 11, 18, 19], np.int32)
PLAIN = small_configs.drafter_config(
    small_configs.target_config(vocab_size=V, hidden_size=E, rope_theta=1e5, max_position_embeddings=128),
    W,
    intermediate_size=10,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    feature_layers=(2, 15, 27),
)
VARIANTS = {
    "plain": PLAIN,
    "eagle31": dataclasses.replace(PLAIN, fc_norm=True, norm_output=True),
    "wide_target": dataclasses.replace(PLAIN, target_hidden_size=12, own_embed=True),
    "biases": dataclasses.replace(PLAIN, attention_bias=True, output_bias=True, norm_before_fc=True),
    "llama3_rope": dataclasses.replace(PLAIN, rope_scaling=Llama3(8.0, 1.0, 4.0, 64)),
    "yarn": dataclasses.replace(PLAIN, rope_scaling=Yarn(4.0, 64, 1.25)),
    "biases_but_one": dataclasses.replace(PLAIN, attention_bias=True, fc_norm=True),
    "norm_before_residual": dataclasses.replace(PLAIN, norm_before_residual=True, feature_layers=(0, 1, 2)),
}


def embed_of(config: DrafterConfig) -> np.ndarray | None:
    return np.random.default_rng(1).normal(size=(V, config.hidden_size)) if config.own_embed else None


def params_of(config: DrafterConfig) -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in parameter_shapes(config).items()}


def edit_config(directory: Path, drop: tuple[str, ...] = (), **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_tensors(directory: Path, rename=lambda name: name, drop: tuple[str, ...] = (), **changes) -> None:
    path = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors | {name.replace("__", "."): value for name, value in changes.items()}, path)


def make_drafter(directory: Path, vocab_size: int = tiny.CONFIG.vocab_size) -> str:
    """Writes a drafter of random weights for the target `tiny` -> its directory, as flags take it."""
    target = dataclasses.replace(tiny.CONFIG, vocab_size=vocab_size)
    config = small_configs.drafter_config(target, 50, feature_layers=(2, 3, 4), fc_norm=True)
    export_drafter(directory, config, drafting.init(jax.random.key(0), config), np.arange(50, 100))
    return str(directory)
