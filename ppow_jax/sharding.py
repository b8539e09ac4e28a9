"""Where every array lies: one mesh of devices, one table from logical axes to its axes.

Programs are written for whole arrays and jitted; XLA cuts them up (SPMD) as their inputs lie, which `NamedSharding`s
say, and adds the communication. That is what `pjit` became. `pmap` is not used: it maps over a leading axis of devices
that programs would have to carry, knows one axis where a mesh has four, and runs replicas only, so that neither a
target larger than one device nor a decoding loop over cut caches can be written with it.

A program finds the mesh around it (`jax.set_mesh`, here `use`); without one, or with a mesh of one device, everything
here leaves arrays alone. What an array's axes mean is read off its name: `PARAMETERS` for parameters, and so for the
moments of optimisers, which carry the same names; the suffix of shapes for all else, as in `k_BxKvxdxL`.
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

from ppow_jax.config import require
from ppow_jax.mesh_shape import AXES, MeshShape

__all__ = ["AXES", "Mesh", "MeshShape"]

T = TypeVar("T")

# Logical axis -> mesh axes. One that these do not divide is left whole, and so is what is not named: window (K), tokens
# (T, S, L), head_dim (d), and the vocabulary of logits. Head axes are cut between heads only.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("data", "fsdp"),  # before experts, which see those of the whole expert axis
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "hidden": ("fsdp",),
    "experts": ("expert",),
}

# Parameters of target and drafter -> logical axes. In front of these an array may have stacked layers and experts.
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
_STACKED = "stacked"  # a path with this name in it: layers lie stacked along the first axis

# Letters of a shape suffix -> logical axes.
_LETTERS = {"B": "batch", "H": "heads", "Kv": "kv_heads"}
_SUFFIX = re.compile(r"(?:.*_)?([A-Z][a-z]?\d*(?:x(?:[A-Z][a-z]?|[a-z])\d*)*)")


def make_mesh(shape: MeshShape | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices`, by default all there are, of every process; without a shape all of them on data.

    Raises:
      UserError: the shape takes another number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = shape or MeshShape(data=len(devices))
    rule = f"takes {shape.devices} devices (the product), but there are {len(devices)}"
    require(shape.devices == len(devices), f"--mesh={shape}: {rule}")
    return jax.make_mesh(shape.sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def shape_of(mesh: Mesh) -> MeshShape:
    """How many devices each axis of a mesh has."""
    return MeshShape(**mesh.shape)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Programs inside of the `with` run on the mesh; on none, they run on the default device."""
    if mesh is None or mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def current() -> Mesh | None:
    """The mesh in use; None on a single device, and inside of programs, which know its sizes alone."""
    try:
        return jax.sharding.get_mesh() if in_use() else None
    except ValueError:  # JAX's word for "inside of a program"
        return None


def axis_sizes() -> dict[str, int]:
    """Of the mesh in use, inside and outside of programs; empty on a single device."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def in_use() -> bool:
    """Whether a mesh of several devices is, inside and outside of programs."""
    return bool(axis_sizes())


def spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], counts: Mapping[str, int]) -> P:
    """Logical axes of an array -> its PartitionSpec on a mesh of these sizes.

    counts: numbers of heads: an axis of H * d values is cut between heads or not at all.
    """
    cut: list[tuple[str, ...] | str | None] = []
    for axis, length in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis or "", ()) if sizes.get(name, 1) > 1)
        parts = math.prod(sizes[name] for name in names)
        fits = bool(names) and counts.get(axis, length) % parts == 0 and length % parts == 0
        cut.append((names if len(names) > 1 else names[0]) if fits else None)
    while cut and cut[-1] is None:  # as XLA spells the layout of results: equal layouts must be equal keys of caches
        cut.pop()
    return P(*cut)


def logical_axes(name: str, ndim: int, stacked: bool = False) -> tuple[str | None, ...]:
    """What the axes of an array of this name are; those of unknown arrays are None, that is whole."""
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
    """Shapes and dtypes with shardings: what programs are lowered from without arrays, and what is restored into."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh, config)
    )


def born(make: Callable[..., T], *args: Any, config: Any = None) -> T:
    """make(*args), compiled so that each device makes only what it holds of the result."""
    mesh = current()
    if mesh is None:
        return constrain(make(*args), config)
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *args), mesh, config))(*args)


def place(tree: T, config: Any = None) -> T:
    """Arrays of the host (the same on every process) or of devices, put where their names say."""
    mesh = current()
    if mesh is None:
        return tree
    return jax.tree.map(put, tree, shardings(tree, mesh, config))


def put(x: Any, where: NamedSharding) -> jax.Array:
    """One array under a sharding; of what the host holds, only what this process's devices need is copied."""
    if isinstance(x, jax.Array) and jax.process_count() == 1:
        return jax.device_put(x, where)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(x)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(x))
        return jax.jit(jax.random.wrap_key_data, out_shardings=where)(data)
    return jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__)


def put_parts(path: Sequence[str | int], shape: tuple[int, ...], read: Callable[[Any], np.ndarray]) -> jax.Array:
    """A parameter out of a file (see `weights.layout`), each piece of it read alone by the process that needs it."""
    axes = logical_axes(str(path[-1]), len(shape))
    where = NamedSharding(current(), spec(axes, shape, axis_sizes(), {}))
    return jax.make_array_from_callback(shape, where, read)


def like(tree: T) -> T:
    """Shapes and dtypes of arrays that lie somewhere, and where."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def fetch(tree: Any) -> Any:
    """The whole arrays as NumPy's, on every process; all of them have to ask."""
    mesh = current()
    if mesh is not None and not all(x.is_fully_addressable for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        tree = _replicate(tree, where=NamedSharding(mesh, P()))
    return jax.device_get(tree)


@functools.partial(jax.jit, static_argnames=("where",))
def _replicate(tree: Any, *, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), tree)


def constrain(tree: T, config: Any = None) -> T:
    """Inside a program: the same arrays, lying where their names say."""
    sizes = axis_sizes()
    if not sizes:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs(tree, sizes, config))


def pin(x: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a program: an array whose first axes are these logical ones; None, and those left out, stay whole."""
    sizes = axis_sizes()
    if not sizes:
        return x
    axes += (None,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes, {}))


def whole_logits(logits_BxxV: jax.Array) -> jax.Array:
    """Inside a program: logits [B, ..., V], made in parts of the vocabulary, then given whole to every device.

    Asked for the whole at once, XLA gathers the matrix that makes them, which is much larger.
    """
    between = (None,) * (logits_BxxV.ndim - 2)
    return pin(pin(logits_BxxV, "batch", *between, "vocab"), "batch")


def parts(axis: str, length: int) -> int:
    """Into how many equal parts a logical axis of this length is cut by the mesh in use."""
    sizes = axis_sizes()
    number = math.prod(sizes.get(name, 1) for name in RULES[axis])
    return number if length % number == 0 else 1
