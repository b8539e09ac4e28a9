"""A page in headless Chromium, driven through the DevTools protocol over pipes."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
# The browser reads commands from descriptor 3 and writes to 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def found() -> str | None:
    """Path of the browser; None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page at an address; use it in a `with`."""

    def __init__(self, url: str):
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        browser = [found(), *FLAGS, f"--user-data-dir={self._directory.name}", "about:blank"]
        command = [sys.executable, "-c", START, *map(str, high), *browser]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=high, stdout=quiet, stderr=quiet)
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._rest, self._number, self._session = b"", 0, None
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._directory.cleanup()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        how = {"awaitPromise": True, "returnByValue": True}
        reply = self._call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
