"""The chat page in headless Chromium: tokens coloured by who proposed them, tau and speed, stopping, errors."""

import contextlib

import chromium
import pytest
from small_model import MODES, model
from small_server import NAME, patient, serving, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.found() is None, reason="no Chromium: apt-get install chromium-headless-shell"),
]

COLOUR = "getComputedStyle(document.querySelector('.assistant .{}')).backgroundColor"
SPANS = "[...document.querySelectorAll('.assistant span')].map((span) => [span.textContent, span.className])"


@pytest.fixture(scope="module")
def page():
    with shown("chain") as found:
        yield found


@contextlib.contextmanager
def shown(mode: str, **how):
    """The page of a server, once it was loaded: a new tab is an empty page at first, which is complete, too."""
    with serving(mode, **how) as (server, address), chromium.Page(f"{address}/") as found:
        until(lambda: found.evaluate("document.readyState") == "complete" and found.evaluate("typeof at") == "function")
        until(lambda: found.evaluate("at('model').textContent") == NAME)
        found.server = server
        yield found


def send(page: chromium.Page, text: str, most: int = 40) -> None:
    page.evaluate("at('clear').click()")
    page.evaluate(f"at('most').value = {most}; at('prompt').value = '{text}'; at('form').requestSubmit()")


def test_an_answer_is_coloured_and_timed(page):
    send(page, "Once upon a time")
    until(lambda: page.evaluate("running === null && messages.length === 2"))
    prompt = patient().chat_prompt("Once upon a time")
    want = patient().generate(prompt, max_new_tokens=40, speculation=MODES["chain"])[0]
    spans = page.evaluate(SPANS)
    assert "".join(text for text, _ in spans) == want.text == page.evaluate("messages[1].content")
    assert {kind for _, kind in spans} == set(want.sources) == {"target", "drafter"}
    assert page.evaluate(COLOUR.format("target")) == "rgba(0, 0, 0, 0)"
    assert page.evaluate(COLOUR.format("drafter")) == "rgb(205, 235, 211)"
    assert float(page.evaluate("at('tau').textContent")) == pytest.approx(want.stats.mean_acceptance_length, abs=0.01)
    assert float(page.evaluate("at('speed').textContent")) > 0
    assert page.evaluate("at('tokens').textContent") == str(len(want.token_ids))
    assert page.evaluate("document.querySelector('.user').textContent") == "Once upon a time"


def test_tokens_of_the_lookup_have_a_colour_of_their_own():
    """In a mixture, and in the legend of every page."""
    prompt = "abcdabcdabcdabcd"
    with shown("mixture", which=model) as page:
        send(page, prompt)
        until(lambda: page.evaluate("running === null && messages.length === 2"))
        spans = page.evaluate(SPANS)
        (want,) = model().generate(model().chat_prompt(prompt), max_new_tokens=40, speculation=MODES["mixture"])
        assert "".join(text for text, _ in spans) == want.text
        kinds = {kind for _, kind in spans}
        assert {"target", "ngram"} <= kinds <= set(want.sources)
        colours = {kind: page.evaluate(COLOUR.format(kind)) for kind in kinds}
        assert colours["ngram"] == "rgb(211, 227, 250)" and colours["target"] == "rgba(0, 0, 0, 0)"
        legend = page.evaluate(
            "['drafter', 'ngram', 'both'].map((kind) => document.querySelector('header .' + kind).textContent)"
        )
        assert legend == ["drafter", "lookup", "both"]


def test_an_answer_can_be_stopped(page):
    page.evaluate("at('temperature').value = 0.3")
    send(page, "b", most=470)
    until(lambda: page.server._engine._running)
    page.evaluate("at('form').requestSubmit()")
    until(lambda: page.evaluate("running === null"))
    until(lambda: page.server._engine.idle)
    assert page.evaluate("at('send').textContent") == "Send"


def test_errors_are_shown(page):
    send(page, "b", most=5000)
    until(lambda: page.evaluate("document.querySelectorAll('.error').length"))
    assert "context holds 512 tokens" in page.evaluate("document.querySelector('.error').textContent")
