"""Prompts from templates over built-in texts: ShareGPT's own answers and the standard library's functions.

They cover common requests about a text or a piece of code that no data set covers: summarise it, answer a question
about it, rewrite it, translate it, explain or edit code. Each source is a function of its texts alone.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator

from ppow_jax.data.code import stdlib_functions

SHORTEST, LONGEST = 300, 4000  # characters of a text that is long enough for a task, and fits a prompt of 1,500 tokens

_SUMMARISE = (
    "Summarize the following text:\n\n{text}",
    "Summarize: {text}",
    "{text}\n\nTl;dr",
    "Give a short summary of this article in {n} sentences.\n\n{text}",
    "What are the main points of the following text? Answer in {n} sentences.\n\n{text}",
    "Write a one-paragraph summary of the text below.\n\n{text}",
)
_ASK = (
    "Answer the question using the text.\n\nText: {text}\n\nQuestion: What does the text say about {topic}?",
    "{text}\n\nAccording to the passage above, what is the role of {topic}?",
    "Context: {text}\n\nQuestion: Why is {topic} important here?\nAnswer:",
    "Read the passage and answer the question.\n\n{text}\n\nWhich facts about {topic} are given?",
    "Use the following document to answer: what should I know about {topic}?\n\nDocument: {text}",
)
_REWRITE = (
    "Rewrite the following paragraph in simpler words:\n\n{text}",
    "Make this text more formal:\n\n{text}",
    "Improve the grammar and style of this text, and keep its meaning:\n\n{text}",
    "Paraphrase the following text.\n\n{text}",
    "Turn this text into a list of bullet points:\n\n{text}",
    "Rewrite this as a friendly email:\n\n{text}",
)
_TRANSLATE = (
    "Translate the following text from English to {language}: {text}",
    "Translate to {language}:\n\n{text}",
    "How do you say this in {language}? {text}",
)
_LANGUAGES = ("German", "French", "Spanish", "Italian", "Portuguese")
_EXPLAIN = (
    "Explain what this Python function does:\n\n```python\n{code}\n```",
    "Explain this code step by step.\n\n```python\n{code}\n```",
    "What are the inputs and outputs of this function?\n\n```python\n{code}\n```",
    "Write a docstring for this function:\n\n```python\n{code}\n```",
)
_EDIT = (
    "Add type hints to this Python function:\n\n```python\n{code}\n```",
    "Add comments to the following code:\n\n```python\n{code}\n```",
    "Rename the function `{name}` to `{name}_v2` and return the whole code:\n\n```python\n{code}\n```",
    "Add error handling to this function:\n\n```python\n{code}\n```",
    "Refactor this function to make it easier to read:\n\n```python\n{code}\n```",
    "Write unit tests for this function:\n\n```python\n{code}\n```",
)

Passages = Callable[[], Iterator[tuple[str, str]]]


def task_sources(passages: Passages) -> dict[str, Callable[[], Iterator[tuple[str, str]]]]:
    """The task sources by name: functions that yield (place, prompt).

    passages: yields (place, text), the texts of the tasks on prose. The template for a text depends on its place alone.
    """

    def over_texts(kind: str, templates: tuple[str, ...], longest: int) -> Callable[[], Iterator[tuple[str, str]]]:
        def prompts() -> Iterator[tuple[str, str]]:
            for place, text in passages():
                rng = random.Random(f"{kind} {place}")
                text = _cut(text, rng.randint(SHORTEST, longest))
                topic = _topic(text, rng)
                if len(text) >= SHORTEST // 2 and topic:
                    words = {"n": rng.randint(1, 4), "language": rng.choice(_LANGUAGES), "topic": topic}
                    yield f"{kind} {place}", rng.choice(templates).format(text=text, **words)

        return prompts

    def over_code(kind: str, templates: tuple[str, ...]) -> Callable[[], Iterator[tuple[str, str]]]:
        def prompts() -> Iterator[tuple[str, str]]:
            for place, node in stdlib_functions():
                code = ast.unparse(node)
                if SHORTEST // 2 <= len(code) <= LONGEST // 2:
                    rng = random.Random(f"{kind} {place}")
                    yield f"{kind} {place}", rng.choice(templates).format(code=code, name=node.name)

        return prompts

    return {
        "summaries": over_texts("summaries", _SUMMARISE, LONGEST),
        "questions": over_texts("questions", _ASK, LONGEST),
        "rewrites": over_texts("rewrites", _REWRITE, LONGEST // 4),
        "translations": over_texts("translations", _TRANSLATE, LONGEST // 8),
        "explanations": over_code("explanations", _EXPLAIN),
        "edits": over_code("edits", _EDIT),
    }


def is_prose(text: str) -> bool:
    """True if a text is long enough and mostly made of sentences: no code, tables or lists."""
    if len(text) < SHORTEST or "```" in text or "|" in text:
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(len(line) > 80 for line in lines) * 2 >= len(lines) and text.count(". ") >= 3


def _cut(text: str, longest: int) -> str:
    """The text up to the last sentence that ends within `longest` characters."""
    if len(text) <= longest:
        return text
    return text[:longest].rpartition(". ")[0] + "."


def _topic(text: str, rng: random.Random) -> str | None:
    """A noun phrase or a long word of the text, to ask about."""
    named = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", text)
    found = sorted(set(named)) or sorted(set(re.findall(r"\b[a-z]{7,}\b", text)))
    return rng.choice(found) if found else None
