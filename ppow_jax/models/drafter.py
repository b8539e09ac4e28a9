"""The EAGLE-3 drafter: a decoder layer over (target feature, embedding of the next token), rarely plain ones above it.

Index i of the drafter holds the feature g_i and the embedding of token i+1, and predicts token i+2. A draft
window continues from an *anchor* index: step 0 sees the keys of all indices up to the anchor; step s adds one key
per earlier step, at the same index, in one joint softmax. Training-time test, rollouts and decoding all use this
`step`, with M anchors per row (EAGLE-3, 2503.01840; EAGLE-3.1 norms, 2605.09992).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.models import cache, precision
from ppow_jax.models.drafter_config import DrafterConfig, is_vector, layer_name, parameter_shapes
from ppow_jax.models.layers import (
    KV,
    Keys,
    Product,
    attention,
    heads,
    linear,
    linear_bf16,
    project,
    project_bf16,
    rms_norm,
    rope,
    rotation,
    rows_of,
    swiglu,
)
from ppow_jax.models.window_attention import attend

Array = jax.Array
Layers = tuple[tuple[Array, Array], ...]  # (key, value) [B, M, Kv, d] of one step, a pair per layer


class Prefix(NamedTuple):
    """One block of the drafter's keys of earlier indices: per layer a `KV` of length L, and each window's mask."""

    kv: tuple[KV, ...]
    mask_BxMxL: Array

# Policies of `jax.checkpoint`. none stores everything; dots stores the products with parameters and recomputes
# attention; full stores only the inputs of a step.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class DrafterSpec(flax.struct.PyTreeNode):
    """A drafter without its parameters, which a training step takes from its state; fields: see `Drafter`."""

    config: DrafterConfig = flax.struct.field(pytree_node=False)
    target_ids_W: Array
    compute_dtype: str | None = flax.struct.field(pytree_node=False, default=None)
    embed_VxE: Array | None = None
    remat: str = flax.struct.field(pytree_node=False, default="none")

    def with_params(self, params: dict[str, Any]) -> "Drafter":
        """The drafter with these parameters."""
        return Drafter(self.config, params, self.target_ids_W, self.compute_dtype, self.embed_VxE, self.remat)


class Drafter(flax.struct.PyTreeNode):
    """A drafter with its vocabulary.

    params: see `drafter_config.parameter_shapes`. target_ids_W: int32, the target id of each draft id, ascending.
    embed_VxE: the drafter's own embedding, frozen; None if it uses the target's. compute_dtype: that of products with
    float32 parameters, in both passes (for training); None: the parameters' own. remat: recomputation in the backward
    pass, see REMAT.
    """

    config: DrafterConfig = flax.struct.field(pytree_node=False)
    params: dict[str, Any]
    target_ids_W: Array
    compute_dtype: str | None = flax.struct.field(pytree_node=False, default=None)
    embed_VxE: Array | None = None
    remat: str = flax.struct.field(pytree_node=False, default="none")

    @property
    def spec(self) -> DrafterSpec:
        """Everything but the parameters."""
        return DrafterSpec(self.config, self.target_ids_W, self.compute_dtype, self.embed_VxE, self.remat)

    def product(self, x: Array, name: str, layer: int = 0) -> Array:
        """x times a matrix of the drafter, plus its bias where it has one, in the dtype of x."""
        y = self.project(x, self.params[layer_name(layer, name)])
        bias = self.params.get(layer_name(layer, name.removesuffix("proj") + "bias"))
        return y if bias is None else (y + bias.astype(jnp.float32)).astype(y.dtype)

    @property
    def linear(self) -> Product:
        """Matrix product in the drafter's compute dtype, with a float32 result."""
        return linear_bf16 if self.compute_dtype == "bfloat16" else linear

    @property
    def project(self) -> Product:
        """Matrix product in the drafter's compute dtype; the result has the dtype of the input."""
        return project_bf16 if self.compute_dtype == "bfloat16" else project

    @property
    def matrices(self) -> Any:
        """Dtype in which the drafter's matrices multiply."""
        return jnp.dtype(self.compute_dtype or self.params["fc"].dtype)

    def enter(self, x: Array) -> Array:
        """Features or embeddings, in the dtype of the drafter's activations."""
        return x.astype(precision.current().activation(self.matrices))

    def rotation(self, position_BxM: Array) -> tuple[Array, Array]:
        """The rotary embedding of positions; see `layers.rotation`."""
        return rotation(position_BxM, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def norm(self, x: Array, name: str, layer: int = 0) -> Array:
        """Root-mean-square norm with one of the drafter's scales."""
        return rms_norm(x, self.params[layer_name(layer, name)], self.config.rms_norm_eps)

    def embed(self, target_embed_VxD: Array, tokens: Array) -> Array:
        """Embeddings [..., E] of tokens: the drafter's own if it has them, otherwise the target's."""
        return self.enter(rows_of(target_embed_VxD if self.embed_VxE is None else self.embed_VxE, tokens))


def fuse(drafter: Drafter, features_BxTxF: Array) -> Array:
    """The three target features -> g_BxTxE: fc, after a norm of each (EAGLE-3.1) or of all at once where it has one."""
    features_BxTxF = drafter.enter(features_BxTxF)
    if drafter.config.fc_norm:
        three = features_BxTxF.reshape(*features_BxTxF.shape[:-1], 3, -1)
        features_BxTxF = drafter.norm(three, "fc_norm").reshape(features_BxTxF.shape)
    if drafter.config.norm_before_fc:
        features_BxTxF = drafter.norm(features_BxTxF, "fc_norm")
    return drafter.product(features_BxTxF, "fc")


def inputs(drafter: Drafter, g_BxMxE: Array, embed_BxMxE: Array) -> tuple[Array, Array]:
    """(input of the first layer's attention: [normed embedding, normed feature], 2E wide; its residual)."""
    normed_BxMxE = drafter.norm(g_BxMxE, "hidden_norm")
    a_BxMx2E = jnp.concatenate([drafter.norm(embed_BxMxE, "input_norm"), normed_BxMxE], -1)
    return a_BxMx2E, normed_BxMxE if drafter.config.norm_before_residual else g_BxMxE


def prefix_keys(
    drafter: Drafter,
    g_BxTxE: Array,
    embed_BxTxE: Array,
    position_BxT: Array,
    mask_BxTxT: Array | None = None,
    contexts: Sequence[Prefix] = (),
) -> tuple[KV, ...]:
    """Keys of indices that hold true target features, laid out as a cache, for each layer.

    Keys above the first layer depend on outputs: mask_BxTxT (indices that each index attends to, itself and earlier
    ones) and contexts (keys of earlier indices) only matter for drafters of several layers.
    """
    num_layers = drafter.config.num_layers
    rotary = drafter.rotation(position_BxT)
    a, residual = inputs(drafter, g_BxTxE, embed_BxTxE)
    result = []
    for n in range(num_layers):
        own = KV.of(*_keys(drafter, n, a, rotary))
        result.append(own)
        if n + 1 < num_layers:
            blocks = [Keys(block.kv[n], block.mask_BxMxL) for block in contexts]
            out_BxTxHxd = attention(_queries(drafter, n, a, rotary), blocks, Keys(own, mask_BxTxT))
            residual = _finish(drafter, n, residual, out_BxTxHxd.reshape(*a.shape[:2], -1))
            a = drafter.norm(residual, "input_norm", n + 1)
    return tuple(result)


def empty_cache(drafter: Drafter, B: int, L: int) -> tuple[KV, ...]:
    """Caches for L indices, one per layer."""
    config, dtype = drafter.config, precision.current().keys(drafter.matrices)
    return tuple(cache.empty(B, config.num_kv_heads, L, config.head_dim, dtype) for _ in range(config.num_layers))


def step(
    drafter: Drafter,
    g_BxMxE: Array,
    embed_BxMxE: Array,
    position_BxM: Array,
    prefix: Sequence[Prefix],
    chain: tuple[Layers, ...] = (),
    first: bool = True,
) -> tuple[Array, tuple[Layers, ...]]:
    """One draft step of M windows per row -> (out_BxMxE before the final norm, the chain with this step's keys).

    position_BxM: anchor index + step. prefix: blocks of keys of the indices up to the anchor (mask_BxMxL). The first
    step's own key is the anchor's, which the prefix already holds; later steps append theirs to the chain.
    """
    once: Callable[..., Any] = functools.partial(_step, first=first)
    if drafter.remat != "none":
        once = jax.checkpoint(once, policy=REMAT[drafter.remat])
    return once(drafter, g_BxMxE, embed_BxMxE, position_BxM, prefix, chain)


def _step(
    drafter: Drafter, g_BxMxE: Array, embed_BxMxE: Array, position_BxM: Array, prefix: Sequence[Prefix],
    chain: tuple[Layers, ...], *, first: bool,
) -> tuple[Array, tuple[Layers, ...]]:
    rotary = drafter.rotation(position_BxM)
    a, residual = inputs(drafter, g_BxMxE, embed_BxMxE)
    mine: Layers = ()
    for n in range(drafter.config.num_layers):
        own = [layers[n] for layers in chain]
        if not first:
            mine = (*mine, _keys(drafter, n, a, rotary))
            own.append(mine[n])
        blocks = [Keys(block.kv[n], block.mask_BxMxL) for block in prefix]
        residual = _finish(drafter, n, residual, attend(_queries(drafter, n, a, rotary), blocks, own))
        if n + 1 < drafter.config.num_layers:
            a = drafter.norm(residual, "input_norm", n + 1)
    return residual, chain if first else (*chain, mine)


def _queries(drafter: Drafter, layer: int, a: Array, rotary: tuple[Array, Array]) -> Array:
    q = heads(drafter.product(a, "q_proj", layer), drafter.config.head_dim)
    return rope(drafter.norm(q, "q_norm", layer) if drafter.config.qk_norm else q, rotary)


def _keys(drafter: Drafter, layer: int, a: Array, rotary: tuple[Array, Array]) -> tuple[Array, Array]:
    """The (key, value) of each index, [B, M, Kv, d] each, rotated to its position."""
    d = drafter.config.head_dim
    k = heads(drafter.product(a, "k_proj", layer), d)
    k = drafter.norm(k, "k_norm", layer) if drafter.config.qk_norm else k
    return rope(k, rotary), heads(drafter.product(a, "v_proj", layer), d)


def _finish(drafter: Drafter, layer: int, residual_BxMxE: Array, attended_BxMxF: Array) -> Array:
    """Output of a layer, from its attention: the projection, then the MLP, each added to the residual."""
    y_BxMxE = residual_BxMxE + drafter.product(attended_BxMxF, "o_proj", layer)
    gate, up, down = (drafter.params[layer_name(layer, name)] for name in ("gate_proj", "up_proj", "down_proj"))
    return y_BxMxE + swiglu(drafter.norm(y_BxMxE, "post_norm", layer), gate, up, down, drafter.project)


def feed(drafter: Drafter, out_BxMxE: Array) -> Array:
    """The next step's feature: the raw output, or the normed one in EAGLE-3.1."""
    return drafter.norm(out_BxMxE, "norm") if drafter.config.norm_output else out_BxMxE


class Anchors(NamedTuple):
    """Starting points of M windows per row: fused target features and index of each, and the keys up to it."""

    g_BxMxE: Array
    position_BxM: Array
    keys: list[Prefix]


def unroll(drafter: Drafter, embed_VxD: Array, anchors: Anchors, token_BxM: Iterable[Array]) -> Iterator[Array]:
    """Drafts along given tokens, one draft step for each of token_BxM -> the steps' outputs out_BxMxE.

    The first token is the one after the anchor. From the second step on, features are the drafter's own outputs.
    """
    g_BxMxE = anchors.g_BxMxE
    chain: tuple[Any, ...] = ()
    for s, token in enumerate(token_BxM):
        embed_BxMxE = drafter.embed(embed_VxD, token)
        position_BxM = anchors.position_BxM + s
        out, chain = step(drafter, g_BxMxE, embed_BxMxE, position_BxM, anchors.keys, chain, first=s == 0)
        g_BxMxE = feed(drafter, out)
        yield out


def logits(drafter: Drafter, out: Array) -> Array:
    """Logits [..., W] over the draft vocabulary, float32."""
    return drafter.linear(drafter.norm(out, "norm"), drafter.params["lm_head"])


def cast(drafter: Drafter, dtype: str) -> Drafter:
    """Casts a drafter for decoding: matrices in `dtype`, norms and biases in float32."""
    params = {k: v if is_vector(k) else jnp.asarray(v, jnp.dtype(dtype)) for k, v in drafter.params.items()}
    return drafter.replace(params=params, compute_dtype=None)


def init(key: Array, config: DrafterConfig, scale: float = 0.02) -> dict[str, Any]:
    """Random float32 parameters (see `training.initialise` for initialisation from the target's own layers)."""
    shapes = parameter_shapes(config)
    matrices = [name for name in shapes if not is_vector(name)]
    params = {
        name: jax.random.normal(k, shapes[name]) * scale
        for k, name in zip(jax.random.split(key, len(matrices)), matrices, strict=True)
    }
    fill = {name: jnp.ones if name.endswith("norm") else jnp.zeros for name in shapes if name not in params}
    return params | {name: make(shapes[name]) for name, make in fill.items()}
