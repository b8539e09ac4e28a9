"""Precision policy: the dtype of every kind of array, by platform.

Programs ask for two dtypes only, that of activations where tokens and features enter a model, and that of caches where
they are made; everything between follows its inputs. Both depend on the dtype of the model's matrices: with float32
matrices all arrays are float32 under every policy. docs/precision.md lists the arrays. Importing this does not import
JAX.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from ppow_jax.flags import require


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes by name, as used with matrices of dtype `parameter`.

    parameter: matrices of the target, and of the drafter while decoding; norms, biases and the drafter's master weights
      in training are always float32.
    compute: of the inputs of products with matrices, which are summed in float32.
    output: of activations: results of those products, also where devices add their parts of one, the residual stream,
      features, and normed states.
    cache: of keys and values.
    reduction: of softmax, statistics of norms, logits, log-probabilities, losses and gradients of parameters.
    """

    name: str
    parameter: str
    compute: str
    output: str
    cache: str
    reduction: str = "float32"

    def activation(self, matrices: Any) -> Any:
        """Dtype of a model's activations, by the dtype of its matrices."""
        return _dtype(self.output, matrices)

    def keys(self, matrices: Any) -> Any:
        """Dtype of a model's caches, by the dtype of its matrices."""
        return _dtype(self.cache, matrices)


def _dtype(name: str, matrices: Any) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name if matrices == jnp.bfloat16 else "float32")


FLOAT32 = Precision("float32", "float32", "float32", "float32", "float32")
CPU_BFLOAT16 = Precision("cpu-bfloat16", "bfloat16", "bfloat16", "float32", "float32")
ACCELERATOR = Precision("accelerator", "bfloat16", "bfloat16", "bfloat16", "bfloat16")
POLICIES = {policy.name: policy for policy in (FLOAT32, CPU_BFLOAT16, ACCELERATOR)}

CHOICES = ("auto", *POLICIES)
HELP = (
    "Dtypes of activations and caches. accelerator: bfloat16; cpu-bfloat16: float32 beside bfloat16 matrices; float32:"
    " all; auto: accelerator on GPU and TPU. With --dtype=float32 everything is float32."
)


@functools.cache
def context() -> Any:
    """The chosen policy of a thread, a part of the key under which JAX keeps compiled programs.

    To be made before the first program is compiled: later ones have other keys.
    """
    import jax

    return jax.make_user_context(default_value=None)


def of_flag(name: str, dtype: str) -> Precision | None:
    """The policy of --precision; None for `auto`, which leaves it to the platform.

    dtype: that of --dtype. Raises UserError where it contradicts the policy.
    """
    if name == "auto":
        return None
    policy = POLICIES[name]
    rule = f"takes matrices in {policy.parameter}, but --dtype={dtype}"
    require(policy.parameter == dtype, f"--precision={name}: {rule}")
    return policy


@contextlib.contextmanager
def use(policy: Precision | None) -> Iterator[None]:
    """Traces this thread's programs inside the `with` under a policy; None leaves it to the platform."""
    with context()(policy):
        yield


def chosen() -> Precision | None:
    """The choice of `use` in this thread, for another thread to `use`; None if it is left to the platform."""
    return context().value


def current() -> Precision:
    """The policy in use: the one chosen by `use`, or the platform's."""
    from ppow_jax.models import platforms  # imports JAX

    return chosen() or (CPU_BFLOAT16 if platforms.on_cpu() else ACCELERATOR)
