"""Online adaptation: the output never changes, worse drafters never serve, the budget holds, and runs resume."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import suites
from small_model import MODES, NEW, model
from small_online import LOOK, PROMPTS, SMALL, Ticks, fresh, online

from ppow_jax.errors import UserError
from ppow_jax.inference.model import Model
from ppow_jax.online import guard, steps
from ppow_jax.online.budget import Budget
from ppow_jax.online.buffer import Buffer
from ppow_jax.online.guard import Guard, Replayed, rounds_of
from ppow_jax.online.session import Online
from ppow_jax.online.settings import OBJECTIVES
from ppow_jax.weights.drafters import import_drafter

SAMPLED = ("tree", "mixture")  # modes in which a seed draws the same tokens with every drafter
CASES = [(mode, t) for mode in MODES if MODES[mode].needs_drafter for t in (0.0, 0.8) if t == 0 or mode in SAMPLED]


def model_of(found: Model, drafter) -> Model:
    return dataclasses.replace(found, drafter=drafter, online=None)


@functools.cache
def expected(mode: str, temperature: float) -> list[list[int]]:
    """Tokens of the prompts without adaptation."""
    results = fresh().generate(PROMPTS, speculation=MODES[mode], temperature=temperature, seed=3, max_new_tokens=NEW)
    return [result.token_ids for result in results]


@pytest.mark.parametrize("case", suites.keep([("mixture", 0.0)], CASES), ids=str)
def test_the_output_never_changes(case):
    """Requests with adaptation between them, against the same requests with the first drafter."""
    mode, temperature = case
    found = fresh()
    session = online(found)
    for _ in range(3):
        how = {"speculation": MODES[mode], "temperature": temperature, "seed": 3, "max_new_tokens": NEW}
        results = found.generate(PROMPTS, **how)
        assert [result.token_ids for result in results] == expected(mode, temperature)
    stats = session.stats()
    assert stats.steps >= 4 and stats.swaps >= 1 and stats.requests == len(PROMPTS) * 3
    assert found.drafter is not session.frozen
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (found.drafter, session.frozen)), strict=True))


@pytest.mark.parametrize("objective", suites.keep(["recipe"], OBJECTIVES))
def test_the_drafter_learns_what_is_asked(objective):
    """The same requests again and again: the drafter that serves accepts more than the frozen one."""
    found = fresh()
    session = online(found, objective=objective)
    for _ in range(6):
        stats = found.adapt(PROMPTS, **LOOK)
    assert stats.replayed["serving"] > 1.1 * stats.replayed["frozen"] > 1.1
    how = {"max_new_tokens": NEW, "speculation": MODES["mixture"]}
    before, after = (
        sum(result.stats.num_spec_steps for result in model_of(found, drafter).generate(PROMPTS, **how))
        for drafter in (session.frozen, found.drafter)
    )
    assert after < before
    assert session.learn() == session.stats() and not session.pending()


def test_answers_of_others_can_be_given():
    found = fresh()
    with pytest.raises(UserError, match="adapt: nothing adapts this model"):
        found.adapt("a", "b")
    online(found)
    with pytest.raises(UserError, match="answers: 1 for 2 prompts; give one for each"):
        found.adapt(["a", "b"], ["c"])
    assert found.adapt(["What is it?", "ab"], ["abcd " * 4, "abc"]).steps == 2


@functools.cache
def skilled() -> Model:
    """The small model with a drafter that was adapted to the prompts."""
    found = fresh()
    online(found)
    for _ in range(6):
        found.adapt(PROMPTS, **LOOK)
    return dataclasses.replace(found, online=None)


def test_a_bad_update_never_serves():
    """A candidate whose parameters are spoilt is replayed on new answers, refused, and replaced by the one before."""
    found = dataclasses.replace(skilled())
    session = online(found)
    begun, begin = [], session._begun
    session._begun = lambda params: begun.append(params) or begin(params)
    for refused in range(2):
        spoilt = jax.tree.map(lambda x: -5 * x, session.state.train.params)
        session.state = session.state.replace(train=session.state.train.replace(params=spoilt))
        session._candidate = None
        good = found.drafter
        while session.stats().fallbacks == refused:
            assert found.drafter is good and session.stats().requests < 100
            found.generate(PROMPTS, **LOOK)
        assert found.drafter is good or found.drafter is session.frozen
        np.testing.assert_array_equal(session.state.serving["fc"], begun[-1]["fc"])
        np.testing.assert_array_equal(found.drafter.params["fc"], begun[-1]["fc"])
    assert len(begun) == 2  # training began again from what serves, each time


@pytest.mark.full
def test_adaptation_ends_where_it_only_harms():
    found = dataclasses.replace(skilled())
    session = online(found, learning_rate=300.0)
    while not session.ended:
        assert session.stats().requests < 200
        found.adapt(PROMPTS, **LOOK)
    assert session.stats().fallbacks == 3 and not session.pending()
    assert found.drafter is session.frozen


def test_the_budget_holds():
    """Every unit takes one tick of the clock; decoding is said to take 10 a request."""
    found = fresh()
    session = online(found, budget=0.05, clock=Ticks())
    for n in range(60):
        found.learn_from(found_results(), 2.5)
        stats = session.stats()
        assert stats.share <= 0.05 and stats.busy_seconds == 2.5 * (n + 1) and stats.idle_seconds == 0
    assert stats.spent_seconds == 7  # 7 / (150 + 7) = 0.0446, 8 / (150 + 8) = 0.0506
    assert session.work() == 0 and session.work(idle=True) > 0 and session.stats().share == stats.share


@functools.cache
def _results() -> list:
    return fresh().generate(PROMPTS, **LOOK)


def found_results() -> list:
    """Answers, decoded once."""
    return _results()


def test_budget_arithmetic():
    budget = Budget(0.1, Ticks())
    assert budget.allows("new")  # of unknown length
    with budget.unit("train", idle=False):
        pass
    assert not budget.allows("train") and budget.share_spent == 1.0
    budget.decoded(18.0)
    assert budget.allows("train")  # 2 / 20
    with budget.unit("train", idle=True):
        pass
    assert (budget.spent, budget.idle, budget.share_spent) == (1.0, 1.0, 1 / 19)


def test_rounds_are_those_of_greedy_chains():
    assert rounds_of(np.array([2, 0, 0, 0, 1, 0])) == 3  # places 0..2, 3, 4..5
    assert rounds_of(np.zeros(4, int)) == 4 and rounds_of(np.zeros(0, int)) == 0


def test_the_guard_compares_in_pairs():
    def answers(n, candidate, serving=10, frozen=10):
        return [Replayed(20 + i, frozen + i, serving + i, candidate + i) for i in range(n)]

    found = Guard(window=8, least=4)
    assert found.add(answers(3, 9)) == guard.WAIT
    assert found.add(answers(1, 9)) == guard.SWAP and found.fresh == []
    assert found.add(answers(4, 10)) == guard.SWAP  # no difference is no harm
    assert found.length("candidate") > found.length("frozen") == found.length("serving")
    assert found.add(answers(4, 11, serving=9)) == guard.SERVING and len(found.window) == 0
    assert found.add(answers(4, 11, serving=11, frozen=9)) == guard.FROZEN
    noisy = [Replayed(20, 10, 10, 10 + (-1) ** i * 3) for i in range(8)]
    assert found.add(noisy) == guard.SWAP


def test_rows_hold_whole_requests():
    buffer = Buffer(row_length=32, max_anchors=20, rows=2)
    for n in (10, 12, 8, 40):
        buffer.add(np.arange(4), np.arange(100, 100 + n))
    buffer.add(np.arange(40), np.arange(5))  # no answer token in the row
    buffer.add(np.arange(3), np.arange(1))
    assert buffer.skipped == 2 and [sorted(row.counts) for row in buffer.rows] == [[9, 11], [7]]
    buffer.close_row()
    first, second = buffer.rows
    assert (first.counts, second.counts) == ([7], [20]) and second.batch.tokens_BxT.shape == (1, 32)
    assert buffer.next() is second
    first.cached = ()
    assert buffer.next() is first


def test_a_stopped_session_resumes(tmp_path):
    """The saved state, counts and drafter are resumed; the adapted drafter can be read by itself."""
    from ppow_jax.weights.loading import load_drafter

    found = fresh()
    session = online(found, save=tmp_path / "online", save_every=1)
    for _ in range(3):
        found.adapt(PROMPTS, **LOOK)
    assert session.stats().swaps >= 1
    session.saved.close()  # as a kill after the last save

    again = fresh()
    resumed = online(again, save=tmp_path / "online")
    mine, theirs = session.stats(), resumed.stats()
    counts = ("requests", "steps", "swaps", "fallbacks", "acceptance_length", "replayed")
    assert [getattr(mine, name) for name in counts] == [getattr(theirs, name) for name in counts]
    for x, y in zip(*map(jax.tree.leaves, (session.state, resumed.state)), strict=True):
        np.testing.assert_array_equal(x, y)
    read = load_drafter(tmp_path / "online" / "drafter", again.target, "float32")
    for name, value in again.drafter.params.items():
        np.testing.assert_array_equal(value, found.drafter.params[name])
        np.testing.assert_array_equal(value, read.params[name])
    assert again.adapt(PROMPTS, **LOOK).steps > mine.steps
    resumed.close()
    with pytest.raises(UserError, match="holds a state of another objective recipe .now supervised."):
        online(fresh(), save=tmp_path / "online", objective="supervised")


def test_ctrl_c_in_a_training_step_leaves_a_session_that_goes_on(tmp_path):
    """The step's program has taken the old state: training begins again from the drafter that serves."""
    found = fresh()
    session = online(found, save=tmp_path)
    update = session._updated

    def interrupted(*given):
        update(*given)
        raise KeyboardInterrupt

    session._updated = interrupted
    with pytest.raises(KeyboardInterrupt):
        found.adapt(PROMPTS, **LOOK)
    session._updated = update
    assert session.stats().steps == 0 and session.candidate is found.drafter
    assert found.adapt(PROMPTS, **LOOK).steps >= 2
    session.close()


def test_a_kill_before_the_export_leaves_it_to_the_next_session(tmp_path):
    found = fresh()
    session = online(found, save=tmp_path, save_every=1)
    session.saved.export = lambda *_: None  # as if killed between the state and the drafter
    for _ in range(3):
        found.adapt(PROMPTS, **LOOK)
    session.saved.close()
    assert not (tmp_path / "drafter").exists()
    again = fresh()
    online(again, save=tmp_path).close()
    stored = import_drafter(tmp_path / "drafter")
    np.testing.assert_array_equal(stored.params["fc"], again.drafter.params["fc"])
    assert (stored.params["fc"] != fresh().drafter.params["fc"]).any()


def test_a_directory_serves_one_session_and_damage_is_told(tmp_path):
    session = online(fresh(), save=tmp_path)
    with pytest.raises(UserError, match="--online_save=.*: another command is running there"):
        online(fresh(), save=tmp_path)
    session.close()
    for damage in ("{", "[1]", "3"):
        (tmp_path / "about.json").write_text(damage)
        with pytest.raises(UserError, match="--online_save=.*: about.json is damaged"):
            online(fresh(), save=tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"budget": 0.0}, "--online_budget=0.0: must be above 0 and at most 1"),
        ({"objective": "ppow"}, "--online_objective=ppow: must be one of recipe, supervised"),
        ({"learning_rate": 0.0}, "--online_learning_rate=0.0: must be above 0"),
        ({"max_anchors": 2}, "max_anchors=2: must be more than draft_steps=2"),
        ({"window": 2}, "window=2: must be at least least=4"),
    ],
)
def test_impossible_settings_are_refused(change, part):
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        dataclasses.replace(SMALL, **change)


def test_a_model_without_a_drafter_is_refused():
    with pytest.raises(UserError, match="--online: needs a drafter to adapt, but there is none"):
        Online(Model(model().target), SMALL)


def test_programs_are_compiled_before_the_first_request():
    found = fresh()
    session = online(found)
    programs = steps.read, steps.serving_copy, steps.master_copy, steps.read_batch, steps.ppow_exact.train_step
    before = [program._cache_size() for program in programs]
    found.adapt(PROMPTS, **LOOK)
    assert session.stats().steps >= 4 and [program._cache_size() for program in programs] == before
