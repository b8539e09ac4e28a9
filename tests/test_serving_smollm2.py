"""SmolLM2 and its drafter behind the endpoint's engine: the answers of `Model.generate`, in every mode."""

import functools

import pytest
from small_server import NAME, News, running

from ppow_jax.inference.model import SPECULATIONS, load
from ppow_jax.serving.engine import Engine, Ticket
from ppow_jax.serving.machine import Machine, Numbers
from ppow_jax.serving.metrics import Metrics

QUESTIONS = ["Why is the sky blue?", "Write a haiku about rain.", "What is 17 + 25?", "Name three colours.", "Hello!"]
NUMBERS = [Numbers(), Numbers(0.8, 0, 0.95), Numbers(1.0), Numbers(), Numbers(0.7, 40, 1.0)]
NEW = [40, 24, 30, 12, 20]


@functools.cache
def model():
    return load("smollm2-135m", "auto", "float32")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("mode", ["off", "chain", "tree", "adaptive"])
def test_smollm2_answers_as_generate_does(mode):
    speculation = SPECULATIONS[mode]
    engine = Engine(Machine(model(), speculation, 3, 256, 4), Metrics(NAME, speculation.window), 64)
    tickets = []
    for i, question in enumerate(QUESTIONS):
        job = model().job([model().chat_prompt(question)], "off", max_new_tokens=NEW[i], seed=i)
        tickets.append(Ticket(job.requests[0], NUMBERS[i], News()))
    with running(engine):
        engine.submit(tickets)
        got = [ticket.emit.last.result for ticket in tickets]
    for i, (result, ticket) in enumerate(zip(got, tickets, strict=True)):
        temperature, top_k, top_p = NUMBERS[i]
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": NEW[i], "seed": i}
        (want,) = model().generate(ticket.request.prompt_ids, speculation=mode, **how)
        assert (result.text, result.token_ids) == (want.text, want.token_ids), QUESTIONS[i]
