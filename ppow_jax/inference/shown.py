"""Results and models for people: one line, text with its drafted tokens coloured for terminals, and the same as HTML.

The functions take a `requests.Result` or a `model.Model`, whose methods call them.
"""

import html
import os
from typing import Any, TextIO

LEGEND = "green: drafted tokens that were accepted; the others are the target's own"
_GREEN, _PLAIN = "\033[32m", "\033[0m"
_STYLE = "background:#cfe8d5;border-radius:2px"
_TEXT = 60  # characters of an answer in its one-line form


def colours(stream: TextIO) -> bool:
    """True if colours should be written to a stream: a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def spans(result: Any) -> list[tuple[str, bool]]:
    """Pieces of the text, and whether they were drafted; the pieces together are `result.text`.

    A piece is as long as the origin of its tokens is the same. A character of several tokens counts to the last one.
    """
    found: list[tuple[str, bool]] = []
    shown, count = 0, len(result.token_ids)
    for n in range(1, count + 1) if result.text_of is not None else ():
        text = result.text if n == count else result.text_of.settled(result.token_ids[:n])
        piece, drafted = result.text[shown : len(text)], result.drafted[n - 1]
        shown += len(piece)
        if found and found[-1][1] == drafted:
            found[-1] = found[-1][0] + piece, drafted
        elif piece:
            found.append((piece, drafted))
    return found or [(result.text, False)]


def coloured(result: Any) -> str:
    """The text for a terminal, its drafted tokens in green."""
    return "".join(f"{_GREEN}{text}{_PLAIN}" if drafted else text for text, drafted in spans(result))


def page(result: Any) -> str:
    """The text as HTML for a notebook, its drafted tokens on green ground, with the figures below."""
    pieces = (
        f'<span style="{_STYLE}" title="drafted">{html.escape(text)}</span>' if drafted else html.escape(text)
        for text, drafted in spans(result)
    )
    return (
        f'<div style="white-space:pre-wrap">{"".join(pieces)}</div>'
        f'<div style="color:#666;font-size:85%">{html.escape(figures(result))}. {LEGEND[0].upper()}{LEGEND[1:]}.</div>'
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
