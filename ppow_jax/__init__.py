"""PPOW in JAX: EAGLE-3 drafters, improved with window-level reinforcement learning.

    from ppow_jax import load

Importing the package itself imports nothing else: import what you need from its subpackages.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppow_jax.inference.model import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ppow_jax.inference import model

    return getattr(model, name)
