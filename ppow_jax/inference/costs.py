"""Costs of the parts of a round of speculative decoding on this device."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.inference.batch import draft_round, verify_round
from ppow_jax.models import cache, stack, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, off
from ppow_jax.speculation.state import State
from ppow_jax.weights.targets import Target

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of drafting (all draft steps of a round), of verifying the window, and of one plain decoding step, for a
    whole batch. steps: draft steps of a round.
    """

    draft: float
    verify: float
    plain_step: float
    steps: int

    @property
    def gamma(self) -> float:
        """Cost of one draft step, in steps of plain decoding."""
        return self.draft / self.steps / self.plain_step

    @property
    def verify_ratio(self) -> float:
        """Cost of one verification, in steps of plain decoding."""
        return self.verify / self.plain_step


def measure_costs(
    target: Target,
    drafter: Drafter | None,
    speculation: Speculation,
    L: int,
    batch: int = 1,
    *,
    sampling: Sampling = GREEDY,
    repetitions: int = 20,
) -> Costs:
    """Times drafting, verification and plain decoding, each as a program of its own, with caches of length L.

    The work depends on shapes alone, so the state is synthetic: half full caches, random features. The three
    measurements alternate, so that a slow phase of the machine affects them equally; the median of `repetitions`
    counts. The caches are donated and fed back, so that they stay in place as in a generation. L must be at least
    K + 3. An adaptive window is measured at its full width. drafter: may be None for n-gram lookup.
    """
    widths = (speculation.verified,)
    found = _measure(target, drafter, speculation, L, batch, widths, sampling=sampling, repetitions=repetitions)
    steps = speculation.shape.depth if speculation.shape else speculation.window
    return Costs(found["draft"], found[speculation.verified], found["plain"], steps)


def measure_cost_table(
    target: Target,
    drafter: Drafter | None,
    speculation: Speculation,
    L: int,
    batch: int = 1,
    *,
    sampling: Sampling = GREEDY,
    repetitions: int = 10,
) -> CostTable:
    """Measures the cost table of an adaptive window; n drafted tokens cost the least compiled width that holds them.

    Verification is measured at full width, near half of it, and at the least width: from no draft to the first drafted
    tokens the cost may jump, where products of matrices and vectors become those of two matrices (in float32 on CPUs by
    77 %). In between costs are interpolated linearly. Where each row decides by itself, as with sampled chains, the
    table holds the costs for all rows.
    """
    N, widths = speculation.verified, np.array(speculation.widths)
    near = sorted({int(widths[1 + np.argmin(np.abs(widths[1:] - width))]) for width in (1, N / 2, N)})
    found = _measure(target, drafter, speculation, L, batch, near, sampling=sampling, repetitions=repetitions)
    verify_X = np.interp(widths, [0, *near], [1.0, *(found[width] / found["plain"] for width in near)])
    compiled_N1 = np.searchsorted(widths, np.arange(N + 1))
    steps = speculation.shape.depth if speculation.shape else speculation.window
    step = found["draft"] / steps / found["plain"]
    cost_table = CostTable.of(step, np.maximum.accumulate(verify_X)[compiled_N1])
    return cost_table if speculation.decides_together(sampling) else cost_table.alone(batch)


def _measure(
    target: Target,
    drafter: Drafter | None,
    speculation: Speculation,
    L: int,
    batch: int,
    widths: Sequence[int],
    *,
    sampling: Sampling,
    repetitions: int,
) -> dict[str | int, float]:
    """Seconds of `draft`, `plain`, and of each of `widths`: verifying so many drafted tokens. See `measure_costs`."""
    K = speculation.window
    drafter = drafter if speculation.needs_drafter else None
    if K < 1 or L < K + 3:
        raise ValueError(f"a cache of length {L} is too short for a window of {K}")
    params, config = target.params, target.config
    state, drafter_kv, target_kv = synthetic_state(target, drafter, K, L, batch)
    settings = {"speculation": dataclasses.replace(speculation, adaptive=None), "sampling": sampling}
    drafter_kv, _, draft = draft_round(params, drafter, drafter_kv, state, **settings)

    def draft_once(kv):
        return jax.block_until_ready(draft_round(params, drafter, kv, state, **settings))[0]

    def verify_once(kv, width):
        return verify_round(params, config, drafter, kv, state, draft, **settings, width=width)[0]

    def plain_once(kv):
        return verify_round(params, config, None, kv, state, None, speculation=off(), sampling=sampling)[0]

    on_target: dict[str | int, Callable[[Any], Any]] = {"plain": plain_once}
    on_target |= {width: functools.partial(verify_once, width=width) for width in widths}
    seconds: dict[str | int, list[float]] = {name: [] for name in ("draft", *on_target)}
    for _ in range(repetitions + 1):  # the first run compiles
        for name, once in on_target.items():
            target_kv = _timed(once, target_kv, seconds[name])
        drafter_kv = _timed(draft_once, drafter_kv, seconds["draft"])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _timed(once: Callable[[Any], Any], kv: Any, seconds: list[float]) -> Any:
    begin = time.perf_counter()
    kv = jax.block_until_ready(once(kv))
    seconds.append(time.perf_counter() - begin)
    return kv


def synthetic_state(
    target: Target, drafter: Drafter | None, K: int, L: int, B: int
) -> tuple[State, tuple[KV, ...] | None, tuple[KV | StackedKV, ...]]:
    """A synthetic mid-generation state, and its drafter's and target's caches, kept apart."""
    config = target.config
    tokens_key, features_key, key = jax.random.split(jax.random.key(0), 3)
    row_B = jnp.ones(B, jnp.int32)
    state = State.begin(
        jax.random.randint(tokens_key, (B, L), 0, config.vocab_size),
        prompt_B=row_B,
        limit_B=row_B * (L - K - 1),
        key_B=jax.random.split(key, B),
        healthy_B=jnp.ones(B, bool),
        target_kv=(),
        K=K,
        experts=config.experts is not None,
    ).replace(
        length_B=row_B * min(L // 2, L - K - 1),
        features_BxK1xF=jax.random.normal(features_key, (B, K + 1, 3 * config.hidden_size)).astype(
            transformer.activation(target.params)
        ),
    )
    empty = cache.empty(B, config.num_kv_heads, L, config.head_dim, transformer.cache_dtype(target.params))
    target_kv = stack.like(target.params["layers"], empty)
    drafter_kv = drafting.empty_cache(drafter, B, L) if drafter else None
    return sharding.place((state, drafter_kv, target_kv))
