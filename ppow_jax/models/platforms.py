"""The platform that programs are traced for: that of this process's devices, unless a plan compiles for another one.

Code that differs by platform asks here while it is traced. `jax.lax.platform_dependent`, which decides when a program
is lowered, traces every branch: a target's program took a third longer to compile with it.
"""

import contextlib
from collections.abc import Iterator

import jax

_chosen = jax.make_user_context(default_value=None)  # part of the key under which JAX keeps compiled programs


@contextlib.contextmanager
def use(platform: str | None) -> Iterator[None]:
    """Traces this thread's programs for a platform: `cpu`, `gpu` or `tpu`; None for this process's own."""
    with _chosen(platform):
        yield


def current() -> str:
    """The platform in use: the one chosen by `use`, or that of JAX's default backend."""
    return _chosen.value or jax.default_backend()


def on_cpu() -> bool:
    """True if programs are traced for a CPU."""
    return current() == "cpu"
