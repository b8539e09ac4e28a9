"""The engine of the endpoint: answers of `Model.generate` whatever else runs, limits, cancelled requests, errors."""

import dataclasses
import errno
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from small_model import MODES, NEW, free, model
from small_server import new_engine, patient, running, ticket, until

from ppow_jax.inference import slots
from ppow_jax.inference.datastore import LEAD, Datastore
from ppow_jax.serving.engine import Engine
from ppow_jax.serving.errors import ApiError
from ppow_jax.serving.machine import Machine
from ppow_jax.serving.metrics import Metrics
from ppow_jax.speculation import generate
from ppow_jax.speculation.sources import NAMES
from ppow_jax.weights.targets import Target

PROMPTS = ["a", "Once upon a time", "b" * 30, "é€ and more", "zz top", "The end?", "x = 3", "d" * 150]
SETTINGS = [
    {"seed": 1, "max_new_tokens": NEW},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2, "max_new_tokens": 9, "stop": "a"},
    {"temperature": 1.3, "top_k": 5, "seed": 3, "max_new_tokens": 20},
    {"top_k": 3, "top_p": 0.5, "max_new_tokens": NEW, "stop": ["é", "ab"]},
    {"temperature": 0.8, "seed": 5, "max_new_tokens": 1},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.8, "seed": 6, "max_new_tokens": NEW},
    {"temperature": 0.7, "seed": 2**31 - 1, "max_new_tokens": NEW},
    {"seed": 8, "max_new_tokens": 25},
]


@functools.cache
def expected(mode: str, which=model) -> list:
    """Every answer, generated in one batch of its own."""
    usual = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "stop": (), "seed": 0, "max_new_tokens": NEW}
    settings = {name: [given.get(name, value) for given in SETTINGS] for name, value in usual.items()}
    return which().generate(PROMPTS, speculation=MODES[mode], **settings)


@pytest.mark.parametrize("mode", suites.keep(["adaptive"], MODES))
def test_answers_are_those_of_generate_whatever_runs_beside_them(mode):
    """The statistics as well, where rows do not decide together what is worth its cost: where drafts are free."""
    if MODES[mode].adaptive:
        check_answers(mode, model, statistics=False)
    if mode != "mixture":  # see `free`
        check_answers(mode, free, statistics=True)


def check_answers(mode: str, which, statistics: bool) -> None:
    order = [3, 0, 6, 1, 7, 2, 5, 4, 0, 3]
    tickets = [ticket(PROMPTS[i], **SETTINGS[i]) for i in order]
    with running(new_engine(mode, which)) as engine:
        for one in tickets:
            engine.submit([one])
            if one is tickets[4]:
                until(lambda: tickets[0].emit.all)  # the others arrive while these are decoded
        for i, one in zip(order, tickets, strict=True):
            news, want = one.emit.last, expected(mode, which)[i]
            assert not isinstance(news, ApiError), news
            got = news.result
            assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
            assert got.prompt_ids == want.prompt_ids
            if statistics:
                assert got.sources == want.sources
                counts = [(x.acceptance_histogram, x.num_draft_tokens) for x in (got.stats, want.stats)]
                assert counts[0] == counts[1] or "stop" in SETTINGS[i]  # rounds until it is seen
            assert "".join(progress.text for progress in one.emit.all) == want.text
            assert "".join(text for progress in one.emit.all for text, _ in progress.pieces) == want.text


def told(one) -> list[str]:
    """Source of each character, by the pieces of a finished ticket."""
    return [source for news in one.emit.all for text, source in news.pieces for _ in text]


def test_pieces_tell_who_proposed_each_token():
    """Each verification adds one token of the target itself, and the prefill the first."""
    one = ticket("Once upon a time", temperature=1.0, seed=3, max_new_tokens=NEW)
    with running(new_engine("chain")) as engine:
        engine.submit([one])
        result = one.emit.last.result
    own = ~np.array(result.drafted)
    steps, K1 = result.stats.num_spec_steps, np.arange(3)
    gained = [int(n) for n in np.diff([0, *(1 + np.flatnonzero(own))])]
    whole = gained[1:] if own[-1] else [*gained[1:], len(own) - int(np.flatnonzero(own)[-1])]
    assert own[0] and len(whole) == steps
    counted = np.bincount(np.array(whole[:-1]) - 1, minlength=3)
    assert ((np.array(result.stats.acceptance_histogram) - counted) >= 0).all() and (counted @ K1) > 0
    assert set(told(one)) == {"target", "drafter"} and set(result.sources) == {"target", "drafter"}
    assert one.emit.last.accepted == (result.stats.num_accepted_draft_tokens, 0, 0)
    assert one.emit.last.drafted == (result.stats.num_draft_tokens, 0, 0)


@pytest.mark.parametrize("mode", suites.keep(["mixture"], ["mixture", "ngram"]))
def test_a_mixture_tells_which_source_proposed_each_token(mode):
    """One request in four rows decides as one alone, so that every count is that of `generate`'s batch of one."""
    prompt = "abcdabcdabcdab" * 2
    settings = {"temperature": 0.7, "seed": 4, "max_new_tokens": NEW}
    one = ticket(prompt, **settings)
    with running(new_engine(mode, model)) as engine:
        engine.submit([one])
        last = one.emit.last
    (want,) = model().generate(prompt, speculation=MODES[mode], **settings)
    assert last.result.sources == want.sources and last.result.text == want.text
    stats = last.result.stats
    assert stats == want.stats
    assert sum(last.drafted) == stats.num_draft_tokens and sum(last.accepted) == stats.num_accepted_draft_tokens
    assert all(accepted <= drafted for accepted, drafted in zip(last.accepted, last.drafted, strict=True))
    counted = [last.result.sources.count(name) for name in NAMES]
    assert sum(last.accepted) - MODES[mode].window <= sum(counted) <= sum(last.accepted)  # the last round may be cut
    assert counted[1] > 0 and (mode == "mixture") == bool(last.drafted[0])
    assert set(told(one)) <= set(last.result.sources) and "ngram" in told(one)


def test_finished_answers_are_looked_up_and_kept(tmp_path):
    """The second answer is in the datastore as a whole; the store is saved when the engine ends."""
    store = Datastore(tmp_path, model().target.config.vocab_size, 512)
    found = Machine(dataclasses.replace(model(), datastore=store), MODES["ngram"], 2, 256, 4)
    settings = {"temperature": 0.9, "seed": 3, "max_new_tokens": NEW}
    results = []
    with running(Engine(found, Metrics("small", MODES["ngram"].window), 8)) as engine:
        for _ in range(2):
            one = ticket("Once upon", **settings)
            engine.submit([one])
            results.append(one.emit.last.result)
    (wanted,) = model().generate("Once upon", speculation="off", **settings)
    assert [result.token_ids for result in results] == [wanted.token_ids] * 2
    assert results[1].stats.num_spec_steps < results[0].stats.num_spec_steps
    kept = Datastore(tmp_path, model().target.config.vocab_size)
    assert kept.tokens.tolist() == [*wanted.prompt_ids[-LEAD:], *wanted.token_ids]


def test_the_datastore_is_saved_where_the_adaptation_cannot_be(tmp_path, caplog):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Datastore(tmp_path, model().target.config.vocab_size, 512)
    store.add([1, 2], [3, 4])
    adapting = dataclasses.replace(model(), online=SimpleNamespace(close=full, pending=lambda: False), datastore=store)
    with running(Engine(Machine(adapting, MODES["ngram"], 2, 256, 4), Metrics("small", 2), 8)):
        pass
    assert "No space left on device" in caplog.text
    assert Datastore(tmp_path, model().target.config.vocab_size).tokens.tolist() == [1, 2, 3, 4]


def test_long_prompts_move_the_running_answers_to_longer_caches():
    """A prompt of 530 tokens arrives while a short answer is written, which goes on unchanged; later they shrink."""
    short, long = "Once upon a time", "b" * 530
    settings = {"temperature": 0.3, "seed": 4}
    engine = new_engine("chain", context=700)
    tickets = [ticket(short, max_new_tokens=400, **settings), ticket(long, max_new_tokens=150, **settings)]
    with running(engine):
        engine.submit(tickets[:1])
        until(lambda: tickets[0].emit.all)
        assert engine.machine.tokens == 512
        engine.submit(tickets[1:])
        until(lambda: tickets[1].emit.all)
        assert engine.machine.tokens == 700
        texts = [one.emit.last.result.token_ids for one in tickets]
        third = ticket(short, max_new_tokens=3)
        engine.submit([third])
        assert third.emit.last.tokens == 3 and engine.machine.tokens == 512
    for one, prompt, new in zip(texts, (short, long), (400, 150), strict=True):
        assert (
            one == patient().generate(prompt, max_new_tokens=new, speculation=MODES["chain"], **settings)[0].token_ids
        )


def test_requests_compile_nothing_after_the_start():
    engine = new_engine("chain", context=700)
    engine.machine.warm_up()
    programs = slots.insert, slots.release, slots.clear, slots.resize, generate.prefill, generate.decode
    before = [program._cache_size() for program in programs]
    rng = np.random.default_rng(0)
    tickets = []
    for i in range(12):
        prompt = rng.integers(0, 200, int(rng.integers(1, 600))).tolist()
        t, k, p = [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 5, 1.0), (0.7, 0, 0.9)][i % 4]
        tickets.append(ticket(prompt, t, k, p, max_new_tokens=int(rng.integers(1, 90)), seed=i))
    with running(engine):
        for one in tickets:
            engine.submit([one])
        assert all(one.emit.last.result for one in tickets)
    assert [program._cache_size() for program in programs] == before


def test_a_cancelled_request_frees_its_row():
    engine = new_engine("off", queue=0)
    tickets = [ticket("b", temperature=0.3, seed=i, max_new_tokens=500) for i in range(4)]
    with running(engine):
        engine.submit(tickets)
        until(lambda: all(one.emit.all for one in tickets))
        with pytest.raises(ApiError) as refused:
            engine.submit([ticket("b")])
        assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
        tickets[1].cancelled = True
        until(lambda: engine.machine.live_B.sum() < 4)
        last = ticket("Once upon a time", max_new_tokens=3)
        engine.submit([last])
        assert last.emit.last.tokens == 3
        for one in tickets:
            one.cancelled = True


def test_waiting_and_running_requests_have_a_time_limit():
    engine = new_engine("off")
    with running(engine):
        hogs = [ticket("b", temperature=0.3, seed=i, max_new_tokens=500) for i in range(4)]
        waits = ticket("a", max_new_tokens=3, seconds=0.0)
        engine.submit(hogs)
        engine.submit([waits])
        assert waits.emit.last.status == 504 and waits.emit.last.code == "time_limit"
        assert not any(one.emit.ended.is_set() for one in hogs)
        for one in hogs:
            one.seconds = 0.0  # it is over
        assert [one.emit.last.status for one in hogs] == [504] * 4
        until(lambda: not engine.machine.live_B.any())


def test_a_row_of_bad_logits_gets_an_error_and_does_no_harm():
    """A token whose embedding is not finite makes NaN keys; the row's next request must not see them."""
    healthy = patient()
    bad = 48  # "Q", which stands in no other prompt
    params = dict(healthy.target.params)
    params["embed"] = params["embed"].at[bad].set(jnp.nan)
    target = Target("damaged", healthy.target.config, params, healthy.target.tokenizer)
    one_row = Machine(dataclasses.replace(healthy, target=target), MODES["chain"], 4, 512, 4)
    one_row.live_B[1:] = True  # only the first is free
    engine = new_engine("chain")
    engine.machine = one_row
    first, second = ticket([65, bad, 66], max_new_tokens=9), ticket("Once upon a time", max_new_tokens=9)
    with running(engine):
        engine.submit([first, second])
        assert isinstance(first.emit.last, ApiError) and first.emit.last.status == 500
        assert "not finite" in first.emit.last.message
        want = healthy.generate("Once upon a time", max_new_tokens=9, speculation=MODES["chain"])[0]
        assert second.emit.last.result.token_ids == want.token_ids


def test_a_failure_of_the_machine_ends_its_requests_and_not_the_engine(monkeypatch):
    engine = new_engine("off")
    calls = iter([True])

    def fails_once(*args):
        if next(calls, False):
            raise jax.errors.JaxRuntimeError("out of memory")
        return Machine._decode(engine.machine, *args)

    monkeypatch.setattr(engine.machine, "_decode", fails_once)
    first, second = ticket("a", max_new_tokens=5), ticket("a", max_new_tokens=5)
    with running(engine):
        engine.submit([first])
        assert first.emit.last.status == 500
        engine.submit([second])
        assert second.emit.last.result.token_ids == patient().generate("a", max_new_tokens=5)[0].token_ids


def test_stopping_ends_what_is_left_with_an_error():
    engine = new_engine("off")
    tickets = [ticket("b", temperature=0.3, seed=i, max_new_tokens=500) for i in range(6)]
    engine.start()
    engine.submit(tickets)
    until(lambda: tickets[0].emit.all)
    engine.stop()
    for one in tickets:
        assert one.emit.ended.is_set() and (isinstance(one.emit.last, ApiError) or one.emit.last.result)
    assert isinstance(tickets[5].emit.last, ApiError) and tickets[5].emit.last.status == 503
    with pytest.raises(ApiError) as refused:
        engine.submit([ticket("a")])
    assert refused.value.status == 503
