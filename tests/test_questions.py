"""The prompt sets that come along: different questions, the same in every run, usable as data and as benchmarks."""

import re

from ppow_jax.data import questions
from ppow_jax.data.conversations import load_conversations
from ppow_jax.evaluation.benchmarks import load_benchmark


def test_problems_are_different_and_always_the_same():
    found = [record["prompt"] for _, record in questions.arithmetic()]
    assert len(set(found)) == len(found) == questions.ARITHMETIC_COUNT
    assert [record["prompt"] for _, record in questions.arithmetic(40)] == found[:40]
    assert all(problem.endswith(("?", ".")) and re.search(r"\d", problem) for problem in found)
    shapes = {re.sub(r"\d+|[A-Z][a-z]+", "", problem) for problem in found}
    assert len(shapes) > 30  # templates with different things


def test_they_are_data_sources():
    found = load_conversations("arithmetic[80:],chat")
    assert len(found) == questions.ARITHMETIC_COUNT - 80 + 40
    assert found[0].source == "arithmetic[80]" and len(found[0].user_turns) == 1
    assert {len(chat.user_turns) for chat in found[-40:]} == {2}


def test_they_are_benchmarks():
    few = load_benchmark("arithmetic", 5, seed=1)
    assert few.name == "arithmetic" and len(few.prompts) == 5 and few == load_benchmark("arithmetic", 5, seed=1)
    assert {len(prompt.turns) for prompt in load_benchmark("chat").prompts} == {2}
    rest = load_benchmark("arithmetic[80:]")
    trained = {chat.user_turns for chat in load_conversations("arithmetic[:80]")}
    assert trained.isdisjoint(prompt.turns for prompt in rest.prompts)
