"""The engine: one thread that answers requests from a bounded queue in the slots of a `Machine`."""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from ppow_jax import sharding
from ppow_jax.errors import UserError
from ppow_jax.inference.requests import Answer, Request, Result, Stats
from ppow_jax.models import precision
from ppow_jax.serving import errors
from ppow_jax.serving.errors import ApiError
from ppow_jax.serving.machine import Machine, Numbers, Rows
from ppow_jax.serving.metrics import Metrics
from ppow_jax.serving.pieces import Piece, Pieces

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """News of an answer: text since the last news, its pieces where they were asked for, and the whole answer so far.

    tokens: new tokens. tau: tokens per verification. rate: tokens per second since the prompt was read. drafted,
    accepted: drafted and accepted tokens by source, see `sources.NAMES`. result: the whole answer where this is the
    last news.
    """

    text: str
    pieces: list[Piece]
    tokens: int
    tau: float
    rate: float
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    result: Result | None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that waits for an answer, or gets it.

    emit: called by the engine's thread, with news or with the error that ends the request. every: also with news before
    the last. pieces: news have the pieces. seconds: time limit, from `arrived` on. cancelled: set by anyone, any time.
    """

    request: Request
    numbers: Numbers
    emit: Callable[[Progress | ApiError], None]
    every: bool = False
    pieces: bool = False
    seconds: float = float("inf")
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    cancelled: bool = False

    def late(self, now: float) -> bool:
        """True if its time is over."""
        return now - self.arrived > self.seconds


@dataclasses.dataclass(eq=False)
class Running:
    """A ticket in a slot, since the time `begin`."""

    ticket: Ticket
    answer: Answer
    begin: float
    tokens: int = 0
    characters: int = 0
    drafted: int = 0
    histogram_K1: np.ndarray | int = 0
    drafted_S: np.ndarray | int = 0
    accepted_S: np.ndarray | int = 0
    pieces: Pieces = dataclasses.field(default_factory=Pieces)


class Engine:
    """Answers tickets in the order of their arrival, as many at once as the machine has rows.

    Where the machine's model adapts its drafter (`Model.online`), that happens between rounds, in the engine's thread.
    Finished answers are added to its datastore, if it has one, which is saved at the end.

    queue: tickets that may wait; `submit` refuses more. mesh: of devices, see `sharding.use`.
    """

    def __init__(self, machine: Machine, metrics: Metrics, queue: int, mesh: sharding.Mesh | None = None):
        self.machine, self.metrics, self.queue, self.mesh = machine, metrics, queue, mesh
        self.online, self.datastore = machine.model.online, machine.model.datastore
        self._finished: list[Result] = []  # that `online` has not been given yet
        self.precision = precision.chosen()  # of the thread that makes it, for its own
        self.accepting, self._stopped = True, False
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._seconds = collections.deque([1.0], maxlen=32)  # that requests spent in slots lately
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queues tickets, all or none. Raises ApiError: 429 where the queue is full, 503 after `refuse`."""
        with self._changed:
            if not self.accepting:
                raise errors.closing()
            free = len(self.machine.live_B) - len(self._running)
            if len(self._waiting) + len(tickets) > self.queue + max(0, free):
                mean = sum(self._seconds) / len(self._seconds)
                raise errors.busy(min(60.0, mean * (1 + len(self._waiting)) / len(self.machine.live_B)))
            self._waiting.extend(tickets)
            self._changed.notify()

    def refuse(self) -> None:
        """Refuses new tickets from now on; those that were accepted are still answered."""
        self.accepting = False

    @property
    def idle(self) -> bool:
        """True if no ticket waits or runs."""
        return not self._waiting and not self._running

    def stop(self) -> None:
        """Ends the thread; tickets that are left get an error."""
        self.refuse()
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with precision.use(self.precision), sharding.use(self.mesh):
            while self._wait():
                try:
                    self._turn()
                except Exception:  # one broken request must not end the server
                    log.exception("decoding failed; the requests in slots get an error")
                    self._fail(errors.failed("The server failed to decode this request; its log tells why"))
                    self.machine.reset()
        self._fail(errors.closing())
        self._close()

    def _close(self) -> None:
        """Saves the adaptation and the datastore; where one fails, the other is still saved."""
        ends = [self.online.close] if self.online is not None else []
        ends += [self.datastore.save] if self.datastore is not None else []
        for end in ends:
            try:
                end()
            except (OSError, UserError) as error:  # such as a full disk
                log.error("%s", error)

    def _wait(self) -> bool:
        """Waits for work; False if the thread must end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self.idle or self._may_learn())
            return not self._stopped

    def _may_learn(self) -> bool:
        return self.online is not None and self.online.pending()

    def _learn(self, begin: float, busy: bool) -> None:
        """Counts the time of a turn, and does a unit of online adaptation where the budget allows it, or none waits."""
        finished, self._finished = self._finished, []
        if self.online is None:
            return
        try:
            if busy:
                self.online.decoded(time.monotonic() - begin)
            for result in finished:
                self.online.finished(result)
            self.online.work(idle=self.idle, units=1)
            self.metrics.adapted(self.online.stats())
        except Exception:  # adaptation must not end requests
            log.exception("online adaptation failed; it is off from now on, and the drafter stays as it is")
            self.online = None

    def _turn(self) -> None:
        """Replaces finished rows, decodes a few rounds, and tells the news; then the drafter may learn."""
        begin, busy = time.monotonic(), not self.idle
        self._answer()
        self._learn(begin, busy)

    def _answer(self) -> None:
        self._drop()
        self._fill()
        self.metrics.running.set(len(self._running))
        self.metrics.waiting.set(len(self._waiting))
        if self._running:
            self.machine.decode()
            self._look(self.machine.look())
            self.metrics.running.set(len(self._running))

    def _drop(self) -> None:
        """Removes tickets that were cancelled or are late."""
        now = time.monotonic()
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled or ticket.late(now)]
            for ticket in gone:
                self._waiting.remove(ticket)
        rows = {row for row, one in self._running.items() if one.ticket.cancelled or one.ticket.late(now)}
        for ticket in [*gone, *(self._running[row].ticket for row in rows)]:
            self.metrics.error("cancelled" if ticket.cancelled else "time_limit")
            self._tell(ticket, errors.late(ticket.seconds))
        self._free(rows)

    def _fill(self) -> None:
        """Gives free rows to the tickets that wait longest."""
        for row in np.flatnonzero(~self.machine.live_B).tolist():
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
                begin = time.monotonic()
                answer = Answer(self.machine.model.target, ticket.request, 0.0)
                self._running[row] = Running(ticket, answer, begin)
            self.metrics.began(len(ticket.request.prompt_ids), begin - ticket.arrived)
            self.machine.insert(row, ticket.request, ticket.numbers)

    def _look(self, rows: Rows) -> None:
        """Tells the news of all rows, and frees those that are finished."""
        now, finished, damaged = time.monotonic(), set(), set()
        for row, one in self._running.items():
            try:
                one.answer.read(*(x[row] for x in rows[:7]), seconds=now - one.begin)
            except UserError as error:  # logits that are not finite
                damaged.add(row)
                log.error("%s", error)
                self.metrics.error("damaged")
                self._tell(one.ticket, errors.failed(str(error)))
                continue
            self._news(one, rows, row, now)
            if one.answer.result:
                finished.add(row)
                self._seconds.append(now - one.begin)
                self.metrics.finished(one.answer.result.finish_reason, now - one.ticket.arrived)
                self._finished.append(one.answer.result)
                if self.datastore is not None:
                    self.datastore.add(one.ticket.request.prompt_ids, one.answer.ids)
        self._free(finished)
        self._free(damaged, damaged=True)

    def _news(self, one: Running, rows: Rows, row: int, now: float) -> None:
        answer, ticket = one.answer, one.ticket
        tokens, histogram_K1, drafted = len(answer.ids), rows.histogram_BxK1[row], int(rows.drafted_B[row])
        if not one.tokens:
            self.metrics.first_tokens(now - ticket.arrived)
        new_K1 = (histogram_K1 - one.histogram_K1).tolist()
        drafted_S, accepted_S = rows.drafted_BxS[row], rows.accepted_BxS[row]
        new_S = (drafted_S - one.drafted_S).tolist(), (accepted_S - one.accepted_S).tolist()
        self.metrics.decoded(tokens - one.tokens, new_K1, drafted - one.drafted, *new_S)
        one.tokens, one.histogram_K1, one.drafted = tokens, histogram_K1, drafted
        one.drafted_S, one.accepted_S = drafted_S, accepted_S
        if not (ticket.every or answer.result):
            return
        text = answer.settled[one.characters :]
        one.characters += len(text)
        start = len(ticket.request.prompt_ids)
        source_T = rows.source_BxL[row, start : start + tokens].tolist()
        pieces = one.pieces.more(answer, source_T) if ticket.pieces else []
        stats = Stats.of(histogram_K1.tolist(), drafted)
        tau = stats.mean_acceptance_length if stats.num_spec_steps else 1.0
        rate = (tokens - 1) / max(now - one.begin, 1e-9)
        by_source = tuple(drafted_S.tolist()), tuple(accepted_S.tolist())
        self._tell(ticket, Progress(text, pieces, tokens, tau, rate, *by_source, answer.result))

    def _free(self, rows: set[int], damaged: bool = False) -> None:
        if rows:
            free_B = np.isin(np.arange(len(self.machine.live_B)), list(rows))
            self.machine.release(free_B, damaged)
        for row in rows:
            del self._running[row]

    def _fail(self, error: ApiError) -> None:
        """Gives an error to every ticket in a slot, and to those that wait if the thread ends."""
        left = [one.ticket for one in self._running.values()]
        self._running.clear()
        with self._changed:
            if self._stopped:
                left += self._waiting
                self._waiting.clear()
        for ticket in left:
            self.metrics.error(str(error.code or error.status))
            self._tell(ticket, error)

    def _tell(self, ticket: Ticket, news: Progress | ApiError) -> None:
        try:
            ticket.emit(news)
        except RuntimeError:  # the loop that waited for it is closed
            ticket.cancelled = True
