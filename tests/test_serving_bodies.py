"""Bodies of requests: what is taken, and what is refused with which status and field."""

import json

import pytest

from ppow_jax.serving.bodies import COMPLETION_TOKENS, parse
from ppow_jax.serving.errors import ApiError, busy

CHAT = {"messages": [{"role": "user", "content": "a"}]}
TEXT = {"prompt": "a"}

# body without the model, the field that the error must name, a part of its message
REFUSED = [
    ({}, "messages", "at least one"),
    (CHAT | {"messages": []}, "messages", "at least one"),
    (CHAT | {"messages": "a"}, "messages", "must be a list"),
    (CHAT | {"messages": ["a"]}, "messages[0]", "must be an object"),
    (CHAT | {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "must be one of system"),
    (CHAT | {"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "must be one of system"),
    (CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "type text"),
    (CHAT | {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0]", "tool_calls"),
    (CHAT | {"logprobs": True}, "logprobs", "not supported"),
    (CHAT | {"top_logprobs": 3}, "top_logprobs", "not supported"),
    (CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT | {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    (CHAT | {"temprature": 1}, "temprature", "not a field"),
    (CHAT | {"prompt": "a"}, "prompt", "not a field"),
    (CHAT | {"temperature": -1}, "temperature", "0 to 100, but is -1"),
    (CHAT | {"temperature": "1"}, "temperature", 'but is "1"'),
    (CHAT | {"temperature": True}, "temperature", "but is true"),
    (CHAT | {"temperature": float("nan")}, "temperature", "but is NaN"),
    (CHAT | {"top_p": 0}, "top_p", "above 0"),
    (CHAT | {"top_p": 1.1}, "top_p", "at most 1"),
    (CHAT | {"top_k": 1.5}, "top_k", "whole number"),
    (CHAT | {"n": 0}, "n", "1 to 64"),
    (CHAT | {"n": 1000}, "n", "1 to 64"),
    (CHAT | {"seed": "x"}, "seed", "whole number"),
    (CHAT | {"stop": ""}, "stop", "none of them empty"),
    (CHAT | {"stop": [1]}, "stop", "list of texts"),
    (CHAT | {"stop": ["a"] * 17}, "stop", "at most 16"),
    (CHAT | {"stream": "yes"}, "stream", "true or false"),
    (CHAT | {"stream_options": {}}, "stream_options", "needs stream=true"),
    (CHAT | {"stream": True, "stream_options": 1}, "stream_options", "must be an object"),
    (CHAT | {"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
    (CHAT | {"max_tokens": 0}, "max_tokens", "1 or more"),
    (CHAT | {"max_completion_tokens": 1.5}, "max_completion_tokens", "whole number"),
    (CHAT | {"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens", "another value"),
    (TEXT | {"prompt": []}, "prompt", "not empty"),
    (TEXT | {"prompt": 5}, "prompt", "must be a text"),
    (TEXT | {"prompt": [1, "a"]}, "prompt", "must be a text"),
    (TEXT | {"prompt": [[1], []]}, "prompt", "must be a text"),
    (TEXT | {"prompt": [1.5]}, "prompt", "must be a text"),
    (TEXT | {"logprobs": 0}, "logprobs", "not supported"),
    (TEXT | {"echo": True}, "echo", "not supported"),
    (TEXT | {"best_of": 3}, "best_of", "not supported"),
    (TEXT | {"messages": []}, "messages", "not a field"),
]


def read(fields, chat=True):
    return parse(json.dumps({"model": "m", **fields}).encode(), "m", chat)


@pytest.mark.parametrize(("fields", "param", "part"), REFUSED)
def test_wrong_fields_are_refused_by_name(fields, param, part):
    with pytest.raises(ApiError) as refused:
        read(fields, chat="prompt" not in fields or "messages" in fields and fields["messages"] != [])
    error = refused.value.body["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert part in error["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"1", b"\xff", b'"\xed"', b"[" * 100_000, b'{"a": ' * 100_000])
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(ApiError, match="The body") as refused:
        parse(raw, "m", True)
    assert refused.value.status == 400


def test_another_model_is_not_found():
    with pytest.raises(ApiError, match="'other' does not exist; this server has 'm'") as refused:
        parse(json.dumps({"model": "other"} | CHAT).encode(), "m", True)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_defaults_are_those_of_the_api():
    body = read(CHAT)
    assert (body.temperature, body.top_p, body.top_k, body.n, body.stop) == (1.0, 1.0, 0, 1, ())
    assert (body.max_tokens, body.stream, body.usage, body.ppow) == (None, False, False, False)
    assert read(TEXT, chat=False).max_tokens == COMPLETION_TOKENS == 16
    assert {read(CHAT).seed for _ in range(3)} != {body.seed}  # drawn for each request
    nothing = dict.fromkeys(["temperature", "seed", "stop", "n", "tools", "logprobs", "unheard_of", "max_tokens"])
    assert read(CHAT | nothing).temperature == 1.0


def test_fields_are_taken_as_given():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": parts, "name": "x"}]
    given = {"stream": True, "stream_options": {"include_usage": True}, "stop": "x", "seed": -1, "top_k": -1, "n": 3}
    body = read({"messages": messages, "max_completion_tokens": 5, "tools": [], "user": "u", "ppow": True} | given)
    assert body.prompts == ([{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}],)
    assert (body.max_tokens, body.usage, body.stop, body.top_k, body.ppow) == (5, True, ("x",), 0, True)
    assert [body.seed_of(choice) for choice in range(3)] == [2**31 - 1, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_prompts_are_texts_or_token_ids(prompt, prompts):
    assert read({"prompt": prompt}, chat=False).prompts == prompts


def test_retry_after_is_a_whole_number_of_seconds():
    assert busy(0.2).headers == {"Retry-After": "1"} and busy(2.1).headers == {"Retry-After": "3"}
