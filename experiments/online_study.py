"""Serves workloads one after the other with a frozen and with an adapting drafter, and compares acceptance lengths.

    python -m experiments.online_study --workloads=tickets --requests=200 --workdir=runs/online
    python -m experiments.online_study --workdir=runs/shift \\
        --workloads='sharegpt[3000:3400],explanations[2000:2400],translations[8000:8400]'

Answers are greedy, one at a time. The workdir holds served.jsonl (a line per request), result.json and plot.png, which
are written as it goes, and online/, the adapted drafter. The same command resumes it, after Ctrl-C or SIGTERM where it
stopped.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from experiments.common import AdaptationFlags, ModelFlags, StoppingFlags
from ppow_jax import cli, files, flags
from ppow_jax.flags import field, require

EVERY = 10  # requests between two writings of the result

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings(AdaptationFlags, StoppingFlags, ModelFlags):
    """The flags of this program."""

    workdir: str | None = field(None, "Directory for all files; the same command resumes it.", group="Study")
    workloads: str = field(
        "translations[8000:9000]",
        "Sources of prompts (docs/data.md), a comma list; they are served in this order.",
        group="Study",
    )
    requests: int = field(200, "Requests of each workload.", low=1, group="Study")
    max_prompt_tokens: int = field(320, "Longer prompts are left out.", low=1, group="Study")
    max_new_tokens: int = field(96, "Maximum number of tokens of an answer.", low=2, group="Study")
    mode: str = field("adaptive", "Speculation mode.", choices=("chain", "tree", "adaptive", "mixture"), group="Study")
    plain_every: int = field(10, "Every so many requests are decoded plainly, too; 0: none.", low=0, group="Study")

    def __post_init__(self):
        super().__post_init__()
        self.adaptation()
        require(bool(self.workdir), "--workdir=DIR: must be given")
        require(self.drafter is not None, "--drafter=none: there is nothing to adapt")
        require(self.online_save is None, f"--online_save={self.online_save}: this study saves to its --workdir")


def main(settings: Settings) -> int:
    """Serves what is left to serve, and writes the result -> the exit code, see `StopSignal`."""
    workdir = files.writable_directory(settings.workdir)
    written = workdir / "flags.txt"
    if written.exists():
        different = flags.differences(flags.read_flagfile(Settings, written), settings)
        rule = f"was run with {', '.join(different)}; name another --workdir"
        require(not different, f"--workdir={workdir}: {rule}")
    flags.write_flagfile(written, settings)
    cli.keep_compiled(settings.compilation_cache)

    with settings.in_use():
        return _run(settings, workdir)


def _run(settings: Settings, workdir: Path) -> int:
    from ppow_jax.data.conversations import load_conversations, sources_of
    from ppow_jax.inference.model import SPECULATIONS, load
    from ppow_jax.online import study
    from ppow_jax.training.run.preemption import StopSignal
    from ppow_jax.weights import loading

    directory = loading.find_drafter(settings.drafter, settings.target)
    require(directory is not None, f"--target={settings.target} has no drafter; name one: --drafter=DIR")
    model = load(settings.target, str(directory), settings.dtype)
    workloads, longest = sources_of(settings.workloads), settings.max_prompt_tokens
    questions = study.questions_of(model, workloads, settings.requests, longest, load_conversations)
    speculation = SPECULATIONS[settings.mode]
    if speculation.adaptive:
        speculation = dataclasses.replace(speculation, adaptive=settings.stopping())
    online = settings.adapt(model, workdir / "online")
    path = workdir / "served.jsonl"
    served = study.read_served(path)
    lost = served[-1].steps - online.stats().steps if served else 0
    if lost > 0:
        log.warning("%d training steps were lost by a kill; a study with --online_save_every=1 loses none", lost)
    with path.open("a", encoding="utf-8", buffering=1) as file, StopSignal() as stop:
        how: dict[str, Any] = {"plain_every": settings.plain_every, "before": tuple(served)}
        for one in study.serve(online, questions, speculation, settings.max_new_tokens, **how):
            print(json.dumps(dataclasses.asdict(one)), file=file)
            served.append(one)
            if len(served) % EVERY == 0:
                _write(settings, workdir, served)
            if stop.requested:
                break
        online.close()
        _write(settings, workdir, served)
        print(f"{workdir / 'result.json'}, {workdir / 'plot.png'}")
        return stop.exit_code


def _write(settings: Settings, workdir: Path, served: list) -> None:
    from ppow_jax.evaluation import report
    from ppow_jax.evaluation.measure import environment
    from ppow_jax.online import study

    rows = study.summary(served)
    about = {"command": flags.command("experiments.online_study", settings)} | environment(settings.dtype)
    requests = [dataclasses.asdict(one) for one in served]
    report.write_json(workdir / "result.json", about | {"results": rows, "requests": requests})
    study.plot(str(workdir / "plot.png"), served)
    for row in rows:
        if row["ratio_last"]:
            low, high = row["ratio_last"][1:]
            log.info(
                "%s, %d requests: tau %.2f, frozen %.2f, over the last %d (ratio %.3f to %.3f); %.1f %% of the time",
                row["workload"],
                row["requests"],
                row["adapted_last"],
                row["frozen_last"],
                row["requests_last"],
                low,
                high,
                100 * row["time_share"],
            )


if __name__ == "__main__":
    cli.run(main, Settings)
