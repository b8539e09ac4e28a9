"""Measures a drafter: decodes the same prompts plainly and speculatively, and compares.

Prints tau (tokens per verification), speeds, their ratio, and how many outputs are identical. --output keeps
all of it as JSON (docs/results_schema.md), --plot draws it, --dump_outputs keeps every token. Example:

    python -m experiments.evaluate --target=smollm2-135m --benchmarks=human_eval,sharegpt --num_prompts=10
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppow_jax import cli, files
from ppow_jax.config import check_fields, field, require
from ppow_jax.errors import UserError

DEFAULT_BENCHMARKS = ("human_eval", "sharegpt")  # the ones that need no network


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of this program."""

    target: str = field(
        "smollm2-135m", "smollm2-135m, tiny, a .gguf file, a directory or a hub name.", group="Models"
    )
    drafter: str | None = field(
        "auto", "The drafter's directory. auto: drafters/TARGET, if there is one.", group="Models"
    )
    dtype: str = field("bfloat16", "Of all matrices.", choices=("bfloat16", "float32"), group="Models")

    prompts: str | None = field(None, "JSON lines with prompts or chats to measure on.", group="Prompts")
    benchmarks: tuple[str, ...] = field(
        (),
        "mt_bench, gsm8k, human_eval, translation, summarization, sharegpt, builtin, or files. By default"
        f" {','.join(DEFAULT_BENCHMARKS)}, unless --prompts is given.",
        group="Prompts",
    )
    benchmark_dir: str | None = field(None, "Where to look for BENCHMARK*.jsonl first.", group="Prompts")
    num_prompts: int | None = field(20, "Prompts per benchmark; none takes all.", low=1, group="Prompts")
    skip_long_prompts: bool = field(
        False, "Leave out prompts that do not fit the target's positions.", group="Prompts"
    )
    seed: int = field(0, "Of the choice of prompts, and of sampling.", low=0, high=2**31 - 1, group="Prompts")

    window: int = field(7, "Drafted tokens per round, K.", low=1, high=64, group="Decoding")
    temperature: float = field(0.0, "0 is greedy.", low=0, high=100, group="Decoding")
    max_new_tokens: int = field(128, "Longest answer.", low=2, group="Decoding")
    batch_size: int = field(1, "Prompts decoded at once.", low=1, group="Decoding")

    output: str | None = field(None, "JSON file for the results.", group="Output")
    dump_outputs: str | None = field(None, "JSON lines file for the tokens of every answer.", group="Output")
    plot: str | None = field(None, "PNG file.", group="Output")

    def __post_init__(self):
        check_fields(self)
        plot_rule = f"--plot={self.plot}: must end in .png"
        require(self.plot is None or self.plot.endswith(".png"), plot_rule)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The benchmarks, and files, to measure on."""
        named = self.benchmarks + ((self.prompts,) if self.prompts else ())
        return named or DEFAULT_BENCHMARKS


def main(settings: Settings) -> None:
    """Measures, prints and writes the results."""
    for name in ("output", "dump_outputs", "plot"):
        _check_output(f"--{name}", getattr(settings, name))

    from ppow_jax.evaluation import report  # what is slow to import comes after the settings' checks

    results = measure(settings)
    print(report.console_table(results["results"]))
    print("\nacceptance by position, given that all before were accepted:")
    print(_acceptance_table(results["results"]))
    if settings.output:
        report.write_json(settings.output, results)
    if settings.plot:
        arm = report.arm(Path(settings.drafter or "").name, results["results"])
        report.plot_results(settings.plot, results | {"arms": [arm]})
    written = {"results": settings.output, "tokens": settings.dump_outputs, "plot": settings.plot}
    for what, path in written.items():
        if path:
            print(f"{what}: {path}")


def measure(settings: Settings) -> dict[str, Any]:
    """Loads everything and measures -> what --output holds (docs/results_schema.md)."""
    from ppow_jax.evaluation import loading
    from ppow_jax.evaluation import measure as measuring
    from ppow_jax.evaluation.benchmarks import load_benchmark
    from ppow_jax.weights import targets

    directory = loading.find_drafter(settings.drafter, settings.target)
    require(
        directory is not None,
        f"--drafter={settings.drafter or 'none'}: name the directory of a drafter for {settings.target}",
    )
    benchmarks = [
        load_benchmark(name, settings.num_prompts, settings.seed, settings.benchmark_dir)
        for name in settings.chosen
    ]
    target = targets.load(settings.target, settings.dtype)
    drafter = loading.load_drafter(directory, target, settings.dtype)
    with _line_writer(settings.dump_outputs) as write:
        rows = measuring.evaluate(
            target,
            drafter,
            benchmarks,
            window=settings.window,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            skip_long_prompts=settings.skip_long_prompts,
            on_output=lambda output: write(output.as_json()),
        )
    used = dataclasses.asdict(settings) | {"drafter": str(directory), "benchmarks": settings.chosen}
    return measuring.environment(settings.dtype) | {"settings": used, "results": rows}


def _check_output(flag: str, path: str | None) -> None:
    if path is None:
        return
    require(not Path(path).is_dir(), f"{flag}={path}: must be a file, but is a directory")
    try:
        files.writable_directory(Path(path).parent)
    except UserError as error:
        raise UserError(f"{flag}={path}: {error}") from None


@contextlib.contextmanager
def _line_writer(path: str | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes a value as a line of JSON at once, or nowhere."""
    if path is None:
        yield lambda value: None
        return
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        yield lambda value: print(json.dumps(value, ensure_ascii=False), file=file)


def _acceptance_table(rows: list[dict[str, Any]]) -> str:
    from ppow_jax.evaluation import report

    positions = {str(j): str(j) for j in range(1, rows[0]["window"] + 1)}
    table = [row | dict(zip(positions, row["acceptance_by_position"], strict=False)) for row in rows]
    return report.console_table(table, {"benchmark": "benchmark", **positions})


if __name__ == "__main__":
    cli.run(main, Settings)
