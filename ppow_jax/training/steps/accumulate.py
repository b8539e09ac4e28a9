"""Processing of a batch in microbatches, one after the other, with the results of the whole batch.

Functions return sums, not means, over the rows that they are given; sums add up exactly, and are divided by counts of
the whole batch. Microbatches are cut so that each has rows of every device.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ppow_jax import sharding

T = TypeVar("T")


def split(tree: T, number: int) -> T:
    """Reshapes every leaf [B, ...] to [number, B / number, ...]; each microbatch has rows of every device's part."""

    def cut(x):
        parts = sharding.parts("batch", x.shape[0])
        pieces = x.reshape(parts, number, x.shape[0] // parts // number, *x.shape[1:])
        return _lying(jnp.moveaxis(pieces, 1, 0).reshape(number, -1, *x.shape[1:]), 1)

    return jax.tree.map(cut, tree)


def join(tree: T) -> T:
    """The inverse of `split`: [number, B / number, ...] -> [B, ...], rows in their order."""

    def mend(x):
        number, rows = x.shape[:2]
        parts = sharding.parts("batch", number * rows)
        pieces = jnp.moveaxis(x.reshape(number, parts, rows // parts, *x.shape[2:]), 0, 1)
        return _lying(pieces.reshape(number * rows, *x.shape[2:]), 0)

    return jax.tree.map(mend, tree)


def _lying(x: jax.Array, axis: int) -> jax.Array:
    """Shards this axis, the rows, over the devices."""
    return sharding.pin(x, *("batch" if a == axis else None for a in range(x.ndim)))


def each(function: Callable[[T], Any], tree: T, number: int) -> Any:
    """Computes function(tree), whose leaves are [B, ...] on both sides, one microbatch at a time."""
    if number == 1:
        return function(tree)
    return join(jax.lax.map(function, split(tree, number)))


def summed(function: Callable[[T], Any], tree: T, number: int) -> Any:
    """Sum of function(microbatch) over the microbatches; the function's results are sums over rows."""
    if number == 1:
        return function(tree)
    pieces = split(tree, number)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    )

    def add(total, piece):
        return jax.tree.map(jnp.add, total, function(piece)), None

    return jax.lax.scan(add, zero, pieces)[0]
