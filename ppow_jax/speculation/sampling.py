"""The sampling distribution, shared by decoding, verification, bonus token, drafts and reward.

Temperature, then top-k, then top-p: logits / temperature; the k largest of them; of these the smallest set (of at least
one token) whose share of the probability reaches p; the remainder is renormalised. Temperature 0 is greedy: all
probability on the argmax. Among equally probable tokens those with the lowest ids are kept, so that top_k = 1 is
exactly greedy.
"""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ppow_jax.flags import require
from ppow_jax.models.vocabulary import argmax

Array = jax.Array
GROUP = 256  # tokens per group; the second random number of a draw chooses within a group


@flax.struct.dataclass
class Sampling:
    """Sampling settings, shared by all rows (scalars) or given row by row ([B]).

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. The numbers are traced, so that one program serves all
    values; a setting that is None is left out of the program, which without a temperature only computes the argmax.
    `of` validates the numbers and leaves out what no row uses; callers that need one fixed program set all three.
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
        """Settings from scalars or one number per row. Raises UserError naming an out-of-range value and its row."""
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
        """True if every draw is the argmax, whatever the numbers."""
        return self.temperature is None


def _check(name: str, values: np.ndarray, good: np.ndarray, rule: str) -> None:
    for row in np.flatnonzero(~good)[:1]:
        place = f" (row {row})" if values.ndim else ""
        require(False, f"{name}={values.flat[row]}{place}: {rule}")


def log_distribution(logits: Array, sampling: Sampling) -> Array:
    """Log-probabilities [..., V] of the next token, float32 (float64 from float64), -inf for tokens never drawn.

    The rows of `sampling` are the first axis of `logits`.
    """
    return _normalised(_log_weights(logits, sampling))


def weights(logits: Array, sampling: Sampling) -> Array:
    """Unnormalised probabilities [..., V], correct up to a factor per row, which is enough for a draw."""
    return jnp.exp(_log_weights(logits, sampling))


def _normalised(z: Array) -> Array:
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def _log_weights(logits: Array, sampling: Sampling) -> Array:
    """`log_distribution` before normalisation: 0 for the most probable token."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == argmax(logits)[..., None]
    if sampling.greedy:
        return jnp.where(best, 0.0, -jnp.inf).astype(logits.dtype)

    def rows(setting: ArrayLike) -> Array:
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
    """Marks the fewest tokens, nearest and then lowest id first, whose mass reaches `needed`; all if no set does.

    Finds the cutoff by bisection: XLA:CPU takes 10 ms to sort 49152 logits, and 0.01 ms for a sum over them.
    """
    kind = jnp.int32 if distance_xV.dtype == jnp.float32 else jnp.int64
    rank_xV = jax.lax.bitcast_convert_type(distance_xV, kind)  # non-negative floats are ordered as their bits
    far = np.asarray(np.inf, distance_xV.dtype).view(kind).item()
    id_xV = jax.lax.broadcasted_iota(kind, rank_xV.shape, rank_xV.ndim - 1)

    def mass(chosen_xV: Array) -> Array:
        return jnp.sum(jnp.where(chosen_xV, mass_xV, 0), -1, keepdims=True)

    cut_x1 = _least(lambda x: mass(rank_xV <= x) >= needed_x1, far, rank_xV[..., :1])
    before_xV, tied_xV = rank_xV < cut_x1, rank_xV == cut_x1
    rest_x1 = needed_x1 - mass(before_xV)
    last_x1 = _least(lambda x: mass(tied_xV & (id_xV <= x)) >= rest_x1, rank_xV.shape[-1] - 1, cut_x1)
    return before_xV | (tied_xV & (id_xV <= last_x1))


def _least(reaches: Callable[[Array], Array], high: int, like: Array) -> Array:
    """The least integer from 0 for which the monotone predicate `reaches` holds, or `high`; shape of `like`."""

    def halve(_: int, span: tuple[Array, Array]) -> tuple[Array, Array]:
        low, up = span
        middle = low + ((up - low) >> 1)
        enough = reaches(middle)
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, up)

    span = jnp.zeros_like(like), jnp.full_like(like, high)
    return jax.lax.fori_loop(0, high.bit_length(), halve, span)[1]


def draw(key_B: Array, logits: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """(token ids [B, ...], log-probabilities [B, ..., V] of the distribution they were drawn from), one key per row.

    Greedy draws are the argmax; the second item is then None.
    """
    if sampling.greedy:
        return argmax(logits), None
    z = _log_weights(logits, sampling)
    return jax.vmap(sample)(key_B, jnp.exp(z)), _normalised(z)


def sample(key: Array, weight_xV: Array) -> Array:
    """Draws token ids [...] from weights [..., V] by `inverse`, with two random numbers each instead of V."""
    return inverse(jax.random.uniform(key, (*weight_xV.shape[:-1], 2), weight_xV.dtype), weight_xV)


def inverse(u_x2: Array, p_xV: Array) -> Array:
    """Inverse-CDF draw: maps two numbers, uniform over [0, 1), to a token of p [..., V], which may be unnormalised.

    The first number chooses a group of tokens, the second a token of the group, so that the resolution of float32 is as
    fine as if the group were the whole vocabulary. A token of probability 0 is never chosen.
    """
    lead, V = p_xV.shape[:-1], p_xV.shape[-1]
    p_xGxC = jnp.pad(p_xV, [(0, 0)] * len(lead) + [(0, -V % GROUP)]).reshape(*lead, -1, GROUP)
    group_x = _crossing(u_x2[..., 0], p_xGxC.sum(-1))
    p_xC = jnp.take_along_axis(p_xGxC, group_x[..., None, None], -2)[..., 0, :]
    return group_x * GROUP + _crossing(u_x2[..., 1], p_xC)


def _crossing(u_x: Array, mass_xN: Array) -> Array:
    """The first index (int32) at which the running sum exceeds u times the total."""
    sum_xN = jnp.cumsum(mass_xN, -1)
    index_xN = jax.lax.broadcasted_iota(jnp.int32, mass_xN.shape, mass_xN.ndim - 1)
    some = mass_xN > 0  # rounding may raise the running sum at zero mass, or put the total out of reach
    first_x = jnp.min(jnp.where(some & (sum_xN > u_x[..., None] * sum_xN[..., -1:]), index_xN, mass_xN.shape[-1]), -1)
    return jnp.minimum(first_x, jnp.max(jnp.where(some, index_xN, 0), -1))
