"""A progress bar with rate and time left; plain log lines if standard error is not a terminal."""

import contextlib
import io
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
SILENT = False  # True in processes other than the one that reports progress
_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"

logger = logging.getLogger(__name__)


def bar(total: int, desc: str, unit: str = "step", initial: int = 0, every: float = LINE_SECONDS) -> tqdm:
    """A tqdm bar: use it as a context manager, call `update(n)` and, optionally, `set_postfix(loss=1.2)`.

    Args:
      total: number of units in all.
      desc: description of the task.
      unit: name of the unit.
      initial: units done by an earlier run; they do not count for the rate.
      every: seconds between two lines if standard error is not a terminal.
    """
    kwargs: dict[str, Any] = {"total": total, "desc": desc, "unit": f" {unit}", "initial": initial, "disable": SILENT}
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, smoothing=0.1, **kwargs)
    return _Lines(every, **kwargs)


@contextlib.contextmanager
def off_the_clock(bar: tqdm) -> Iterator[None]:
    """Excludes the time spent inside, such as compilation, from the bar's rate and time left."""
    if bar.disable:
        yield
        return
    begin = bar._time()
    yield
    seconds = bar._time() - begin
    bar.start_t += seconds
    bar.last_print_t += seconds


class _Lines(tqdm):
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
        logger.info("%s", self)
        self._shown_at, self._shown_n = time.monotonic(), self.n


class LogHandler(logging.StreamHandler):
    """Writes log lines to standard error without disrupting a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record above the bar."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
