"""A measurement of online adaptation: the same requests, one after the other, with a frozen and an adapting drafter."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ppow_jax import files
from ppow_jax.evaluation import plots
from ppow_jax.evaluation.intervals import Counts, Estimate, paired_ratio
from ppow_jax.flags import require
from ppow_jax.inference.batch import bucket
from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Result
from ppow_jax.online.session import Online
from ppow_jax.speculation.settings import Speculation
from ppow_jax.training.run.metrics import read_metrics

LAST = 0.25  # share of a workload's requests that count as further ones: its last
AVERAGED = 20  # requests of a moving average in the plot


class Question(NamedTuple):
    """A request of a workload. prompt_ids: token ids [T]."""

    workload: str
    prompt_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Served:
    """One request. tokens: that its rounds gained. rounds, seconds: with the frozen and with the adapting drafter.

    adapting_seconds: of adaptation after the request. plain_seconds: of plain decoding, None where it was not measured.
    identical: all gave the same tokens. steps, swaps, fallbacks: of adaptation so far. share: of the time so far that
    adaptation took.
    """

    workload: str
    tokens: int
    frozen_rounds: int
    rounds: int
    frozen_seconds: float
    seconds: float
    adapting_seconds: float
    plain_seconds: float | None
    identical: bool
    steps: int
    swaps: int
    fallbacks: int
    share: float


def serve(
    online: Online,
    questions: Sequence[Question],
    speculation: Speculation,
    max_new_tokens: int,
    plain_every: int,
    before: Sequence[Served] = (),
) -> Iterator[Served]:
    """Answers the requests at temperature 0, in their order.

    The two drafters take turns in going first. Every program is compiled before the first request.
    plain_every: every so many requests are also decoded plainly; 0: none. before: what an earlier process served.
    """
    model = online.model
    frozen = Model(model.target, online.frozen, model.cost_table)
    budget = online.budget
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    budget.busy, budget.spent = (sum(getattr(x, name) for x in before) for name in ("seconds", "adapting_seconds"))

    def timed(which: Model, question: Question, mode: Speculation | str) -> tuple[Result, float]:
        begin, spent = time.perf_counter(), budget.spent
        (result,) = which.generate(question.prompt_ids, speculation=mode, **settings)
        return result, time.perf_counter() - begin - (budget.spent - spent)

    lengths = (len(question.prompt_ids) for question in questions)
    shapes = {(bucket(n), bucket(n + max_new_tokens)): n for n in lengths}  # of one program each
    for mode in (speculation, "off")[: 2 if plain_every else 1]:
        for length in shapes.values():
            frozen.warm_up(np.zeros(length, np.int32), speculation=mode, **settings)
    for number, question in enumerate(questions):
        if number < len(before):
            continue
        order = (model, frozen) if number % 2 else (frozen, model)
        spent, found = budget.spent, {}
        for which in order:
            found[id(which)] = timed(which, question, speculation)
        (mine, seconds), (theirs, frozen_seconds) = found[id(model)], found[id(frozen)]
        plain = timed(frozen, question, "off") if plain_every and number % plain_every == 0 else None
        texts = [mine.token_ids, theirs.token_ids, *([plain[0].token_ids] if plain else [])]
        stats = online.stats()
        yield Served(
            workload=question.workload,
            tokens=len(mine.token_ids) - 1,
            frozen_rounds=theirs.stats.num_spec_steps,
            rounds=mine.stats.num_spec_steps,
            frozen_seconds=frozen_seconds,
            seconds=seconds,
            adapting_seconds=budget.spent - spent,
            plain_seconds=plain[1] if plain else None,
            identical=all(text == texts[0] for text in texts),
            **{name: getattr(stats, name) for name in ("steps", "swaps", "fallbacks", "share")},
        )


def read_served(path: Path) -> list[Served]:
    """Requests of a file with a line for each; a last line that a kill left incomplete is removed from the file."""
    rows = read_metrics(path) if path.exists() else []
    files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return [Served(**row) for row in rows]


def summary(served: Sequence[Served]) -> list[dict[str, Any]]:
    """One row per workload, in their order; see docs/online.md for its keys."""
    require(len(served) > 0, "nothing was served")
    found = []
    for workload in dict.fromkeys(one.workload for one in served):
        mine = [one for one in served if one.workload == workload]
        last = mine[-max(1, round(LAST * len(mine))) :]
        plain = [one for one in mine if one.plain_seconds is not None]
        spent, busy = (sum(getattr(one, name) for one in mine) for name in ("adapting_seconds", "seconds"))
        found.append(
            {
                "workload": workload,
                "requests": len(mine),
                "identical": sum(one.identical for one in mine),
                **{f"{key}_all": value for key, value in _lengths(mine).items()},
                **{f"{key}_last": value for key, value in _lengths(last).items()},
                "requests_last": len(last),
                "time_share": spent / (busy + spent),
                "steps": mine[-1].steps,
                "swaps": mine[-1].swaps,
                "fallbacks": mine[-1].fallbacks,
                "slowest_to_plain": max((one.seconds / one.plain_seconds for one in plain), default=None),
                "won_back_after": _won_back(mine),
            }
        )
    return found


def _lengths(served: Sequence[Served]) -> dict[str, Any]:
    """Acceptance lengths of both drafters, and their ratio with its interval."""
    names = ("tokens", "rounds", "frozen_rounds")
    tokens, mine, theirs = (np.array([getattr(one, name) for one in served]) for name in names)
    used = (mine > 0) & (theirs > 0)
    if not used.any():
        return {"adapted": None, "frozen": None, "ratio": None}
    ratio: Estimate = paired_ratio(Counts(tokens[used], mine[used]), Counts(tokens[used], theirs[used]))
    lengths = (float(tokens[used].sum() / rounds[used].sum()) for rounds in (mine, theirs))
    return dict(zip(("adapted", "frozen"), lengths, strict=True)) | {"ratio": list(ratio)}


def _won_back(served: Sequence[Served]) -> int | None:
    """Requests after which adaptation had saved more time than it took, for good; None if it has not yet."""
    gained = np.cumsum([one.frozen_seconds - one.seconds - one.adapting_seconds for one in served])
    behind = np.flatnonzero(gained < 0)
    first = 1 + int(behind[-1]) if len(behind) else 0
    return first + 1 if first < len(served) else None


def plot(path: str, served: Sequence[Served]) -> None:
    """Draws acceptance length against requests served, frozen and adapting, as moving averages, to a PNG file."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        ax = figure.subplots()
        for name, rounds, colour in (("frozen", "frozen_rounds", 0), ("adapting", "rounds", 1)):
            ax.plot(_moving(served, rounds), label=name, color=plots.colour(colour))
        swaps = [n for n in range(1, len(served)) if served[n].swaps > served[n - 1].swaps]
        low, _ = ax.get_ylim()
        ax.plot(swaps, [low] * len(swaps), "|", color="#444444", markersize=6, label="a new drafter serves")
        for n in range(1, len(served)):
            if served[n].workload != served[n - 1].workload:
                ax.axvline(n, color="#444444", linewidth=0.9, linestyle=(0, (1, 2)))
        ax.set_xlabel("requests served")
        ax.set_ylabel(f"tokens per verification\n(average of {AVERAGED} requests)")
        ax.legend()
        plots.save_figure(figure, path)


def _moving(served: Sequence[Served], rounds: str) -> list[float]:
    """Acceptance length over the last AVERAGED requests of the same workload."""
    found = []
    for n, one in enumerate(served):
        near = [x for x in served[max(0, n + 1 - AVERAGED) : n + 1] if x.workload == one.workload]
        found.append(sum(x.tokens for x in near) / max(1, sum(getattr(x, rounds) for x in near)))
    return found


def questions_of(
    model: Model, workloads: Sequence[str], number: int, longest: int, load: Callable[[str], Sequence[Any]]
) -> list[Question]:
    """The first `number` prompts of each workload that have at most `longest` tokens: the first user turn of each chat.

    load: a source by name -> its conversations. Raises UserError where a workload has too few.
    """
    found: list[Question] = []
    for workload in workloads:
        turns = ([m for m in chat.messages if m.role == "user"][:1] for chat in load(workload))
        prompts = (model.chat_prompt(turn) for turn in turns if turn)
        fitting = [ids for ids, _ in zip((p for p in prompts if len(p) <= longest), range(number), strict=False)]
        rule = f"only {len(fitting)} prompts of at most {longest} tokens, but --requests={number}"
        require(len(fitting) == number, f"--workloads={workload}: {rule}")
        found += [Question(workload.partition("[")[0], ids) for ids in fitting]
    return found
