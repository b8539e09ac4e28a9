"""Training state that is carried from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ppow_jax import sharding

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """step (int32), the drafter's float32 parameters, the optimizer's state, the updates skipped so far (int32),
    and the exponential average of the parameters, None where none is kept.
    """

    step: Array
    params: dict
    opt_state: Any
    skipped: Array
    average: dict | None = None

    @classmethod
    def create(
        cls, params: dict, optimizer: optax.GradientTransformation, config: Any = None, averaged: bool = False
    ) -> "TrainState":
        """Step 0, with the parameters copied to float32. config: the drafter's, for its placement on a mesh.

        averaged: keep an exponential average of the parameters, initialised to them.
        """

        def start(params: dict) -> "TrainState":
            params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
            step, skipped = jnp.zeros((2, 1), jnp.int32)  # two buffers, because both are donated
            average = jax.tree.map(jnp.copy, params) if averaged else None
            return cls(step[0], params, optimizer.init(params), skipped[0], average)

        return sharding.born(start, params, config=config)

    @property
    def best_params(self) -> dict:
        """Parameters that are evaluated and exported: the average if there is one."""
        return self.params if self.average is None else self.average

    def advance(self, params: dict, opt_state: Any, *values: Array, decay: float = 0.0) -> "TrainState":
        """The state after a step; an update is skipped, and counted, where a value or a parameter is not finite.

        values: scalars to check, such as loss and gradient norm. decay: decay of the average. Uses selects inside the
        step instead of a branch on the host.
        """
        finite = jnp.isfinite(jnp.stack([*values, optax.tree.norm(params)])).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (self.params, self.opt_state)
        )
        average = self.average
        if average is not None:
            average = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, average, params)
        return TrainState(self.step + 1, params, opt_state, self.skipped + ~finite, average)
