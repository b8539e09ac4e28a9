"""Number of experts that a verification touches, whose weights a pass over a few tokens has to read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def unique_experts(experts: Sequence[Array], number: int) -> Array:
    """Counts the distinct experts that each row's tokens are routed to: float32 [B], the mean over layers.

    Args:
      experts: for each layer with experts, the experts of each token, [B, S, experts per token].
      number: experts per layer.
    """

    def of_layer(expert_BxSxX: Array) -> Array:
        row_Bx1x1 = jnp.arange(expert_BxSxX.shape[0])[:, None, None]
        touched_BxE = jnp.zeros((expert_BxSxX.shape[0], number), bool).at[row_Bx1x1, expert_BxSxX].set(True)
        return touched_BxE.sum(-1)

    return jnp.mean(jnp.stack([of_layer(x) for x in experts]).astype(jnp.float32), axis=0)
