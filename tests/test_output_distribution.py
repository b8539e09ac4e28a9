"""Sampled continuations of real text follow SmolLM2's own law, however they are drafted; biased rules are found out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppow_jax.models import transformer
from ppow_jax.speculation import generate, verify
from ppow_jax.speculation.adaptive import CostTable, Stopping
from ppow_jax.speculation.propose import NONE, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, adaptive, adaptive_tree, chain, tree
from ppow_jax.weights import loading, targets

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

PROMPT = "The best thing about the winter here is"
ROWS, CALLS, TOKENS, LIKELY = 256, 4, 2, 24
WAYS = {
    "chain": chain(2, block=False),
    "block": chain(2),
    "tree": tree(2, 2, 3),
    "adaptive": adaptive_tree(2, 2, 3),
}


@functools.cache
def world():
    """Target, drafter, and one row that has read the prompt and holds one token more, which all rows share."""
    target = targets.load("smollm2-135m", "bfloat16")
    drafter = loading.load_drafter(loading.find_drafter("auto", "smollm2-135m"), target)
    ids = np.asarray(target.tokenizer(PROMPT)["input_ids"], np.int32)
    return target, drafter, ids


@functools.cache
def start():
    target, drafter, ids = world()
    length = np.array([len(ids)], np.int32)
    begin = ids[None], length, length + 1 + TOKENS, jax.random.split(jax.random.key(0), 1)
    L = generate.cache_length(len(ids), 1 + TOKENS, 2)
    return generate.prefill(target.params, target.config, drafter, *begin, K=2, sampling=Sampling.of(1.0), L=L)


@functools.cache
def law() -> tuple[np.ndarray, np.ndarray]:
    """The LIKELY most probable tokens after the shared one, and the joint law [LIKELY, V] of these and the next."""
    target, _, ids = world()
    shared = np.r_[ids, np.asarray(start().tokens_BxL)[0, len(ids)]]

    @jax.jit
    def after(params, texts):
        position = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        mask = transformer.causal_mask(*texts.shape)
        out = transformer.forward(params, target.config, texts, position, mask)
        return jax.nn.softmax(transformer.logits(params, out.hidden_BxSxD[:, -1]))

    first_V = np.asarray(after(target.params, shared[None]), np.float64)[0]
    likely = np.argsort(-first_V)[:LIKELY]
    texts = np.concatenate([np.tile(shared, (LIKELY, 1)), likely[:, None]], 1)
    return likely, first_V[likely, None] * np.asarray(after(target.params, texts), np.float64)


def p_value(way: Speculation, calls: int = CALLS) -> float:
    """The p-value of a chi-square test of ROWS * calls continuations against the law; rare cells are pooled."""
    target, drafter, ids = world()
    state = jax.tree.map(lambda x: jnp.repeat(x, ROWS, 0), start().replace(key_B=None))
    how = {"speculation": way, "sampling": Sampling.of(1.0), "cost_table": CostTable.of(0.05, 1 + 0.02 * np.arange(4))}
    found = []
    for call in range(calls):
        mine = jax.tree.map(jnp.copy, state).replace(key_B=jax.random.split(jax.random.key(call + 1), ROWS))
        done = generate.decode(target.params, target.config, drafter, mine, 10, **how)
        found.append(np.asarray(done.tokens_BxL)[:, len(ids) + 1 : len(ids) + 1 + TOKENS])
    likely, joint = law()
    place = {int(token): i for i, token in enumerate(likely)}
    counts = np.zeros_like(joint)
    for first, second in np.concatenate(found):
        if int(first) in place:
            counts[place[int(first)], second] += 1
    N = ROWS * calls
    often = joint * N >= 5
    assert often.sum() >= 15
    kept = [np.r_[x[often], N - x[often].sum()] for x in (counts, joint * N)]
    return stats.chisquare(*kept).pvalue


@pytest.mark.parametrize("mode", WAYS)
def test_continuations_follow_the_target(mode):
    assert p_value(WAYS[mode]) > 1e-3


def dropping(*arguments, go_on=None, **more):
    """Drops a drawn token that is not the drafter's favourite, and all after it."""
    draft = propose(*arguments, **more)
    sure = jnp.cumprod(draft.logp_BxMxK > draft.log_q_BxMxKxW.max(-1) - 1e-3, axis=-1).astype(bool)
    law = jnp.where(sure[..., None], draft.log_q_BxMxKxW, -jnp.inf)
    return draft._replace(token_BxMxK=jnp.where(sure, draft.token_BxMxK, NONE), log_q_BxMxKxW=law)


BIASED = {
    "q ignored": (verify, "likelihood_ratio", lambda p, q: p),
    "p instead of the residual": (verify, "residual", lambda p, q, scale: p),
    "dropped after the draw": (generate, "propose", dropping),
}


@pytest.mark.parametrize("bias", BIASED)
def test_biased_rules_are_found_out(monkeypatch, bias):
    monkeypatch.setattr(*BIASED[bias])
    never = Stopping("threshold", 1e-9 * (1 + list(BIASED).index(bias)))  # a program of its own for each
    assert p_value(adaptive(2, block=False, stopping=never), 3 * CALLS) < 1e-6
