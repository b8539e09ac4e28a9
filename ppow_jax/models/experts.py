"""Mixture of experts: every token goes to its best experts, none is dropped, all shapes are fixed.

The (token, expert) pairs are sorted by expert and cut into blocks that belong to one expert each. A loop over the
non-empty blocks multiplies each with its expert's matrices, so time and memory traffic scale with the number of experts
touched, not with all experts: this matters when a window of a few tokens is verified.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models.families import Experts
from ppow_jax.models.layers import linear, swiglu

Array = jax.Array
BLOCK = 128  # maximum rows per block


class Routes(NamedTuple):
    """expert_MxX: the X experts of each token, best first. weight_MxX: their weights, float32."""

    expert_MxX: Array
    weight_MxX: Array


def route(x_MxD: Array, router_ExD: Array, experts: Experts) -> Routes:
    """Softmax over all experts in float32, then the best `per_token`; ties go to the lower number."""
    share_MxE = jax.nn.softmax(linear(x_MxD, router_ExD), axis=-1)
    weight_MxX, expert_MxX = jax.lax.top_k(share_MxE, experts.per_token)
    if experts.normalize:
        weight_MxX /= weight_MxX.sum(-1, keepdims=True)
    return Routes(expert_MxX, weight_MxX)


def block_rows(N: int, E: int) -> int:
    """Rows per block, for N pairs and E experts: about the load of one expert."""
    return min(BLOCK, max(8, 1 << (N // E).bit_length()))


def mixture(layer: dict[str, Any], x_MxD: Array, routes: Routes, first: Array | int = 0) -> Array:
    """sum_i weight_i expert_i(x), float32 [M, D].

    layer: gate_proj, up_proj [E, I, D] and down_proj [E, D, I]. They may hold a part of the experts, from number
    `first` on, as on one device of several: the result is then the contribution of these. Or they may hold those of N
    layers, [N, E, ...], of which `number` selects one.
    """
    M, X = routes.expert_MxX.shape
    E, N = layer["gate_proj"].shape[-3], M * X
    S = block_rows(N, E)
    number_N = routes.expert_MxX.reshape(N) - first
    number_N = jnp.where((number_N >= 0) & (number_N < E), number_N, E)  # E: not an expert of this part
    order_N = jnp.argsort(number_N, stable=True)

    # Expert e has the sorted pairs start_e .. start_e + size_e - 1, in ceil(size_e / S) blocks that end at block end_e.
    size_E = jnp.zeros(E + 1, jnp.int32).at[number_N].add(1)[:E]
    start_E = jnp.cumsum(size_E) - size_E
    blocks_E = -(-size_E // S)
    end_E = jnp.cumsum(blocks_E)

    def one_block(i: Array, y_MxD: Array) -> Array:
        e = jnp.searchsorted(end_E, i, side="right")
        offset = (i - (end_E[e] - blocks_E[e])) * S + jnp.arange(S)
        inside_S = offset < size_E[e]
        pair_S = order_N[jnp.minimum(start_E[e] + offset, N - 1)]
        token_S = jnp.where(inside_S, pair_S // X, M)  # entries past the end are dropped
        weight_S = routes.weight_MxX.reshape(N)[pair_S]
        gate, up, down = (_matrix(layer, name, e) for name in _MATRICES)
        out_SxD = swiglu(x_MxD[pair_S // X], gate, up, down) * weight_S[:, None]
        return y_MxD.at[token_S].add(out_SxD, mode="drop")

    return jax.lax.fori_loop(0, end_E[-1], one_block, jnp.zeros(x_MxD.shape, jnp.float32))


_MATRICES = ("gate_proj", "up_proj", "down_proj")


def _matrix(layer: dict[str, Any], name: str, e: Array) -> Array:
    """Slices an expert's matrix out of the stacked array."""
    w = layer[name]
    where = (e,) if w.ndim == 3 else (layer["number"], e)
    found = jax.lax.dynamic_slice(w, (*where, 0, 0), (*(1 for _ in where), *w.shape[-2:]))
    return found.reshape(w.shape[-2:])


def spread_mixture(layer: dict[str, Any], x_MxD: Array, routes: Routes) -> Array:
    """`mixture` on the mesh in use: every device applies its shard of the experts, and of their width.

    Tokens are gathered along the expert axis before, and the results of its devices are summed after, in their dtype.
    """
    sizes = sharding.axis_sizes()
    if not sizes:
        return mixture(layer, x_MxD, routes)
    used = {name: layer[name] for name in (*_MATRICES, "number") if name in layer}
    lying = {}
    for name, w in used.items():
        axes = sharding.logical_axes(name, w.ndim, stacked=w.ndim == 4)
        kept = [axis if axis in ("experts", "mlp") else None for axis in axes]  # fsdp: gathered, as in every layer
        lying[name] = sharding.spec(kept, w.shape, sizes, {})
    rows = sharding.spec(("tokens", None), x_MxD.shape, sizes, {})
    summed = [axis for axis in ("expert", "tensor") if axis in lying["gate_proj"]]

    def here(used: dict[str, Any], x_MxD: Array, routes: Routes) -> Array:
        first = jax.lax.axis_index("expert") * used["gate_proj"].shape[-3] if "expert" in summed else 0
        return jax.lax.psum(mixture(used, x_MxD, routes, first).astype(x_MxD.dtype), summed)

    spread = jax.shard_map(here, in_specs=(lying, rows, rows), out_specs=rows, check_vma=False)
    return spread(used, x_MxD, routes)
