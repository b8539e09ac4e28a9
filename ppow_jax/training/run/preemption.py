"""Graceful stop: Ctrl-C and SIGTERM request a run to save and stop, instead of killing it."""

import logging
import signal
import threading
from types import FrameType

from ppow_jax import distributed

EXIT_SIGINT = 128 + signal.SIGINT  # 130
EXIT_SIGTERM = 128 + signal.SIGTERM  # 143

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Raised when a signal requested the run to stop; finished work is saved."""


class StopSignal:
    """Within `with StopSignal() as stop:`, the first SIGINT or SIGTERM only sets `stop.requested`.

    The loop checks it between steps, saves, and exits with `stop.exit_code`. A second signal raises
    KeyboardInterrupt. The previous handlers are restored at the end. Outside the main thread, where Python allows no
    handlers, it never fires.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._former: dict[int, object] = {}
        self._agreement = distributed.Agreement()

    @property
    def requested(self) -> bool:
        """True if any of the processes received a signal; all processes must call this equally often."""
        return self._agreement.ask(self.signum != 0)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells; 0 without a signal. SIGTERM's if only another process got it."""
        return 128 + (self.signum or signal.SIGTERM) if self.requested else 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._former.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._former = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        logger.warning("%s: saving, then stopping (again to stop at once)", signal.Signals(signum).name)
