"""The HTTP application: routes of the OpenAI API, metrics, health, and the chat page."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ppow_jax.inference.model import Model
from ppow_jax.serving import bodies, replies
from ppow_jax.serving.calls import Call, requests_of
from ppow_jax.serving.engine import Engine
from ppow_jax.serving.errors import ApiError, closing, failed, invalid, unknown_model

log = logging.getLogger(__name__)

MOST_BYTES = 8 << 20  # of a body
CHAT_PAGE = resources.files("ppow_jax.serving") / "chat.html"
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def json_reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: halves of surrogate pairs in an error message must not break the reply."""
    return Response(json.dumps(data), status, headers, media_type="application/json")


class Stream(StreamingResponse):
    """A stream of a call's chunks, which closes the call however it ends."""

    def __init__(self, call: Call, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"media_type": "text/event-stream"})
        self._call = call

    async def __call__(self, *asgi: Any) -> None:
        """Sends the chunks."""
        try:
            await super().__call__(*asgi)
        finally:
            self._call.close()


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Handlers of the routes. name: of the model. seconds: time limit of a request."""

    model: Model
    engine: Engine
    name: str
    seconds: float
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._complete(request, chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._complete(request, chat=False)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_reply({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        if request.path_params["name"] != self.name:
            raise unknown_model(request.path_params["name"], self.name)
        return json_reply(self._card())

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.engine.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are accepted."""
        if not self.engine.accepting:
            raise closing()
        return json_reply({"status": "ok"})

    async def page(self, request: Request) -> Response:
        """GET /: the chat page."""
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return Response(CHAT_PAGE.read_text(encoding="utf-8"), headers=headers, media_type="text/html")

    def _card(self) -> dict[str, Any]:
        return replies.model_object(self.name, self.started, self.engine.machine.context)

    async def _complete(self, request: Request, chat: bool) -> Response:
        try:
            raw = await _read(request)
        except ClientDisconnect:
            return Response(status_code=499)
        body = bodies.parse(raw, self.name, chat)
        context = self.engine.machine.context
        wanted = await to_thread.run_sync(requests_of, self.model, body, context)
        most = self.engine.queue + len(self.engine.machine.live_B)
        if len(wanted) > most:
            raise invalid("n", f"{len(wanted)} answers in one request; this server accepts {most} at once")
        call = Call(wanted, body, self.seconds)
        self.engine.submit(call.tickets)
        if body.stream:
            return Stream(call, replies.chunks(call, body, self.name))
        try:
            reply = await _unless_gone(request, replies.whole(call, body, self.name))
        finally:
            call.close()
        return Response(status_code=499) if reply is None else json_reply(reply)


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise ApiError(413, f"The body has more than {MOST_BYTES} bytes")
    return b"".join(parts)


async def _unless_gone(request: Request, reply: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """The reply; None as soon as the client has closed the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(reply), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task


def make_app(endpoint: Endpoint) -> Starlette:
    """The application."""
    get, post = ["GET"], ["POST"]
    routes = [
        Route("/v1/chat/completions", endpoint.chat, methods=post),
        Route("/v1/completions", endpoint.completions, methods=post),
        Route("/v1/models", endpoint.models, methods=get),
        Route("/v1/models/{name:path}", endpoint.one_model, methods=get),
        Route("/metrics", endpoint.metrics, methods=get),
        Route("/health", endpoint.health, methods=get),
        Route("/", endpoint.page, methods=get),
    ]

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        endpoint.engine.metrics.error(error.code or str(error.status))
        return json_reply(error.body, error.status, error.headers)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        wrong = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return json_reply(wrong.body, wrong.status, dict(error.headers or {}))

    async def own_fault(request: Request, error: Exception) -> Response:
        wrong = failed("The server failed; its log tells why")
        return json_reply(wrong.body, wrong.status)

    handlers: dict[Any, Callable] = {ApiError: api_error, HTTPException: http_error, Exception: own_fault}
    return Starlette(routes=routes, exception_handlers=handlers)
