"""A target small enough to compile in seconds, answers that it wrote itself, and a drafter for it.

Everything is made once per session and never changed. Three layers instead of the seven of `--target=tiny`: compiling
is what tests of training spend their time on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_configs

from ppow_jax.corpus.target_pass import score
from ppow_jax.data.batches import Batches, PackedBatch
from ppow_jax.data.encoding import Example
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import off
from ppow_jax.training import initialise
from ppow_jax.training.steps import supervised
from ppow_jax.training.steps.rollout import RolloutSettings
from ppow_jax.training.steps.state import TrainState

CONFIG = small_configs.target_config()
FEATURE_LAYERS = (0, 1, 3)
ROW, ANCHORS, ROWS = 64, 48, 2
ANSWER = 20


@functools.cache
def target_params() -> dict:
    return jax.jit(lambda key: transformer.init(key, CONFIG, scale=0.3))(jax.random.key(0))


@functools.cache
def examples() -> tuple[Example, ...]:
    """24 prompts with the target's greedy answers, of at most ANSWER tokens; two answers end early."""
    rng = np.random.default_rng(1)
    n, P = 24, 12
    prompt_B = rng.integers(3, P + 1, n)
    prompt_BxP = rng.integers(0, CONFIG.vocab_size - 1, (n, P)) * (np.arange(P) < prompt_B[:, None])
    length_B, tokens_BxL = greedy(prompt_BxP, prompt_B, prompt_B + ANSWER)
    return tuple(
        Example(tokens[:length].astype(np.int32), np.arange(length) >= prompt, f"small:{i}")
        for i, (tokens, length, prompt) in enumerate(zip(tokens_BxL, length_B, prompt_B, strict=True))
    )


def greedy(prompt_BxP: np.ndarray, prompt_B: np.ndarray, limit_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain greedy decoding: (length_B, tokens_BxL)."""
    B, P = prompt_BxP.shape
    keys = jax.random.split(jax.random.key(0), B)
    arguments = (jnp.asarray(x, jnp.int32) for x in (prompt_BxP, prompt_B, limit_B))
    L = generate.cache_length(P, ANSWER, 0)
    state = generate.prefill(target_params(), CONFIG, None, *arguments, keys, K=0, sampling=Sampling(), L=L)
    state = generate.decode(target_params(), CONFIG, None, state, ANSWER, speculation=off(), sampling=Sampling())
    return np.asarray(state.length_B), np.asarray(state.tokens_BxL)


@functools.cache
def batches() -> Batches:
    return Batches(examples(), seed=0, batch_size=ROWS, row_length=ROW, max_anchors=ANCHORS)


def batch() -> PackedBatch:
    return batches().at(0)


@functools.cache
def drafter(fc_norm: bool = False) -> Drafter:
    """A start whose sampled windows are accepted now and then; its vocabulary lacks some tokens of the answers.

    What training begins with, at unit size: on this small target its drafts vary more than those of the start itself.
    """
    config = initialise.drafter_config(CONFIG, 20, FEATURE_LAYERS, fc_norm)
    ids_W = initialise.choose_vocabulary(examples(), CONFIG.vocab_size, 20)
    scored = scored_batch(ids_W, batch())
    features_NxF = np.asarray(scored.windows.features_BxTxF)[batch().segment_BxT > 0]
    scale = initialise.feature_scale(features_NxF)
    start = initialise.from_target(jax.random.key(5), config, target_params(), ids_W, scale)
    if fc_norm:
        return start
    small = {name: start.params[name] / np.float32(scale[2]) for name in ("fc", "o_proj", "down_proj")}
    return start.replace(params=start.params | small)


def score_in(batch, ids_W, answers_are_greedy: bool = True):
    """The target's pass, inside a jitted function."""
    return score(target_params(), CONFIG, FEATURE_LAYERS, ids_W, batch, answers_are_greedy)


def scored_batch(ids_W, batch_: PackedBatch):
    """The target's pass over a batch."""
    return _score(batch_, jnp.asarray(ids_W))


_score = jax.jit(score_in)


# Supervised training, shared by the tests so that it is compiled once.

STEPS, OPTIMIZER = 3, optax.adamw(3e-3)
train_step = functools.partial(
    supervised.train_step,
    config=CONFIG,
    optimizer=OPTIMIZER,
    steps=STEPS,
    loss=SupervisedLoss(),
    answers_are_greedy=True,
)


@functools.cache
def training() -> tuple[Drafter, list[dict], int]:
    """90 steps from the start: (drafter, metrics of each step, compilations)."""
    start = drafter()
    shell, state, history = start.spec, TrainState.create(start.params, OPTIMIZER), []
    before = supervised.train_step._cache_size()
    for index in range(90):
        state, metrics = train_step(state, shell, target_params(), batches().at(index))
        history.append(jax.device_get(metrics))
    assert state.step == 90
    return start.replace(params=state.params), history, supervised.train_step._cache_size() - before


def trained() -> Drafter:
    """Some of its windows are accepted, many are not."""
    return training()[0]


# Rollouts.

ROLLOUTS = RolloutSettings(
    window=3,
    group=4,
    windows=3,
    rollout_temperature=0.7,
    verify_temperature=0.0,
    eta=0.2,
    eps=4.0,
    adaw=True,
    adaw_start=2,
    greedy_reference=False,
    costs=CostModel(0.12),
)
