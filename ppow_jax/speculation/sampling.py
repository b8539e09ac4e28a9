"""The one distribution: what "the target's output" means, for decoding, verification, bonus token and reward."""

import dataclasses

import jax
import jax.numpy as jnp

from ppow_jax.models.vocabulary import argmax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Hashable: pass it as a static argument.

    temperature: 0 is greedy (argmax). Otherwise logits / temperature, softmaxed.
    """

    temperature: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether every draw is the argmax."""
        return self.temperature == 0.0


def log_distribution(logits: Array, sampling: Sampling) -> Array:
    """Log-probabilities [..., V], float32, after temperature. Greedy keeps temperature 1 (ranks are the same)."""
    temperature = 1.0 if sampling.greedy else sampling.temperature
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def draw(key: Array, logits: Array, sampling: Sampling) -> Array:
    """One token id [...] from logits [..., V]: argmax at temperature 0, else a sample."""
    if sampling.greedy:
        return argmax(logits)
    return jax.random.categorical(key, log_distribution(logits, sampling), axis=-1).astype(jnp.int32)
