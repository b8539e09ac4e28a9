"""Root-mean-square norm on a CPU, the same for a row whatever rows are beside it; XLA sums one row in another order."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rms_norm(x: Array, scale_D: Array, eps: float) -> Array:
    """x / root-mean-square over the last axis, times scale -> float32 [..., D].

    Call it only in programs for CPUs, and only if `library.available()`.
    """
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    call = jax.ffi.ffi_call("ppow_norm", shape, vmap_method="sequential")
    return call(x.astype(jnp.float32), scale_D.astype(jnp.float32), eps=np.float32(eps))
