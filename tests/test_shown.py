"""Results in one line, in colour and as HTML."""

import dataclasses
import io

import pytest
from small_model import tokenizer

from ppow_jax.inference import shown
from ppow_jax.inference.answer_text import AnswerText
from ppow_jax.inference.requests import Result, Stats

PROMPT = [1, 2]
GREEN, YELLOW, CYAN, PLAIN = "\033[32m", "\033[33m", "\033[36m", "\033[0m"


def result(text: str, drafted: str, **changes) -> Result:
    """A result of one token per byte. drafted: a sign per token: d of the drafter, n of a lookup, b of both."""
    ids = tokenizer()(text)["input_ids"]
    stats = Stats.of([1, 1, 1], 6)
    origin = [{".": "target", "d": "drafter", "n": "ngram", "b": "both"}[sign] for sign in drafted]
    made = Result(text, ids, "length", PROMPT, stats, 0.5, 2.0, origin, AnswerText(tokenizer(), PROMPT))
    assert len(ids) == len(drafted)
    return dataclasses.replace(made, **changes)


def test_spans_are_the_text():
    found = shown.spans(result("abcdef", ".dd.d."))
    own, drafted = "target", "drafter"
    assert found == [("a", own), ("bc", drafted), ("d", own), ("e", drafted), ("f", own)]
    assert shown.spans(result("aé!", ".d.d")) == [("aé", own), ("!", drafted)]  # é is complete with its second token
    cut = dataclasses.replace(result("abcdef", ".ddddd"), text="abc")  # before a stop text
    assert shown.spans(cut) == [("a", own), ("bc", drafted)]
    assert shown.spans(dataclasses.replace(result("ab", ".d"), text_of=None)) == [("ab", own)]
    assert shown.spans(result("abcd", "nnbd")) == [("ab", "ngram"), ("c", "both"), ("d", drafted)]


def test_a_terminal_gets_colours(monkeypatch):
    assert shown.coloured(result("abc", ".d.")) == f"a{GREEN}b{PLAIN}c"
    assert shown.coloured(result("abc", "nbd")) == f"{YELLOW}a{PLAIN}{CYAN}b{PLAIN}{GREEN}c{PLAIN}"
    assert "yellow" in shown.legend(result("ab", ".n")) and "yellow" not in shown.legend(result("ab", ".d"))
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown.colours(terminal) and not shown.colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shown.colours(terminal)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not shown.colours(terminal)


def test_a_notebook_gets_html():
    assert 'title="from n-gram lookup">b</span>' in result("ab", ".n")._repr_html_()
    page = result("<b>&", "..dd")._repr_html_()
    assert "&lt;b" in page and 'title="drafted">&gt;&amp;</span>' in page and "<b>" not in page
    assert "4 tokens, 1.5 token/s, tau 1.00, 3 of 6 drafted tokens accepted" in page


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (
            result("abcd", ".dd."),
            "Result('abcd', 4 tokens, 1.5 token/s, tau 1.00, 3 of 6 drafted tokens accepted, finish_reason='length')",
        ),
        (result("a\n", "..", stats=Stats.of([1], 0)), "Result('a\\n', 2 tokens, 0.5 token/s, finish_reason='length')"),
        (result("a", ".", stats=Stats.of([0], 0), finish_reason="stop"), "Result('a', 1 token, finish_reason='stop')"),
    ],
)
def test_repr_is_one_line(made, line):
    assert repr(made) == line
    assert len(repr(dataclasses.replace(made, text="x" * 500))) < 200
