"""Replies in the form of the OpenAI API: objects of whole answers, and the chunks of streams."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ppow_jax.serving.bodies import Body
from ppow_jax.serving.calls import Call
from ppow_jax.serving.engine import Progress
from ppow_jax.serving.errors import ApiError
from ppow_jax.speculation.sources import NAMES


def model_object(model: str, created: int, context: int) -> dict[str, Any]:
    """An entry of the list of models."""
    return {"id": model, "object": "model", "created": created, "owned_by": "ppow_jax", "max_model_len": context}


async def whole(call: Call, body: Body, model: str) -> dict[str, Any]:
    """The object of all choices, once they are answered."""
    answers: dict[int, Progress] = {}
    async for choice, news in call.news():
        answers[choice] = news
    ordered = [answers[choice] for choice in range(len(call.tickets))]
    choices = []
    for choice, answer in enumerate(ordered):
        text = answer.result.text
        content = {"message": {"role": "assistant", "content": text}} if body.chat else {"text": text}
        choices.append(_choice(choice, content, answer.result.finish_reason))
    reply = _head(body, model, "chat.completion" if body.chat else "text_completion") | {"choices": choices}
    reply["usage"] = _usage(call, body, {choice: answer.tokens for choice, answer in answers.items()})
    return reply | ({"ppow": [_extension(*item) for item in enumerate(ordered)]} if body.ppow else {})


async def chunks(call: Call, body: Body, model: str) -> AsyncIterator[str]:
    """The events of a stream (SSE), the last of them [DONE]. An error ends it, as an event of its own."""
    head = _head(body, model, "chat.completion.chunk" if body.chat else "text_completion")
    if body.usage:
        head["usage"] = None
    tokens: dict[int, int] = {}
    if body.chat:
        for choice in range(len(call.tickets)):
            yield event(head | {"choices": [_choice(choice, {"delta": {"role": "assistant", "content": ""}}, None)]})
    try:
        async for choice, news in call.news():
            tokens[choice] = news.tokens
            reason = news.result.finish_reason if news.result else None
            if not (news.text or reason or body.ppow):
                continue
            text = {"content": news.text} if news.text else {}
            content: dict[str, Any] = {"delta": text} if body.chat else {"text": news.text}
            extension = {"ppow": _extension(choice, news)} if body.ppow else {}
            yield event(head | {"choices": [_choice(choice, content, reason)]} | extension)
    except ApiError as error:
        yield event(error.body)
    else:
        if body.usage:
            yield event(head | {"choices": [], "usage": _usage(call, body, tokens)})
    yield "data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data)}\n\n"


def _head(body: Body, model: str, kind: str) -> dict[str, Any]:
    name = f"{'chatcmpl' if body.chat else 'cmpl'}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _choice(index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _usage(call: Call, body: Body, tokens: Mapping[int, int]) -> dict[str, int]:
    """Token counts; the prompt of several choices counts once."""
    prompt = sum(len(ticket.request.prompt_ids) for ticket in call.tickets[:: body.n])
    answer = sum(tokens.values())
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _extension(choice: int, news: Progress) -> dict[str, Any]:
    """The field "ppow": pieces of the new text, each with who proposed it, tokens by source, and the speed so far."""
    pieces: Sequence[Any] = [list(piece) for piece in news.pieces]
    speed = {"tokens": news.tokens, "tau": round(news.tau, 3), "tokens_per_second": round(news.rate, 2)}
    drafted, accepted = (dict(zip(NAMES, tokens_S, strict=True)) for tokens_S in (news.drafted, news.accepted))
    return {"index": choice, "pieces": pieces, **speed, "drafted": drafted, "accepted": accepted}
