"""Location of each of our parameters in a Hugging Face checkpoint: names, shapes, and the two layouts of experts."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig

Path = tuple[str | int, ...]  # ("embed",) or ("layers", 3, "q_proj")
Index = tuple[slice, ...]  # of the leading axes; trailing ones that are missing are taken whole
Read = Callable[[Index], np.ndarray]
Put = Callable[[Path, tuple[int, ...], Read], jax.Array]  # creates the array of one parameter, with its placement

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_LAYER = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "router": "mlp.gate",
}
_FUSED, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"  # of transformers 5, all experts in one tensor


@dataclasses.dataclass(frozen=True)
class Source:
    """Source of one parameter: a tensor, one tensor for each expert, or a part of the rows of one that holds all.

    shape: of each of the tensors. first_row: first of our rows (axis 1) in a tensor of all experts' gate and up.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    per_expert: bool = False
    first_row: int | None = None


def put_whole(path: Path, shape: tuple[int, ...], read: Read) -> jax.Array:
    """Puts the whole parameter on the default device."""
    return jax.block_until_ready(jnp.asarray(read(())))  # at most one at a time in host memory


def sources(config: ModelConfig, stored: Collection[str] = ()) -> dict[Path, Source]:
    """Every parameter's source. stored: names in the checkpoint, by which the layout of experts is recognised."""
    shapes = transformer.shapes(config)
    found: dict[Path, Source] = {
        (ours,): Source((hf_name(ours),), shapes[ours]) for ours in _TOP if ours in shapes
    }
    for n, layer in enumerate(shapes["layers"]):
        prefix = f"model.layers.{n}."
        fused = prefix + _FUSED in stored or prefix + _DOWN in stored
        for ours, shape in layer.items():
            if len(shape) == 3:
                found["layers", n, ours] = _experts(prefix, ours, shape, fused)
            elif ours.endswith("_bias"):
                found["layers", n, ours] = Source((f"{prefix}{_LAYER[ours[:-5] + '_proj']}.bias",), shape)
            else:
                found["layers", n, ours] = Source((f"{prefix}{_LAYER[ours]}.weight",), shape)
    return found


def _experts(prefix: str, ours: str, shape: tuple[int, ...], fused: bool) -> Source:
    E, O, I = shape
    if not fused:
        return Source(tuple(f"{prefix}mlp.experts.{e}.{ours}.weight" for e in range(E)), (O, I), per_expert=True)
    if ours == "down_proj":
        return Source((prefix + _DOWN,), shape)
    return Source((prefix + _FUSED,), (E, 2 * O, I), first_row=0 if ours == "gate_proj" else O)


def hf_name(ours: str) -> str:
    """The Hugging Face name of one of the tensors outside the layers."""
    return f"{_TOP[ours]}.weight"


def expected(found: Mapping[Path, Source]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, for everything that a checkpoint must hold."""
    return {name: source.shape for source in found.values() for name in source.names}


def reader(source: Source, shape: tuple[int, ...], read: Callable[[str, Index], np.ndarray], dtype: Any) -> Read:
    """A function that reads any part of a parameter of that shape, and only that part, in `dtype`."""

    def part(index: Index) -> np.ndarray:
        if not source.per_expert and source.first_row is None:
            return read(source.names[0], index).astype(dtype, copy=False)
        experts, rows, columns = map(_among, (*index, *[slice(None)] * (3 - len(index))), shape)
        if source.first_row is not None:
            own_rows = slice(source.first_row + rows.start, source.first_row + rows.stop)
            return read(source.names[0], (_slice(experts), own_rows, _slice(columns))).astype(dtype, copy=False)
        stacked = np.empty((len(experts), len(rows), len(columns)), dtype)
        for i, e in enumerate(experts):
            stacked[i] = read(source.names[e], (_slice(rows), _slice(columns)))
        return stacked

    return part


def _among(part: slice, size: int) -> range:
    return range(size)[part]


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)


def tensors(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Checkpoint of the parameters: tensor name -> array, expert by expert."""
    result: dict[str, np.ndarray] = {}
    for path, source in sources(config).items():
        value: Any = params
        for step in path:
            value = value[step]
        value = np.asarray(value)
        result |= dict(zip(source.names, value if source.per_expert else [value], strict=True))
    return result
