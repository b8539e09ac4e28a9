"""How a round speculates: nothing, a chain, a chain of adaptive length, or a tree."""

import dataclasses

from ppow_jax.config import require
from ppow_jax.speculation.tree import TreeShape


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Hashable: static in every program. See `off`, `chain`, `adaptive` and `tree`.

    window: K, the most drafted tokens that a round can accept; 0 is plain autoregressive decoding.
    block: sampled chains are verified block-wise instead of token-wise; the law of the output is the same.
    adaptive: the drafter decides before each further token whether to go on, see `speculation.adaptive`.
    shape: of the tree; None for a chain.
    """

    window: int
    block: bool = False
    adaptive: bool = False
    shape: TreeShape | None = None

    def __post_init__(self):
        require(self.window >= 0, f"--window={self.window}: must be at least 1, or 0 without speculation")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of drafted tokens for which an adaptive round has a verification of its own; the next wider one
        takes those between.
        """
        return tuple(w for w in (0, 2, 4, 7, 11, 15, 23, 31, 47) if w < self.window) + (self.window,)

    @property
    def mode(self) -> str:
        """Its name in flags and results."""
        if self.window == 0:
            return "off"
        return "tree" if self.shape else "adaptive" if self.adaptive else "chain"


def off() -> Speculation:
    """Plain autoregressive decoding."""
    return Speculation(0)


def chain(window: int, block: bool = False) -> Speculation:
    """Always `window` tokens, one after the other."""
    return Speculation(window, block)


def adaptive(window: int, block: bool = False) -> Speculation:
    """Up to `window` tokens, fewer or none where more are not worth their cost."""
    return Speculation(window, block, adaptive=True)


def tree(branch: int, depth: int, nodes: int) -> Speculation:
    """The best `nodes` of a tree; see `TreeShape`."""
    return Speculation(depth, shape=TreeShape(branch, depth, nodes))
