"""200 prompts for a target of 12 tokens, what it must answer, and random drafters for it: worlds of the decoding tests.

The answers come from whole forward passes, which know neither caches nor drafters.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from golden import models

from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, chain
from ppow_jax.training import initialise

V, N, B, P, NEW = 12, 200, 50, 9, 24  # few tokens, so that random drafters are right now and then
ENDS = (4, 9)  # written often, so that many answers end early
CONFIG = dataclasses.replace(
    models.TARGETS["untied"], vocab_size=V, num_layers=2, max_position_embeddings=256, eos_token_ids=ENDS
)
DRAFTER = initialise.drafter_config(CONFIG, 9, (0, 1, 2))
LAYERED = 6  # the seed of a drafter of two layers, narrower than the target, with an embedding of its own
ARMS = [(1, False, 0), (3, True, 1), (3, True, 2), (5, False, 3), (3, False, LAYERED)]  # K, EAGLE-3.1, seed
GREEDY = Sampling()
FREE, CHEAP, DEAR = 0.0, 0.05, 1.0  # see `cost_table_of`
PARAMS = jax.tree.map(jnp.asarray, models.target_params(CONFIG, seed=5))


@functools.cache
def drafter(fc_norm: bool, seed: int) -> Drafter:
    config = dataclasses.replace(DRAFTER, fc_norm=fc_norm, norm_output=fc_norm, norm_before_residual=fc_norm)
    embed_VxE = None
    if seed == LAYERED:
        config = dataclasses.replace(config, num_layers=2, qk_norm=True, hidden_size=24, own_embed=True)
        embed_VxE = jnp.asarray(models.matrix(np.random.RandomState(seed), V, 24))
    weights = jax.tree.map(jnp.asarray, models.drafter_params(config, seed))
    return Drafter(config, weights, jnp.array([0, 1, 3, 4, 5, 7, 8, 9, 11]), embed_VxE=embed_VxE)


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded prompts [N, P], their lengths, and the total lengths at which they must stop."""
    rng = np.random.default_rng(0)
    length_N = rng.integers(1, P + 1, N)
    prompt_NxP = rng.integers(0, V, (N, P)) * (np.arange(P) < length_N[:, None])
    budget_N = np.where(rng.random(N) < 0.5, NEW, rng.integers(0, NEW, N))
    return prompt_NxP.astype(np.int32), length_N.astype(np.int32), (length_N + budget_N).astype(np.int32)


def prefill(rows, K, drafter_=None, prompt_BxP=None):
    prompt_NxP, length_N, limit_N = prompts()
    prompt_BxP = prompt_NxP[rows] if prompt_BxP is None else prompt_BxP
    begin = (prompt_BxP, length_N[rows], limit_N[rows], jax.random.split(jax.random.key(0), len(rows)))
    L = generate.cache_length(P, NEW, K)
    return generate.prefill(PARAMS, CONFIG, drafter_, *begin, K=K, sampling=GREEDY, L=L)


def decode(rows, K, drafter_=None, prompt_BxP=None):
    state = prefill(rows, K, drafter_, prompt_BxP)
    return generate.decode(PARAMS, CONFIG, drafter_, state, 10_000, speculation=chain(K), sampling=GREEDY)


def answers(state) -> list[list[int]]:
    assert np.asarray(state.done_B).all()
    ends = zip(np.asarray(state.tokens_BxL), np.asarray(state.prompt_B), np.asarray(state.length_B), strict=True)
    return [tokens[start:stop].tolist() for tokens, start, stop in ends]


def batches() -> list[np.ndarray]:
    return np.split(np.arange(N), N // B)


@functools.cache
def endless() -> np.ndarray:
    """Prompts and greedy continuations [N, P + NEW + 8], by a whole forward pass per token; no end tokens."""
    prompt_NxP, length_N, _ = prompts()
    tokens_NxT = jnp.pad(prompt_NxP, ((0, 0), (0, NEW + 8)))
    mask, rows = transformer.causal_mask(N, tokens_NxT.shape[1]), jnp.arange(N)
    position_NxT = jnp.broadcast_to(jnp.arange(tokens_NxT.shape[1]), tokens_NxT.shape)

    def next_token(i, tokens_NxT):
        out = transformer.forward(PARAMS, CONFIG, tokens_NxT, position_NxT, mask)
        last_NxD = out.hidden_BxSxD[rows, length_N - 1 + i]
        return tokens_NxT.at[rows, length_N + i].set(jnp.argmax(transformer.logits(PARAMS, last_NxD), -1))

    return np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, NEW + 8, next_token, x))(tokens_NxT))


@functools.cache
def expected() -> list[list[int]]:
    """The expected tokens of every row: the greedy continuation up to its budget or its first end token."""
    found = []
    for tokens, start, limit in zip(endless().tolist(), *(x.tolist() for x in prompts()[1:]), strict=True):
        answer = tokens[start:limit]
        end = next((i + 1 for i, token in enumerate(answer) if token in ENDS), len(answer))
        found.append(answer[:end])
    return found


def expected_histogram(correct_NxT: np.ndarray, K: int, rows=slice(None)) -> np.ndarray:
    """Accepted lengths per row [., K1] when token t is drafted right in a window from n where correct(n, t)."""
    histograms = []
    for n in np.arange(N)[rows]:
        histogram, start = np.zeros(K + 1, int), prompts()[1][n]
        stop, at = start + len(expected()[n]), start + 1
        while at < stop:
            right = correct_NxT[n, at]
            k = int(np.cumprod(right[:K]).sum())
            histogram[k] += 1
            at += k + 1
        histograms.append(histogram)
    return np.array(histograms)


@functools.cache
def speculative(K: int, fc_norm: bool, seed: int) -> tuple[list[list[int]], np.ndarray]:
    states = [decode(rows, K, drafter(fc_norm, seed)) for rows in batches()]
    histogram_NxK1 = np.concatenate([np.asarray(state.histogram_BxK1) for state in states])
    return [a for state in states for a in answers(state)], histogram_NxK1


def cost_table_of(price: float, speculation: Speculation) -> CostTable:
    """price: of a draft step, and of verifying one more token."""
    return CostTable.of(price, 1 + price * np.arange(speculation.verified + 1))


@functools.cache
def with_mode(speculation: Speculation, price: float | None = None, make: Callable[[bool, int], Drafter] = drafter):
    """(answers, histogram_NxK1, drafted_N) of all prompts. price: see `cost_table_of`. make: gives the drafter."""
    found, histogram, drafted = [], [], []
    made = make(True, 1)
    for rows in batches():
        state = prefill(rows, speculation.window, made)
        cost_table = None if price is None else cost_table_of(price, speculation)
        state = generate.decode(
            PARAMS, CONFIG, made, state, 10_000, speculation=speculation, sampling=GREEDY, cost_table=cost_table
        )
        found += answers(state)
        histogram.append(np.asarray(state.histogram_BxK1)), drafted.append(np.asarray(state.drafted_B))
    return found, np.concatenate(histogram), np.concatenate(drafted)


def drafted_after(state, made):
    """The drafter's keys of all indices that the next round sees, from the state and from a pass over its tokens."""
    chain_state, _ = generate.draft_window(PARAMS, made, state, chain(3), GREEDY)
    tokens_BxL, L = state.tokens_BxL, state.tokens_BxL.shape[1]
    position_BxL = jnp.broadcast_to(jnp.arange(L), tokens_BxL.shape)
    mask, layers = transformer.causal_mask(*tokens_BxL.shape), DRAFTER.feature_layers
    out = transformer.forward(PARAMS, CONFIG, tokens_BxL, position_BxL, mask, feature_layers=layers)
    g_BxLxE, next_BxL = drafting.fuse(made, out.features_BxSxF), jnp.roll(tokens_BxL, -1, 1)
    (kv,) = drafting.prefix_keys(made, g_BxLxE, made.embed(PARAMS["embed"], next_BxL), position_BxL, mask)
    seen_BxL = np.arange(L) < np.asarray(state.length_B)[:, None] - 1
    keys = (np.asarray(x.k_BxKvxdxL) for x in (*chain_state.drafter_kv, kv))
    return [np.where(seen_BxL[:, None, None], x, 0.0) for x in keys]
