"""Names of a drafter's tensors in files, and the files themselves: safetensors or torch's `.bin`, one or sharded."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import DrafterConfig, layer_name, parameter_shapes
from ppow_jax.weights import huggingface as hf
from ppow_jax.weights import torch_file

EMBED = "embed_tokens.weight"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WRAPPERS = ("_orig_mod.", "module.", "model.")  # prefixes of torch.compile, data parallelism, and transformers
_FIRST = "midlayer."  # prefix of the first layer in the flat format; `layers.0.` in the speculators format
_TOP = {"fc": "fc.weight", "norm": "norm.weight", "lm_head": "lm_head.weight"}
_LAYER = {
    "input_norm": "input_layernorm.weight",
    "hidden_norm": "hidden_norm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
FC_NORMS = tuple(f"fc_norm.{i}.weight" for i in range(3))  # EAGLE-3.1
NORM_BEFORE_FC = "input_norm.weight"
FC, LM_HEAD = _TOP["fc"], _TOP["lm_head"]
O_BIAS, Q_BIAS, Q_NORM = (_FIRST + _LAYER[name] for name in ("o_bias", "q_bias", "q_norm"))
_LEFT_OUT = ("verifier_norm.weight", "verifier_lm_head.weight")  # the target's own, which speculators files may contain


def names(config: DrafterConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each parameter -> its names in the flat format (a norm of each feature has three)."""
    result: dict[str, tuple[str, ...]] = {name: (theirs,) for name, theirs in _TOP.items()}
    if config.fc_norm or config.norm_before_fc:
        result["fc_norm"] = FC_NORMS if config.fc_norm else (NORM_BEFORE_FC,)
    for n in range(config.num_layers):
        scope = _FIRST if n == 0 else f"layers.{n}."
        result |= {layer_name(n, name): (scope + theirs,) for name, theirs in _LAYER.items()}
    return {ours: result[ours] for ours in parameter_shapes(config)}


def said_of_biases(problems: list[str]) -> list[str]:
    """The problems of `tensor_problems`, with an explanation if a bias is unknown."""
    unknown = ".bias: unknown tensor"
    return [
        f"{text} (a bias in {text.removesuffix(unknown)} is not supported)" if text.endswith(unknown) else text
        for text in problems
    ]


def stored_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor but the vocabulary's, by its name in the flat format."""
    shapes, E = parameter_shapes(config), config.hidden_size
    result = {theirs: shapes[ours][-len(shapes[ours]) :] for ours, (theirs, *_) in names(config).items()}
    if config.fc_norm:
        result |= dict.fromkeys(FC_NORMS, (config.target_hidden_size,))
    return result | ({EMBED: (config.vocab_size, E)} if config.own_embed else {})


def to_tensors(config: DrafterConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters -> tensors under the names of the flat format."""
    tensors: dict[str, np.ndarray] = {}
    for ours, theirs in names(config).items():
        tensors |= dict(zip(theirs, params[ours] if len(theirs) > 1 else [params[ours]], strict=True))
    return tensors


def from_tensors(config: DrafterConfig, stored: Mapping[str, hf.StoredTensor]) -> dict[str, np.ndarray]:
    """Reads the parameters present in the file, in its dtype."""
    found = {ours: theirs for ours, theirs in names(config).items() if set(theirs) <= stored.keys()}
    read = {ours: [stored[name].read() for name in theirs] for ours, theirs in found.items()}
    return {ours: np.stack(parts) if len(parts) > 1 else parts[0] for ours, parts in read.items()}


def speculators_name(flat_name: str) -> str:
    """The name of a tensor in the speculators format."""
    return flat_name.replace(_FIRST, "layers.0.", 1) if flat_name.startswith(_FIRST) else flat_name


def open_tensors(directory: Path) -> tuple[dict[str, hf.StoredTensor], list[str]]:
    """(tensors under the names of the flat format, problems with their names).

    Names may begin with `midlayer.` or `layers.0.`, and with `model.` or torch's wrappers before that.

    Raises:
      UserError: for missing or broken files, and for a `.bin` file if torch is not installed.
    """
    files, problems = _open(directory)
    result: dict[str, hf.StoredTensor] = {}
    for name, tensor in files.items():
        short = name
        for wrapper in _WRAPPERS:
            short = short.removeprefix(wrapper)
        short = _FIRST + short.removeprefix("layers.0.") if short.startswith("layers.0.") else short
        if hf.is_buffer(short) or short in _LEFT_OUT:
            continue
        if short in result:
            problems.append(f"{name}: duplicated, under another spelling")
        result[short] = tensor
    return result, problems


def spelling(directory: Path) -> str:
    """Prefix of the first layer's tensors in the files."""
    names = _open(directory)[0]
    scopes = [name.partition("self_attn.")[0] for name in names if "self_attn." in name and "layers.1." not in name]
    return scopes[0] if scopes else ""


def _open(directory: Path) -> tuple[dict[str, hf.StoredTensor], list[str]]:
    if any((directory / name).exists() for name in (hf.WEIGHTS, hf.INDEX)):
        return hf.open_directory(directory)
    if (directory / PICKLED).exists():
        return torch_file.open_tensors(directory / PICKLED), []
    if (directory / PICKLED_INDEX).exists():
        return hf.open_shards(directory / PICKLED_INDEX, torch_file.open_tensors)
    raise UserError(f"{directory}: contains none of {hf.WEIGHTS}, {hf.INDEX}, {PICKLED}, {PICKLED_INDEX}")
