"""PPOW in JAX: EAGLE-3 drafters, sharpened with window-level reinforcement learning.

Importing the package imports nothing else: take what you need from its subpackages.
"""

__version__ = "0.1.0"
