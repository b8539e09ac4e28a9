"""The one distribution: what "the target's output" means, for decoding, verification, bonus token, drafts and reward.

Temperature, then top-k, then top-p: logits / temperature; the k largest of them; of those the fewest whose share of the
probability reaches p, always at least one; what is left is renormalised. Temperature 0 is greedy: all on the argmax.
Of equally probable tokens those with the lowest ids stay, so that top_k = 1 is exactly greedy.
"""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ppow_jax.config import require
from ppow_jax.models.vocabulary import argmax

Array = jax.Array
GROUP = 256  # tokens among which the second random number of a draw chooses


@flax.struct.dataclass
class Sampling:
    """How tokens are drawn from logits, for all rows alike (scalars) or row by row ([B]).

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. The numbers are traced, so that one program serves all
    of them; what is None is left out of the program: without a temperature it knows the argmax alone. `of` checks the
    numbers and leaves out what no row uses; a caller whose program must never change gives all three itself.
    """

    temperature: ArrayLike | None = None
    top_k: ArrayLike | None = None
    top_p: ArrayLike | None = None

    @classmethod
    def of(
        cls,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
    ) -> "Sampling":
        """From one number each, or one per row. Raises UserError naming a number that is out of range, and its row."""
        t, k, p = map(np.asarray, (temperature, top_k, top_p))
        _check("--temperature", t, (t >= 0) & (t < np.inf), "must be 0 or more")
        _check("--top_k", k, (k >= 0) & (k < np.inf) & (k % 1 == 0), "must be a whole number, 0 or more")
        _check("--top_p", p, (p > 0) & (p <= 1), "must be above 0 and at most 1")
        shapes = {x.shape for x in (t, k, p) if x.ndim}
        fit = len(shapes) <= 1 and all(len(shape) == 1 for shape in shapes)
        given = f"--temperature, --top_k and --top_p of shapes {t.shape}, {k.shape}, {p.shape}"
        require(fit, f"{given}: each must be one number, or one for each row")
        if not (t > 0).any():
            return cls()
        most = np.iinfo(np.int32).max
        return cls(
            t.astype(np.float32),
            np.minimum(k, most).astype(np.int32) if k.any() else None,
            p.astype(np.float32) if (p < 1).any() else None,
        )

    @property
    def greedy(self) -> bool:
        """Whether every draw is the argmax, whatever the numbers."""
        return self.temperature is None


def _check(name: str, values: np.ndarray, good: np.ndarray, rule: str) -> None:
    for row in np.flatnonzero(~good)[:1]:
        place = f" (row {row})" if values.ndim else ""
        require(False, f"{name}={values.flat[row]}{place}: {rule}")


def log_distribution(logits: Array, sampling: Sampling) -> Array:
    """Log-probabilities [..., V] of the next token, float32 (float64 from float64), -inf for what is never drawn.

    The rows of `sampling` are the first axis of `logits`.
    """
    return _normalised(_log_weights(logits, sampling))


def weights(logits: Array, sampling: Sampling) -> Array:
    """e to the `log_distribution` times a number of each row: all that a draw needs."""
    return jnp.exp(_log_weights(logits, sampling))


def _normalised(z: Array) -> Array:
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def _log_weights(logits: Array, sampling: Sampling) -> Array:
    """`log_distribution` before it is normalised: 0 for the most probable token."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == argmax(logits)[..., None]
    if sampling.greedy:
        return jnp.where(best, 0.0, -jnp.inf).astype(logits.dtype)

    def rows(setting):
        return jnp.reshape(setting, jnp.shape(setting) + (1,) * (logits.ndim - jnp.ndim(setting)))

    tiny = jnp.finfo(jnp.float32).tiny
    distance = logits.max(-1, keepdims=True) - logits
    temperature = rows(sampling.temperature)
    z = -distance / jnp.maximum(temperature, tiny)
    z = jnp.where(temperature < tiny, jnp.where(best, 0.0, -jnp.inf), z)
    if sampling.top_k is not None:
        top_k = rows(sampling.top_k)
        needed = jnp.where(top_k > 0, top_k.astype(z.dtype), jnp.inf)
        z = jnp.where(_fewest(distance, jnp.ones_like(z), needed), z, -jnp.inf)
    if sampling.top_p is not None:
        top_p, mass = rows(sampling.top_p), jnp.exp(z)
        needed = jnp.where(top_p < 1, jnp.maximum(top_p, tiny) * mass.sum(-1, keepdims=True), jnp.inf)
        z = jnp.where(_fewest(distance, mass, needed), z, -jnp.inf)
    return z


def _fewest(distance_xV: Array, mass_xV: Array, needed_x1: Array) -> Array:
    """Marks the fewest tokens, nearest and then lowest id first, whose mass reaches `needed`; all where none do.

    Finds where to cut by bisection: XLA:CPU takes 10 ms to sort 49152 logits, and a sum over them 0.01 ms.
    """
    kind = jnp.int32 if distance_xV.dtype == jnp.float32 else jnp.int64
    rank_xV = jax.lax.bitcast_convert_type(distance_xV, kind)  # non-negative floats are ordered as their bits are
    far = np.asarray(np.inf, distance_xV.dtype).view(kind).item()
    id_xV = jax.lax.broadcasted_iota(kind, rank_xV.shape, rank_xV.ndim - 1)

    def mass(chosen_xV):
        return jnp.sum(jnp.where(chosen_xV, mass_xV, 0), -1, keepdims=True)

    cut_x1 = _least(lambda x: mass(rank_xV <= x) >= needed_x1, far, rank_xV[..., :1])
    before_xV, tied_xV = rank_xV < cut_x1, rank_xV == cut_x1
    rest_x1 = needed_x1 - mass(before_xV)
    last_x1 = _least(lambda x: mass(tied_xV & (id_xV <= x)) >= rest_x1, rank_xV.shape[-1] - 1, cut_x1)
    return before_xV | (tied_xV & (id_xV <= last_x1))


def _least(reaches: Callable[[Array], Array], high: int, like: Array) -> Array:
    """The least integer from 0 for which `reaches` holds (once it does, it goes on to), or `high`; shape of `like`."""

    def halve(_, span):
        low, up = span
        middle = low + ((up - low) >> 1)
        enough = reaches(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, up)

    span = jnp.zeros_like(like), jnp.full_like(like, high)
    return jax.lax.fori_loop(0, high.bit_length(), halve, span)[1]


def draw(key_B: Array, logits: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """(token ids [B, ...], the log-law [B, ..., V] that they were drawn from), with one key per row.

    Greedy draws are the argmax; they need no law, and have None.
    """
    if sampling.greedy:
        return argmax(logits), None
    z = _log_weights(logits, sampling)
    return jax.vmap(sample)(key_B, jnp.exp(z)), _normalised(z)


def sample(key: Array, weight_xV: Array) -> Array:
    """Token ids [...] from weights [..., V], by `inverse`: two random numbers each, not V."""
    return inverse(jax.random.uniform(key, (*weight_xV.shape[:-1], 2), weight_xV.dtype), weight_xV)


def inverse(u_x2: Array, p_xV: Array) -> Array:
    """The token of law p [..., V], which need not add up to 1, that two numbers, uniform over [0, 1), stand for.

    The first chooses a group of tokens, the second one of the group, so that the grid of float32 is as fine as if the
    group were all there is. A token of probability 0 is never chosen.
    """
    lead, V = p_xV.shape[:-1], p_xV.shape[-1]
    p_xGxC = jnp.pad(p_xV, [(0, 0)] * len(lead) + [(0, -V % GROUP)]).reshape(*lead, -1, GROUP)
    group_x = _crossing(u_x2[..., 0], p_xGxC.sum(-1))
    p_xC = jnp.take_along_axis(p_xGxC, group_x[..., None, None], -2)[..., 0, :]
    return group_x * GROUP + _crossing(u_x2[..., 1], p_xC)


def _crossing(u_x: Array, mass_xN: Array) -> Array:
    """The first index at which the running sum exceeds u times the whole, int32."""
    sum_xN = jnp.cumsum(mass_xN, -1)
    index_xN = jax.lax.broadcasted_iota(jnp.int32, mass_xN.shape, mass_xN.ndim - 1)
    some = mass_xN > 0  # rounding may let the sum of nothing grow, or the whole be beyond reach
    first_x = jnp.min(jnp.where(some & (sum_xN > u_x[..., None] * sum_xN[..., -1:]), index_xN, mass_xN.shape[-1]), -1)
    return jnp.minimum(first_x, jnp.max(jnp.where(some, index_xN, 0), -1))
