"""Every family against golden values of transformers and torch, in float32: logits, greedy text, decoding in all modes.

The golden texts are transformers' own greedy ones, so that equality with them is equality of plain decoding, too.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import suites
from golden import families

from ppow_jax.corpus.target_pass import score
from ppow_jax.data.batches import Batches
from ppow_jax.data.encoding import Example
from ppow_jax.models import transformer
from ppow_jax.models.transformer import causal_mask
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.speculation import generate, prefill
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import chain, off, tree
from ppow_jax.speculation.verify import leading
from ppow_jax.training import initialise
from ppow_jax.training.steps import ppow_sampled
from ppow_jax.training.steps.rollout import RolloutSettings, rollout
from ppow_jax.training.steps.state import TrainState

GOLDEN = np.load(Path(__file__).parent / "golden" / "families.npz")
NEW, K = families.NEW_TOKENS, 3
FAMILIES = ("llama3", "qwen2-sliding", "qwen3", "qwen3-moe")  # one of each, for what takes long to compile


@functools.cache
def params(name: str) -> dict:
    return jax.tree.map(jnp.asarray, families.params(name))


def texts(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(length_N of the prompts, tokens_NxL of prompts and golden answers)."""
    return GOLDEN[f"{name}.length"].astype(np.int32), GOLDEN[f"{name}.tokens"].astype(np.int32)


@functools.partial(jax.jit, static_argnames="name")
def logits(name: str, params: dict, tokens_NxL: jax.Array) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(tokens_NxL.shape[1]), tokens_NxL.shape)
    out = transformer.forward(params, families.TARGETS[name], tokens_NxL, position, causal_mask(*tokens_NxL.shape))
    return transformer.logits(params, out.hidden_BxSxD)


@pytest.mark.parametrize("name", families.TARGETS)
def test_logits_and_greedy_texts_equal_transformers(name):
    length_N, tokens_NxL = texts(name)
    z_NxLxV = np.asarray(logits(name, params(name), tokens_NxL))
    for i in range(families.LOGIT_ROWS):
        expected = GOLDEN[f"{name}.logits{i}"]
        limit = 1e-3 if families.TARGETS[name].experts else 1e-4
        np.testing.assert_allclose(z_NxLxV[i, : len(expected)], expected, rtol=0, atol=limit)
    for z_LxV, tokens, length in zip(z_NxLxV, tokens_NxL, length_N, strict=True):
        answer = slice(length, length + NEW)
        assert z_LxV.argmax(-1)[length - 1 : length + NEW - 1].tolist() == tokens[answer].tolist()
    assert len({tuple(tokens[length:]) for tokens, length in zip(tokens_NxL, length_N, strict=True)}) > 15


@pytest.mark.parametrize("name", ["qwen2-yarn", "qwen2-sliding", "qwen3-moe"])
def test_what_makes_a_family_counts(name):
    """Without it the golden logits are missed by far."""
    config = families.TARGETS[name]
    without = {"qwen2-yarn": {"rope_scaling": None}, "qwen2-sliding": {"sliding_layers": ()}}
    if config.experts:
        without[name] = {"experts": dataclasses.replace(config.experts, normalize=False)}
    other = dataclasses.replace(config, **without[name])
    _, tokens_NxL = texts(name)
    tokens = tokens_NxL[:1, : len(GOLDEN[f"{name}.logits0"])]
    position = np.arange(tokens.shape[1])[None]
    mask = causal_mask(*tokens.shape)
    out = jax.jit(transformer.forward, static_argnums=1)(params(name), other, tokens, position, mask)
    difference = transformer.logits(params(name), out.hidden_BxSxD)[0] - GOLDEN[f"{name}.logits0"]
    assert np.abs(difference).max() > 0.05


# Decoding.


def examples(name: str) -> list[Example]:
    length_N, tokens_NxL = texts(name)
    return [
        Example(tokens[: length + NEW], np.arange(length + NEW) >= length, f"{name}:{i}")
        for i, (length, tokens) in enumerate(zip(length_N, tokens_NxL, strict=True))
    ]


@functools.cache
def drafter(name: str):
    config = initialise.drafter_config(families.TARGETS[name], 40, (0, 1, 2), fc_norm=False)
    ids_W = initialise.choose_vocabulary(examples(name), families.SIZES["vocab_size"], 40)
    return initialise.from_target(jax.random.key(0), config, params(name), ids_W)


def decode(name: str, speculation, prompt_BxP, length_B, new: int):
    """The state after a whole generation."""
    config, K = families.TARGETS[name], speculation.window
    speaker = drafter(name) if K else None
    B, P = prompt_BxP.shape
    keys, L = jax.random.split(jax.random.key(0), B), generate.cache_length(P, new, K)
    arguments = jnp.asarray(prompt_BxP), jnp.asarray(length_B), jnp.asarray(length_B + new), keys
    state = generate.prefill(params(name), config, speaker, *arguments, K=K, sampling=Sampling(), L=L)
    return generate.decode(params(name), config, speaker, state, new, speculation=speculation, sampling=Sampling())


@pytest.mark.parametrize("name", suites.keep(["qwen3-moe"], FAMILIES))
def test_decoding_in_every_mode_gives_the_golden_texts(name):
    length_B, tokens_BxL = texts(name)
    prompt_BxP = np.where(np.arange(length_B.max()) < length_B[:, None], tokens_BxL[:, : length_B.max()], 0)
    plain = [off()] if name == "qwen3-moe" else []  # the golden texts are plain decoding's, by their own definition
    for speculation in (*plain, chain(K), tree(2, K, 6)):
        state = decode(name, speculation, prompt_BxP, length_B, NEW)
        for tokens, expected, length in zip(np.asarray(state.tokens_BxL), tokens_BxL, length_B, strict=True):
            assert tokens[: length + NEW].tolist() == expected[: length + NEW].tolist(), speculation.mode
        histogram = np.asarray(state.histogram_BxK1).sum(0)
        assert speculation.window == 0 or histogram[1:].sum() > 0  # some drafts were right
        experts = families.TARGETS[name].experts
        assert (state.experts_B is None) == (experts is None)
        if experts:
            per_pass = np.asarray(state.experts_B).sum() / histogram.sum()
            tokens = {"off": 1, "chain": K + 1, "tree": 7}[speculation.mode]
            low, high = experts.per_token, min(experts.number, tokens * experts.per_token)
            assert per_pass == low if tokens == 1 else low < per_pass < high


def test_prompts_read_in_pieces_through_a_sliding_window(monkeypatch):
    monkeypatch.setattr(prefill, "WHOLE", 16)
    monkeypatch.setattr(prefill, "PIECE", 16)
    length_B, tokens_BxL = (x[:5] for x in texts("qwen2-sliding"))
    new, end_B = 6, length_B + NEW - 6
    prompt_BxP = np.where(np.arange(end_B.max()) < end_B[:, None], tokens_BxL[:, : end_B.max()], 0)
    state = decode("qwen2-sliding", off(), prompt_BxP, end_B, new)
    for tokens, expected, end in zip(np.asarray(state.tokens_BxL), tokens_BxL, end_B, strict=True):
        assert tokens[: end + new].tolist() == expected[: end + new].tolist()


# Training.

ROLLOUTS = RolloutSettings(
    window=K,
    group=2,
    windows=3,
    rollout_temperature=0.7,
    verify_temperature=0.0,
    eta=0.2,
    eps=4.0,
    adaw=True,
    adaw_start=0,
    greedy_reference=False,
    costs=CostModel(0.12),
)


def batch(name: str):
    return Batches(examples(name)[:6], seed=0, batch_size=1, row_length=160, max_anchors=96).at(0)


@pytest.mark.parametrize("name", suites.keep(["qwen3-moe"], FAMILIES))
def test_a_ppow_step(name):
    optimizer, start = optax.adamw(1e-3), drafter(name)
    state, metrics = ppow_sampled.train_step(
        TrainState.create(jax.tree.map(jnp.copy, start.params), optimizer),
        start.spec,
        params(name),
        batch(name),
        jax.random.key(1),
        config=families.TARGETS[name],
        optimizer=optimizer,
        rollouts=ROLLOUTS,
        policy=ppow_sampled.PolicySettings(clip=0.2, kl_weight=0.1, passes=1),
        answers_are_greedy=True,
    )
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(metrics))
    assert metrics["windows"] == 6 and metrics["gradient_norm"] > 0 and metrics["accepted_histogram"].sum() == 6
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start.params)
    assert moved["fc"] > 0 and moved["lm_head"] > 0


@pytest.mark.parametrize("name", ["qwen3-moe-other"])  # experts and sliding windows, in packed rows
def test_rollouts_are_verified_as_a_pass_over_the_whole_text_would(name):
    packed, config, speaker = batch(name), families.TARGETS[name], drafter(name)

    @jax.jit
    def roll(key_B):
        scored = score(params(name), config, (0, 1, 2), speaker.target_ids_W, packed, answers_are_greedy=True)
        return rollout(key_B, 0, speaker, params(name), config, scored, ROLLOUTS)[0]

    windows, checked = jax.device_get(roll(jax.random.split(jax.random.key(3), len(packed.tokens_BxT)))), 0
    length, tokens_NxL = 96, []
    for x, anchor in enumerate(windows.anchor_BxX[0]):
        start = anchor - packed.position_BxT[0, anchor]
        text = np.r_[packed.tokens_BxT[0, start : anchor + 2], windows.token_BxXxK[0, x]]
        tokens_NxL.append(np.r_[text, np.zeros(length - len(text), int)])
    best_NxL = np.asarray(logits(name, params(name), np.array(tokens_NxL, np.int32))).argmax(-1)
    for x, anchor in enumerate(windows.anchor_BxX[0]):
        root = packed.position_BxT[0, anchor] + 1
        expected = leading(jnp.asarray(best_NxL[x, root : root + K] == windows.token_BxXxK[0, x]))
        assert windows.accepted_BxX[0, x] == expected
        checked += bool(windows.valid_BxX[0, x])
    assert checked == 6
