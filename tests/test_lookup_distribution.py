"""Sampled text follows the target's distribution where tokens are looked up; biased acceptance is found out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
import twelve_tokens as world
from scipy import stats

from ppow_jax.models import transformer
from ppow_jax.speculation import generate, verification
from ppow_jax.speculation.adaptive import Stopping
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, mixture, ngram
from ppow_jax.speculation.state import row_keys
from ppow_jax.speculation.tree import follow

ROWS, TOKENS, V = 8192, 3, world.V
CONFIG = dataclasses.replace(world.CONFIG, eos_token_ids=())
SHARP = Sampling.of(0.4)
PROMPT = np.array([*range(V), 3, 0, 5, 1, 7, 2, 9, 4, 11, 6, 8, 10], np.int32)  # a match after whichever token


@functools.cache
def law() -> np.ndarray:
    """The joint distribution [V, V, V] of the first TOKENS tokens after PROMPT, from whole forward passes."""

    @jax.jit
    def after(texts):
        position = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        out = transformer.forward(world.PARAMS, CONFIG, texts, position, transformer.causal_mask(*texts.shape))
        return jax.nn.softmax(transformer.logits(world.PARAMS, out.hidden_BxSxD[:, -1]) / 0.4)

    joint, texts = np.ones(1), PROMPT[None]
    for _ in range(TOKENS):
        joint = (joint.reshape(-1, 1) * np.asarray(after(texts), np.float64)).ravel()
        texts = np.concatenate([np.repeat(texts, V, 0), np.tile(np.arange(V), len(texts))[:, None]], 1)
    return joint.reshape((V,) * TOKENS)


def p_value(way: Speculation) -> tuple[float, float]:
    """(that of a chi-square test of ROWS texts against `law`, share of rounds that accepted a drafted token)."""
    made, length_1 = world.drafter(True, 1), np.array([len(PROMPT)], np.int32)
    made = made if way.needs_drafter else None
    begin = PROMPT[None], length_1, length_1 + TOKENS
    L = generate.cache_length(len(PROMPT), TOKENS, way.window)
    prompts = (jnp.repeat(jnp.asarray(x), ROWS, 0) for x in begin)
    keys = jax.random.split(jax.random.key(7), ROWS)
    state = generate.prefill(world.PARAMS, CONFIG, made, *prompts, keys, K=way.window, sampling=SHARP, L=L)
    how = {"speculation": way, "sampling": SHARP, "cost_table": world.cost_table_of(world.FREE, way)}
    state = generate.decode(world.PARAMS, CONFIG, made, state, 10, **how)
    texts = np.asarray(state.tokens_BxL)[:, len(PROMPT) : len(PROMPT) + TOKENS]
    counts, expected = np.zeros_like(law()), law() * ROWS
    np.add.at(counts, tuple(texts.T), 1)
    often = expected >= 5
    kept = [np.r_[x[often], ROWS - x[often].sum()] for x in (counts, expected)]
    histogram_K1 = np.asarray(state.histogram_BxK1).sum(0)
    return stats.chisquare(*kept).pvalue, histogram_K1[1:].sum() / histogram_K1.sum()


WAYS = {"ngram": ngram(3), "mixture": mixture(2, 2, 6, 3)}


@pytest.mark.parametrize("mode", suites.keep(["mixture"], WAYS))
def test_looked_up_text_follows_the_target(mode):
    assert (law() * ROWS >= 5).sum() > 30
    p, accepted = p_value(WAYS[mode])
    assert p > 1e-3 and accepted > 0.05


def one_number(state, use, ahead=0):
    """The keys of a round's first token, for all of its tokens."""
    return row_keys(state, use, 0 * ahead if use == verification.OWN else ahead)


def generous(tree, drawn_BxN, depth):
    """Goes on from the first drafted token in some cases in which the target draws another one."""
    return follow(tree, drawn_BxN | (jnp.arange(drawn_BxN.shape[1]) == 0) & (tree.token_BxN > 5), depth)


BIASED = {
    "one number for all tokens": ("row_keys", one_number),
    "on from a token that was not drawn": ("follow", generous),
}


@pytest.mark.parametrize("bias", suites.keep(["one number for all tokens"], BIASED))
def test_biased_acceptance_is_found_out(monkeypatch, bias):
    monkeypatch.setattr(verification, *BIASED[bias])
    never = Stopping("threshold", 1e-9 * (1 + list(BIASED).index(bias)))  # a program of its own for each
    assert p_value(ngram(3, never))[0] < 1e-6
