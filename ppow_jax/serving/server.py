"""The server process: its socket, its start, and its end without lost requests."""

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn

from ppow_jax.errors import UserError
from ppow_jax.serving.app import Endpoint, make_app

log = logging.getLogger(__name__)

CLOSE = 5  # seconds for connections to end after the last answer
KEEP = 75  # seconds that idle connections stay open, longer than clients keep theirs: none asks on a closed one


def bind(host: str, port: int) -> socket.socket:
    """A socket for --host and --port (0: any free one). Raises UserError where it cannot be had."""
    found = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        if found is not None:
            found.close()
        raise UserError(f"--host={host} --port={port}: cannot be used ({error.strerror or error})") from None
    return found


def address(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves an endpoint until SIGTERM or SIGINT.

    Requests that were accepted are then still answered, for at most `drain` seconds, while new ones are refused (503);
    a second signal ends it at once.
    """

    def __init__(self, endpoint: Endpoint, drain: float):
        how = {"log_config": None, "log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
        how |= {"timeout_graceful_shutdown": CLOSE, "timeout_keep_alive": KEEP}
        super().__init__(uvicorn.Config(make_app(endpoint), **how))  # type: ignore[arg-type]
        self._engine, self._drain_seconds = endpoint.engine, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves, with the engine's thread running."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        try:
            await super().serve(sockets)
        finally:
            await asyncio.to_thread(self._engine.stop)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end; called by signal handlers, so that it may not wait for a lock."""
        if self._engine.accepting:
            self._engine.refuse()
            self._loop.call_soon_threadsafe(self._begin_to_drain)
        else:
            self.should_exit = self.force_exit = True

    def _begin_to_drain(self) -> None:
        log.info("shutting down: answering what was accepted, for at most %g seconds", self._drain_seconds)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        end = time.monotonic() + self._drain_seconds
        while not self._engine.idle and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._engine.stop)
        self.should_exit = True
