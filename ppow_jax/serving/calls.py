"""Calls: the tickets of one HTTP request, and the news of their answers as the event loop reads them."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Request
from ppow_jax.serving.bodies import Body
from ppow_jax.serving.engine import Progress, Ticket
from ppow_jax.serving.errors import ApiError, invalid
from ppow_jax.serving.machine import Numbers

_tokenizing = threading.Lock()  # tokenizers may change while they read


def requests_of(model: Model, body: Body, context: int) -> list[Request]:
    """A request for each choice of each prompt, in that order.

    Raises ApiError (400) where a prompt cannot be read, or does not fit the context together with its answer.
    """
    name = "messages" if body.chat else "prompt"
    found = []
    for prompt in body.prompts:
        try:
            with _tokenizing:
                text = model.chat_prompt(prompt) if body.chat else prompt
                text = text if isinstance(text, str | np.ndarray) else np.array(text)
                (request,) = model.job([text], "off", stop=list(body.stop)).requests
        except UserError as error:
            message = str(error)
            raise invalid("stop" if "stop=" in message else name, message) from None
        length = len(request.prompt_ids)
        wanted = max(1, context - length) if body.max_tokens is None else body.max_tokens
        if length + wanted > context:
            asked = f"{length} tokens of the prompt and {wanted} of the answer were asked for"
            rule = f"this server's context holds {context} tokens, but {asked}"
            raise invalid(name, rule, "context_length_exceeded")
        for choice in range(body.n):
            found.append(dataclasses.replace(request, max_new_tokens=wanted, seed=body.seed_of(choice)))
    return found


class Call:
    """Tickets of one HTTP request. Made and read in the event loop; `close` it in any case."""

    def __init__(self, requests: list[Request], body: Body, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Progress | ApiError]] = asyncio.Queue()
        numbers = Numbers(body.temperature, body.top_k, body.top_p)
        how: dict[str, Any] = {"every": body.stream, "pieces": body.ppow, "seconds": seconds}
        self.tickets = [
            Ticket(request, numbers, self._emitter(choice), **how) for choice, request in enumerate(requests)
        ]
        self._open = set(range(len(requests)))

    def _emitter(self, choice: int):
        return lambda news: self._loop.call_soon_threadsafe(self._news.put_nowait, (choice, news))

    async def news(self) -> AsyncIterator[tuple[int, Progress]]:
        """(index of the choice, its news), until all choices are answered. Raises the first ApiError."""
        while self._open:
            choice, news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            if news.result:
                self._open.discard(choice)
            yield choice, news

    def close(self) -> None:
        """Cancels what is not answered yet."""
        for choice in self._open:
            self.tickets[choice].cancelled = True
