"""The Python API: requests of all kinds in one batch, stop texts, streaming, limits, and prompts read in pieces."""

import dataclasses
import functools
import math
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world

import ppow_jax
from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt, tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.inference import SPECULATIONS, Model
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.config import DrafterConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.requests import Answer, Request
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import adaptive, chain, off, tree
from ppow_jax.weights.targets import Target

POSITIONS, NEW = 1200, 30
CONFIG = dataclasses.replace(
    small_world.CONFIG, vocab_size=259, num_layers=2, max_position_embeddings=POSITIONS, eos_token_ids=(258,)
)
MODES = {"off": off(), "chain": chain(3), "adaptive": adaptive(3), "tree": tree(3, 3, 9)}
DEAR = np.array([1.0, 2.0, 2.6, 3.3], np.float32)  # so that adaptive rows take all widths, and rest


@functools.cache
def tokenizer():
    return tiny_tokenizer()


@functools.cache
def model() -> Model:
    """Writes few different tokens, among them the bytes of two characters, so that drafts are right now and then."""
    written = sorted({*tokenizer()("abcd é€")["input_ids"], 258})
    params = dict(transformer.init(jax.random.key(1), CONFIG, scale=0.3))
    often_V = np.isin(np.arange(CONFIG.vocab_size), written)
    params["lm_head"] = params["lm_head"] * np.where(often_V, 1.5, 0.0)[:, None].astype(np.float32)
    config = DrafterConfig(
        vocab_size=CONFIG.vocab_size,
        draft_vocab_size=len(written),
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=POSITIONS,
        target_hidden_size=32,
        feature_layers=(0, 1, 2),
        fc_norm=True,
    )
    drafter = Drafter(config, drafting.init(jax.random.key(2), config, scale=0.2), jnp.array(written))
    costs = {(3, rows, greedy): DEAR for rows in (1, 2, 4, 8) for greedy in (True, False)}
    return Model(Target("small", CONFIG, params, tokenizer()), drafter, costs)


PROMPTS = ["a", "Once upon a time", "b" * 70, "é€ and more", "zz top", "The end?", "x = 3", "d" * 20]
SETTINGS = {
    "temperature": [0.0, 1.0, 1.3, 0.0, 0.8, 1.0, 0.7, 1.0],
    "top_k": [0, 0, 5, 3, 0, 12, 0, 1],
    "top_p": [1.0, 0.9, 1.0, 0.5, 1.0, 0.8, 1.0, 1.0],
    "seed": [1, 2, 3, 4, 5, 6, 2**31 - 1, 8],
    "max_new_tokens": [NEW, 9, 20, NEW, 1, NEW, NEW, 25],
    "stop": [(), ("a",), (), ("é", "ab"), (), (), ("b ",), ()],
}


def pick(rows) -> dict:
    return {name: [values[i] for i in rows] for name, values in SETTINGS.items()}


def without_times(result):
    return dataclasses.replace(result, prefill_seconds=0.0, decode_seconds=0.0)


def answers(rows, mode: str, **more) -> list:
    results = model().generate([PROMPTS[i] for i in rows], **pick(rows), speculation=MODES[mode], **more)
    return [without_times(result) for result in results]


@functools.cache
def together(mode: str) -> tuple:
    return tuple(answers(range(8), mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_request_depends_neither_on_its_neighbours_nor_on_its_place(mode):
    order = [5, 2, 7, 0, 6, 3, 1, 4]
    assert repr(answers(order, mode)) == repr([together(mode)[i] for i in order])  # nan is not equal to itself
    alone = answers(range(8), mode, batch_size=1)
    assert repr(alone) == repr(list(together(mode)))
    assert len({tuple(result.token_ids) for result in alone}) == 8


def test_greedy_answers_are_the_same_in_every_mode():
    for i in (0, 3, 7):  # the last by top_k = 1
        expected = together("off")[i]
        for mode in ("chain", "adaptive", "tree"):
            found = together(mode)[i]
            assert (found.text, found.token_ids, found.finish_reason) == (
                expected.text,
                expected.token_ids,
                expected.finish_reason,
            )


def test_limits_and_reasons():
    for mode in MODES:
        results = together(mode)
        for result, budget in zip(results, SETTINGS["max_new_tokens"], strict=True):
            assert 1 <= len(result.token_ids) <= budget
            if result.finish_reason == "length":
                assert len(result.token_ids) == budget and 258 not in result.token_ids
        assert {result.finish_reason for result in results} == {"stop", "length"}
        assert [result.prompt_ids for result in results] == [tokenizer()(text)["input_ids"] for text in PROMPTS]


def test_stats_are_those_of_vllm():
    for mode, how in MODES.items():
        for result in together(mode):
            stats = result.stats
            steps, accepted = stats.num_spec_steps, stats.num_accepted_draft_tokens
            assert len(stats.acceptance_histogram) == how.window + 1 and sum(stats.acceptance_histogram) == steps
            assert accepted == np.dot(stats.acceptance_histogram, np.arange(how.window + 1))
            if steps == 0:
                assert len(result.token_ids) == 1 and math.isnan(stats.mean_acceptance_length)
                continue
            assert stats.mean_acceptance_length == 1 + accepted / steps
            assert stats.num_draft_tokens == {"off": 0, "chain": 3 * steps, "tree": 9 * steps}.get(
                mode, stats.num_draft_tokens
            )
            if stats.num_draft_tokens:
                assert stats.draft_acceptance_rate == accepted / stats.num_draft_tokens
            assert steps + accepted >= len(result.token_ids) - 1  # more where a stop or the budget cut the last round
    assert sum(result.stats.num_accepted_draft_tokens for result in together("chain")) > 5


# ---------------------------------------------------------------- stop texts and streaming


def cut(whole, stops) -> tuple[str, list[int], str]:
    """What a stop text must make of an answer: the shortest prefix of tokens that holds one, cut before the first."""
    for n in range(1, len(whole.token_ids) + 1):
        text = tokenizer().decode(whole.token_ids[:n], skip_special_tokens=True)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], whole.token_ids[:n], "stop"
    return whole.text, whole.token_ids, whole.finish_reason


def test_stop_texts_cut_at_the_first_occurrence():
    how = {"max_new_tokens": NEW, "temperature": 1.0, "speculation": MODES["chain"]}
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 60]
    seeds = list(range(len(prompts)))
    wholes = model().generate(prompts, seed=seeds, **how)
    rng = np.random.default_rng(0)
    ways = set()
    for _ in range(12):
        stops = []
        for whole in wholes:
            at, size = rng.integers(0, max(1, len(whole.text))), rng.integers(1, 5)
            stops.append([whole.text[at : at + size] or "?", "not there"])
        for whole, stop, result in zip(
            wholes, stops, model().generate(prompts, seed=seeds, stop=stops, **how), strict=True
        ):
            assert (result.text, result.token_ids, result.finish_reason) == cut(whole, stop)
            ways.add((result.finish_reason, len(result.token_ids) < len(whole.token_ids)))
    assert ("stop", True) in ways


def test_one_stop_text_serves_all_prompts():
    how = {"max_new_tokens": NEW, "speculation": "off", "temperature": 1.0}
    wholes = model().generate(PROMPTS[:2], **how)
    for stop, stops in (("a", ("a",)), (["c", "b"], ("c", "b")), ([["a"], []], None)):
        results = model().generate(PROMPTS[:2], stop=stop, **how)
        for whole, result, each in zip(wholes, results, [stops] * 2 if stops else [("a",), ()], strict=True):
            assert (result.text, result.token_ids, result.finish_reason) == cut(whole, each)


@pytest.mark.parametrize("mode", MODES)
def test_streamed_pieces_are_the_answer(mode):
    for i in (0, 1, 3, 5):
        (settings,) = [{name: values[0] for name, values in pick([i]).items()}]
        stream = model().stream(PROMPTS[i], **settings, speculation=MODES[mode])
        assert stream.result is None
        pieces = list(stream)
        assert "".join(pieces) == stream.result.text and all(pieces)
        got, expected = without_times(stream.result), together(mode)[i]
        assert dataclasses.replace(got, stats=None) == dataclasses.replace(expected, stats=None)
        if len(expected.token_ids) > 20:
            assert len(pieces) > 1


TEXTS = ["naïve café", "日本語 and 한국어", "a🙂b🙃🙂c", "stop it, stop! stopped", "sto sto stop", "ééé", ""]


@pytest.mark.parametrize("stop", [(), ("stop",), ("stop!", "🙂c", "opp"), ("é",)], ids=str)
def test_what_is_shown_is_never_taken_back(stop):
    """Token by token, which here is byte by byte: characters come complete, stop texts never show."""
    target = model().target
    for text in TEXTS:
        for ids in (tokenizer()(text)["input_ids"], [*tokenizer()(text)["input_ids"], 258]):
            answer, shown = Answer(target, Request("prompt", np.array([1]), 99, stop, 0), 0.0), ""
            tokens_L = np.array([1, *ids, 5, 5])
            for n in range(1, len(ids) + 1):
                answer.read(tokens_L, n + 1, n == len(ids), True, np.array([n]), 0, seconds=0.0)
                assert answer.settled.startswith(shown) and "\ufffd" not in answer.settled
                shown = answer.settled
                if answer.result:
                    break
            first = min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))
            assert shown == text[:first]
            if ids:
                assert answer.result.text == shown


def test_a_request_without_stop_text_is_one_program():
    with mock.patch.object(generate, "decode", wraps=generate.decode) as decode:
        model().generate(PROMPTS[0], max_new_tokens=NEW, speculation=MODES["chain"])
        assert decode.call_count == 1
        list(model().stream(PROMPTS[0], max_new_tokens=NEW, speculation=MODES["chain"]))
        assert decode.call_count > 2


def test_prompts_of_a_rung_share_their_programs_and_nothing_is_left_behind():
    how = {"speculation": MODES["chain"], "batch_size": 4}
    rng = np.random.default_rng(3)

    def run(n: int) -> None:
        prompts = [rng.integers(0, 256, rng.integers(1, 30)) for _ in range(n)]
        budgets = rng.integers(1, 30, n).tolist()
        assert len(model().generate(prompts, max_new_tokens=budgets, **how)) == n

    run(8)
    before = generate.decode._cache_size(), generate.prefill._cache_size(), len(jax.live_arrays())
    for n in (4, 40, 9):
        run(n)
    assert (generate.decode._cache_size(), generate.prefill._cache_size(), len(jax.live_arrays())) == before


# ---------------------------------------------------------------- chats


def test_chat():
    how = {"max_new_tokens": 12, "speculation": "off"}
    said = model().chat("hi", **how)
    assert said.prompt_ids == encode_prompt(tokenizer(), [Message("user", "hi")]).tolist()
    assert model().chat([{"role": "user", "content": "hi"}], **how).token_ids == said.token_ids
    stream = model().chat("hi", stream=True, **how)
    assert "".join(stream) == said.text == stream.result.text
    history = [Message("user", "hi"), {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
    ids = model().chat(history, **how).prompt_ids
    assert "ho" in tokenizer().decode(ids) and len(ids) > len(said.prompt_ids)


def test_prompts_may_be_token_ids():
    how = {"max_new_tokens": 8, "speculation": "off"}
    ids = tokenizer()("Once")["input_ids"]
    expected = model().generate("Once", **how)[0].token_ids
    for prompt in (ids, np.array(ids), [ids], jnp.array(ids)):
        assert [result.token_ids for result in model().generate(prompt, **how)] == [expected]
    assert model().generate([], **how) == []


# ---------------------------------------------------------------- limits and mistakes


@pytest.mark.parametrize("mode", ["off", "chain", "tree"])
def test_prompts_up_to_the_targets_positions(mode):
    how = {"speculation": MODES[mode], "max_new_tokens": 5}
    ids = np.arange(POSITIONS) % 200
    whole = jax.jit(functools.partial(transformer.forward, config=CONFIG))
    found = {n: model().generate(ids[:n], **how)[0] for n in (1, POSITIONS - 2, POSITIONS)}
    assert len(found[1].token_ids) <= 5
    for n, expected in ((POSITIONS - 2, 3), (POSITIONS, 1)):  # the last token needs no position
        result = found[n]
        assert len(result.token_ids) == expected and result.finish_reason == "length"
        text = np.r_[ids[:n], result.token_ids][None, :POSITIONS]
        position = np.arange(text.shape[1])[None]
        out = whole(
            params=model().target.params,
            tokens_BxS=text,
            position_BxS=position,
            self_mask_BxSxS=transformer.causal_mask(*text.shape),
        )
        best = np.asarray(transformer.logits(model().target.params, out.hidden_BxSxD[0, n - 1 :])).argmax(-1)
        assert best.tolist() == result.token_ids


MISTAKES = [
    (("",), {}, "prompt: has no tokens"),
    ((["a", []],), {}, "prompt 1: has no tokens"),
    (
        (np.zeros(POSITIONS + 1, int),),
        {},
        f"prompt: it has {POSITIONS + 1} tokens, but small has {POSITIONS} positions",
    ),
    (([[3], [259]],), {}, "prompt 1: token ids must be whole numbers of 0..258"),
    (([[0.5]],), {}, "prompt: token ids must be whole numbers"),
    (("a",), {"max_new_tokens": 0}, "prompt: max_new_tokens=0: must be at least 1"),
    ((["a", "b"],), {"seed": [1]}, "seed: 1 values for 2 prompts"),
    ((["a", "b"],), {"seed": [1, -2]}, "prompt 1: seed=-2: must be"),
    ((["a", "b"],), {"temperature": [1, -2]}, "--temperature=-2 (row 1): must be 0 or more"),
    (("a",), {"top_p": 0}, "--top_p=0"),
    (("a",), {"stop": ["x", ""]}, "prompt: stop=('x', ''): must be texts that are not empty"),
    (("a",), {"speculation": "trees"}, "speculation=trees: must be one of off, chain, adaptive, tree"),
    (("a",), {"batch_size": 0}, "batch_size=0: must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "settings", "message"), MISTAKES, ids=[case[2][:40] for case in MISTAKES])
def test_mistakes(arguments, settings, message):
    with pytest.raises(UserError) as caught:
        model().generate(*arguments, **settings)
    assert message in str(caught.value)


def test_mistakes_of_chats_and_models():
    for messages in (
        [],
        [{"role": "user"}],
        [{"role": "cook", "content": "a"}],
        ["a"],
        [{"role": "user", "content": 3}],
    ):
        with pytest.raises(UserError, match="message"):
            model().chat(messages)
    plain = Model(model().target)
    with pytest.raises(UserError, match="speculation=tree: needs a drafter"):
        plain.generate("a", speculation="tree")
    assert plain.resolve(None) == off() and model().resolve(None) == SPECULATIONS["chain"]
    with pytest.raises(UserError, match="dtype=float64"):
        ppow_jax.load("tiny", dtype="float64")
    with pytest.raises(UserError, match="nowhere"):
        ppow_jax.load("tiny", drafter="nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_no_numbers_are_caught(mode, value):
    """A token whose embedding is broken: in the prompt, or written by the target itself."""
    target = model().target
    expected = together(mode)[0].token_ids
    written = next(token for token in expected[1:-1] if token != expected[0])
    for token, count in ((tokenizer()("z")["input_ids"][0], 1), (written, None)):
        params = target.params | {"embed": target.params["embed"].at[token].set(value)}
        broken = dataclasses.replace(model(), target=dataclasses.replace(target, params=params))
        prompts = ["a", "zz"] if count else "a"
        name = "prompt 1" if count else "prompt"
        with pytest.raises(UserError, match=f"{name}: after {count or '.*'} new tokens .* of small are not finite"):
            broken.generate(prompts, max_new_tokens=NEW, speculation=MODES[mode])


# ---------------------------------------------------------------- prompts in pieces


@pytest.mark.parametrize("speculation", [off(), chain(3)], ids=["plain", "chain"])
def test_long_prompts_are_read_in_pieces(speculation):
    drafter = model().drafter if speculation.window else None
    rng = np.random.default_rng(0)
    prompt_B = np.array([700, 513, 30, 256, 257], np.int32)
    B, P, K = len(prompt_B), 768, speculation.window
    prompt_BxP = np.where(np.arange(P) < prompt_B[:, None], rng.integers(0, 256, (B, P)), 0).astype(np.int32)
    begin = prompt_BxP, prompt_B, prompt_B + NEW, jax.random.split(jax.random.key(0), B)
    L = generate.cache_length(P, NEW, K)

    def read(**sizes):
        with mock.patch.multiple(generate, **sizes):
            plain = functools.partial(generate.prefill.__wrapped__, config=CONFIG, K=K, L=L, sampling=Sampling())
            names = ("prompt_BxP", "prompt_B", "limit_B", "key_B")
            return jax.jit(
                lambda *x: plain(model().target.params, drafter=drafter, **dict(zip(names, x, strict=True)))
            )(*begin)

    whole = read(WHOLE=P)
    params = model().target.params
    how = {"speculation": speculation, "sampling": Sampling()}
    expected = generate.decode(params, CONFIG, drafter, whole.replace(key_B=whole.key_B), NEW, **how).tokens_BxL
    whole = read(WHOLE=P)  # the first was donated
    for sizes in ({}, {"WHOLE": 100, "PIECE": 100}):  # the second divides no length
        state = read(**sizes)
        np.testing.assert_array_equal(state.tokens_BxL, whole.tokens_BxL)
        assert state.healthy_B.all()
        if drafter:
            np.testing.assert_allclose(state.features_BxK1xF, whole.features_BxK1xF, rtol=1e-4, atol=1e-4)
        pairs = list(zip(state.target_kv, whole.target_kv, strict=True))
        for mine, theirs in [*pairs, *([(state.drafter_kv, whole.drafter_kv)] if drafter else [])]:
            for b, n in enumerate(prompt_B - 1):  # the slots that count
                np.testing.assert_allclose(
                    mine.k_BxKvxdxL[b, :, :, :n], theirs.k_BxKvxdxL[b, :, :, :n], rtol=1e-4, atol=1e-4
                )
                np.testing.assert_allclose(mine.v_BxKvxLxd[b, :, :n], theirs.v_BxKvxLxd[b, :, :n], rtol=1e-4, atol=1e-4)
        done = generate.decode(params, CONFIG, drafter, state, NEW, **how)
        np.testing.assert_array_equal(done.tokens_BxL, expected)


# ---------------------------------------------------------------- the package


def test_the_package_itself_is_light():
    code = "import ppow_jax, sys; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); print(ppow_jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ppow_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ppow_jax.nothing  # noqa: B018


def test_five_lines():
    loaded = ppow_jax.load("tiny", drafter=None, dtype="float32")
    result = loaded.chat("hi", max_new_tokens=4)
    assert len(result.token_ids) <= 4 and result.stats.num_draft_tokens == 0
    assert result.text == tokenizer().decode(result.token_ids, skip_special_tokens=True)
