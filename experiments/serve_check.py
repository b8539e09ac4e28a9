"""Checks that a serving engine decodes with a drafter as this project does: the same tokens, the same acceptance.

    make engines
    python -m experiments.serve_check --engine=vllm --target=smollm2-135m --prompts=prompts.jsonl
    python -m experiments.serve_check --engine=eagle --engine_code=EAGLE --benchmarks=human_eval --num_prompts=10

The target (if it is no Hugging Face directory) and the drafter, in every format that the engine reads, are written
below --workdir. The engine runs in an environment of its own (.engines/ENGINE, or --engine_python), in float32, one
request at a time, plainly and with the drafter. At temperature 0 all tokens must be ours, up to ties of two logits, and
the acceptance length and each position's acceptance must be within 3 % of ours. Above it, the acceptance length must be
within 3 %, or its difference within noise (95 % bootstrap interval over prompts). See docs/engines.md.
Exit codes: 0 if everything agrees, 1 if something does not, 2 for wrong input or an engine that does not run.
"""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppow_jax import cli
from ppow_jax.engines import job as engines
from ppow_jax.flags import check_fields, field, require

if TYPE_CHECKING:
    from ppow_jax.engines.check import Report

log = logging.getLogger(__name__)
FORMATS = ("flat", "speculators")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of this program."""

    engine: str = field("vllm", "The engine.", choices=tuple(engines.ENGINES), group="Engine")
    engine_python: str | None = field(
        None, "Python of the engine's environment. By default .engines/ENGINE/bin/python.", group="Engine"
    )
    engine_code: str | None = field(
        None, "Directory of the official EAGLE code, for --engine=eagle; it is not downloaded.", group="Engine"
    )
    timeout: float = field(1800.0, "Seconds that each run of the engine may take.", low=1, group="Engine")

    target: str = field(
        "smollm2-135m", "Target: smollm2-135m, tiny, a .gguf file, a directory or a hub name.", group="Models"
    )
    drafter: str = field("auto", "Directory of the drafter. auto: drafters/TARGET.", group="Models")
    formats: tuple[str, ...] = field(
        (), "Formats to export; by default all that the engine reads.", choices=FORMATS, group="Models"
    )
    workdir: str = field("runs/serve_check", "Directory for the exported models and the engine's logs.", group="Models")

    prompts: str | None = field(None, "JSON Lines file with prompts or chats (first turns).", group="Prompts")
    benchmarks: tuple[str, ...] = field(
        (), "Benchmarks, as for experiments.evaluate; human_eval unless --prompts is given.", group="Prompts"
    )
    benchmark_dir: str | None = field(None, "Directory to search first for BENCHMARK*.jsonl.", group="Prompts")
    num_prompts: int | None = field(7, "Prompts per benchmark; none: all.", low=1, group="Prompts")

    window: int = field(4, "Drafted tokens per round, K.", low=1, high=64, group="Decoding")
    max_new_tokens: int = field(64, "Maximum number of tokens of an answer.", low=2, group="Decoding")
    temperature: tuple[float, ...] = field(
        (0.0, 1.0), "Sampling temperatures; 0 is greedy.", low=0, high=100, group="Decoding"
    )
    seeds: tuple[int, ...] = field((0, 1), "Sampling seeds, above temperature 0.", low=0, group="Decoding")

    output: str | None = field(None, "JSON file for the result.", group="Output")

    def __post_init__(self):
        check_fields(self)
        for name in ("temperature", "seeds"):
            values = getattr(self, name)
            require(bool(values), f"--{name}=: must name one at least")
            require(len(set(values)) == len(values), f"--{name}={values}: each can be named once")
        for name in self.formats:
            read = engines.ENGINES[self.engine].formats
            require(name in read, f"--formats={name}: {self.engine} reads only {', '.join(read)}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The benchmarks, and files, whose prompts are decoded."""
        return self.benchmarks + ((self.prompts,) if self.prompts else ()) or ("human_eval",)


def main(settings: Settings) -> int:
    """Prints a row for each format, temperature and benchmark; 1 if one of them does not agree."""
    engine = engines.ENGINES[settings.engine]
    python = engines.find_python(engine, settings.engine_python)
    code = engines.check_code(engine, settings.engine_code)
    cli.check_output("--output", settings.output)

    from ppow_jax.engines import check  # slow to import: after the settings' checks

    result = measure(settings, engine, python, code)
    print(check.table(result))
    for line in check.remarks(result):
        print(line)
    if settings.output:
        check.write(settings.output, result)
        print(f"result: {settings.output}")
    return int(not check.agrees(result))


def measure(settings: Settings, engine: engines.Engine, python: Path, code: str | None) -> "Report":
    """Exports, runs the engine and us, and compares."""
    from ppow_jax.engines import check
    from ppow_jax.evaluation.benchmarks import load_benchmark
    from ppow_jax.files import writable_directory
    from ppow_jax.weights import loading, targets

    directory = loading.find_drafter(settings.drafter, settings.target)
    rule = f"--drafter={settings.drafter}: name the directory of a drafter for {settings.target}"
    require(directory is not None, rule)
    benchmarks = [load_benchmark(name, settings.num_prompts, 0, settings.benchmark_dir) for name in settings.chosen]
    workdir = writable_directory(settings.workdir)
    target = targets.load(settings.target, "float32")
    drafter = loading.load_drafter(directory, target, "float32")
    about: dict[str, Any] = {
        name: getattr(settings, name) for name in ("window", "max_new_tokens", "temperature", "seeds", "num_prompts")
    }
    plan = check.Plan(engine, python, code, workdir, settings.timeout, settings.formats or engine.formats, **about)
    return check.run(plan, target, drafter, directory, benchmarks)


if __name__ == "__main__":
    cli.run(main, Settings)
