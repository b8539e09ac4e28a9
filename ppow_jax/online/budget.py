"""Budget of time for adaptation."""

import contextlib
import time
from collections.abc import Callable, Iterator

Clock = Callable[[], float]


class Budget:
    """Seconds of decoding and of adaptation, and whether another unit of work is allowed.

    share: most of the time that adaptation may take, of both together. clock: returns seconds. busy: seconds of
    decoding. spent, idle: seconds of adaptation while requests waited or ran, and while none did; idle time is free.
    last: of each kind of unit, the seconds of the last one.
    """

    def __init__(self, share: float, clock: Clock = time.perf_counter):
        self.share, self.clock = share, clock
        self.busy = self.spent = self.idle = 0.0
        self.last: dict[str, float] = {}

    def decoded(self, seconds: float) -> None:
        """Counts time in which requests were decoded."""
        self.busy += seconds

    def allows(self, kind: str) -> bool:
        """True if a unit as long as the last one of this kind keeps the share."""
        spent = self.spent + self.last.get(kind, 0.0)
        return spent <= self.share * (self.busy + spent)

    @contextlib.contextmanager
    def unit(self, kind: str, idle: bool) -> Iterator[None]:
        """Times a unit of work. idle: no request waits for it."""
        begin = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - begin
            self.last[kind] = seconds
            if idle:
                self.idle += seconds
            else:
                self.spent += seconds

    @property
    def share_spent(self) -> float:
        """Share of the time that adaptation took so far, without idle time; 0 before the first request."""
        return self.spent / (self.busy + self.spent) if self.spent else 0.0
