"""The slots of a server: programs of fixed shapes, compiled before the first request, and the state that they move."""

import itertools
import logging
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.inference import slots
from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Request
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.sources import NAMES

log = logging.getLogger(__name__)

MARGIN = 128  # tokens that must stay free for a move to shorter caches, so that rows do not move back and forth


class Numbers(NamedTuple):
    """Sampling settings of one request."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class Rows(NamedTuple):
    """Arrays that the host reads of all rows; see `State`.

    drafted_BxS, accepted_BxS: drafted and accepted tokens by source, see `sources.NAMES`.
    """

    tokens_BxL: np.ndarray
    length_B: np.ndarray
    done_B: np.ndarray
    healthy_B: np.ndarray
    histogram_BxK1: np.ndarray
    drafted_B: np.ndarray
    source_BxL: np.ndarray
    drafted_BxS: np.ndarray
    accepted_BxS: np.ndarray


class Machine:
    """B rows that decode together, each answering a request or free.

    context: the most tokens, of prompt and answer together, of a request. rounds: decoding rounds of one `decode`.
    Rounds in which no row samples use a program that only takes maxima, and rounds without top-k and top-p one without
    these. The caches are as long as the live rows need, see `slots.cache_tokens`.
    """

    def __init__(self, model: Model, speculation: Speculation, B: int, context: int, rounds: int):
        self.model, self.speculation, self.context, self.rounds = model, speculation, context, rounds
        self.lengths, self.buckets = slots.cache_tokens(context), slots.prompt_buckets(context)
        self.cost_table = {greedy: model.cost_table_of(speculation, B, greedy) for greedy in (True, False)}
        self.live_B = np.zeros(B, bool)
        self.length_B, self.limit_B = np.ones((2, B), np.int64)
        self.temperature_B = np.zeros(B, np.float32)
        self.top_k_B, self.top_p_B = np.zeros(B, np.int32), np.ones(B, np.float32)
        self.reset()

    @property
    def drafter(self) -> Drafter | None:
        """The model's drafter as it is now, if the mode needs one; `Model.online` may replace it between rounds."""
        return self.model.drafter if self.speculation.needs_drafter else None

    def reset(self) -> None:
        """Frees all rows, with new caches."""
        self.live_B[:] = False
        self.tokens = self.lengths[0]
        self.state = self._blank(self.tokens)

    def insert(self, row: int, request: Request, numbers: Numbers) -> None:
        """Reads a request's prompt into a free row; `max_new_tokens` must fit the context."""
        prompt_ids = request.prompt_ids
        limit = len(prompt_ids) + request.max_new_tokens
        fresh = self._read(prompt_ids, limit, request.seed, numbers)
        self._fit(max(self._needed(), slots.least(self.lengths, len(prompt_ids))))
        self.state = slots.insert(self.state, fresh, row)
        self.live_B[row], self.length_B[row], self.limit_B[row] = True, len(prompt_ids) + 1, limit
        self.temperature_B[row], self.top_k_B[row], self.top_p_B[row] = numbers

    def decode(self) -> None:
        """Decodes `rounds` rounds, fewer where all rows are done earlier."""
        self._fit(self._needed())
        self._decode(self._sampling(), self.rounds)

    def look(self) -> Rows:
        """Reads all rows."""
        s = self.state
        read = s.tokens_BxL, s.length_B, s.done_B, s.healthy_B, s.histogram_BxK1, s.drafted_B, s.source_BxL
        rows = Rows(*sharding.fetch((*read, s.sources.drafted_BxS, s.sources.accepted_BxS)))
        if not self.speculation.lookup:  # all by the drafter, and only counted in total
            accepted_B = rows.histogram_BxK1 @ np.arange(rows.histogram_BxK1.shape[1])
            totals = {"drafted_BxS": rows.drafted_B, "accepted_BxS": accepted_B}
            first_S = np.arange(len(NAMES)) == 0
            rows = rows._replace(**{name: total_B[:, None] * first_S for name, total_B in totals.items()})
        self.length_B = np.where(self.live_B, rows.length_B, 1)
        return rows

    def release(self, free_B: np.ndarray, damaged: bool = False) -> None:
        """Frees rows, True in free_B. damaged: their values may be NaN."""
        free = slots.clear if damaged else slots.release
        self.state = free(self.state, sharding.place({"free_B": jnp.asarray(free_B)})["free_B"])
        self.live_B &= ~free_B
        self.temperature_B[free_B], self.top_k_B[free_B], self.top_p_B[free_B] = Numbers()

    def warm_up(self) -> None:
        """Compiles every program that requests can need, by running each without work."""
        log.info("compiling %d decoding programs and %d for prompts", 3 * len(self.lengths), len(self.buckets))
        free_B = ~np.zeros_like(self.live_B)
        for P in self.buckets:
            self._read(np.zeros(1, np.int32), 1, 0, Numbers(), P)
        for tokens in self.lengths:
            self.tokens, self.state = tokens, self._blank(tokens)
            for kind in (Numbers(), Numbers(1.0), Numbers(1.0, 1, 0.5)):
                self.temperature_B[:], self.top_k_B[:], self.top_p_B[:] = kind
                self._decode(self._sampling(), 0)
            for shorter in self.lengths[: 1 + self.lengths.index(tokens)]:
                fresh = self._read(np.zeros(1, np.int32), 1, 0, Numbers(), slots.least(self.buckets, shorter))
                self.state = slots.insert(self.state, fresh, 0)
            self.release(free_B)
            self.release(free_B, damaged=True)
            log.info("caches of %d tokens: compiled", tokens)
        for before, after in itertools.permutations(self.lengths, 2):
            slots.resize(self._blank(before), self._slots(after))
        self.reset()

    def _needed(self) -> int:
        """Tokens that the longest live row may have after the next rounds."""
        most_B = np.minimum(self.length_B + self.rounds * (self.speculation.window + 1), self.limit_B)
        return int(np.where(self.live_B, most_B, 1).max())

    def _fit(self, needed: int) -> None:
        """Moves to caches for `needed` tokens: longer ones at once, shorter ones with a margin."""
        tokens = slots.least(self.lengths, needed)
        if tokens < self.tokens:
            tokens = min(self.tokens, slots.least(self.lengths, needed + MARGIN))
        if tokens != self.tokens:
            self.tokens, self.state = tokens, slots.resize(self.state, self._slots(tokens))

    def _slots(self, tokens: int) -> int:
        return generate.cache_length(tokens, 0, self.speculation.window)

    def _blank(self, tokens: int) -> generate.State:
        target, K = self.model.target, self.speculation.window
        return slots.blank(target.params, target.config, self.drafter, len(self.live_B), self._slots(tokens), K=K)

    def _read(
        self, prompt_ids: np.ndarray, limit: int, seed: int, numbers: Numbers, P: int | None = None
    ) -> generate.State:
        target = self.model.target
        P = P or slots.least(self.buckets, len(prompt_ids))
        temperature, top_k, top_p = numbers
        sampling = Sampling(*map(np.array, ([np.float32(temperature)], [np.int32(top_k)], [np.float32(top_p)])))
        L = self._slots(slots.least(self.lengths, P))
        how = {"K": self.speculation.window, "P": P, "L": L}
        return slots.read(target.params, target.config, self.drafter, prompt_ids, limit, seed, sampling, **how)

    def _decode(self, sampling: Sampling, rounds: int) -> None:
        target = self.model.target
        self.state = generate.decode(
            target.params,
            target.config,
            self.drafter,
            self.state,
            rounds,
            speculation=self.speculation,
            sampling=sampling,
            cost_table=self.cost_table[sampling.greedy],
            store_S=self.model.store_S if self.speculation.lookup else None,
        )

    def _sampling(self) -> Sampling:
        """Settings of all rows, without those that no live row uses."""
        if not (self.temperature_B > 0).any():
            return Sampling()
        temperature_B = self.temperature_B.copy()
        if not (self.top_k_B > 0).any() and (self.top_p_B == 1).all():
            return Sampling(temperature_B)
        return Sampling(temperature_B, self.top_k_B.copy(), self.top_p_B.copy())
