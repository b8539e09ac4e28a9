"""Trace of one answer, decoded round by round from the host: for inspection, not for speed."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Batch, Text
from ppow_jax.inference.trace_page import Drafted, Step, Trace
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.generate import Round, State
from ppow_jax.speculation.propose import NONE, Draft
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.tree import Tree

LIKELY = 4  # number of the target's most probable tokens that are recorded


def record(model: Model, prompt: Text, **settings: Any) -> Trace:
    """Answers one prompt as `Model.generate` does, with its settings, recording every round.

    Drafting and verification are separate programs here, so that each can be timed; they are compiled beforehand.
    """
    job = model.job([prompt], **settings)
    for width in job.speculation.widths if job.speculation.adaptive else (None,):
        _round(model, model.begin(job, [0]), width)  # compiles
    batch, steps = model.begin(job, [0]), []
    begin = time.perf_counter()
    while True:
        batch.look(begin)
        if batch.finished:
            break
        steps.append(_step(model, batch))
    tokenizer, result = model.target.tokenizer, batch.answers[0].result
    text = tokenizer.decode(result.prompt_ids)
    return Trace(model.target.name, text, job.speculation, settings, tuple(steps), result, tokenizer)


class _Timed(NamedTuple):
    """A round, and the seconds of its parts."""

    draft: Draft | Tree | None
    result: Round
    draft_seconds: float
    verify_seconds: float


def _round(model: Model, batch: Batch, width: int | None = None) -> _Timed:
    """Decodes one round of a batch of one. width: width of its verification, by default as the draft needs."""
    params, config = model.target.params, model.target.config
    how = {"speculation": batch.speculation, "sampling": batch.sampling, "prices": batch.prices}
    state, draft = batch.state, None
    begin = time.perf_counter()
    if batch.drafter:
        state, draft = jax.block_until_ready(_draft(params, batch.drafter, state, **how))
    middle = time.perf_counter()
    if draft is not None and batch.speculation.adaptive and width is None:
        width = batch.speculation.width_of(int(draft.count_B[0]))
    state, result = jax.block_until_ready(_verify(params, config, batch.drafter, state, draft, **how, width=width))
    end = time.perf_counter()
    batch.state = state
    return _Timed(draft, result, middle - begin, end - middle)


def _step(model: Model, batch: Batch) -> Step:
    """Decodes and describes one round of a batch of one."""
    length = int(batch.state.length_B[0])
    root = int(batch.state.tokens_BxL[0, length - 1])
    draft, result, *seconds = _round(model, batch)
    token_N, parent_N, drafter_N = _drafts(draft)
    p_N1xV = np.asarray(_probabilities(model.target.params, result.hidden_BxN1xD[0]))
    accepted, index_K1 = int(result.accepted_B[0]), np.asarray(result.index_BxK1[0])
    path = set(index_K1[1 : accepted + 1].tolist())
    drafted = tuple(
        Drafted(int(token), int(parent), float(q), float(p_N1xV[parent, token]), n + 1 in path)
        for n, (token, parent, q) in enumerate(zip(token_N, parent_N, drafter_N, strict=True))
    )
    own, p_V = int(result.token_BxK1[0, accepted]), p_N1xV[index_K1[accepted]]
    likely = tuple((int(token), float(p_V[token])) for token in np.argsort(-p_V)[:LIKELY])
    gained = int(batch.state.length_B[0]) - length
    return Step(root, drafted, own, float(p_V[own]), likely, gained, *seconds)


def _drafts(draft: Draft | Tree | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_N, parent_N, the drafter's probability of each given its parents)."""
    if draft is None:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    if isinstance(draft, Tree):
        draft = draft.cut(int(draft.count_B[0]))
        token_N, parent_N, logp_N = (np.asarray(x[0]) for x in (draft.token_BxN, draft.parent_BxN, draft.logp_BxN))
        return token_N, parent_N, np.exp(logp_N - np.r_[0.0, logp_N][parent_N])
    token_K = np.asarray(draft.token_BxMxK[0, 0])
    count = int((token_K != NONE).sum())
    return token_K[:count], np.arange(count), np.exp(np.asarray(draft.logp_BxMxK[0, 0, :count]))


@functools.partial(jax.jit, static_argnames=("speculation",), donate_argnames=("state",))
def _draft(
    params: dict, drafter: Drafter, state: State, *, speculation: Speculation, sampling: Sampling, prices: Any
) -> tuple[State, Draft | Tree]:
    return generate.draft_window(params, drafter, state, speculation, sampling, prices)


@functools.partial(jax.jit, static_argnames=("config", "speculation", "width"), donate_argnames=("state",))
def _verify(
    params: dict,
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    draft: Draft | Tree | None,
    *,
    speculation: Speculation,
    sampling: Sampling,
    prices: Any,
    width: int | None,
) -> tuple[State, Round]:
    state, result = generate.verify_window(params, config, drafter, state, draft, speculation, sampling, prices, width)
    return state, result._replace(kv=(), features_BxK1xF=None)  # the state already holds what is needed of them


@jax.jit
def _probabilities(params: dict, hidden_N1xD: jax.Array) -> jax.Array:
    """The target's distribution [N1, V] after each index of the window, at temperature 1."""
    return jax.nn.softmax(transformer.logits(params, hidden_N1xD).astype(jnp.float32))
