"""What the confidence head learns: the overlap of the target's and the drafter's laws."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from ppow_jax.models import confidence

Array = jax.Array


def confidence_loss(params: Mapping[str, Any], hidden: Array, overlap: Array) -> Array:
    """[...]: the Kullback-Leibler divergence, in nats, of the head's chance from overlap [...] = sum_v min(P, Q).

    hidden: normed outputs [..., E] of a draft step. The head alone learns from it: they and the overlap are constants.
    """
    z = confidence.logit(params, jax.lax.stop_gradient(hidden))
    a = jnp.clip(jax.lax.stop_gradient(overlap), 0.0, 1.0)
    cross_entropy = -a * jax.nn.log_sigmoid(z) - (1 - a) * jax.nn.log_sigmoid(-z)
    return cross_entropy + xlogy(a, a) + xlogy(1 - a, 1 - a)
