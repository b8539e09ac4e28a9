"""Results and models for people: one line, text with its drafted tokens coloured for terminals, and the same as HTML.

The functions take a `requests.Result` or a `model.Model`, whose methods call them.
"""

import html
import os
from typing import Any, TextIO

from ppow_jax.speculation.sources import ORIGINS

LEGEND = "green: drafted tokens that were accepted; the others are the target's own"
LOOKUP_LEGEND = "green: accepted from the drafter; yellow: from n-gram lookup; cyan: both; others: the target's own"
_COLOURS = {"drafter": "\033[32m", "ngram": "\033[33m", "both": "\033[36m"}
_PLAIN = "\033[0m"
_GROUNDS = {"drafter": "#cfe8d5", "ngram": "#f6e3b4", "both": "#cbe6ee"}
_TITLES = {"drafter": "drafted", "ngram": "from n-gram lookup", "both": "drafted, and from n-gram lookup"}
_TEXT = 60  # characters of an answer in its one-line form


def colours(stream: TextIO) -> bool:
    """True if colours should be written to a stream: a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(result: Any) -> str:
    """Explains the colours of a result."""
    return LOOKUP_LEGEND if {"ngram", "both"} & set(result.sources) else LEGEND


def spans(result: Any) -> list[tuple[str, str]]:
    """Pieces of the text, and who proposed them (`sources.ORIGINS`); the pieces together are `result.text`.

    A piece is as long as the origin of its tokens is the same. A character of several tokens counts to the last one.
    """
    found: list[tuple[str, str]] = []
    shown, count = 0, len(result.token_ids)
    for n in range(1, count + 1) if result.text_of is not None else ():
        text = result.text if n == count else result.text_of.settled(result.token_ids[:n])
        piece, source = result.text[shown : len(text)], result.sources[n - 1]
        shown += len(piece)
        if found and found[-1][1] == source:
            found[-1] = found[-1][0] + piece, source
        elif piece:
            found.append((piece, source))
    return found or [(result.text, ORIGINS[0])]


def coloured(result: Any) -> str:
    """The text for a terminal, its drafted tokens in the colours of their sources."""
    pieces = ((text, _COLOURS.get(source)) for text, source in spans(result))
    return "".join(f"{colour}{text}{_PLAIN}" if colour else text for text, colour in pieces)


def page(result: Any) -> str:
    """The text as HTML for a notebook, its drafted tokens on coloured ground, with the figures below."""

    def piece(text: str, source: str) -> str:
        if source not in _GROUNDS:
            return html.escape(text)
        style = f"background:{_GROUNDS[source]};border-radius:2px"
        return f'<span style="{style}" title="{_TITLES[source]}">{html.escape(text)}</span>'

    pieces, told = (piece(*span) for span in spans(result)), legend(result)
    return (
        f'<div style="white-space:pre-wrap">{"".join(pieces)}</div>'
        f'<div style="color:#666;font-size:85%">{html.escape(figures(result))}. {told[0].upper()}{told[1:]}.</div>'
    )


def figures(result: Any) -> str:
    """Tokens, speed, tau, accepted of drafted tokens. The first token is the prefill's, and counts for none of them."""
    stats, gained = result.stats, len(result.token_ids) - 1
    speed = f", {gained / result.decode_seconds:.1f} token/s" if gained and result.decode_seconds else ""
    line = f"{gained + 1} token{'s' if gained else ''}{speed}"
    if not stats.num_draft_tokens:
        return line
    tau = f"tau {gained / stats.num_spec_steps:.2f}"
    return f"{line}, {tau}, {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} drafted tokens accepted"


def summary(result: Any, name: str) -> str:
    """One line about a result of the decoding called `name`: its figures, and the seconds of its prefill."""
    return f"{name}: {figures(result)} (prefill {result.prefill_seconds:.2f} s)"


def comparison(plain: Any, fast: Any, temperature: float) -> str:
    """Plain decoding's line, and what the drafter gained."""
    lines = [summary(plain, "without a drafter")]
    counts = [len(result.token_ids) - 1 for result in (plain, fast)]
    if all(counts):
        seconds = [result.decode_seconds / n for result, n in zip((plain, fast), counts, strict=True)]
        lines.append(f"speedup {seconds[0] / seconds[1]:.2f}")
    if temperature == 0:
        differ = "the outputs differ, by rounding: --dtype=float32 makes them identical"
        lines.append("the outputs are identical" if plain.token_ids == fast.token_ids else differ)
    return "\n".join(lines)


def result_line(result: Any) -> str:
    """`repr` of a result."""
    text = repr(result.text if len(result.text) <= _TEXT else result.text[: _TEXT - 3] + "...")
    return f"Result({text}, {figures(result)}, finish_reason={result.finish_reason!r})"


def model_line(model: Any) -> str:
    """`repr` of a model."""
    config = model.target.config
    target = f"{model.target.name}, {config.num_layers} layers, {config.vocab_size} tokens"
    if model.drafter is None:
        return f"Model({target}; no drafter)"
    drafter = model.drafter.config
    layers = f"{drafter.num_layers} layer{'s' if drafter.num_layers > 1 else ''}"
    return f"Model({target}; drafter of {layers}, {drafter.draft_vocab_size} tokens)"
