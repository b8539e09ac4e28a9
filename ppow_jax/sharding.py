"""Placement of all arrays: one mesh of devices, and one table from logical axes to mesh axes.

Programs are written for whole arrays and jitted; XLA partitions them (SPMD) according to the shardings of their inputs
(`NamedSharding`), and adds the communication, as `pjit` did. `pmap` is not used: it maps over a leading axis of devices
that programs would have to carry, has one axis where a mesh has four, and runs replicas only, so that neither a
target larger than one device nor a decoding loop over sharded caches can be written with it.

A program finds the mesh in its context (`jax.set_mesh`, here `use`); without one, or with a mesh of one device, the
functions here leave arrays unchanged. The meaning of an array's axes follows from its name: `PARAMETERS` for
parameters, and for the moments of optimizers, which have the same names; the suffix of shapes for all else, as in
`k_BxKvxdxL`.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppow_jax.flags import require
from ppow_jax.mesh_shape import AXES, MeshShape

__all__ = ["AXES", "Mesh", "MeshShape"]

T = TypeVar("T")

# Logical axis -> mesh axes. An axis that these do not divide stays whole, and so do axes that are not listed: window
# (K), tokens (T, S, L), head_dim (d), and the vocabulary of logits. Head axes are only split between heads.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("data", "fsdp"),  # before experts, which process those of the whole expert axis
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "hidden": ("fsdp",),
    "experts": ("expert",),
}

# Parameters of target and drafter -> logical axes. Arrays may have axes for stacked layers and experts before these.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "hidden"),
    "embed_VxE": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("heads", "hidden"),
    "k_proj": ("kv_heads", "hidden"),
    "v_proj": ("kv_heads", "hidden"),
    "o_proj": ("hidden", "heads"),
    "q_bias": ("heads",),
    "k_bias": ("kv_heads",),
    "v_bias": ("kv_heads",),
    "o_bias": ("hidden",),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
    "down_bias": ("hidden",),
    "router": (None, "hidden"),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "down_proj": ("hidden", "mlp"),
    "fc": ("hidden", None),
}
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_STACKED = "stacked"  # a path that contains this name: layers are stacked along the first axis

# Letters of a shape suffix -> logical axes.
_LETTERS = {"B": "batch", "H": "heads", "Kv": "kv_heads"}
_SUFFIX = re.compile(r"(?:.*_)?([A-Z][a-z]?\d*(?:x(?:[A-Z][a-z]?|[a-z])\d*)*)")


def make_mesh(shape: MeshShape | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices`, by default all devices of every process; without a shape all of them on data.

    Raises:
      UserError: the shape needs a different number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = shape or MeshShape(data=len(devices))
    rule = f"takes {shape.devices} devices (the product), but there are {len(devices)}"
    require(shape.devices == len(devices), f"--mesh={shape}: {rule}")
    return jax.make_mesh(shape.sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def shape_of(mesh: Mesh) -> MeshShape:
    """Number of devices along each axis of a mesh."""
    return MeshShape(**mesh.shape)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Runs programs inside the `with` on the mesh; on None, they run on the default device."""
    if mesh is None or mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def current() -> Mesh | None:
    """The mesh in use; None on a single device, and inside of programs, where only its sizes are known."""
    try:
        return jax.sharding.get_mesh() if in_use() else None
    except ValueError:  # raised inside of a program
        return None


def axis_sizes() -> dict[str, int]:
    """Axis sizes of the mesh in use, inside and outside of programs; empty on a single device."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def in_use() -> bool:
    """True if a mesh of several devices is in use, inside and outside of programs."""
    return bool(axis_sizes())


def committed(tree: T) -> T:
    """Commits arrays to the devices that they are on; on a mesh they already are.

    Programs are compiled apart for arrays that are committed, as restored ones are, and for those that are not.
    """
    if in_use():
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


def spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], counts: Mapping[str, int]) -> P:
    """Logical axes of an array -> its PartitionSpec on a mesh of these sizes.

    counts: numbers of heads: an axis of H * d values is split between heads or not at all.
    """
    cut: list[tuple[str, ...] | str | None] = []
    for axis, length in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis or "", ()) if sizes.get(name, 1) > 1)
        parts = math.prod(sizes[name] for name in names)
        fits = bool(names) and counts.get(axis, length) % parts == 0 and length % parts == 0
        cut.append((names if len(names) > 1 else names[0]) if fits else None)
    while cut and cut[-1] is None:  # as XLA writes the sharding of results: equal ones must be equal cache keys
        cut.pop()
    return P(*cut)


def logical_axes(name: str, ndim: int, stacked: bool = False) -> tuple[str | None, ...]:
    """Logical axes of an array of this name; those of unknown arrays are None, that is whole."""
    axes = PARAMETERS.get(name)
    if axes is None:
        found = _SUFFIX.fullmatch(name)
        letters = found[1].split("x") if found else []
        return tuple(map(_LETTERS.get, letters)) if len(letters) == ndim else (None,) * ndim
    in_front: tuple[str | None, ...] = (None,) * stacked
    if name in _OF_EXPERTS and ndim - len(in_front) > len(axes):
        in_front += ("experts",)
    return (*in_front, *axes) if len(in_front) + len(axes) == ndim else (None,) * ndim


def specs(tree: T, sizes: Mapping[str, int], config: Any = None) -> T:
    """The PartitionSpec of every leaf of a tree of arrays (or of their shapes), by its name.

    config: of the model that the tree belongs to (num_heads, num_kv_heads).
    """
    counts = {} if config is None else {"heads": config.num_heads, "kv_heads": config.num_kv_heads}

    def of(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        named = [name for name in names if name and not name.isdecimal()]
        name = named[-1].rpartition(".")[2] if named else ""  # a drafter's later layers: "layers.1.q_proj"
        axes = logical_axes(name, leaf.ndim, _STACKED in named)
        return spec(axes, leaf.shape, sizes, counts)

    return jax.tree_util.tree_map_with_path(of, tree)


def shardings(tree: T, mesh: Mesh, config: Any = None) -> T:
    """The NamedSharding of every leaf; see `specs`."""
    found = specs(tree, dict(mesh.shape), config)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, leaf), found, is_leaf=lambda x: isinstance(x, P))


def abstract(tree: T, mesh: Mesh | None, config: Any = None) -> T:
    """Shapes and dtypes with shardings, for lowering programs without arrays and for restoring checkpoints."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh, config)
    )


def born(make: Callable[..., T], *args: Any, config: Any = None) -> T:
    """make(*args), compiled so that each device computes only its own shards of the result."""
    mesh = current()
    if mesh is None:
        return constrain(make(*args), config)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh, config))(*args)


def place(tree: T, config: Any = None) -> T:
    """Places arrays of the host (the same on every process) or of devices according to their names."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(put, tree, shardings(tree, mesh, config))


def put(x: Any, where: NamedSharding) -> jax.Array:
    """Places one array; from the host, only the parts that this process's devices need are copied."""
    if isinstance(x, jax.Array) and jax.process_count() == 1:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(x)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(x))
        return jax.jit(jax.random.wrap_key_data, out_shardings=where)(data)
    return jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__)


def put_parts(path: Sequence[str | int], shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> jax.Array:
    """A parameter from a file (see `weights.layout`), each shard read separately by the process that needs it."""
    axes = logical_axes(str(path[-1]), len(shape))
    where = NamedSharding(current(), spec(axes, shape, axis_sizes(), {}))
    return jax.make_array_from_callback(shape, where, read)


def like(tree: T) -> T:
    """Shapes, dtypes and shardings of existing arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def fetch(tree: Any) -> Any:
    """The whole arrays as NumPy arrays, on every process; all processes have to call it."""
    mesh = current()
    if mesh is not None and not all(x.is_fully_addressable for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        tree = _replicate(tree, where=NamedSharding(mesh, P()))
    return jax.device_get(tree)


@functools.partial(jax.jit, static_argnames=("where",))
def _replicate(tree: Any, *, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), tree)


def constrain(tree: T, config: Any = None) -> T:
    """Constrains arrays, inside a program, to the shardings of their names."""
    sizes = axis_sizes()
    if not sizes:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs(tree, sizes, config))


def pin(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an array, inside a program, to these logical axes; None, and missing ones, stay whole."""
    sizes = axis_sizes()
    if not sizes:
        return x
    axes += (None,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes, {}))


def split_logits(logits_BxxV: jax.Array) -> jax.Array:
    """Shards logits [B, ..., V], inside a program, by rows and by the vocabulary, as the matrix that computes them."""
    between = (None,) * (logits_BxxV.ndim - 2)
    return pin(logits_BxxV, "batch", *between, "vocab")


def whole_logits(logits_BxxV: jax.Array) -> jax.Array:
    """Replicates logits [B, ..., V], inside a program, after computing them in shards of the vocabulary.

    If asked for whole logits directly, XLA gathers the matrix that computes them, which is much larger.
    """
    return pin(split_logits(logits_BxxV), "batch")


def parts(axis: str, length: int) -> int:
    """Number of equal parts into which the mesh in use splits a logical axis of this length."""
    sizes = axis_sizes()
    number = math.prod(sizes.get(name, 1) for name in RULES[axis])
    return number if length % number == 0 else 1
