"""Speculation modes of a round: none, a chain, a tree, each of fixed or adaptive size; n-gram lookup; or both."""

import dataclasses

from ppow_jax.defaults import BRANCH, NODES
from ppow_jax.flags import require
from ppow_jax.speculation.adaptive import Stopping
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.tree import TreeShape, most_nodes

THROUGHPUT = Stopping()
MODES = ("chain", "adaptive", "tree")  # of the drafter
LOOKUP_MODES = ("ngram", "mixture")
TOKENS = 15  # most tokens that an n-gram lookup drafts


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Speculation mode and its sizes. Hashable: static in every program. See `off`, `chain`, `tree`, ...

    window: K, the most drafted tokens that a round can accept; 0 is plain autoregressive decoding.
    block: sampled chains are verified block-wise, not token-wise; the output distribution is the same, more is
      accepted.
    adaptive: the rule by which the drafter decides, before each further token or level of a tree, whether to continue,
      and how much of a tree is verified; None for windows of fixed size.
    shape: sizes of the drafter's tree, the maximum where it adapts; None for a chain, and without a drafter. In a
      mixture its nodes are those of both sources.
    lookup: most tokens drafted by n-gram lookup (`speculation.ngram`), 0 for none.
    """

    window: int
    block: bool = True
    adaptive: Stopping | None = None
    shape: TreeShape | None = None
    lookup: int = 0

    def __post_init__(self) -> None:
        require(self.window >= 0, f"--window={self.window}: must be at least 1, or 0 without speculation")
        require(self.lookup >= 0, f"--ngram_tokens={self.lookup}: must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of drafted tokens for which an adaptive round compiles a verification; counts in between use the next
        wider one.
        """
        steps = (0, 2, 4, 7, 15, 31) if self.shape else (0, 2, 4, 7, 11, 15, 23, 31, 47)
        return tuple(w for w in steps if w < self.verified) + (self.verified,)

    def width_of(self, count: int) -> int:
        """The least of `widths` that holds `count` drafted tokens."""
        return next(width for width in self.widths if width >= count)

    def decides_together(self, sampling: Sampling) -> bool:
        """True if the rows of a batch decide together about an adaptive window (see `speculation.adaptive`)."""
        return self.shape is not None or self.lookup > 0 or sampling.greedy

    @property
    def needs_drafter(self) -> bool:
        """True if tokens are drafted by a drafter: in all modes but plain decoding and n-gram lookup."""
        return self.window > 0 and (self.shape is not None or self.lookup == 0)

    @property
    def verified(self) -> int:
        """N, the most drafted tokens that a round verifies."""
        return self.shape.nodes if self.shape else self.window

    @property
    def mode(self) -> str:
        """Name of the mode in flags and results."""
        if self.window == 0:
            return "off"
        if self.lookup:
            return "mixture" if self.shape else "ngram"
        return "adaptive" if self.adaptive else "tree" if self.shape else "chain"


def off() -> Speculation:
    """Plain autoregressive decoding."""
    return Speculation(0)


def chain(window: int, block: bool = True) -> Speculation:
    """A chain of exactly `window` tokens."""
    return Speculation(window, block)


def adaptive(window: int, block: bool = True, stopping: Stopping = THROUGHPUT) -> Speculation:
    """A chain of up to `window` tokens, fewer or none where more are not worth their cost."""
    return Speculation(window, block, stopping)


def adaptive_tree(branch: int, depth: int, nodes: int, stopping: Stopping = THROUGHPUT) -> Speculation:
    """A tree of up to `depth` levels and `nodes` nodes; fewer, or none, where more are not worth their cost."""
    return Speculation(depth, adaptive=stopping, shape=TreeShape(branch, depth, nodes))


def tree(branch: int, depth: int, nodes: int) -> Speculation:
    """A tree of its best `nodes` nodes; see `TreeShape`."""
    return Speculation(depth, shape=TreeShape(branch, depth, nodes))


def ngram(tokens: int, stopping: Stopping = THROUGHPUT) -> Speculation:
    """N-gram lookup of up to `tokens` tokens, without a drafter; fewer where more are not worth their cost."""
    require(tokens >= 1, f"--ngram_tokens={tokens}: must be at least 1")
    return Speculation(tokens, adaptive=stopping, lookup=tokens)


def mixture(branch: int, depth: int, nodes: int, tokens: int, stopping: Stopping = THROUGHPUT) -> Speculation:
    """An adaptive tree that shares its up to `nodes` nodes with an n-gram lookup of up to `tokens` tokens."""
    require(tokens >= 1, f"--ngram_tokens={tokens}: must be at least 1")
    shape = TreeShape(branch, depth, nodes)
    return Speculation(max(depth, tokens), adaptive=stopping, shape=shape, lookup=tokens)


def of_mode(
    mode: str,
    window: int,
    *,
    branch: int = BRANCH,
    nodes: int | None = None,
    tokens: int = TOKENS,
    block: bool = True,
    stopping: Stopping = THROUGHPUT,
) -> Speculation:
    """Builds a mode by name: one of MODES or LOOKUP_MODES, or "off". Settings that a mode does not have are ignored.

    window: drafted tokens, or levels of a tree. branch, nodes: of trees; by default up to NODES nodes. tokens: of an
    n-gram lookup. block: see `Speculation`. stopping: of modes that adapt.
    """
    if mode == "off":
        return off()
    if mode == "chain":
        return chain(window, block)
    if mode == "ngram":
        return ngram(tokens, stopping)
    nodes = nodes or most_nodes(branch, window, NODES)
    if mode == "mixture":
        return mixture(branch, window, nodes, tokens, stopping)
    return adaptive_tree(branch, window, nodes, stopping) if mode == "adaptive" else tree(branch, window, nodes)
