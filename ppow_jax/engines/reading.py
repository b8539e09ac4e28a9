"""Readings of a drafter's files by serving engines, and where one would silently read them otherwise than meant.

Facts from the engines' own sources, of the versions in `SOURCES`; docs/drafter_files.md has the table with the files.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.weights import drafter_tensors, drafters
from ppow_jax.weights import huggingface as hf
from ppow_jax.weights.feature_layers import LAYER_IDS

SOURCES = {
    "vLLM": "0.32.0",
    "SGLang": "0.5.23",
    "sglang-jax": "commit cddbf6f",
    "tpu-inference": "0.32.0, JAX models",
    "EAGLE": "commit cb7e084",
}
READS, FAILS, MISREADS = "reads", "refuses", "MISREADS"


@dataclasses.dataclass(frozen=True)
class Files:
    """A drafter as an engine meets it: what the files mean, and how they say it.

    at_top, in_eagle: layer ids as written at the top level of config.json and in eagle_config; None where absent.
    spelling: prefix of the first layer's tensors. has_head: the files have an lm_head.
    """

    config: DrafterConfig
    format: str
    architecture: str
    at_top: list[int] | None
    in_eagle: list[int] | None
    spelling: str
    has_head: bool
    tied: bool

    @property
    def usual_layers(self) -> bool:
        """True if its target layers are EAGLE-3's usual choice for some depth, or left to it."""
        layers = self.config.feature_layers
        return not layers or layers == (2, (layers[2] + 3) // 2, layers[2])


@dataclasses.dataclass(frozen=True)
class Reading:
    """One engine's reading of one property. verdict: READS, FAILS or MISREADS (without any error)."""

    engine: str
    field: str
    verdict: str
    how: str


def of_directory(directory: Path) -> Files:
    """Reads a drafter's files. Raises the errors of `drafters.import_drafter`."""
    json_config = hf.read_json(directory / hf.CONFIG)
    stored = drafters.import_drafter(directory, headless=True)
    eagle = json_config.get("eagle_config")
    names = json_config.get("architectures") or [""]
    tensors, _ = drafter_tensors.open_tensors(directory)
    return Files(
        config=stored.config,
        format=stored.format,
        architecture=str(names[0]),
        at_top=json_config.get(LAYER_IDS) or None,
        in_eagle=(eagle.get(LAYER_IDS) if isinstance(eagle, Mapping) else None) or None,
        spelling=drafter_tensors.spelling(directory),
        has_head=drafter_tensors.LM_HEAD in tensors,
        tied=json_config.get("tie_word_embeddings") is True,
    )


def readings(files: Files) -> list[Reading]:
    """Every engine's reading of every property that this drafter has."""
    return [reading for engine in _ENGINES for reading in _of_engine(engine, files)]


def _of_engine(engine: str, files: Files) -> Iterator[Reading]:
    for field, verdict, how in _ENGINES[engine](files):
        yield Reading(engine, field, verdict, how)


Row = tuple[str, str, str]


def _vllm(files: Files) -> Iterator[Row]:
    config = files.config
    yield "format", READS, f"{files.format}, architecture {files.architecture}"
    if files.at_top:
        yield "target layers", READS, f"inputs of {_join(files.at_top)}, from the top level"
    elif files.in_eagle:
        meant = [i + 1 for i in files.in_eagle]
        right = config.feature_layers == tuple(files.in_eagle)
        how = f"eagle_config's {_join(files.in_eagle)} as inputs"
        yield "target layers", READS if right else MISREADS, how + ("" if right else f", meant are {_join(meant)}")
    else:
        yield "target layers", READS, "the usual 2, N//2, N-3"
    for name in ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc"):
        if getattr(config, name):
            yield name, READS, "true"
    if config.own_embed:
        yield "own embedding", READS, "from the files"
    yield _head(files, tied_is_read=False)
    if config.num_layers > 1:
        yield "layers", READS, f"{config.num_layers}"
    if config.qk_norm:
        if files.format == "speculators":
            yield "norms of queries and keys", READS, "as Eagle3Qwen3ForCausalLM"
        else:
            yield "norms of queries and keys", FAILS, "the flat format's Llama layer has none"
    if config.attention_bias:
        right = config.output_bias
        how = "of q, k, v and o" if right else "of q, k, v, and one of o, which the files lack, with arbitrary values"
        yield "attention_bias", READS if right else MISREADS, how


def _sglang(files: Files) -> Iterator[Row]:
    config = files.config
    if files.format != "flat" or files.architecture != "LlamaForCausalLMEagle3":
        how = f"{files.format}, {files.architecture}: it reads the flat LlamaForCausalLMEagle3 (convert --format=flat)"
        yield "format", FAILS, how
        return
    yield "format", READS, "flat, architecture LlamaForCausalLMEagle3"
    if files.in_eagle:
        right = config.feature_layers == tuple(i + 1 for i in files.in_eagle)
        yield "target layers", READS if right else MISREADS, f"outputs of {_join(files.in_eagle)}, from eagle_config"
    else:
        how = "the usual 2, N//2, N-3: it does not look at the top level"
        yield "target layers", READS if files.usual_layers else MISREADS, how
    yield from _unread(config, ("norm_before_residual",))
    for name in ("fc_norm", "norm_output", "norm_before_fc"):
        if getattr(config, name):
            yield name, READS, "true"
    if config.own_embed:
        right = config.hidden_size != config.target_hidden_size
        how = "from the files" if right else "replaced by the target's, as its width is the target's"
        yield "own embedding", READS if right else MISREADS, how
    yield _head(files, tied_is_read=True)
    if config.num_layers > 1:
        yield "layers", MISREADS, "norms of later layers must be called hidden_norm; input_layernorm is left out"
    yield from _no_extras(config)


def _sglang_jax(files: Files) -> Iterator[Row]:
    config = files.config
    if files.format != "flat" or files.architecture not in ("LlamaForCausalLMEagle3", "LlamaForCausalLM"):
        how = f"{files.format}, {files.architecture}: it reads the flat LlamaForCausalLMEagle3 (convert --format=flat)"
        yield "format", FAILS, how
        return
    yield "format", READS, f"flat, architecture {files.architecture}"
    yield _names(files)
    how = "the usual 2, N//2, N-3: it looks for eagle_config in the target's config.json, not in the drafter's"
    yield "target layers", READS if files.usual_layers else MISREADS, how
    yield from _unread(config, ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc"))
    if config.own_embed:
        yield "own embedding", MISREADS, "replaced by the target's"
    yield _head(files, tied_is_read=True)
    if config.num_layers > 1:
        yield "layers", FAILS, "only one"
    yield from _no_extras(config)


def _tpu_inference(files: Files) -> Iterator[Row]:
    config = files.config
    loaded = "Eagle3LlamaForCausalLM"
    if files.format != "flat" or files.architecture not in (loaded, "LlamaForCausalLM"):
        how = f"{files.format}, {files.architecture}: its JAX drafter is {loaded}, with tensors midlayer.*"
        yield "format", FAILS, how + "; rename `architectures` in config.json" * (files.format == "flat")
        return
    yield "format", READS, f"flat, as {loaded}"
    yield _names(files)
    yield "target layers", READS if files.usual_layers else MISREADS, "the usual 2, N//2, N-3 of a Llama target"
    if config.norm_before_residual:
        yield "norm_before_residual", READS, "true"
    yield from _unread(config, ("norm_output",))
    for name in ("fc_norm", "norm_before_fc", "qk_norm", "attention_bias"):
        if getattr(config, name):
            yield name, FAILS, "it has no such parameter"
    if config.own_embed:
        yield "own embedding", READS, "from the files"
    if not files.has_head:
        yield "head", MISREADS, "the files have none, and it does not take the target's"
    if config.num_layers > 1:
        yield "layers", FAILS, "only one"


def _eagle(files: Files) -> Iterator[Row]:
    config = files.config
    if files.format != "flat":
        yield "format", FAILS, "speculators: it reads the flat format (convert --format=flat)"
        return
    yield "format", READS, "flat; it does not look at `architectures`"
    yield _names(files)
    how = "the usual 2, N//2, N-3, whatever the files say"
    yield "target layers", READS if files.usual_layers else MISREADS, how
    yield from _unread(config, ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc"))
    if config.own_embed:
        yield "own embedding", READS, "from the files"
    if not files.has_head:
        yield "head", MISREADS, "the files have none, and it does not take the target's: its values are arbitrary"
    if config.num_layers > 1:
        yield "layers", MISREADS, "the first only; the others are left out"
    yield from _no_extras(config)
    if config.head_dim * config.num_heads != config.hidden_size:
        yield "head_dim", FAILS, f"{config.head_dim}: it must be hidden_size / num_attention_heads"
    if config.rope_scaling is not None:
        yield "rope_scaling", FAILS, "only linear and dynamic scaling, each with type and factor"


_ENGINES: dict[str, Callable[[Files], Iterator[Row]]] = {
    "vLLM": _vllm,
    "SGLang": _sglang,
    "sglang-jax": _sglang_jax,
    "tpu-inference": _tpu_inference,
    "EAGLE": _eagle,
}


def _unread(config: DrafterConfig, names: tuple[str, ...]) -> Iterator[Row]:
    """Switches that an engine does not look at; where they are false, that is what it assumes."""
    for name in names:
        if getattr(config, name):
            yield name, MISREADS, "not read: taken as false"


def _no_extras(config: DrafterConfig) -> Iterator[Row]:
    """Parts of the attention that an engine leaves out without an error."""
    if config.qk_norm:
        yield "norms of queries and keys", MISREADS, "left out"
    if config.attention_bias:
        yield "attention_bias", MISREADS, "left out"


def _names(files: Files) -> Row:
    right = files.spelling == "midlayer."
    how = f"{files.spelling}*" + ("" if right else ": only midlayer.* is found, the rest keeps its initial values")
    return "tensor names", READS if right else MISREADS, how


def _head(files: Files, tied_is_read: bool) -> Row:
    V, W = files.config.vocab_size, files.config.draft_vocab_size
    if files.has_head:
        return "vocabulary", READS, f"{W} of {V} tokens, by d2t" if W < V else "all tokens"
    if files.tied and not tied_is_read:
        return "head", MISREADS, "the target's head; tie_word_embeddings is not looked at"
    if files.tied or W == V:
        return "head", READS, "the embedding (tied)" if files.tied else "the target's"
    return "head", FAILS, "the files have none"


def _join(ids: Any) -> str:
    return ", ".join(map(str, ids))


def table(found: list[Reading]) -> str:
    """The readings as aligned lines, one block for each engine."""
    lines = []
    for engine in _ENGINES:
        lines.append(f"{engine} ({SOURCES[engine]})")
        for reading in found:
            if reading.engine == engine:
                lines.append(f"  {reading.verdict:<9} {reading.field:<26} {reading.how}")
    return "\n".join(lines)


def warnings(found: list[Reading]) -> list[str]:
    """One line for each silent misreading."""
    return [f"{x.engine} would silently misread {x.field}: {x.how}" for x in found if x.verdict == MISREADS]
