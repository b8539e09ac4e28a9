"""The confidence head: how likely a draft is accepted, from what the drafter's step put out.

One affine map of the normed output to a logit. It learns the overlap sum_v min(P(v), Q(v)) of the target's and the
drafter's laws, the chance that a token drawn from Q is accepted (Leviathan et al., 2211.17192), and is known before
that token is drawn. A drafter without one works as ever.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

NAMES = WEIGHT, BIAS = "confidence_weight", "confidence_bias"  # among a drafter's parameters


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the parameters, for outputs of E = width numbers."""
    return {WEIGHT: (width,), BIAS: ()}


def init(width: int) -> dict[str, Array]:
    """A head that says one half to all."""
    return {name: jnp.zeros(shape) for name, shape in shapes(width).items()}


def has_head(params: Mapping[str, Any]) -> bool:
    """Whether a drafter's parameters hold a confidence head."""
    return WEIGHT in params


def logit(params: Mapping[str, Any], hidden: Array) -> Array:
    """[...] float32, of normed outputs [..., E] of a draft step."""
    weight, bias = (params[name].astype(jnp.float32) for name in NAMES)
    return jnp.einsum("...e,e->...", hidden, weight) + bias


def log_confidence(params: Mapping[str, Any], hidden: Array) -> Array:
    """[...]: the log of the chance that a token drafted from normed outputs [..., E] is accepted."""
    return jax.nn.log_sigmoid(logit(params, hidden))
