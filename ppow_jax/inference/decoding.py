"""Timed decoding of a batch of prompts, all with the same settings."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.data.known_ids import require_known
from ppow_jax.flags import require
from ppow_jax.inference import batch
from ppow_jax.inference.batch import TO_THE_END
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.weights.targets import Target


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding settings, the same for plain and for speculative decoding.

    speculation: speculation mode. temperature, top_k, top_p: see `Sampling`; 0, 0 and 1 are off.
    batch_size: rows decoded at once. max_new_tokens: maximum length of an answer.
    """

    speculation: Speculation
    temperature: float = 0.0
    max_new_tokens: int = 128
    batch_size: int = 1
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        require(self.window >= 1, f"--window={self.window}: must be at least 1")
        Sampling.of(self.temperature, self.top_k, self.top_p)  # validates the numbers
        require(self.max_new_tokens >= 1, f"--max_new_tokens={self.max_new_tokens}: must be at least 1")
        require(self.batch_size >= 1, f"--batch_size={self.batch_size}: must be at least 1")

    @property
    def window(self) -> int:
        """K, the most drafted tokens that a round can accept."""
        return self.speculation.window

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of all rows."""
        return Sampling.of(self.temperature, self.top_k, self.top_p)

    def cache_length(self, prompt_length: int) -> int:
        """L, the slots of both caches for prompts of this length. One per length bucket: each is compiled once."""
        return batch.cache_length(prompt_length, self.max_new_tokens, self.window)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Result of decoding a batch.

    answers: per prompt, its new token ids; the first comes from the prefill, and an end token is kept.
    accepted_BxK1: per prompt, numbers of verifications that accepted k drafted tokens; K = 0 without a drafter.
    drafted: tokens drafted for all prompts. prefill_seconds, decode_seconds: times of the whole batch. drafted_S,
    accepted_S: drafted and accepted tokens by source (`speculation.sources.NAMES`), in n-gram lookup and mixtures, else
    zeros. experts: distinct experts touched (the mean over layers), summed over verifications; 0 for targets without
    experts.
    """

    answers: list[np.ndarray]
    accepted_BxK1: np.ndarray
    drafted: int
    prefill_seconds: float
    decode_seconds: float
    drafted_S: np.ndarray
    accepted_S: np.ndarray
    experts: float = 0.0

    @property
    def decode_tokens(self) -> int:
        """Number of new tokens of all prompts, without the first of each, which the prefill makes."""
        return sum(map(len, self.answers)) - len(self.answers)

    @property
    def verifications(self) -> int:
        """Number of verifications of all prompts together."""
        return int(self.accepted_BxK1.sum())


def require_room(target: Target, length: int, settings: Decoding, source: str) -> None:
    """Raises UserError unless a prompt of `length` tokens, its answer and a last window fit the positions."""
    limit, needed = target.config.max_position_embeddings, length + settings.max_new_tokens + settings.window
    require(
        needed <= limit,
        f"{source}: a prompt of {length} tokens with --max_new_tokens={settings.max_new_tokens} and "
        f"--window={settings.window} needs {needed} positions, but {target.name} has {limit}",
    )


def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[np.ndarray],
    settings: Decoding,
    ids: Sequence[int] = (0,),
    rounds: int = TO_THE_END,
    cost_table: CostTable | None = None,
    store_S: jax.Array | None = None,
) -> Decoded:
    """Answers up to `batch_size` prompts (token ids [T]), speculatively, or plainly where the drafter is missing.

    Rows beyond the prompts are dummies that are done from the start. ids: one number per prompt, which together with
    the seed makes its random key. rounds: maximum number of rounds (one round compiles every program). cost_table: cost
    table of an adaptive window, see `costs.measure_cost_table`. store_S: earlier texts for lookups, see `datastore`.
    Times include any compilation.
    """
    for number, prompt in enumerate(prompts):
        require_known(prompt, target.config.vocab_size, f"prompt {number}", target.tokenizer)
    if not 0 < len(prompts) == len(ids) <= settings.batch_size or not all(map(len, prompts)):
        raise ValueError(f"needed: 1..{settings.batch_size} prompts of one token or more, and as many ids")
    longest = max(map(len, prompts))
    rows = batch.pack(
        prompts,
        [len(prompt) + settings.max_new_tokens for prompt in prompts],
        batch.keys_of(jax.random.key(settings.seed), ids, settings.batch_size),
        batch.bucket(longest),
    )
    L = settings.cache_length(longest)
    begin = time.perf_counter()
    how = settings.speculation, settings.sampling, L, cost_table, store_S
    generation = batch.Generation.begin(target.params, target.config, drafter, rows, *how)
    jax.block_until_ready(generation.state)
    middle = time.perf_counter()
    generation.decode(rounds)
    state = jax.block_until_ready(generation.state)
    end = time.perf_counter()
    read = state.tokens_BxL, state.prompt_B, state.length_B, state.histogram_BxK1, state.drafted_B, state.experts_B
    tokens_BxL, prompt_B, length_B, histogram_BxK1, drafted_B, experts_B = sharding.fetch(read)
    by_source = sharding.fetch((state.sources.drafted_BxS, state.sources.accepted_BxS))
    drafted_S, accepted_S = (x_BxS[: len(prompts)].sum(0) for x_BxS in by_source)
    answers = [tokens_BxL[b, prompt_B[b] : length_B[b]] for b in range(len(prompts))]
    drafted = int(drafted_B[: len(prompts)].sum())
    experts = 0.0 if experts_B is None else float(experts_B[: len(prompts)].sum())
    times = middle - begin, end - middle
    return Decoded(answers, histogram_BxK1[: len(prompts)], drafted, *times, drafted_S, accepted_S, experts)


def top2_margin(target: Target, tokens: np.ndarray) -> float:
    """Difference of the target's two largest logits after tokens [T]."""
    padded_T = np.zeros(batch.bucket(len(tokens)), np.int32)
    padded_T[: len(tokens)] = tokens
    return float(_top2_margin(target.params, padded_T, len(tokens), config=target.config))


@functools.partial(jax.jit, static_argnames=("config",))
def _top2_margin(params: dict, tokens_T: jax.Array, length: jax.Array, *, config) -> jax.Array:
    T = tokens_T.shape[0]
    out = transformer.forward(params, config, tokens_T[None], jnp.arange(T)[None], transformer.causal_mask(1, T))
    best = jax.lax.top_k(transformer.logits(params, out.hidden_BxSxD[:, length - 1])[0], 2)[0]
    return best[0] - best[1]
