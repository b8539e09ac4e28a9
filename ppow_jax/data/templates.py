"""Chat templates: rendering of messages as text with a tokenizer's template.

Templates come with models and may do anything: ask for the date, refuse a chat, fail, or omit the user's text.
Any exception becomes a UserError that names the chat.
"""

import copy
import dataclasses
import datetime
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from ppow_jax.data.messages import Message
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = (  # for base models: texts and blank lines, an end-of-text token after each answer
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
)
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of strftime, GNU's included
_PROBE = "zqxjkvbw"  # a text that no template writes by itself


def is_plain(tokenizer: Any) -> bool:
    """True if a tokenizer has no chat template, so that chats are written as plain text."""
    return not getattr(tokenizer, "chat_template", None)


def with_date(tokenizer: Any, date: str | None) -> Any:
    """A copy of the tokenizer whose chat template uses `date` (as 2026-01-31) as today; None: the current date."""
    if date is None:
        return tokenizer
    dated = copy.copy(tokenizer)
    dated.chat_date = datetime.date.fromisoformat(date)
    return dated


def render(tokenizer: Any, messages: Sequence[Message], prompt: bool, source: str) -> str:
    """The text of `messages`, with `prompt` followed by the generation prompt.

    If the template writes the beginning-of-sequence token, a copy at the start of the first message is removed.
    Raises UserError, naming `source`, if the template refuses the messages, fails, or omits the question.
    """
    if is_plain(tokenizer):
        _warn_plain(name_of(tokenizer))
    text = _apply(tokenizer, messages, prompt, source)
    begin = getattr(tokenizer, "bos_token", None)
    if begin and messages and messages[0].content.startswith(begin):
        first = dataclasses.replace(messages[0], content=messages[0].content.removeprefix(begin))
        without = _apply(tokenizer, (first, *messages[1:]), prompt, source)
        if without.startswith(begin):
            _warn_begin(name_of(tokenizer))
            text = without
    if not text.strip():
        raise UserError(f"{source}: the chat template of {name_of(tokenizer)} renders nothing")
    last = messages[-1].content if messages else ""
    if prompt and messages[-1].role == "user" and not holds(text, last.removeprefix(begin or "")):
        raise UserError(f"{source}: the chat template of {name_of(tokenizer)} omits the user's text")
    return text


def holds(text: str, part: str) -> bool:
    """True if a text contains another one, ignoring white space."""
    return "".join(part.split()) in "".join(text.split())


def name_of(tokenizer: Any) -> str:
    """The tokenizer's name, for messages."""
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _apply(tokenizer: Any, messages: Sequence[Message], prompt: bool, source: str) -> str:
    try:
        template = PLAIN_TEMPLATE if is_plain(tokenizer) else _template(tokenizer)
        parts = _wants_parts(tokenizer, template)
    except Exception as error:  # noqa: BLE001 (several templates without a default, a template that is no text)
        raise UserError(f"the chat template of {name_of(tokenizer)} cannot be used: {_reason(error)}") from None
    try:
        return _run(tokenizer, template, messages, parts, prompt)
    except Exception as error:  # noqa: BLE001 (templates are programs)
        raise UserError(f"{source}: the chat template of {name_of(tokenizer)} refuses it: {_reason(error)}") from None


def _run(tokenizer: Any, template: str, messages: Sequence[Message], parts: bool, prompt: bool) -> str:
    chat = [_object(message, parts) for message in messages]
    date = {"chat_date": _dated(tokenizer.chat_date)} if template.startswith(_CALL) else {}
    return tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt, **date
    )


def _object(message: Message, parts: bool) -> dict[str, Any]:
    content = [{"type": "text", "text": message.content}] if parts else message.content
    result = {"role": message.role, "content": content}
    return result | ({"reasoning_content": message.reasoning} if message.reasoning else {})


# The sandbox of transformers accepts no functions: `strftime_now` is passed as a macro that substitutes directives.
_CALL = "{%- macro strftime_now(format) -%}"
_MACRO = (
    _CALL + "{%- set date = namespace(text=format) -%}{%- for directive, text in chat_date.items() -%}"
    "{%- set date.text = date.text | replace(directive, text) -%}{%- endfor -%}{{ date.text }}{%- endmacro %}{{- '' }}"
)


def _template(tokenizer: Any) -> str:
    template = tokenizer.get_chat_template().removeprefix("\ufeff")  # a byte order mark of its file
    if "strftime_now" not in template or not getattr(tokenizer, "chat_date", None):
        return template
    return _MACRO + re.sub(r"^[ \t]+(?=\{%)", "", template)  # Jinja strips these, too, at the beginning of a line


@functools.cache
def _dated(date: datetime.date) -> dict[str, str]:
    """Texts of strftime's directives at midnight of a day, the longer ones first."""
    midnight = datetime.datetime.combine(date, datetime.time())
    long = [f"%-{letter}" for letter in _DIRECTIVES] + ["%f"]
    return {directive: midnight.strftime(directive) for directive in (*long, *(f"%{d}" for d in _DIRECTIVES))}


@functools.lru_cache(maxsize=16)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """True if a template renders content only as a list of parts, as some of models with images do.

    Raises UserError if it renders the user's text in neither form: every prompt would be the same.
    """
    rendered: list[str] = []
    for parts in (False, True):
        try:
            rendered.append(_run(tokenizer, template, [Message("user", _PROBE)], parts, True).lower())
        except Exception:  # noqa: BLE001 (other chats may work; their errors are reported then)
            rendered.append("")
        if _PROBE in rendered[-1]:
            return parts
    if all(text.strip() for text in rendered):
        raise UserError("it omits the user's text")
    return False


def _reason(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    known = type(error).__name__ in ("TemplateError", "UserError")
    return (text if known else f"{type(error).__name__}: {text}")[:300]


@functools.cache
def _warn_plain(name: str) -> None:
    log.warning("tokenizer %s has no chat template: conversations are written as plain text", name)


@functools.cache
def _warn_begin(name: str) -> None:
    log.warning("texts begin with the token that the chat template of %s writes itself: it is removed from them", name)
