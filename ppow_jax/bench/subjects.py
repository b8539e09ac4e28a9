"""Models to measure: a named target with its drafter, or random weights of a published shape."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.models import stack, transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import is_vector, parameter_shapes
from ppow_jax.planning import published
from ppow_jax.training import initialise
from ppow_jax.weights import loading, targets
from ppow_jax.weights.targets import DTYPES, Target

log = logging.getLogger(__name__)
SCALE = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True)
class Subject:
    """A target and its drafter, both with matrices in the dtype of decoding. random: their weights are."""

    target: Target
    drafter: Drafter
    random: bool


def load(name: str, drafter: str | None, dtype: str, random_weights: bool, vocabulary: int, scan: bool) -> Subject:
    """A target with its drafter, or with a random one of `vocabulary` tokens if it has none.

    random_weights: of the shape that `planning.published` knows by this name. scan: stack the target's layers.
    Raises UserError for targets that do not exist.
    """
    if random_weights:
        target = random_target(name, dtype, scan)
        return Subject(target, random_drafter(target, dtype, vocabulary), True)
    target = targets.load(name, dtype)
    directory = loading.find_drafter(drafter, name)
    found = loading.load_drafter(directory, target, dtype) if directory else None
    if found is None:
        log.info("%s has no drafter here: a random one is measured", name)
        found = random_drafter(target, dtype, vocabulary)
    return Subject(targets.stacked(target) if scan else target, found, directory is None)


def random_target(name: str, dtype: str, scan: bool) -> Target:
    """A target of a published shape with random weights, made on the devices; it never ends an answer."""
    config = published.read(name)

    def make() -> dict:
        params = transformer.init(jax.random.key(0), config, DTYPES[dtype])
        return stack.stack(params, config) if scan else params

    return Target(name, dataclasses.replace(config, eos_token_ids=()), _fill(jax.eval_shape(make), config), None)


def random_drafter(target: Target, dtype: str, vocabulary: int) -> Drafter:
    """A drafter of the target's width with random weights, whose vocabulary is spread over the target's."""
    config = initialise.drafter_config(target.config, min(vocabulary, target.config.vocab_size))
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if is_vector(name) else DTYPES[dtype])
        for name, shape in parameter_shapes(config).items()
    }
    ids_W = np.linspace(0, config.vocab_size - 1, config.draft_vocab_size).astype(np.int32)
    return Drafter(config, _fill(shapes, config), sharding.place(jnp.asarray(ids_W)))


def _fill(shapes: Any, config: Any) -> Any:
    """Arrays for a tree of shapes, one at a time and each on its devices: norms 1, all others random."""
    mesh = sharding.current()
    places = None if mesh is None else jax.tree.leaves(sharding.shardings(shapes, mesh, config))
    leaves = []
    for n, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(shapes)[0]):
        ones = str(getattr(path[-1], "key", "")).endswith("norm")
        where = None if places is None else places[n]
        leaves.append(_made(where, leaf.shape, leaf.dtype, ones)(np.uint32(n)))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.cache
def _made(where: Any, shape: tuple[int, ...], dtype: Any, ones: bool) -> Any:
    def make(seed):
        if ones:
            return jnp.ones(shape, dtype)
        return (SCALE * jax.random.normal(jax.random.key(seed), shape, dtype)).astype(dtype)

    return jax.jit(make, out_shardings=where)
