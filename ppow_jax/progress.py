"""A progress bar with rate and time left; plain log lines if standard error is not a terminal.

Time spent compiling counts neither for the rate nor for the time left; while it lasts, it is shown apart.
"""

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ppow_jax import compiling

LINE_SECONDS = 10.0
ACTIVITY_SECONDS = 4.0  # between two lines of an activity
SILENT = False  # True in processes other than the one that reports progress
_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"
_LEAST_SHOWN = 2.0  # seconds: shorter compilations are not mentioned

logger = logging.getLogger(__name__)


def bar(total: int, desc: str, unit: str = "step", initial: int = 0, every: float = LINE_SECONDS) -> "Bar":
    """A tqdm bar: use it as a context manager, call `update(n)` and, optionally, `set_postfix(loss=1.2)`.

    Args:
      total: number of units in all.
      desc: description of the task.
      unit: name of the unit.
      initial: units done before, such as by an earlier run; they do not count for the rate.
      every: seconds between two lines if standard error is not a terminal.
    """
    kwargs: dict[str, Any] = {"total": total, "desc": desc, "unit": f" {unit}", "initial": initial, "disable": SILENT}
    if sys.stderr.isatty():
        return _Drawn(dynamic_ncols=True, smoothing=0.1, **kwargs)
    return _Lines(every, **kwargs)


@contextlib.contextmanager
def off_the_clock(bar: "Bar") -> Iterator[None]:
    """Excludes the time spent inside, such as a first run of a program, from the bar's rate and time left."""
    if bar.disable:
        yield
        return
    bar.exclude_compiling()
    begin = bar._time()
    yield
    bar.exclude(bar._time() - begin)
    bar.compiled = compiling.seconds()  # excluded with all the rest


@contextlib.contextmanager
def activity(text: str, every: float = ACTIVITY_SECONDS, hidden: bool = False) -> Iterator[None]:
    """Shows what is being done and for how long, where the end is not known: `loading the target... 7 s`.

    One line that is redrawn in a terminal, and removed at the end; otherwise a log line at once and every few seconds.
    hidden: only what takes long is shown.
    """
    if SILENT:
        yield
        return
    if sys.stderr.isatty():
        yield from _line(text, hidden)
        return
    if not hidden:
        logger.info("%s", text)
    with _ticking(every, lambda s: logger.info("%s... %.0f s", text, s)):
        yield


def _line(text: str, hidden: bool) -> Iterator[None]:
    """An activity in a terminal."""
    lines: list[tqdm] = []

    def draw(text: str) -> None:
        if lines:
            lines[0].set_description_str(text)
        else:
            lines.append(tqdm(bar_format="{desc}", desc=text, leave=False))

    if not hidden:
        draw(text)
    try:
        with _ticking(1.0, lambda s: draw(f"{text}... {s:.0f} s")):
            yield
    finally:
        for line in lines:
            line.close()


@contextlib.contextmanager
def _ticking(every: float, tick: Callable[[float], object]) -> Iterator[None]:
    """Calls tick(seconds so far) from another thread, every few seconds."""
    over, begin = threading.Event(), time.monotonic()

    def run() -> None:
        while not over.wait(every):
            tick(time.monotonic() - begin)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Bar(tqdm):
    """A bar whose clock stands still while a program is compiled; see `bar`."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.compiled = 0.0
        self.apart = 0.0  # seconds of compiling that were excluded
        self._ticks = contextlib.ExitStack()
        if not self.disable:
            self.compiled = compiling.seconds()
            self._ticks.enter_context(_ticking(1.0, lambda _: self._tick()))

    def exclude(self, seconds: float) -> None:
        """Sets the clock back."""
        self.start_t += seconds
        self.last_print_t += seconds

    def exclude_compiling(self) -> None:
        """Sets the clock back by the time spent compiling since the last call."""
        total = compiling.seconds()
        seconds = min(total - self.compiled, max(0.0, self._time() - self.start_t))
        self.compiled = total
        self.apart += seconds
        self.exclude(seconds)

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` units as done."""
        if not self.disable:
            compiling.not_running()
            self.exclude_compiling()
        return super().update(n)

    def close(self) -> None:
        """Ends the bar."""
        if not self.disable:
            self._ticks.close()
        super().close()

    def _tick(self) -> None:
        """Shows that a program is being compiled; called every second, from another thread."""
        raise NotImplementedError


class _Drawn(Bar):
    """A bar in a terminal."""

    def __init__(self, **kwargs: Any):
        self._task = kwargs["desc"]
        super().__init__(**kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        self.set_description(self._task, refresh=False)
        return super().update(n)

    def _tick(self) -> None:
        if (seconds := compiling.running()) >= _LEAST_SHOWN:
            self.set_description(f"{self._task}, compiling... {seconds:.0f} s")


class _Lines(Bar):
    """Logs a line every few seconds, and one at the end, instead of redrawing a bar."""

    def __init__(self, every: float, **kwargs: Any):
        self._every = every
        self._shown_at = time.monotonic()
        self._shown_n = kwargs["initial"]
        # tqdm draws into a sink; `display` does the work. One call of update in ten seconds must be enough.
        sink = io.StringIO()
        super().__init__(file=sink, mininterval=0, miniters=1, bar_format=_LINE_FORMAT, smoothing=0, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Logs the line if it is due."""
        due = time.monotonic() - self._shown_at >= self._every or self.n == self.total
        if due and self.n != self._shown_n:
            self._log()
        return True

    def close(self) -> None:
        """Logs the final state."""
        if not self.disable and self.n != self._shown_n:
            self._log()
        super().close()

    def _log(self) -> None:
        apart = f" (and {self.apart:.0f} s of compiling)" if self.apart >= _LEAST_SHOWN else ""
        logger.info("%s%s", self, apart)
        self._shown_at, self._shown_n = time.monotonic(), self.n

    def _tick(self) -> None:
        seconds = compiling.running()
        if seconds >= _LEAST_SHOWN and time.monotonic() - self._shown_at >= self._every:
            logger.info("%s: compiling... %.0f s", self.desc.removesuffix(": "), seconds)
            self._shown_at = time.monotonic()


class LogHandler(logging.StreamHandler):
    """Writes log lines to standard error without disrupting a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record above the bar."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
