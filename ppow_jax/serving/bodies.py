"""Bodies of requests: JSON of the OpenAI API -> checked settings.

A field that the engine does not implement is refused unless it has the value that changes nothing: an answer is never
something else than what was asked for.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ppow_jax.serving.errors import ApiError, check, unknown_model

MOST_CHOICES, MOST_STOPS = 64, 16
COMPLETION_TOKENS = 16  # the API's default of max_tokens for completions; chats have none

# Fields that are known and without effect here.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that are not implemented -> values that change nothing (None always is one).
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
SHARED = {"model", "max_tokens", "n", "ppow", "seed", "stop", "stream", "stream_options"}
SHARED |= {"temperature", "top_k", "top_p"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Body:
    """A request for completions.

    prompts: texts or token ids; for a chat one list of messages. max_tokens: None takes what the context has. usage:
    a last chunk of a stream tells the usage. ppow: chunks tell who proposed each token.
    """

    chat: bool
    prompts: tuple[Any, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    seed: int
    n: int
    stream: bool
    usage: bool
    ppow: bool

    def seed_of(self, choice: int) -> int:
        """Seed of one of the `n` choices of a prompt: the request's for the first, then the following numbers."""
        return (self.seed + choice) % 2**31


def parse(raw: bytes, model: str, chat: bool) -> Body:
    """Checks a body. Raises ApiError: 400 for a wrong field, 404 for another model."""
    fields = _object(raw)
    if fields.get("model", model) != model:
        raise unknown_model(fields["model"], model)
    own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    _check_names(fields, SHARED | own)
    prompts = (_messages(fields.get("messages")),) if chat else _prompts(fields.get("prompt"))
    limits = [fields[name] for name in ("max_completion_tokens", "max_tokens") if name in fields]
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    check(len(set(map(str, limits))) <= 1, name, "max_tokens, its older name, has another value")
    max_tokens = limits[0] if limits else None if chat else COMPLETION_TOKENS
    check(max_tokens is None or (_whole(max_tokens) and max_tokens >= 1), name, "must be a whole number, 1 or more")
    stream = _value(fields, "stream", False, _boolean, "must be true or false")
    options = fields.get("stream_options", {})
    check(isinstance(options, dict), "stream_options", "must be an object")
    check("stream_options" not in fields or stream, "stream_options", "needs stream=true")
    n = _value(fields, "n", 1, lambda x: _whole(x) and 1 <= x <= MOST_CHOICES, f"must be 1 to {MOST_CHOICES}")
    top_k = _value(fields, "top_k", 0, lambda x: _whole(x) and x >= -1, "must be a whole number; 0 or -1 is off")
    return Body(
        chat=chat,
        prompts=prompts,
        max_tokens=max_tokens,
        temperature=_value(fields, "temperature", 1.0, lambda x: _number(x) and 0 <= x <= 100, "must be 0 to 100"),
        top_p=_value(fields, "top_p", 1.0, lambda x: _number(x) and 0 < x <= 1, "must be above 0 and at most 1"),
        top_k=min(max(top_k, 0), 2**31 - 1),
        stop=_stops(fields.get("stop", [])),
        seed=_value(fields, "seed", secrets.randbelow(2**31), _whole, "must be a whole number") % 2**31,
        n=n,
        stream=stream,
        usage=_value(options, "include_usage", False, _boolean, "must be true or false"),
        ppow=_value(fields, "ppow", False, _boolean, "must be true or false"),
    )


def _object(raw: bytes) -> dict[str, Any]:
    """The body's fields that have a value: null stands for the default."""
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _check_names(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        if name in known or name in IGNORED:
            continue
        check(name in NEUTRAL, name, "is not a field of this request")
        same = any(value == plain and isinstance(value, bool) == isinstance(plain, bool) for plain in NEUTRAL[name])
        check(same, name, f"is not supported by this server; leave it out ({_shown(value)} was given)")


def _value(fields: Mapping[str, Any], name: str, default: Any, good: Callable[[Any], bool], rule: str) -> Any:
    value = fields.get(name, default)
    check(good(value), name, f"{rule}, but is {_shown(value)}")
    return value


def _messages(messages: Any) -> list[dict[str, str]]:
    """Messages with texts as content, in the roles that chat templates know."""
    check(isinstance(messages, list) and len(messages) > 0, "messages", "must be a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, str]:
    check(isinstance(message, dict), name, "must be an object")
    given = {key for key, value in message.items() if value not in (None, [])} - {"role", "content", "name"}
    check(not given, name, f"{', '.join(sorted(given))}: not supported; a message has role and content")
    role, content = message.get("role"), message.get("content")
    known = isinstance(role, str) and role in ROLES
    check(known, f"{name}.role", f"must be one of {', '.join(ROLES)}, but is {_shown(role)}")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        texts = [part.get("text") if part.get("type") == "text" else None for part in parts]
        check(all(isinstance(text, str) for text in texts), f"{name}.content", "only parts of type text are supported")
        content = "".join(texts)
    check(isinstance(content, str), f"{name}.content", "must be a text, or a list of parts of type text")
    return {"role": ROLES[role], "content": content}


def _prompts(prompt: Any) -> tuple[Any, ...]:
    """One or several prompts: texts or lists of token ids."""
    rule = "must be a text, token ids, or a list of texts or of lists of token ids"
    if isinstance(prompt, str):
        return (prompt,)
    check(isinstance(prompt, list) and len(prompt) > 0, "prompt", f"{rule}, and not empty")
    if all(map(_whole, prompt)):
        return (prompt,)
    texts = all(isinstance(one, str) for one in prompt)
    check(texts or all(isinstance(one, list) and one and all(map(_whole, one)) for one in prompt), "prompt", rule)
    return tuple(prompt)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    check(good, "stop", "must be a text, or a list of texts, none of them empty")
    check(len(stops) <= MOST_STOPS, "stop", f"must be at most {MOST_STOPS} texts")
    return tuple(stops)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return "a nested value"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)
