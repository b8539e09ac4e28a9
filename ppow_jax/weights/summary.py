"""Human-readable summary of a drafter or target; weights are checked, but not run."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.models.families import Experts
from ppow_jax.weights import drafter_tensors, drafters, ends, gguf, gguf_file
from ppow_jax.weights import huggingface as hf


def is_drafter(json_config: Mapping[str, Any]) -> bool:
    """True if a config.json is a drafter's, recognised by keys that only drafters have."""
    names = json_config.get("architectures")
    eagle = isinstance(names, list) and any("eagle" in str(name).lower() for name in names)
    return eagle or drafters.format_of(json_config) == "speculators" or "draft_vocab_size" in json_config


def drafter_lines(directory: Path) -> list[tuple[str, str]]:
    """(label, value) of a drafter, all of whose weights are read and checked.

    Raises:
      UserError: see `drafters.import_drafter`.
    """
    stored = drafters.import_drafter(directory, headless=True)
    config, params = stored.config, stored.params
    count = sum(value.size for value in params.values())
    dtypes = sorted({str(value.dtype) for value in params.values()})
    embed = "the target's"
    if stored.embed_VxE is not None:
        embed = f"its own, {config.vocab_size} x {config.hidden_size} (maybe a copy of the target's)"
    return [
        ("kind", f"EAGLE-3{'.1' if config.fc_norm and config.norm_output else ''} drafter"),
        ("format", f"{stored.format}, names {drafter_tensors.spelling(directory)}*, {', '.join(_files(directory))}"),
        ("target", stored.target_name or "not named in the files"),
        ("parameters", f"{_count(count)} ({', '.join(dtypes)}), head {_head(params)}"),
        ("layers", f"{config.num_layers}{', later ones are plain decoder layers' if config.num_layers > 1 else ''}"),
        ("width", _widths(config)),
        ("attention", _attention(config, config.attention_bias)),
        ("rope", _rope(config)),
        ("target layers", _target_layers(config)),
        ("norms", _norms(config)),
        ("vocabulary", _vocabulary(stored)),
        ("embedding", embed),
    ]


def target_lines(directory: Path) -> list[tuple[str, str]]:
    """(label, value) of a target in Hugging Face's format; names, shapes and types of its tensors are checked.

    Raises:
      UserError: see `huggingface.load_target`.
    """
    config, stored = hf.open_target(directory)
    count = sum(math.prod(tensor.shape) for tensor in stored.values())
    dtypes = f" ({', '.join(sorted({tensor.dtype for tensor in stored.values()}))})"
    end_ids = ends.of_directory(directory, config.vocab_size, config.eos_token_ids)
    return config_lines(config, f"Hugging Face, {', '.join(_files(directory))}", count, dtypes, end_ids)


def gguf_lines(path: Path) -> list[tuple[str, str]]:
    """(label, value) of a GGUF file; its header is checked, its weights are not read."""
    file = gguf_file.open_model(path)
    config = gguf.read_config(file)
    count = sum(math.prod(map(int, tensor.shape)) for tensor in file.tensors)
    kinds = Counter(tensor.tensor_type.name for tensor in file.tensors)
    stored = ", ".join(f"{number} tensors {kind}" for kind, number in kinds.most_common())
    size = f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)"
    return config_lines(config, f"GGUF, {size}, {stored}", count, "", config.eos_token_ids)


def config_lines(
    config: ModelConfig, format: str, count: int, dtypes: str, end_ids: Iterable[int]
) -> list[tuple[str, str]]:
    """(label, value) of a target's config. count, dtypes: number of parameters, and how they are stored."""
    N = config.num_layers
    return [
        ("kind", f"target, {config.architecture}"),
        ("format", format),
        ("parameters", f"{_count(count)}{dtypes}"),
        ("layers", str(N)),
        ("width", f"{config.hidden_size}, MLP {config.intermediate_size}"),
        *([("experts", _experts(config.experts))] if config.experts else []),
        ("attention", _attention(config, config.qkv_bias) + _sliding(config)),
        ("rope", _rope(config)),
        ("vocabulary", f"{config.vocab_size}{', the embedding is the head' if config.tie_word_embeddings else ''}"),
        ("end tokens", ", ".join(map(str, end_ids)) or "none but the tokenizer's"),
        ("drafters' layers", f"inputs of 2, {N // 2}, {N - 3} by default" if N >= 7 else "no default: fewer than 7"),
    ]


def _files(directory: Path) -> list[str]:
    found = [path for path in sorted(directory.iterdir()) if path.suffix in (".safetensors", ".bin")]
    return [f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in found[:3]] + ["..."] * (len(found) > 3)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _head(params: Mapping[str, np.ndarray]) -> str:
    return _count(params["lm_head"].size) if "lm_head" in params else "of the target"


def _widths(config: DrafterConfig) -> str:
    same = config.hidden_size == config.target_hidden_size
    of_target = "as the target's" if same else f"for features of width {config.target_hidden_size}"
    return f"{config.hidden_size}, {of_target}; MLP {config.intermediate_size}"


def _attention(config: ModelConfig | DrafterConfig, bias: bool = False) -> str:
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    normed = ", queries and keys normed" if getattr(config, "qk_norm", False) else ""
    return heads + (", with biases" if bias else "") + normed


def _experts(experts: Experts) -> str:
    """Description of a mixture of experts."""
    return (
        f"{experts.per_token} of {experts.number} for each token, {experts.intermediate_size} wide each,"
        f" in {len(experts.layers)} layers"
    )


def _sliding(config: ModelConfig) -> str:
    layers = len(config.sliding_layers)
    return f", {config.sliding_window} tokens back in {layers} of the layers" if layers else ""


def _rope(config: ModelConfig | DrafterConfig) -> str:
    scaling = getattr(config, "rope_scaling", None)
    kind = "" if scaling is None else f", {type(scaling).__name__.lower()} scaling"
    return f"base {config.rope_theta:g}{kind}, {config.max_position_embeddings} positions"


def _target_layers(config: DrafterConfig) -> str:
    if not config.feature_layers:
        return "not in the files: 2, N//2, N-3 of the target's N layers"
    inputs, outputs = (", ".join(str(i - shift) for i in config.feature_layers) for shift in (0, 1))
    return f"inputs of layers {inputs} = outputs of layers {outputs}"


def _norms(config: DrafterConfig) -> str:
    parts = ["one of each feature"] if config.fc_norm else ["one over all features"] if config.norm_before_fc else []
    parts.append(f"the {'normed' if config.norm_output else 'raw'} output is fed back")
    parts.append(f"the {'normed' if config.norm_before_residual else 'raw'} feature is the residual")
    return ", ".join(parts)


def _vocabulary(stored: drafters.StoredDrafter) -> str:
    V, W = stored.config.vocab_size, stored.config.draft_vocab_size
    whole = W == V and np.array_equal(stored.target_ids_W, np.arange(V))
    return f"{W} of {V} tokens{' (all)' if whole else ''}"


def table(lines: Iterable[tuple[str, str]]) -> str:
    """Formats lines with aligned columns."""
    return "\n".join(f"{what:<16} {value}" for what, value in lines)
