"""Import and export of EAGLE-3 drafters, in the flat format and in the speculators format."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import DrafterConfig, parameter_shapes
from ppow_jax.weights import drafter_tensors, flat, speculators, vocabulary_map
from ppow_jax.weights import huggingface as hf

log = logging.getLogger(__name__)
FORMATS = ("flat", "speculators")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_TARGET_KEY = "target_name_or_path"  # in the flat format, informational
_FORMER = "confidence_head.json"  # part of drafters of versions up to 2026-11-29


class StoredDrafter(NamedTuple):
    """A drafter as stored in its files.

    params: in the dtype of the file, see `drafter_config.parameter_shapes`. target_ids_W: int32, ascending. embed_VxE:
    the drafter's own embedding, or None. format: one of FORMATS. target_name: the target, if the files name it.
    """

    config: DrafterConfig
    params: dict[str, np.ndarray]
    target_ids_W: np.ndarray
    embed_VxE: np.ndarray | None
    format: str
    target_name: str | None


def export_drafter(
    directory: str | Path,
    config: DrafterConfig,
    params: Mapping[str, Any],
    target_ids_W: Any,
    *,
    dtype: str | None = "bfloat16",
    target_name: str | None = None,
    target_architecture: str | None = None,
    embed_VxE: Any = None,
    format: str | None = None,
) -> None:
    """Writes a drafter; in a directory that already holds one, it is replaced as a whole.

    The target's embedding is never written, only the drafter's own: servers use the target's if there is none.

    Args:
      params: the drafter's matrices `[out, in]`, see `drafter_config.parameter_shapes`.
      target_ids_W: target id of each draft id, ascending.
      dtype: of the weights in the file: bfloat16, float16 or float32; None leaves each as it is.
      target_name: the target's name, recorded in config.json.
      target_architecture: its transformers class, which the speculators format records.
      embed_VxE: the drafter's own embedding, for a config with own_embed.
      format: flat or speculators; None is `best_format`.

    Raises:
      UserError: for an unknown dtype or format, a drafter that the format cannot represent, weights that are not finite
        in the dtype, a directory that cannot be written.
      ValueError: if parameters and config do not belong together.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}")
    format = best_format(config) if format is None else format
    if format not in FORMATS:
        raise UserError(f"format = {format!r} must be one of {', '.join(FORMATS)}")
    ids_W = np.asarray(target_ids_W, np.int64)
    if ids_W.shape != (config.draft_vocab_size,) or not vocabulary_map.ascending(ids_W, config.vocab_size):
        raise ValueError(f"needed: {config.draft_vocab_size} ascending target ids below {config.vocab_size}")
    shapes = parameter_shapes(config)
    if {name: np.shape(value) for name, value in params.items()} != shapes:
        raise ValueError(f"parameters {sorted(params)} do not have the names and shapes {shapes}")
    if np.shape(embed_VxE) != ((config.vocab_size, config.hidden_size) if config.own_embed else ()):
        raise ValueError(f"an embedding of shape {np.shape(embed_VxE)} with own_embed = {config.own_embed}")

    values = dict(params) | ({"embed": embed_VxE} if config.own_embed else {})
    cast = {name: _cast(value, dtype, f"{directory}: not written, {name}") for name, value in values.items()}
    embed = cast.pop("embed", None)
    tensors = drafter_tensors.to_tensors(config, cast) | vocabulary_map.to_tensors(ids_W, config.vocab_size)
    if embed is not None:
        tensors[drafter_tensors.EMBED] = embed
    if format == "flat":
        json_config = flat.to_json(config, str(directory)) | {"torch_dtype": str(cast["fc"].dtype)}
        json_config |= {} if target_name is None else {_TARGET_KEY: target_name}
    else:
        tensors = {drafter_tensors.speculators_name(name): value for name, value in tensors.items()}
        json_config = speculators.to_json(config, target_name, target_architecture)
        json_config |= {"torch_dtype": str(cast["fc"].dtype)}
    hf.replace_files(directory, {hf.WEIGHTS: hf.tensors_writer(tensors), hf.CONFIG: hf.json_writer(json_config)})


def import_drafter(
    directory: str | Path,
    *,
    num_target_layers: int | None = None,
    target_embed_VxD: Any = None,
    target_head: Callable[[], Any] | None = None,
    headless: bool = False,
) -> StoredDrafter:
    """Reads a drafter in either format, from this project or elsewhere.

    Names may begin with `midlayer.` or `layers.0.`, and with `model.` before that; weights may be stored in safetensors
    or in `.bin` files (which require torch), one or several with an index. If draft ids are not in the order of target
    ids, they are sorted, together with the rows of the head. Accepted deviations from the formats:
    docs/drafter_files.md. `confidence_head.json`, which earlier versions wrote, is ignored.

    Args:
      num_target_layers: N of the target. Files without layer ids use the default choice for
        that depth; without N, such a drafter has no feature_layers, and can only be written again.
      target_embed_VxD: the target's embedding: a copy of it in the files is left out. Without it, an embedding in the
        files counts as the drafter's own.
      target_head: returns the target's head [V, D], used by drafters of a whole vocabulary if their files have none.
      headless: read such a drafter without a head if target_head is None, instead of refusing it.

    Raises:
      UserError: for a config that is not supported, broken or missing files, and for unknown, missing, duplicated,
        mis-shaped tensors or ids (all of them in one message).
    """
    directory = Path(directory)
    json_config = hf.read_json(directory / hf.CONFIG)
    if (directory / _FORMER).exists():
        log.info("%s: ignored, drafters no longer have this part", directory / _FORMER)
    stored, problems = drafter_tensors.open_tensors(directory)
    width = None if target_embed_VxD is None else np.shape(target_embed_VxD)[1]
    config = describe(json_config, stored, num_target_layers, str(directory / hf.CONFIG), width)
    V, W = config.vocab_size, config.draft_vocab_size

    expected = drafter_tensors.stored_shapes(config)
    expected |= {name: shape for name, shape in {"d2t": (W,), "t2d": (V,)}.items() if name in stored}
    borrowed = drafter_tensors.LM_HEAD not in stored
    if borrowed and W == V:
        del expected[drafter_tensors.LM_HEAD]
    problems += drafter_tensors.said_of_biases(
        hf.tensor_problems(stored, expected, {"d2t": ("I64", "I32"), "t2d": ("BOOL",)})
    )
    if not {"d2t", "t2d"} & stored.keys() and W != V:
        problems.append(f"d2t: missing (without d2t and t2d, draft_vocab_size {W} must equal vocab_size {V})")
    hf.raise_problems(str(directory), problems)

    params = drafter_tensors.from_tensors(config, stored)
    embed = stored[drafter_tensors.EMBED].read() if config.own_embed else None
    values = params if embed is None else params | {"embed_tokens": embed}
    problems = [f"{name}: not finite" for name, value in values.items() if not np.isfinite(value).all()]
    ids_W, order_W = vocabulary_map.from_tensors(stored, V, W, problems, str(directory))
    hf.raise_problems(str(directory), problems)
    if borrowed:
        tied = json_config.get("tie_word_embeddings") is True
        head = _borrowed_head(config, embed, target_embed_VxD, target_head, tied, str(directory))
        params |= {} if head is None else {"lm_head": head}
        if head is None and not headless:
            raise UserError(
                f"{directory}: the tensors do not fit the config:\n  {drafter_tensors.LM_HEAD}: missing (the target's"
                " head is used if the target is given)"
            )
    else:
        params["lm_head"] = params["lm_head"][order_W]
    if embed is not None and target_embed_VxD is not None and _same(embed, target_embed_VxD):
        config, embed = dataclasses.replace(config, own_embed=False), None
    return StoredDrafter(config, params, ids_W, embed, format_of(json_config), _target_name(json_config))


def _borrowed_head(
    config: DrafterConfig, embed_VxE: Any, target_embed_VxD: Any, target_head: Any, tied: bool, where: str
) -> np.ndarray | None:
    """The head of a whole vocabulary whose files have none: the embedding if they are tied, else the target's head."""
    if tied:
        what, head = "embedding (they are tied)", target_embed_VxD if embed_VxE is None else embed_VxE
    else:
        what, head = "target's head", target_head and target_head()
    if head is None:
        return None
    head, E = np.asarray(head), config.hidden_size
    if head.shape[1] != E or len(head) < config.draft_vocab_size:
        shape = f"{list(head.shape)}, not {[config.draft_vocab_size, E]}"
        raise UserError(f"{where}: {drafter_tensors.LM_HEAD}: missing, and the {what} has shape {shape}")
    log.warning("%s has no %s: the %s is used instead", where, drafter_tensors.LM_HEAD, what)
    return head[: config.draft_vocab_size]


def best_format(config: DrafterConfig) -> str:
    """The format that most servers read, among those that can represent this drafter."""
    return "flat" if flat.reason_against(config) is None else "speculators"


def format_of(json_config: Mapping[str, Any]) -> str:
    """The format, one of FORMATS, of a config.json."""
    return "speculators" if speculators.is_speculators(json_config) else "flat"


def describe(
    json_config: Mapping[str, Any],
    tensors: Collection[str],
    num_target_layers: int | None,
    where: str,
    target_width: int | None = None,
) -> DrafterConfig:
    """Config of a drafter from its config.json and its tensors, or their names (flat format); see `flat.from_json`."""
    read = flat.from_json if format_of(json_config) == "flat" else speculators.from_json
    return read(json_config, tensors, num_target_layers, where, target_width)


def _target_name(json_config: Mapping[str, Any]) -> str | None:
    name = json_config.get(_TARGET_KEY) or speculators.target_of(json_config)
    return name if isinstance(name, str) else None


def _cast(value: Any, dtype: str | None, what: str) -> np.ndarray:
    array = np.asarray(value)
    with np.errstate(over="ignore"):
        array = array if dtype is None else array.astype(DTYPES[dtype])
    if not np.isfinite(array).all():
        raise UserError(f"{what} has values that are not finite in {array.dtype}")
    return array


def _same(embed_VxE: np.ndarray, target_VxD: Any) -> bool:
    """True if an embedding equals the target's, up to the rounding of either's precision and rows of padding."""
    if embed_VxE.shape[1:] != np.shape(target_VxD)[1:]:
        return False
    rows = min(len(embed_VxE), len(target_VxD))
    for start in range(0, rows, 8192):  # in chunks: float32 copies of both could take gigabytes
        part = slice(start, min(start + 8192, rows))
        ours, theirs = (np.asarray(x[part]).astype(np.float32) for x in (embed_VxE, target_VxD))
        if not np.allclose(ours, theirs, rtol=1e-2, atol=1e-4):
            return False
    return True
