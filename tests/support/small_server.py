"""A server of the small model, in threads of the test's process, and requests to its engine without HTTP."""

import contextlib
import dataclasses
import functools
import threading
import time

import jax.numpy as jnp
from small_model import CONFIG, MODES, model

from ppow_jax.inference.model import Model
from ppow_jax.serving import server
from ppow_jax.serving.app import Endpoint
from ppow_jax.serving.engine import Engine, Progress, Ticket
from ppow_jax.serving.machine import Machine, Numbers
from ppow_jax.serving.metrics import Metrics

NAME = "small"
WAIT = 900  # seconds, also for what must be compiled


@functools.cache
def patient() -> Model:
    """The small model, whose answers only end at their limits, at temperatures well below 1."""
    params = dict(model().target.params)
    params["lm_head"] = params["lm_head"].at[jnp.array(CONFIG.eos_token_ids)].set(0.0)
    return dataclasses.replace(model(), target=dataclasses.replace(model().target, params=params))


@functools.cache
def machine(mode: str, which, slots: int = 4, context: int = 512, rounds: int = 4) -> Machine:
    return Machine(which(), MODES[mode], slots, context, rounds)


def new_engine(mode: str, which=patient, queue: int = 64, **how) -> Engine:
    found = machine(mode, which, **how)
    found.reset()
    return Engine(found, Metrics(NAME, MODES[mode].window), queue)


@contextlib.contextmanager
def running(engine: Engine):
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        engine.machine.reset()


class News:
    """News of one ticket."""

    def __init__(self):
        self.all: list = []
        self.ended = threading.Event()

    def __call__(self, news):
        self.all.append(news)
        if not isinstance(news, Progress) or news.result:
            self.ended.set()

    @property
    def last(self):
        assert self.ended.wait(WAIT)
        return self.all[-1]


def ticket(prompt, temperature=0.0, top_k=0, top_p=1.0, *, every=True, seconds=float("inf"), **settings) -> Ticket:
    """A ticket whose `emit` is a `News`; settings as in `Model.generate`."""
    (request,) = model().job([prompt], "off", **settings).requests
    numbers = Numbers(temperature, top_k, top_p)
    return Ticket(request, numbers, News(), every=every, pieces=True, seconds=seconds)


def until(condition, seconds: float = WAIT) -> None:
    """Waits until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(mode: str = "chain", *, seconds: float = WAIT, drain: float = WAIT, **how):
    """A server on a free port -> (its `Server`, its address)."""
    engine = new_engine(mode, **how)
    bound = server.bind("127.0.0.1", 0)
    found = server.Server(Endpoint(engine.machine.model, engine, NAME, seconds), drain)
    thread = threading.Thread(target=found.run, args=([bound],))
    thread.start()
    until(lambda: found.started)
    try:
        yield found, server.address(bound)
    finally:
        found.should_exit = True
        thread.join(WAIT)
        bound.close()
        assert not thread.is_alive()
        engine.machine.reset()
