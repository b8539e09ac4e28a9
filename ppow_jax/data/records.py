"""Mapping of records to conversations: one table for all the shapes in which chats are published.

The first field in the order of SHAPES that is not null determines the shape of a record; field names are
case-insensitive. Null and absent are equivalent everywhere. docs/data.md describes in words what is read.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ppow_jax.data.messages import Conversation, Message
from ppow_jax.errors import UserError

ANSWERS = ("response", "completion", "answer", "output", "chosen")


@dataclass(frozen=True)
class Shape:
    """A kind of record, recognised by the field `key`, which holds a chat, or the user's text, or texts.

    chat: only a chat is accepted. more: fields with text that is appended to the user's. answers: fields with the
    assistant's answer; the first that is not empty is used.
    """

    key: str
    chat: bool = False
    more: tuple[str, ...] = ()
    answers: tuple[str, ...] = ANSWERS


SHAPES = (
    Shape("messages", chat=True, answers=()),  # OpenAI, most data sets on the Hugging Face hub
    Shape("conversations", chat=True, answers=()),  # ShareGPT
    Shape("conversation", chat=True, answers=()),
    Shape("dialogue", chat=True, answers=()),
    Shape("turns", answers=()),  # MT-Bench: texts of the user
    Shape("prompt"),  # TRL: text or messages, with completion or chosen of either kind
    Shape("question", more=("context",)),  # GSM8K, Open-Orca, SQuAD
    Shape("instruction", more=("input", "context")),  # Alpaca, Dolly
    Shape("query"),
    Shape("input", answers=("output",)),
    Shape("chosen", chat=True, answers=()),  # preferences that repeat the prompt; Anthropic's HH as text
)
_SYSTEMS = ("system", "system_prompt")  # fields beside the chat
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython"),
}
_ROLE_OF = {spelling: role for role, spellings in _ROLES.items() for spelling in spellings}
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TOOLS = ("tool_use", "tool_call", "tool_calls", "tool_result", "function_call", "function_call_output")
_PAIRS = (("human", "user", "input", "question", "prompt"), ("assistant", "gpt", "bot", "output", "answer", "response"))

# Reasons for dropping the rest of a conversation.
TOOL, MEDIA, ORDER, EMPTY = "tool calls or results", "images or sound", "turns out of order", "empty turns"
HALVES, UNUSABLE = "unpaired surrogates", "unusable records"


class _Malformed(Exception):
    """A malformed record; the message does not include its place."""


class _Cut(Exception):
    """Raised where a conversation ends early, for one of the reasons above."""


def conversation_from_record(record: Any, source: str, notes: Counter | None = None) -> Conversation | None:
    """Reads one record in any of the usual chat shapes; None when it is well formed but unusable.

    A conversation ends before its first empty message, before its first turn out of order, and before anything that is
    not text: tool calls and their results, images. notes: counts these by reason, and the texts in which halves of
    surrogate pairs were replaced by U+FFFD.
    Raises UserError with the place for a malformed record.
    """
    notes = Counter() if notes is None else notes
    messages: list[Message] = []
    cut = None
    try:
        for message in _messages(record):
            messages.append(message)
    except _Malformed as error:
        raise UserError(f"{source}: {error}") from None
    except _Cut as reason:
        cut = str(reason)
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None
    head = 1 if messages and messages[0].role == "system" else 0
    alternate = any(m.role == "assistant" for m in messages)
    usable = head
    for i, message in enumerate(messages[head:]):
        expected = "assistant" if alternate and i % 2 else "user"
        if message.role != expected or not message.content.strip():
            cut = EMPTY if message.role == expected else ORDER
            break
        usable += 1
    if usable == head:
        notes.update([UNUSABLE] if cut in (None, EMPTY) else [UNUSABLE, cut])
        return None
    notes.update([cut] if cut else [])
    return Conversation(tuple(_whole(message, notes) for message in messages[:usable]), source)


def whole_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no tokenizer accepts; whole pairs are joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _whole(message: Message, notes: Counter) -> Message:
    texts = (message.content, message.reasoning or "")
    fixed = [text if text.isascii() else whole_text(text) for text in texts]
    if (*fixed,) == texts:
        return message
    notes[HALVES] += 1
    return replace(message, content=fixed[0], reasoning=fixed[1] or None)


def _messages(record: Any) -> Iterator[Message]:
    if isinstance(record, list) and record and isinstance(record[0], dict):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise _Malformed(f"a record must be a JSON object, not {type(record).__name__}")
    fields = {str(k).strip().lower(): v for k, v in record.items()} | record
    shape = next((shape for shape in SHAPES if fields.get(shape.key) is not None), None)
    if shape is None:
        if any(shape.key in fields for shape in SHAPES):
            return  # all null
        known = ", ".join(shape.key for shape in SHAPES)
        hint = '; a record is a whole chat: {"messages": [...]}' if "role" in fields and "content" in fields else ""
        hint = "; a plain text has no roles" if "text" in fields else hint
        raise _Malformed(f"no known field ({known}) in a record with {_shown(record)}{hint}")
    if any(fields.get(key) for key in _MEDIA):
        raise _Cut(MEDIA)
    said = _said(fields, shape)
    system = next((fields[key] for key in _SYSTEMS if fields.get(key)), None)
    first = next(said, None)
    if system is not None and (first is None or first.role != "system"):
        yield Message("system", _text(system, "system"))
    if first is not None:
        yield first
    yield from said


def _said(fields: Mapping[str, Any], shape: Shape) -> Iterator[Message]:
    """The messages of a record, except for a system prompt in a field of its own."""
    for key in shape.answers:  # an answer that repeats the prompt is read alone
        value = fields.get(key)
        if _is_chat(value) and _role(value[0]) in ("system", "user"):
            yield from _chat(value, key)
            return
    if isinstance(fields.get("history"), list) and not shape.chat:
        yield from _history(fields["history"])
    value = fields[shape.key]
    if shape.chat or _is_chat(value):
        yield from _chat(value, shape.key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield Message("user", _content(value, shape.key)[0])
    elif isinstance(value, list):
        yield from (Message("user", _text(turn, shape.key)) for turn in value)
    else:
        parts = [value, *(fields[key] for key in shape.more if fields.get(key))]
        yield Message("user", "\n\n".join(_text(part, shape.key) for part in parts))
    for key in shape.answers:
        value = fields.get(key)
        if key == "completion" and fields.get("label") is False:
            continue  # labelled as bad
        if _is_chat(value):
            yield from _chat(value, key)
            return
        answer = _answer(value, key)
        if answer.strip():
            yield Message("assistant", answer.strip(), _reasoning(fields))
            return


def _answer(value: Any, key: str) -> str:
    """Text; numbers and booleans as JSON writes them; the first of several texts."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        value = value[0]
    if isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    return _text(value, key) if value else ""


def _history(pairs: list) -> Iterator[Message]:
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Malformed(f"an entry of 'history' must be a question and its answer, not {pair!r:.60}")
        yield Message("user", _text(pair[0], "history"))
        yield Message("assistant", _text(pair[1], "history").strip())


def _is_chat(value: Any) -> bool:
    """True for a list of messages, False for the parts of one message."""
    objects = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    return objects and (_role(value[0]) is not None or "type" not in value[0])


def _chat(value: Any, key: str) -> Iterator[Message]:
    """The messages of a list of them; also of the list as JSON text, or as an object of columns."""
    if isinstance(value, str) and key == "chosen":
        yield from _human_assistant(value, key)
        return
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Malformed(f"the text in {key!r} must be a JSON list of messages, not {value!r:.60}") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise _Malformed(f"{key!r} must be a list of messages, not {value!r:.60}")
    for turn in value:
        yield from _turn(turn, key)


def _human_assistant(text: str, key: str) -> Iterator[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if len(parts) < 3 or parts[0].strip():
        raise _Malformed(f"the text in {key!r} must begin with '\\n\\nHuman:' where there is no prompt")
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        yield Message("user" if speaker == "Human" else "assistant", said.strip())


def _turn(turn: Any, key: str) -> Iterator[Message]:
    """The message of one entry, or two where it holds a question with its answer."""
    if not isinstance(turn, dict):
        raise _Malformed(f"an entry of {key!r} must be an object with role and content, not {turn!r:.60}")
    role, content = _role(turn), _first(turn, ("content", "value", "text"))
    if role is None and turn.get("type") in _TOOLS:
        raise _Cut(TOOL)
    if role is None and _first(turn, ("role", "from")) is None:
        question, answer = (_first(turn, names) for names in _PAIRS)
        if question is not None and answer is not None:
            yield Message("user", _text(question, key))
            yield Message("assistant", _text(answer, key).strip())
            return
    if role is None:
        spelled = _first(turn, ("role", "from"))
        raise _Malformed(f"role {spelled!r:.60} in {key!r} is none of {', '.join(_ROLE_OF)}")
    if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
        raise _Cut(TOOL)
    if role == "system" and content is None:
        return
    text, thoughts = _content(content, key)
    if role != "assistant":
        yield Message(role, text)
    else:  # stripped: otherwise tokens span its borders
        yield Message(role, text.strip(), thoughts or _reasoning(turn))


def _role(turn: Mapping[str, Any]) -> str | None:
    spelled = _first(turn, ("role", "from"))
    return _ROLE_OF.get(spelled.strip().lower()) if isinstance(spelled, str) else None


def _content(value: Any, key: str) -> tuple[str, str | None]:
    """Text and reasoning of a message's content: a text, or a list of parts."""
    if value is None or isinstance(value, str):
        return value or "", None
    if isinstance(value, dict) and "type" in value:
        value = [value]
    if not isinstance(value, list):
        return _text(value, key), None
    texts, thoughts = [], []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise _Malformed(f"a part of the content in {key!r} must be a text or an object, not {part!r:.60}")
        kind = part.get("type")
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning"):
            thoughts.append(_text(_first(part, ("thinking", "text", "reasoning")) or "", key))
        elif kind in _TOOLS:
            raise _Cut(TOOL)
        elif kind in _TEXT_PARTS:
            raise _Malformed(f"the text in {key!r} must be a string, not {part.get('text')!r:.60}")
        else:
            raise _Cut(MEDIA)
    return "".join(texts), "".join(thoughts) or None


def _reasoning(turn: Mapping[str, Any]) -> str | None:
    value = _first(turn, _REASONING)
    return value if isinstance(value, str) and value.strip() else None


def _first(turn: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first value that is not null."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"the text in {key!r} must be a string, not {value!r:.60}")
    return value


def _shown(record: dict) -> str:
    names = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"{names}, ..." if len(record) > 8 else names
