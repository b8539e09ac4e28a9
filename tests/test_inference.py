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
import suites
from small_model import CONFIG, JOINT, MODES, NEW, POSITIONS, model, tokenizer

import ppow_jax
from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.errors import UserError
from ppow_jax.inference import model as inference
from ppow_jax.inference.model import SPECULATIONS, Model
from ppow_jax.inference.requests import Answer, Request
from ppow_jax.models import transformer
from ppow_jax.speculation import generate, prefill
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import adaptive

PROMPTS = ["a", "Once upon a time", "b" * 30, "é€ and more", "zz top", "The end?", "x = 3", "d" * 20]
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


def all_of(results) -> str:
    """Every field, as text: nan is not equal to itself."""
    return repr([{name: value for name, value in vars(r).items() if name != "text_of"} for r in results])


def answers(rows, mode: str, **more) -> list:
    results = model().generate([PROMPTS[i] for i in rows], **pick(rows), speculation=MODES[mode], **more)
    return [without_times(result) for result in results]


@functools.cache
def together(mode: str) -> tuple:
    return tuple(answers(range(8), mode))


@pytest.mark.parametrize("mode", suites.keep(["off", "tree"], MODES))
def test_a_request_does_not_depend_on_its_place(mode):
    order = [5, 2, 7, 0, 6, 3, 1, 4]
    assert all_of(answers(order, mode)) == all_of([together(mode)[i] for i in order])
    assert len({tuple(result.token_ids) for result in together(mode)}) == 8


@pytest.mark.parametrize("mode", suites.keep(["chain"], ["chain", "adaptive", "tree"]))
def test_a_request_does_not_depend_on_its_neighbours(mode):
    assert all_of(answers(range(8), mode, batch_size=1)) == all_of(together(mode))


@pytest.mark.full
@pytest.mark.parametrize("mode", JOINT)
def test_how_much_a_batch_drafts_changes_no_answer(mode):
    """Rows decide together how much they draft, as with adaptive trees: that changes statistics, and no answer."""
    for alone, found in zip(answers(range(8), mode, batch_size=1), together(mode), strict=True):
        assert (alone.text, alone.token_ids, alone.finish_reason) == (found.text, found.token_ids, found.finish_reason)


@pytest.mark.full
def test_a_longer_neighbour_changes_nothing():
    prompts = [*PROMPTS[:4], "b" * 70, *PROMPTS[5:]]  # all caches are longer
    results = model().generate(prompts, **pick(range(8)), speculation=MODES["chain"])
    for i in {*range(8)} - {4}:
        assert all_of([without_times(results[i])]) == all_of([together("chain")[i]])


@pytest.mark.full
def test_adaptive_rows_rest_and_draft_at_their_own_pace():
    """Otherwise it would show little that adaptive rows do not depend on their neighbours."""
    stats = [result.stats for result in together("adaptive") if result.stats.num_spec_steps >= 14]
    assert any(0 < s.num_draft_tokens < s.num_spec_steps for s in stats)
    assert len({s.num_draft_tokens for s in stats}) > 2


KEPT = ["chain", "tree"]  # by the default suite: each mode compiles its own programs


@pytest.mark.parametrize("mode", suites.keep(KEPT, [mode for mode in MODES if mode != "off"]))
def test_greedy_answers_are_the_same_in_every_mode(mode):
    for i in (0, 3, 7):  # the last by top_k = 1
        expected, found = together("off")[i], together(mode)[i]
        assert (found.text, found.token_ids, found.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )


@pytest.mark.parametrize("mode", suites.keep(["tree"], ["tree", "ngram", "mixture"]))
def test_sampled_trees_give_the_text_of_plain_decoding(mode):
    for found, expected in zip(together(mode), together("off"), strict=True):
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


@pytest.mark.parametrize("mode", suites.keep(["off", *KEPT], MODES))
def test_limits_and_reasons(mode):
    results = together(mode)
    for result, budget in zip(results, SETTINGS["max_new_tokens"], strict=True):
        assert 1 <= len(result.token_ids) <= budget
        if result.finish_reason == "length":
            assert len(result.token_ids) == budget and 258 not in result.token_ids
    assert {result.finish_reason for result in results} == {"stop", "length"}
    assert [result.prompt_ids for result in results] == [tokenizer()(text)["input_ids"] for text in PROMPTS]


@pytest.mark.parametrize("mode", suites.keep(["off", *KEPT], MODES))
def test_stats_are_those_of_vllm(mode):
    window = MODES[mode].window
    for result in together(mode):
        stats = result.stats
        steps, accepted = stats.num_spec_steps, stats.num_accepted_draft_tokens
        assert len(stats.acceptance_histogram) == window + 1 and sum(stats.acceptance_histogram) == steps
        assert accepted == np.dot(stats.acceptance_histogram, np.arange(window + 1))
        if steps == 0:
            assert len(result.token_ids) == 1 and math.isnan(stats.mean_acceptance_length)
            continue
        assert stats.mean_acceptance_length == 1 + accepted / steps
        drafted = {"off": 0, "chain": 2 * steps, "tree": 8 * steps}.get(mode, stats.num_draft_tokens)
        assert stats.num_draft_tokens == drafted
        if stats.num_draft_tokens:
            assert stats.draft_acceptance_rate == accepted / stats.num_draft_tokens
        assert steps + accepted >= len(result.token_ids) - 1  # more where a stop or the budget cut the last round
    assert mode != "chain" or sum(result.stats.num_accepted_draft_tokens for result in together(mode)) > 5


# ---------------------------------------------------------------- stop texts and streaming


def cut(whole, stops) -> tuple[str, list[int], str]:
    """The answer that a stop text must give: the shortest prefix of tokens that holds one, cut before the first."""
    for n in range(1, len(whole.token_ids) + 1):
        text = tokenizer().decode(whole.token_ids[:n], skip_special_tokens=True)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], whole.token_ids[:n], "stop"
    return whole.text, whole.token_ids, whole.finish_reason


def test_stop_texts_cut_at_the_first_occurrence():
    how = pick(range(8)) | {"speculation": MODES["chain"]}
    wholes = model().generate(PROMPTS, **how | {"stop": ()})
    rng = np.random.default_rng(0)
    ways = set()
    for _ in range(12):
        stops = []
        for whole in wholes:
            at, size = rng.integers(0, max(1, len(whole.text))), rng.integers(1, 5)
            part = whole.text[at : at + size].strip("\ufffd")  # which stands for half a character
            stops.append([part if part and "\ufffd" not in part else "?", "not there"])
        results = model().generate(PROMPTS, **how | {"stop": stops})
        for whole, stop, result in zip(wholes, stops, results, strict=True):
            assert (result.text, result.token_ids, result.finish_reason) == cut(whole, stop)
            ways.add((result.finish_reason, len(result.token_ids) < len(whole.token_ids)))
    assert ("stop", True) in ways


def test_stop_texts_are_given_for_all_prompts_or_for_each():
    def stops(stop):
        return [request.stop for request in model().job(["a", "b"], stop=stop).requests]

    assert stops(()) == [(), ()]
    assert stops("xy") == [("xy",), ("xy",)]
    assert stops(["x", "y"]) == [("x", "y"), ("x", "y")]
    assert stops([["x", "y"], []]) == [("x", "y"), ()]
    assert stops([("x",), "yz"]) == [("x",), ("yz",)]


@pytest.mark.parametrize("stop", [False, True])
def test_streamed_pieces_are_the_answer(stop):
    for i in (0, 5):
        settings = {name: values[0] for name, values in pick([i]).items()} | {"speculation": MODES["chain"]}
        expected = together("chain")[i]
        if stop:
            settings["stop"] = expected.text[9:11]
            expected = without_times(model().generate(PROMPTS[i], **settings)[0])
            assert expected.finish_reason == "stop" and settings["stop"] not in expected.text
        stream = model().stream(PROMPTS[i], **settings)
        assert stream.result is None
        pieces = list(stream)
        assert "".join(pieces) == stream.result.text and all(pieces)
        assert all_of([without_times(stream.result)]) == all_of([expected])
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
                histogram, sources_L = np.array([n]), np.zeros_like(tokens_L)
                answer.read(tokens_L, n + 1, n == len(ids), True, histogram, 0, sources_L, seconds=0.0)
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
    how = {"speculation": "off", "batch_size": 4}
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


def test_a_program_is_warmed_up_once():
    fresh, how = dataclasses.replace(model()), {"max_new_tokens": NEW, "speculation": MODES["chain"]}
    with mock.patch.object(Model, "run", autospec=True, side_effect=Model.run) as run:
        for prompt, settings, runs in (
            (PROMPTS[0], {}, 1),
            (PROMPTS[1], {}, 1),  # another prompt of its length
            (PROMPTS[0], {"temperature": 1.0}, 2),
            (PROMPTS[0], {"temperature": 0.5, "seed": 3}, 2),
            (PROMPTS[0], {"temperature": 0.5, "top_k": 3}, 3),
            ("b" * 40, {}, 4),
            (PROMPTS[0], {"speculation": "off"}, 5),
        ):
            fresh.warm_up(prompt, **how | settings)
            assert run.call_count == runs


def test_costs_of_adaptive_windows_are_measured_once():
    fresh, measured = dataclasses.replace(model(), cost_table={}), []

    def measure(target, drafter, speculation, L, batch, *, sampling):
        measured.append((speculation, batch, sampling.greedy))
        return CostTable.of(0.1, np.ones(speculation.window + 1))

    with mock.patch.object(inference, "measure_cost_table", measure):
        assert fresh.cost_table_of(MODES["chain"], 4, True) is None
        for rows, greedy in ((4, True), (4, True), (8, True), (4, False), (8, False)):  # sampled: as if alone
            assert fresh.cost_table_of(adaptive(3), rows, greedy).verify_N1.shape == (4,)
    assert measured == [(adaptive(3), 4, True), (adaptive(3), 8, True), (adaptive(3), 1, False)]


# ---------------------------------------------------------------- chats


def test_chat():
    how = {"max_new_tokens": 12, "speculation": "off"}
    said = model().chat("hi", **how)
    assert said.prompt_ids == encode_prompt(tokenizer(), [Message("user", "hi")]).tolist()
    assert model().chat([{"role": "user", "content": "hi"}], **how).token_ids == said.token_ids
    stream = model().chat("hi", stream=True, **how)
    assert "".join(stream) == said.text == stream.result.text
    history = [Message("user", "hi"), {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
    ids = model().chat_prompt(history)
    assert "ho" in tokenizer().decode(ids) and len(ids) > len(said.prompt_ids)


def test_prompts_may_be_token_ids():
    how = {"max_new_tokens": 8, "speculation": "off"}
    ids = tokenizer()("Once")["input_ids"]
    expected = model().generate("Once", **how)[0].token_ids
    for prompt in (ids, np.array(ids), [ids], jnp.array(ids)):
        assert [result.token_ids for result in model().generate(prompt, **how)] == [expected]
    assert model().generate([], **how) == []


# ---------------------------------------------------------------- limits and mistakes


@pytest.mark.parametrize("mode", suites.keep(["off"], ["off", "tree"]))
def test_prompts_up_to_the_targets_positions(mode):
    how = {"speculation": MODES[mode], "max_new_tokens": 5}
    ids = np.arange(POSITIONS) % 200
    whole = jax.jit(functools.partial(transformer.forward, config=CONFIG))
    for n, expected in ((POSITIONS - 2, 3), (POSITIONS - 1, 2), (POSITIONS, 1)):  # the last token needs no position
        result = model().generate(ids[:n], **how)[0]
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
    (("a",), {"speculation": "trees"}, "speculation=trees: must be one of off, chain, adaptive, tree, ngram"),
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
    assert plain.resolve(None) == SPECULATIONS["ngram"] and model().resolve(None) == SPECULATIONS["mixture"]
    with pytest.raises(UserError, match="dtype=float64"):
        ppow_jax.load("tiny", dtype="float64")
    with pytest.raises(UserError, match="nowhere"):
        ppow_jax.load("tiny", drafter="nowhere")


@pytest.mark.parametrize("mode", suites.keep(["chain"], ["chain", "adaptive"]))
def test_logits_that_are_no_numbers_are_caught(mode):
    """A token whose embedding is broken: in the prompt, or written by the target itself."""
    target = model().target
    expected = together(mode)[0].token_ids
    written = next(token for token in expected[1:-1] if token != expected[0])
    z = tokenizer()("z")["input_ids"][0]
    for value in (np.nan, np.inf):
        for token, prompts, place in (
            (z, ["a", "zz"], "prompt 1: after 0"),
            (written, ["a", "a"], "prompt 0: after .*"),
        ):
            params = target.params | {"embed": target.params["embed"].at[token].set(value)}
            broken = dataclasses.replace(model(), target=dataclasses.replace(target, params=params))
            with pytest.raises(UserError, match=f"{place} new tokens .* of small are not finite"):
                broken.generate(prompts, max_new_tokens=NEW, speculation=MODES[mode])


# ---------------------------------------------------------------- prompts in pieces


def test_long_prompts_are_read_in_pieces():
    speculation, drafter = MODES["chain"], model().drafter
    rng = np.random.default_rng(0)
    prompt_B = np.array([700, 513, 30, 256, 257], np.int32)
    B, P, K = len(prompt_B), 768, speculation.window
    prompt_BxP = np.where(np.arange(P) < prompt_B[:, None], rng.integers(0, 256, (B, P)), 0).astype(np.int32)
    begin = prompt_BxP, prompt_B, prompt_B + NEW, jax.random.split(jax.random.key(0), B)
    L = generate.cache_length(P, NEW, K)

    def read(**sizes):
        with mock.patch.multiple(prefill, **sizes):
            plain = functools.partial(generate.prefill.__wrapped__, config=CONFIG, K=K, L=L, sampling=Sampling())
            names = ("prompt_BxP", "prompt_B", "limit_B", "key_B")
            return jax.jit(
                lambda *x: plain(model().target.params, drafter=drafter, **dict(zip(names, x, strict=True)))
            )(*begin)

    params, how = model().target.params, {"speculation": speculation, "sampling": Sampling()}
    whole = read(WHOLE=P, PIECE=P)
    states = [read(WHOLE=512, PIECE=256), read(WHOLE=100, PIECE=100)]  # the latter divides no length
    for state in states:
        np.testing.assert_array_equal(state.tokens_BxL, whole.tokens_BxL)
        np.testing.assert_allclose(state.features_BxK1xF, whole.features_BxK1xF, rtol=1e-4, atol=1e-4)
        assert state.healthy_B.all()
        caches = zip((*state.target_kv, *state.drafter_kv), (*whole.target_kv, *whole.drafter_kv), strict=True)
        for mine, theirs in caches:
            for b, n in enumerate(prompt_B - 1):  # the slots that count
                near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
                near(mine.k_BxKvxdxL[b, ..., :n], theirs.k_BxKvxdxL[b, ..., :n])
                near(mine.v_BxKvxLxd[b, :, :n], theirs.v_BxKvxLxd[b, :, :n])
    expected, *found = (generate.decode(params, CONFIG, drafter, state, NEW, **how) for state in (whole, *states))
    for state in found:
        np.testing.assert_array_equal(state.tokens_BxL, expected.tokens_BxL)
        np.testing.assert_array_equal(state.histogram_BxK1, expected.histogram_BxK1)


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
