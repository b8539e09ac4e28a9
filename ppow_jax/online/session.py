"""A session of online adaptation: finished requests in, better drafters out, between two programs of decoding.

model = load("smollm2-135m")
online = Online(model, OnlineSettings(budget=0.05), save="runs/online")
model.chat("How does a rainbow form?")  # is kept; units of work are done after it, within the budget
print(online.stats())
online.close()
"""

import collections
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppow_jax import sharding
from ppow_jax.data.encoding import encode_text
from ppow_jax.data.questions import arithmetic
from ppow_jax.flags import require
from ppow_jax.inference.learner import OnlineStats
from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Result
from ppow_jax.models.drafter import Drafter
from ppow_jax.online import guard, steps
from ppow_jax.online.budget import Budget, Clock
from ppow_jax.online.buffer import Buffer, Row
from ppow_jax.online.guard import Guard, Replayed, rounds_of
from ppow_jax.online.saving import Saved
from ppow_jax.online.settings import OnlineSettings
from ppow_jax.online.steps import OnlineState
from ppow_jax.training.steps.state import TrainState

log = logging.getLogger(__name__)

READ, REPLAY, TRAIN, SAVE = "read", "replay", "train", "save"  # kinds of units of work
MOST_FALLBACKS = 3  # in a row; adaptation ends after these


class Online:
    """Adapts the drafter of a model; it attaches itself as `model.online`. Not for several threads at once.

    save: directory to resume from and to save to. save_every: training steps between two saves. clock: for tests.
    """

    def __init__(
        self,
        model: Model,
        settings: OnlineSettings | None = None,
        *,
        save: str | Path | None = None,
        save_every: int = 16,
        clock: Clock = time.perf_counter,
    ):
        """Measures the scale of the target's features on some text, compiles every program, and resumes.

        Raises UserError: the model has no drafter, a mesh of several devices is in use, or `save` holds something else.
        """
        self.model, self.settings = model, settings or OnlineSettings()
        require(model.drafter is not None, "--online: needs a drafter to adapt, but there is none")
        require(not sharding.in_use(), "--online: works on one device, without --mesh")
        self.frozen: Drafter = sharding.committed(model.drafter)  # as what is restored: programs serve both
        model.drafter = self.frozen
        self.dtype = str(self.frozen.params["fc"].dtype)
        compute = "bfloat16" if self.dtype == "bfloat16" else None
        self.spec = self.frozen.replace(compute_dtype=compute).spec
        s = self.settings
        self.buffer, self.budget = Buffer(s.row_length, s.max_anchors, s.rows), Budget(s.budget, clock)
        self.guard = Guard(s.window, s.least)
        self.ended = False  # after too many fallbacks
        self._served: collections.deque[tuple[int, int]] = collections.deque(maxlen=s.window)
        self._counts = collections.Counter[str]()
        self._refused = 0  # fallbacks since the last swap
        self._candidate: Drafter | None = self.frozen
        self._unsaved, self._exported = 0, True  # training steps since the last save; whether a swap was exported
        self.save_every = save_every
        row = self._some_text()
        features_NxF = np.asarray(sharding.fetch(row.cached[0])[0], np.float32)[row.batch.segment_BxT[0] > 0]
        self.optimizer = steps.optimizer_of(s, self.frozen, features_NxF)
        self.state = OnlineState(self._begun(self.frozen.params), steps.master_copy(self.frozen.params))
        self.saved = Saved(save, s, model.target, self.frozen) if save else None
        try:
            self._compile(row)
            if self.saved and (found := self.saved.restore(self.state)):
                self._resume(*found)
        except BaseException:
            if self.saved:
                self.saved.close()  # so that the directory can be tried again
            raise
        model.online = self

    # What the decoding engine calls; see `inference.learner.Learner`.

    def finished(self, result: Result) -> None:
        """Keeps a finished request."""
        stats = result.stats
        if stats.num_spec_steps:
            self._served.append((stats.num_spec_steps + stats.num_accepted_draft_tokens, stats.num_spec_steps))
        self.keep(np.asarray(result.prompt_ids), np.asarray(result.token_ids))

    def decoded(self, seconds: float) -> None:
        """Counts time in which requests were decoded."""
        self.budget.decoded(seconds)

    def keep(self, prompt_ids: np.ndarray, answer_ids: np.ndarray) -> None:
        """Keeps an answer, token ids [T] each."""
        self._counts["requests"] += 1
        self.buffer.add(prompt_ids, answer_ids)

    def pending(self) -> bool:
        """True if work is left."""
        return self._next() is not None

    def work(self, idle: bool = False, units: int | None = None) -> int:
        """Does at most `units` units of work, as far as the budget allows, without limit where idle -> how many."""
        done = 0
        while units is None or done < units:
            kind = self._next()
            if kind is None or not (idle or self.budget.allows(kind)):
                break
            with self.budget.unit(kind, idle):
                self._do(kind)
            done += 1
        return done

    def learn(self) -> OnlineStats:
        """Does all work that is left, also on a row that is not full, whatever it takes."""
        self.buffer.close_row()
        self.work(idle=True)
        return self.stats()

    def close(self) -> None:
        """Saves what is not saved, and detaches; the model keeps the drafter that serves."""
        self.model.online = None
        if self.saved:
            try:
                if self._unsaved or not self._exported:
                    self._save()
            finally:
                self.saved.close()

    def stats(self) -> OnlineStats:
        """Counts and acceptance lengths so far."""
        counts, budget = self._counts, self.budget
        rounds = sum(rounds for _, rounds in self._served)
        return OnlineStats(
            **{name: counts[name] for name in ("requests", "steps", "swaps", "fallbacks")},
            skipped=self.buffer.skipped,
            share=budget.share_spent,
            busy_seconds=budget.busy,
            spent_seconds=budget.spent,
            idle_seconds=budget.idle,
            acceptance_length=sum(tokens for tokens, _ in self._served) / rounds if rounds else float("nan"),
            replayed={name: self.guard.length(name) for name in ("frozen", "serving", "candidate")},
        )

    # Units of work.

    def _next(self) -> str | None:
        """The kind of the next unit; None where nothing is left."""
        if self.saved and self._unsaved >= self.save_every:
            return SAVE
        row = None if self.ended else self.buffer.next()
        if row is None:
            return None
        return READ if row.cached is None else TRAIN if row.replayed else REPLAY

    def _do(self, kind: str) -> None:
        row = self.buffer.next()
        if kind == SAVE:
            self._save()
        elif kind == READ:
            row.cached = self._read(row)
        elif kind == REPLAY:
            self._compare(row)
        else:
            self._train(row)

    def _read(self, row: Row) -> tuple[Any, Any]:
        target, layers = self.model.target, self.frozen.config.feature_layers
        return jax.block_until_ready(steps.read(target.params, row.batch, config=target.config, layers=layers))

    def _train(self, row: Row) -> None:
        try:
            train = self._updated(self.state.train, row)
        except BaseException:  # such as Ctrl-C: the state before is donated, so training begins again from what serves
            self.state = self.state.replace(train=self._begun(self.state.serving))
            self._candidate = self.model.drafter
            raise
        self.state = self.state.replace(train=train)
        self._candidate = None
        self._counts["steps"] += 1
        self._unsaved += 1
        row.uses += 1
        if row.uses == self.settings.passes:
            self.buffer.rows.remove(row)

    def _updated(self, state: TrainState, row: Row) -> TrainState:
        target = self.model.target
        how: dict[str, Any] = {"config": target.config, "optimizer": self.optimizer, "settings": self.settings}
        new, _ = steps.train(state, self.spec, target.params, row.batch, row.cached, **how)
        return jax.block_until_ready(new)

    def _compare(self, row: Row) -> None:
        """Replays a new row with all three drafters, and does what the guard says."""
        row.replayed = True
        drafters = {"frozen": self.frozen, "serving": self.model.drafter, "candidate": self.candidate}
        accepted: dict[int, np.ndarray] = {}  # drafters that are the same are replayed once
        for drafter in drafters.values():
            if id(drafter) not in accepted:
                accepted[id(drafter)] = self._replay(drafter, row)
        answers, first = [], 0
        for count in row.counts:
            here = slice(first, first + count)
            rounds = {name: rounds_of(accepted[id(drafter)][here]) for name, drafter in drafters.items()}
            answers.append(Replayed(count, **rounds))
            first += count
        verdict = self.guard.add(answers)
        if verdict == guard.SWAP and self.candidate is not self.model.drafter:
            self._serve(self.candidate, steps.master_copy(self.state.train.params))
            self._counts["swaps"] += 1
            self._refused = 0
        elif verdict in (guard.SERVING, guard.FROZEN):
            self._fall_back(verdict)

    def _fall_back(self, verdict: str) -> None:
        self._counts["fallbacks"] += 1
        self._refused += 1
        self.ended = self._refused >= MOST_FALLBACKS
        log.warning("online: the adapted drafter is worse than the one before: %s", verdict)
        if self.ended:
            log.warning("online: adaptation ends after %d fallbacks in a row", self._refused)
        params = self.state.serving if verdict == guard.SERVING else self.frozen.params
        drafter = self.model.drafter if verdict == guard.SERVING else self.frozen
        self.state = self.state.replace(train=self._begun(params))
        self._serve(drafter, steps.master_copy(params))

    def _begun(self, params: dict) -> TrainState:
        """Training from these parameters, before its first step."""
        return sharding.committed(TrainState.create(params, self.optimizer))

    def _serve(self, drafter: Drafter, params: dict) -> None:
        """Decodes with a drafter from now on; params: its float32 parameters."""
        self.model.drafter = self._candidate = drafter
        self.state = self.state.replace(serving=params)
        self._exported = False

    @property
    def candidate(self) -> Drafter:
        """The drafter that is being trained, as it would serve."""
        if self._candidate is None:
            self._candidate = steps.serving_copy(self.state.train.params, self.frozen.spec, dtype=self.dtype)
        return self._candidate

    def _replay(self, drafter: Drafter, row: Row) -> np.ndarray:
        target = self.model.target
        return steps.replay(drafter, target.params, row.batch, row.cached, target.config, self.settings.draft_steps)

    # Start, and resume.

    def _some_text(self) -> Row:
        """A row of text that comes along, read by the target."""
        text = "\n".join(str(record) for _, record in arithmetic())
        ids = encode_text(self.model.target.tokenizer, text)[: self.settings.row_length]
        some = Buffer(self.settings.row_length, self.settings.max_anchors, 1)
        some.add(ids[:1], ids[1:])
        some.close_row()
        row = some.rows[0]
        row.cached = self._read(row)
        return row

    def _compile(self, row: Row) -> None:
        """Compiles every program, then times each, so that the budget knows the units before the first one."""
        for _ in range(2):
            with self.budget.unit(READ, idle=True):
                self._read(row)
            copied = steps.serving_copy(self.state.serving, self.frozen.spec, dtype=self.dtype)
            with self.budget.unit(REPLAY, idle=True):
                for drafter in (self.frozen, copied):
                    self._replay(drafter, row)
            scratch = self._begun(self.frozen.params)
            with self.budget.unit(TRAIN, idle=True):
                self._updated(scratch, row)
        self.budget.idle = 0.0

    def _save(self) -> None:
        kept = {"counts": dict(self._counts), "refused": self._refused, "ended": self.ended}
        kept |= {"window": list(self.guard.window), "fresh": self.guard.fresh, "served": list(self._served)}
        self.saved.save(self.state, kept)
        if not self._exported:
            self.saved.export(self.model.drafter, self.dtype)
        self._unsaved, self._exported = 0, True

    def _resume(self, state: OnlineState, kept: dict[str, Any]) -> None:
        self.state = sharding.committed(state)
        self._counts.update(kept["counts"])
        self._refused, self.ended = kept["refused"], kept["ended"]
        self.guard.window.extend(Replayed(*answer) for answer in kept["window"])
        self.guard.fresh = [Replayed(*answer) for answer in kept["fresh"]]
        self._served.extend((tokens, rounds) for tokens, rounds in kept["served"])
        self.model.drafter = steps.serving_copy(self.state.serving, self.frozen.spec, dtype=self.dtype)
        self._candidate = None
        self._exported = not (self._counts["swaps"] or self._counts["fallbacks"])  # a kill may have come before it
        log.info("online: resumed after %d steps and %d swaps", self._counts["steps"], self._counts["swaps"])
