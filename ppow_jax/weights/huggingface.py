"""Targets as Hugging Face directories: config.json and safetensors, in one file or in shards.

Nothing here needs torch. The helpers for safetensors and JSON files are shared with the drafter's format.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors' numpy interface relies on)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ppow_jax.data.hub_access import offline_if_unreachable
from ppow_jax.errors import UserError
from ppow_jax.files import mistaken
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.weights import layout

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_PROBLEMS = 50


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in a file. `dtype` is its name in safetensors, such as "BF16".

    read: the tensor, or the part of it given by an index of slices; nothing else of the file is loaded into memory.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


def load_target(
    directory_or_name: str | Path, dtype: Any = jnp.float32, put: layout.Put = layout.put_whole
) -> tuple[ModelConfig, dict]:
    """Reads a target into (config, parameters), every matrix `[out, in]` in `dtype`, tensor by tensor.

    Args:
      directory_or_name: a directory with config.json and safetensors, or a hub name such as "owner/model".
      put: places each parameter. For example, to read each shard of a mesh separately: `lambda path, shape, read:
        jax.make_array_from_callback(shape, shardings(path), read)`.

    Raises:
      UserError: if there is no such model, for a config that is not supported, for broken or missing files,
        and for unknown, missing, duplicated or mis-shaped tensors (all of them in one message).
    """
    config, stored = open_target(find_directory(directory_or_name))
    sources, shapes = layout.sources(config, stored), transformer.shapes(config)

    def read(name: str, index: layout.Index) -> np.ndarray:
        return stored[name].read(index)

    def parameter(path: layout.Path, shape: tuple[int, ...]) -> jax.Array:
        return put(path, shape, layout.reader(sources[path], shape, read, np.dtype(dtype)))

    layers = [
        {name: parameter(("layers", n, name), shape) for name, shape in layer.items()}
        for n, layer in enumerate(shapes.pop("layers"))
    ]
    return config, {"layers": layers} | {name: parameter((name,), shape) for name, shape in shapes.items()}


def open_target(directory: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The config of a target and its tensors by their Hugging Face names, none of them read, but all checked.

    Raises:
      UserError: see `load_target`.
    """
    config = ModelConfig.from_hf(read_json(directory / CONFIG), str(directory / CONFIG))
    stored, problems = open_directory(directory)
    expected = layout.expected(layout.sources(config, stored))
    head, embed = layout.hf_name("lm_head"), layout.hf_name("embed")
    if config.tie_word_embeddings and head in stored:
        expected[head] = expected[embed]
    problems += tensor_problems(stored, expected)
    if not problems and config.tie_word_embeddings and head in stored:
        if not _equal(stored[head], stored[embed]):
            problems.append(f"{head}: differs from {embed}, although tie_word_embeddings is true")
    raise_problems(str(directory), problems)
    return config, stored


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """True if two tensors of the same shape are equal, compared in chunks."""
    parts = (slice(start, min(start + rows, a.shape[0])) for start in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read((part,)), b.read((part,))) for part in parts)


def save_target(directory: str | Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Writes config.json, model.safetensors and its index, in the dtype of the parameters.

    transformers, vLLM, SGLang and the official EAGLE code (which requires the index) can load the directory.

    Raises:
      UserError: if the directory cannot be written.
    """
    tensors = layout.tensors(config, params)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS),
    }
    hf_config = config.to_hf() | {"torch_dtype": str(tensors[layout.hf_name("embed")].dtype)}
    replace_files(
        directory,
        {WEIGHTS: tensors_writer(tensors), INDEX: json_writer(index), CONFIG: json_writer(hf_config)},
    )


def find_directory(directory_or_name: str | Path) -> Path:
    """The directory itself, or the local snapshot of a hub model of that name, downloaded if necessary.

    Raises:
      UserError: if there is no such directory and the hub has no such model or cannot be reached.
    """
    path = Path(directory_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; a directory with {CONFIG} and {WEIGHTS} is needed")
    name = str(directory_or_name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name}: there is no such directory, and it is no hub name (owner/model)")
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with offline_if_unreachable() as offline:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # errors of the hub, its HTTP library and the system share no base class
            if offline:
                rule = "it was not downloaded before; name a directory or a .gguf file instead"
                raise UserError(f"{name}: no such directory; {offline}, and {rule}") from None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            rule = f"it could not be downloaded from the hub ({reason})"
            raise UserError(f"{name}: no such directory, and {rule}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError, with the line if the text is malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        other = mistaken(path)
        if other:
            raise UserError(f"{path}: {other}") from None
        if isinstance(error, json.JSONDecodeError):
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must contain a JSON object, not {type(value).__name__}")
    return value


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, none of them read yet. Raises UserError if the file is missing or broken."""
    try:
        with safe_open(path, framework="np") as file:
            mapped = _Mapped(path)
            return {name: _stored(file, name, mapped) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        other = mistaken(path)
        raise UserError(f"{path}: {other or f'not a readable safetensors file ({_reason(error)})'}") from None


def tensor_problems(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, tuple[str, ...]] = {},  # noqa: B006  (never written)
) -> list[str]:
    """Problems of a file: unknown, missing or mis-shaped tensors, or types that are not in `dtypes`.

    `dtypes` maps names to permitted types; names without an entry permit any float of 16 bits or more.
    """
    problems = [f"{name}: unknown tensor" for name in sorted(stored.keys() - expected.keys())]
    for name, shape in expected.items():
        tensor, permitted = stored.get(name), dtypes.get(name, FLOATS)
        if tensor is None:
            problems.append(f"{name}: missing")
        elif tensor.shape != shape:
            problems.append(f"{name}: has shape {list(tensor.shape)}, the config requires {list(shape)}")
        elif tensor.dtype not in permitted:
            problems.append(f"{name}: has type {tensor.dtype}, must be {' or '.join(permitted)}")
    return problems


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Raises one UserError that lists all problems, if there are any."""
    problems = list(problems)
    if not problems:
        return
    rest = len(problems) - _MAX_PROBLEMS
    lines = problems[:_MAX_PROBLEMS] + ([f"... and {rest} more"] if rest > 0 else [])
    raise UserError(f"{where}: the tensors do not fit the config:\n  " + "\n  ".join(lines))


def replace_files(directory: str | Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files atomically, in the given order; put config.json, which completes the set, last.

    While older files are replaced there is no config.json, so that files left by a kill are never mistaken
    for a model. Raises UserError if the directory cannot be written.
    """
    directory = Path(directory)
    temporary = {name: directory / f".{name}.tmp" for name in writers}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
        if CONFIG in writers:
            (directory / CONFIG).unlink(missing_ok=True)
        for name in writers:
            os.replace(temporary[name], directory / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot be written ({_reason(error)})") from None
    finally:
        for path in temporary.values():
            if path.exists():
                path.unlink()


def json_writer(value: Mapping[str, Any]) -> Callable[[Path], object]:
    """Writer for `replace_files`: indented JSON."""
    text = json.dumps(value, indent=2) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def tensors_writer(tensors: Mapping[str, np.ndarray]) -> Callable[[Path], object]:
    """Writer for `replace_files`: safetensors that torch programs accept (equal tensors give equal bytes)."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        save_file(contiguous, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it private, but a served drafter is read by others

    return write


class _Mapped:
    """A safetensors file that is unmapped whenever a fiftieth of it has been read.

    The pages of a file that stays mapped accumulate to a second copy of it in memory; remapping only reads its header.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None
        self._bytes = 0

    def read(self, name: str, index: layout.Index) -> np.ndarray:
        """A tensor, or a part of it."""
        if self._file is None:
            self._file, self._bytes = safe_open(self.path, framework="np"), 0
        value = self._file.get_slice(name)[index] if index else self._file.get_tensor(name)
        self._bytes += value.nbytes
        if self._bytes > self.path.stat().st_size / 50:
            self._file = None
        return value


def _stored(file: Any, name: str, mapped: _Mapped) -> StoredTensor:
    def read(index: layout.Index = ()) -> np.ndarray:
        try:
            return mapped.read(name, index)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{mapped.path}: tensor {name} cannot be read ({_reason(error)})") from None

    entry = file.get_slice(name)
    return StoredTensor(tuple(entry.get_shape()), str(entry.get_dtype()), read)


def open_directory(directory: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """All tensors of all shards, and inconsistencies between the shards."""
    problems: list[str] = []
    if (directory / WEIGHTS).exists():
        stored = open_safetensors(directory / WEIGHTS)
    elif (directory / INDEX).exists():
        stored, problems = open_shards(directory / INDEX, open_safetensors)
    else:
        raise UserError(f"{directory}: contains neither {WEIGHTS} nor {INDEX} (other formats are not read)")
    return {name: tensor for name, tensor in stored.items() if not is_buffer(name)}, problems


def open_shards(
    index: Path, read: Callable[[Path], dict[str, StoredTensor]]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of all files in an index, each opened by `read`, and inconsistencies between them."""
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read(index.parent / shard).items():
            if name in stored:
                problems.append(f"{name}: duplicated, in {shard} and an earlier shard")
            elif weight_map.get(name, shard) != shard:
                problems.append(f"{name}: is in {shard}, the index says {weight_map[name]}")
            stored[name] = tensor
    lost = sorted(name for name in weight_map.keys() - stored.keys() if not is_buffer(name))
    return stored, problems + [f"{name}: not in {weight_map[name]}, where the index says it is" for name in lost]


def is_buffer(name: str) -> bool:
    """True for tensors that old exporters saved although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name != "" and "\0" not in value


def _reason(error: BaseException) -> str:
    """The error's own message on one line, without the path if it is already named."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
