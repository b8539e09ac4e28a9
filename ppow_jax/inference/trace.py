"""Trace of one answer, decoded round by round from the host: for inspection, not for speed."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Batch, Text
from ppow_jax.inference.trace_page import Drafted, Step, Trace
from ppow_jax.models import transformer
from ppow_jax.speculation.generate import Verification
from ppow_jax.speculation.propose import Draft
from ppow_jax.speculation.sources import NAMES, Drafts
from ppow_jax.speculation.tree import Tree

LIKELY = 4  # number of the target's most probable tokens that are recorded


def record(model: Model, prompt: Text, **settings: Any) -> Trace:
    """Answers one prompt as `Model.generate` does, with its settings, recording every round.

    Drafting and verification are separate programs here, so that each can be timed; they are compiled beforehand.
    """
    job = model.job([prompt], **settings)
    for width in job.speculation.widths if job.speculation.adaptive else (None,):
        _round(model.begin(job, [0]), width)  # compiles
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

    draft: Draft | Tree | Drafts | None
    result: Verification
    draft_seconds: float
    verify_seconds: float


def _round(batch: Batch, width: int | None = None) -> _Timed:
    """Decodes one round of a batch of one. width: width of its verification, by default as the draft needs."""
    generation = batch.generation
    begin = time.perf_counter()
    draft = generation.draft()
    jax.block_until_ready(generation.state)
    middle = time.perf_counter()
    if draft is not None and generation.speculation.adaptive and width is None:
        width = generation.speculation.width_of(int(draft.count_B[0]))
    result = jax.block_until_ready(generation.verify(draft, width))
    jax.block_until_ready(generation.state)
    return _Timed(draft, result, middle - begin, time.perf_counter() - middle)


def _step(model: Model, batch: Batch) -> Step:
    """Decodes and describes one round of a batch of one."""
    length = int(batch.generation.state.length_B[0])
    root = int(batch.generation.state.tokens_BxL[0, length - 1])
    draft, result, *seconds = _round(batch)
    token_N, parent_N, drafter_N, source_N = _drafts(draft)
    p_N1xV = np.asarray(_probabilities(model.target.params, result.hidden_BxN1xD[0]))
    accepted, index_K1 = int(result.accepted_B[0]), np.asarray(result.index_BxK1[0])
    path = set(index_K1[1 : accepted + 1].tolist())
    drafted = tuple(
        Drafted(int(token), int(parent), float(q), float(p_N1xV[parent, token]), n + 1 in path, source)
        for n, (token, parent, q, source) in enumerate(zip(token_N, parent_N, drafter_N, source_N, strict=True))
    )
    own, p_V = int(result.token_BxK1[0, accepted]), p_N1xV[index_K1[accepted]]
    likely = tuple((int(token), float(p_V[token])) for token in np.argsort(-p_V)[:LIKELY])
    gained = int(batch.generation.state.length_B[0]) - length
    return Step(root, drafted, own, float(p_V[own]), likely, gained, *seconds)


def _drafts(draft: Draft | Tree | Drafts | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(token_N, parent_N, the drafter's probability of each given its parents, the sources)."""
    if draft is None:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0), []
    count = int(draft.count_B[0])
    if isinstance(draft, Drafts):
        return *_drafts(draft.tree)[:3], [NAMES[source - 1] for source in np.asarray(draft.source_BxN[0, :count])]
    if isinstance(draft, Tree):
        draft = draft.cut(count)
        token_N, parent_N, logp_N = (np.asarray(x[0]) for x in (draft.token_BxN, draft.parent_BxN, draft.logp_BxN))
        return token_N, parent_N, np.exp(logp_N - np.r_[0.0, logp_N][parent_N]), count * [NAMES[0]]
    token_K = np.asarray(draft.token_BxMxK[0, 0])
    return token_K[:count], np.arange(count), np.exp(np.asarray(draft.logp_BxMxK[0, 0, :count])), count * [NAMES[0]]


@jax.jit
def _probabilities(params: dict, hidden_N1xD: jax.Array) -> jax.Array:
    """The target's distribution [N1, V] after each index of the window, at temperature 1."""
    return jax.nn.softmax(transformer.logits(params, hidden_N1xD).astype(jnp.float32))
