"""The EAGLE-3 drafter: one decoder layer over (target feature, embedding of the next token).

Index i of the drafter holds the feature g_i and the embedding of token i+1, and predicts token i+2. A draft
window continues from an *anchor* index: step 0 sees the keys of all indices up to the anchor; step s adds one key
per earlier step, at the same index, in one joint softmax. Training-time test, rollouts and decoding are this same
`step`, with M anchors per row (EAGLE-3, 2503.01840; EAGLE-3.1 norms, 2605.09992).
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.models.layers import (
    KV,
    Keys,
    heads,
    linear,
    linear_bf16,
    query_blocks,
    rms_norm,
    rope,
    rotation,
    scores,
    swiglu,
    weighted_values,
)

Array = jax.Array


class Drafter(flax.struct.PyTreeNode):
    """A drafter with its vocabulary.

    params: see `init`. target_ids_W: int32, the target's id of each draft id, ascending.
    mixed: multiply float32 parameters in bfloat16, in both passes (for training).
    """

    config: DrafterConfig = flax.struct.field(pytree_node=False)
    params: dict
    target_ids_W: Array
    mixed: bool = flax.struct.field(pytree_node=False, default=False)

    def product(self, x: Array, name: str) -> Array:
        """x times a matrix of the drafter."""
        return self.linear(x, self.params[name])

    @property
    def linear(self):
        """The matrix product of the drafter's precision."""
        return linear_bf16 if self.mixed else linear

    def rotation(self, position_BxM: Array) -> tuple[Array, Array]:
        """The rotary embedding of positions; see `layers.rotation`."""
        return rotation(position_BxM, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def norm(self, x: Array, name: str) -> Array:
        """Root-mean-square norm with one of the drafter's scales."""
        return rms_norm(x, self.params[name], self.config.rms_norm_eps)


def fuse(drafter: Drafter, features_BxTxF: Array) -> Array:
    """The three target features -> g_BxTxE (fc; with EAGLE-3.1, each feature is normed first)."""
    if drafter.config.fc_norm:
        three = features_BxTxF.reshape(*features_BxTxF.shape[:-1], 3, -1)
        features_BxTxF = drafter.norm(three, "fc_norm").reshape(features_BxTxF.shape)
    return drafter.product(features_BxTxF, "fc")


def inputs(drafter: Drafter, g_BxMxE: Array, embed_BxMxE: Array) -> Array:
    """What attention sees: [normed embedding, normed feature], 2E wide."""
    return jnp.concatenate([drafter.norm(embed_BxMxE, "input_norm"), drafter.norm(g_BxMxE, "hidden_norm")], -1)


def keys(drafter: Drafter, a_BxMx2E: Array, position_BxM: Array) -> tuple[Array, Array]:
    """The (key, value) of each index, [B, M, Kv, d] each, rotated to its position."""
    d = drafter.config.head_dim
    k = rope(heads(drafter.product(a_BxMx2E, "k_proj"), d), drafter.rotation(position_BxM))
    return k, heads(drafter.product(a_BxMx2E, "v_proj"), d)


def prefix_keys(drafter: Drafter, g_BxTxE: Array, embed_BxTxE: Array, position_BxT: Array) -> KV:
    """Keys of indices that hold true target features, laid out as a cache."""
    return KV.of(*keys(drafter, inputs(drafter, g_BxTxE, embed_BxTxE), position_BxT))


def step(
    drafter: Drafter,
    g_BxMxE: Array,
    embed_BxMxE: Array,
    position_BxM: Array,
    prefix: Sequence[Keys],
    chain: tuple = (),
    first: bool = True,
) -> tuple[Array, tuple]:
    """One draft step of M windows per row -> (out_BxMxE before the final norm, the chain with this step's keys).

    position_BxM: anchor index + step. prefix: blocks of keys of the indices up to the anchor (mask_BxMxL). The first
    step's own key is the anchor's, which the prefix holds already; later steps add theirs to the chain.
    """
    a_BxMx2E = inputs(drafter, g_BxMxE, embed_BxMxE)
    if not first:
        chain = (*chain, keys(drafter, a_BxMx2E, position_BxM))
    q = heads(drafter.product(a_BxMx2E, "q_proj"), drafter.config.head_dim)
    q = rope(q, drafter.rotation(position_BxM))
    attended_BxMxE = drafter.product(_attend(q, prefix, chain), "o_proj")
    residual = drafter.norm(g_BxMxE, "hidden_norm") if drafter.config.norm_before_residual else g_BxMxE
    y_BxMxE = residual + attended_BxMxE
    p = drafter.params
    h_BxMxE = drafter.norm(y_BxMxE, "post_norm")
    return y_BxMxE + swiglu(h_BxMxE, p["gate_proj"], p["up_proj"], p["down_proj"], drafter.linear), chain


def _attend(q_BxMxHxd: Array, prefix: Sequence[Keys], chain: tuple) -> Array:
    """Joint softmax over the prefix blocks and the window's own chain: [B, M, H*d]."""
    outs = []
    for rows in query_blocks(q_BxMxHxd.shape[1]):
        blocks = [Keys(kv, mask_BxMxL[:, rows]) for kv, mask_BxMxL in prefix]
        outs.append(_attend_block(q_BxMxHxd[:, rows], blocks, [(k[:, rows], v[:, rows]) for k, v in chain]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _attend_block(q_BxMxHxd: Array, prefix: Sequence[Keys], chain: Sequence) -> Array:
    B, M, H, d = q_BxMxHxd.shape
    Kv = prefix[0].kv.k_BxKvxdxL.shape[1]
    q = q_BxMxHxd.reshape(B, M, Kv, H // Kv, d)
    parts = [scores(q_BxMxHxd, block) for block in prefix]  # each [B, Kv, g, M, L]
    if chain:
        own = jnp.stack([jnp.sum(q * k[:, :, :, None], -1) for k, _ in chain], -1) * d**-0.5  # [B, M, Kv, g, R]
        parts.append(own.transpose(0, 2, 3, 1, 4))
    top = functools.reduce(jnp.maximum, [part.max(-1) for part in parts])[..., None]
    parts = [jnp.exp(part - jax.lax.stop_gradient(top)) for part in parts]
    total_BxKvxgxM = functools.reduce(jnp.add, [part.sum(-1) for part in parts])
    total_BxMxH = total_BxKvxgxM.transpose(0, 3, 1, 2).reshape(B, M, H)
    values = [weighted_values(part, block.kv.v_BxKvxLxd) for part, block in zip(parts, prefix, strict=False)]
    out = functools.reduce(jnp.add, values).reshape(B, M, Kv, H // Kv, d)
    for r, (_, v) in enumerate(chain):
        out += parts[-1][..., r].transpose(0, 3, 1, 2)[..., None] * v[:, :, :, None]
    return (out.reshape(B, M, H, d) / total_BxMxH[..., None]).reshape(B, M, H * d)


def feed(drafter: Drafter, out_BxMxE: Array) -> Array:
    """The next step's feature: the raw output, or the normed one in EAGLE-3.1."""
    return drafter.norm(out_BxMxE, "norm") if drafter.config.fc_norm else out_BxMxE


def logits(drafter: Drafter, out: Array) -> Array:
    """Logits [..., W] over the draft vocabulary, float32."""
    return drafter.product(drafter.norm(out, "norm"), "lm_head")


def init(key: Array, config: DrafterConfig, scale: float = 0.02) -> dict:
    """Random float32 parameters (see `training.initialise` for the start from the target's own layers)."""
    E, D, d, width = config.hidden_size, config.target_hidden_size, config.head_dim, config.intermediate_size
    shapes = {
        "fc": (E, 3 * D),
        "q_proj": (config.num_heads * d, 2 * E),
        "k_proj": (config.num_kv_heads * d, 2 * E),
        "v_proj": (config.num_kv_heads * d, 2 * E),
        "o_proj": (E, config.num_heads * d),
        "gate_proj": (width, E),
        "up_proj": (width, E),
        "down_proj": (E, width),
        "lm_head": (config.draft_vocab_size, E),
    }
    params = {
        name: jax.random.normal(k, shape) * scale
        for k, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }
    params |= {name: jnp.ones(E) for name in ("input_norm", "hidden_norm", "post_norm", "norm")}
    return params | ({"fc_norm": jnp.ones((3, D))} if config.fc_norm else {})
