"""Scale factor of a root-mean-square norm, on a CPU: the result of a row does not depend on the other rows.

XLA sums a single row in a different order than many rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def factor(x: Array, eps: float) -> Array:
    """1 / sqrt(mean of x^2 over the last axis + eps): float32 [..., 1] of float32 [..., D].

    Call it only in programs for CPUs, and only if `library.available()`.
    """
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], 1), jnp.float32)
    return jax.ffi.ffi_call("ppow_norm_factor", shape, vmap_method="sequential")(x, eps=np.float32(eps))


def _forward(x, eps):
    factor_ = factor(x, eps)
    return factor_, (x, factor_)


def _backward(_, saved, g):
    x, factor_ = saved
    return (-(factor_**3) * x / x.shape[-1] * g,)


factor.defvjp(_forward, _backward)
