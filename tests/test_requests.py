"""Random requests in random batches, statistics, wrong arguments, and many requests one after the other."""

import functools
import gc
import resource

import jax
import numpy as np
import pytest
import suites
from small_model import MODES, NEW, free, model

from ppow_jax.errors import UserError
from ppow_jax.inference.model import Result
from ppow_jax.inference.requests import Stats
from ppow_jax.speculation import generate

POOL = 20  # requests
CASES = 6  # batches, per way to speculate


@functools.cache
def pool() -> dict[str, list]:
    """Prompts of 1 to 30 tokens, each with settings of its own; together they use every setting."""
    rng = np.random.default_rng(7)

    def pick(*values):
        return [values[i] for i in rng.integers(0, len(values), POOL)]

    lengths = [1, 1, *rng.integers(1, 31, POOL - 2)]
    return {
        "prompts": [rng.integers(97, 123, n) for n in lengths],
        "temperature": pick(0.0, 0.0, 0.5, 1.0, 1.5),
        "top_k": pick(0, 0, 1, 5, 40),
        "top_p": pick(1.0, 1.0, 0.9, 0.3),
        "seed": rng.integers(0, 2**31, POOL).tolist(),
        "max_new_tokens": rng.integers(1, NEW + 1, POOL).tolist(),
        "stop": [list(stop) for stop in pick((), (), ("a",), ("é", "bb"), ("cd", "not there"))],
    }


def told(result: Result) -> tuple:
    """All that must not change; as a text, since nan is not equal to itself."""
    return result.text, result.token_ids, result.finish_reason, result.prompt_ids, repr(result.stats)


def answers(mode: str, members, batch_size: int) -> list[tuple]:
    asked = {name: [values[i] for i in members] for name, values in pool().items()}
    found = free() if mode == "ngram" else model()
    results = found.generate(**asked, speculation=MODES[mode], batch_size=batch_size)
    return [told(result)[: -1 if mode == "mixture" else None] for result in results]


@pytest.mark.parametrize("mode", suites.keep(["adaptive"], MODES))
def test_a_request_gives_the_same_in_any_company_and_place(mode):
    alone = answers(mode, range(POOL), batch_size=1)
    assert {reason for _, _, reason, *_ in alone} == {"stop", "length"}
    assert len({len(ids) for _, ids, *_ in alone}) > 5
    assert mode == "mixture" or len({stats for *_, stats in alone}) > 5
    assert answers(mode, range(POOL), batch_size=8) == alone
    programs = generate.prefill._cache_size(), generate.decode._cache_size()
    rng = np.random.default_rng(11)
    for _ in range(CASES):
        members = rng.permutation(POOL)[: rng.integers(8, POOL + 1)]
        assert answers(mode, members, batch_size=8) == [alone[i] for i in members]
    assert (generate.prefill._cache_size(), generate.decode._cache_size()) == programs  # ragged batches share them


def test_greedy_answers_do_not_depend_on_sampled_neighbours():
    """Another program decodes where no row samples."""
    prompts = pool()["prompts"][:8]
    how = {"max_new_tokens": 20, "speculation": MODES["chain"]}
    greedy = model().generate(prompts, **how)
    mixed = model().generate(prompts, temperature=[0.0, 1.0] * 4, top_k=[0, 3] * 4, top_p=[1.0, 0.9] * 4, **how)
    assert [told(result) for result in mixed[::2]] == [told(result) for result in greedy[::2]]
    assert [told(result) for result in mixed[1::2]] != [told(result) for result in greedy[1::2]]


# ---------------------------------------------------------------- statistics


def test_statistics_are_counted_as_by_vllm():
    """The example of vLLM's own description of its per-request figures, with windows of 3."""
    stats = Stats.of([39, 1, 0, 3], 129)
    assert stats.mean_acceptance_length == pytest.approx(1.2325581395348837, abs=1e-15)
    assert stats.draft_acceptance_rate == pytest.approx(0.07751937984496124, abs=1e-15)
    assert (stats.acceptance_histogram, stats.num_spec_steps) == ((39, 1, 0, 3), 43)
    assert (stats.num_accepted_draft_tokens, stats.num_draft_tokens) == (10, 129)
    plain, nothing = Stats.of([7], 0), Stats.of([0, 0], 0)
    assert plain.mean_acceptance_length == 1.0 and np.isnan(plain.draft_acceptance_rate)
    assert np.isnan(nothing.mean_acceptance_length) and nothing.num_spec_steps == 0


# ---------------------------------------------------------------- wrong arguments

MISTAKES = [
    ((None,), {}, "prompts=None: must be a text, token ids, or a list of these"),
    ((3,), {}, "prompts=3: must be a text"),
    ((["a", 3],), {}, "prompt: token ids must be whole numbers"),
    (([[1], [[2], [3, 4]]],), {}, "prompt 1: token ids must be whole numbers"),
    (("a",), {"max_new_tokens": "long"}, "prompt: max_new_tokens=long: must be at least 1"),
    (("a",), {"max_new_tokens": 2.5}, "prompt: max_new_tokens=2.5: must be"),
    (("a",), {"max_new_tokens": None}, "prompt: max_new_tokens=None: must be"),
    (("a",), {"temperature": "hot"}, "temperature='hot': must be a number"),
    ((["a", "b"],), {"top_p": [0.5, None]}, "top_p=None: must be a number"),
    (("a",), {"top_k": 2.5}, "--top_k=2.5"),
    (("a",), {"temperature": np.nan}, "--temperature=nan"),
    (("a",), {"seed": True}, "prompt: seed=True: must be a whole number"),
    (("a",), {"batch_size": "8"}, "batch_size=8: must be at least 1"),
    (("a",), {"stop": 3}, "stop=3: must be a text, a list of texts"),
    ((["a", "b"],), {"stop": ["x", None]}, "prompt 1: stop=(None,): must be texts"),
]


@pytest.mark.parametrize(("arguments", "settings", "message"), MISTAKES, ids=[case[2][:40] for case in MISTAKES])
def test_mistakes(arguments, settings, message):
    with pytest.raises(UserError) as caught:
        model().job(*arguments, **settings)
    assert message in str(caught.value)


def test_numbers_may_be_those_of_numpy_and_stop_may_be_none():
    job = model().job("a", temperature=np.float32(0.5), top_k=np.int64(3), max_new_tokens=np.int32(4), stop=None)
    assert job.requests[0].stop == () and job.requests[0].max_new_tokens == 4


# ---------------------------------------------------------------- many requests


def crowd(rng: np.random.Generator, n: int) -> None:
    """Answers n requests of mixed lengths and settings."""
    prompts = [rng.integers(97, 123, rng.choice((1, 5, 30, 90))) for _ in range(n)]
    asked = {
        "temperature": rng.choice((0.0, 1.0), n).tolist(),
        "max_new_tokens": rng.integers(1, NEW + 1, n).tolist(),
        "stop": [[["a"], []][i] for i in rng.integers(0, 2, n)],
    }
    results = model().generate(prompts, **asked, seed=list(range(n)), speculation=MODES["chain"], batch_size=8)
    assert all(1 <= len(r.token_ids) <= most for r, most in zip(results, asked["max_new_tokens"], strict=True))


def held() -> tuple[int, int, int]:
    """Things that a process keeps: arrays on the device, and compiled programs."""
    gc.collect()
    return len(jax.live_arrays()), generate.prefill._cache_size(), generate.decode._cache_size()


def test_a_hundred_requests_leave_nothing_behind():
    rng = np.random.default_rng(5)
    crowd(rng, 40)
    before = held()
    crowd(rng, 60)
    assert held() == before


@pytest.mark.slow
def test_a_thousand_requests_take_constant_memory():
    """Resident memory, after 200 and after 1,000 requests: the last 800 add less than 2 % to it."""
    rng = np.random.default_rng(6)
    found = []
    for _ in range(5):
        crowd(rng, 200)
        found.append((*held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        print(f"{200 * len(found)} requests: {found[-1]} (arrays, programs, programs, MB)")
    assert len({kept[:3] for kept in found}) == 1
    assert found[-1][3] < 1.02 * found[0][3]
