"""Measures a drafter: decodes the same prompts with plain and with speculative decoding, and compares.

Prints tau (tokens per verification), speeds, their ratio, and the number of identical outputs. --output writes
everything as JSON (docs/results_schema.md), --plot plots it, --dump_outputs writes the tokens. Example:

    python -m experiments.evaluate --target=smollm2-135m --benchmarks=human_eval,sharegpt --num_prompts=10 \\
        --modes=chain,adaptive,tree --temperature=0,1

--modes, --window, --tree_depth, --tree_nodes, --temperature and --batch_size take lists: every combination is measured,
and all speculation modes are compared with plain decoding in the same run.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.common import DatastoreFlags, LookupFlags, ModelFlags, StoppingFlags
from ppow_jax import cli, defaults, flags
from ppow_jax.files import line_writer
from ppow_jax.flags import field, require

if TYPE_CHECKING:
    from ppow_jax.speculation.settings import Speculation

MODES = ("chain", "adaptive", "tree", "ngram", "mixture")
DEFAULT_BENCHMARKS = ("human_eval", "sharegpt")  # the ones that need no network


@dataclasses.dataclass(frozen=True)
class Settings(DatastoreFlags, LookupFlags, StoppingFlags, ModelFlags):
    """The flags of this program."""

    prompts: str | None = field(None, "JSON Lines file with prompts or chats.", group="Prompts")
    benchmarks: tuple[str, ...] = field(
        (),
        "human_eval, sharegpt, arithmetic, chat, builtin; from the hub mt_bench, gsm8k, translation, summarization; or"
        f" files. By default {','.join(DEFAULT_BENCHMARKS)}, unless --prompts is given.",
        group="Prompts",
    )
    benchmark_dir: str | None = field(None, "Directory to search first for BENCHMARK*.jsonl.", group="Prompts")
    num_prompts: int | None = field(20, "Prompts per benchmark; none: all.", low=1, group="Prompts")
    skip_long_prompts: bool = field(False, "Skip prompts that do not fit into the target's positions.", group="Prompts")
    seed: int = field(0, "Seed for the selection of prompts.", low=0, high=2**31 - 1, group="Prompts")

    modes: tuple[str, ...] = field((defaults.MODE,), "Speculation modes.", choices=MODES, group="Decoding")
    window: tuple[int, ...] = field((), defaults.WINDOW_HELP, low=1, high=64, group="Decoding")
    block: bool = field(True, "Verify sampled chains block-wise; otherwise token-wise.", group="Decoding")
    adaptive_chain: bool = field(False, "Draft chains instead of trees in adaptive mode.", group="Decoding")
    tree_depth: tuple[int, ...] = field((), defaults.DEPTH_HELP, low=1, high=64, group="Decoding")
    tree_branch: int = field(defaults.BRANCH, defaults.BRANCH_HELP, low=1, group="Decoding")
    tree_nodes: tuple[int, ...] = field((), defaults.NODES_HELP, low=1, group="Decoding")
    temperature: tuple[float, ...] = field(
        (0.0,), "Sampling temperature; 0 is greedy.", low=0, high=100, group="Decoding"
    )
    batch_size: tuple[int, ...] = field((1,), "Prompts decoded in parallel.", low=1, group="Decoding")
    seeds: tuple[int, ...] = field((0,), "Sampling seeds; all prompts are decoded with each.", low=0, group="Decoding")
    max_new_tokens: int = field(128, "Maximum number of tokens of an answer.", low=2, group="Decoding")

    output: str | None = field(None, "JSON file for the results.", group="Output")
    dump_outputs: str | None = field(None, "JSON Lines file for the tokens of every answer.", group="Output")
    plot: str | None = field(None, "PNG file for a plot.", group="Output")

    def __post_init__(self):
        super().__post_init__()
        plot_rule = f"--plot={self.plot}: must end in .png"
        require(self.plot is None or self.plot.endswith(".png"), plot_rule)
        for name in ("modes", "temperature", "batch_size", "seeds"):
            require(bool(getattr(self, name)), f"--{name}=: must name one at least")
        seeds = len(self.seeds) if any(self.temperature) else 1
        once = len(self.temperature) == len(self.batch_size) == seeds == 1
        rule = "needs a single --temperature, --batch_size and --seeds: it holds the answers to prompts once measured"
        require(self.datastore is None or once, f"--datastore={self.datastore}: {rule}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The benchmarks, and files, to measure on."""
        named = self.benchmarks + ((self.prompts,) if self.prompts else ())
        return named or DEFAULT_BENCHMARKS

    def speculations(self) -> "list[Speculation]":
        """Every speculation mode, in every size that is asked for. Raises UserError for an impossible tree."""
        from ppow_jax.speculation.settings import adaptive, of_mode

        def sized(mode: str, window: int, nodes: int | None) -> "Speculation":
            if mode == "adaptive" and self.adaptive_chain:
                return adaptive(window, self.block, self.stopping())
            branch, tokens, stopping = self.tree_branch, self.ngram_tokens, self.stopping()
            return of_mode(
                mode, window, branch=branch, nodes=nodes, tokens=tokens, block=self.block, stopping=stopping
            )

        found: list[Speculation] = []
        for mode in self.modes:
            windows = (self.tree_depth if mode == "tree" else ()) or self.window or (defaults.WINDOW,)
            found += [sized(mode, window, nodes) for window in windows for nodes in self.tree_nodes or (None,)]
        return list(dict.fromkeys(found))  # sizes that a mode does not have make no other


def main(settings: Settings) -> None:
    """Measures, prints and writes the results."""
    for name in ("output", "dump_outputs", "plot"):
        cli.check_output(f"--{name}", getattr(settings, name))
    cli.keep_compiled(settings.compilation_cache)

    from ppow_jax.evaluation import plots, report  # what is slow to import comes after the settings' checks

    results = measure(settings)
    print(f"{results['headline']}\n")
    print(report.console_table(results["results"]))
    print("\nacceptance by position, given that all before were accepted:")
    print(report.acceptance_table(results["results"]))
    if len(best := report.winners(results["results"])) > 0:
        print("\nbest, by the mean speedup over the benchmarks:")
        print(report.console_table(best, report.WINNER_COLUMNS))
    if settings.output:
        report.write_json(settings.output, results)
    if settings.plot:
        plots.plot_results(settings.plot, results | {"arms": report.arms_by_mode(results["results"])})
    written = {"results": settings.output, "tokens": settings.dump_outputs, "plot": settings.plot}
    for what, path in written.items():
        if path:
            print(f"{what}: {path}")


def measure(settings: Settings) -> dict[str, Any]:
    """Loads everything and measures -> what --output holds (docs/results_schema.md)."""
    with settings.in_use():
        return _measure(settings)


def _measure(settings: Settings) -> dict[str, Any]:
    from ppow_jax.evaluation import dialogues, report
    from ppow_jax.evaluation import measure as measuring
    from ppow_jax.evaluation.benchmarks import load_benchmark
    from ppow_jax.weights import loading, targets

    speculations = settings.speculations()
    directory = loading.find_drafter(settings.drafter, settings.target)
    needed = any(way.needs_drafter for way in speculations)
    require(
        directory is not None or not needed,
        f"--drafter={settings.drafter or 'none'}: name the directory of a drafter for {settings.target}",
    )
    benchmarks = [
        load_benchmark(name, settings.num_prompts, settings.seed, settings.benchmark_dir) for name in settings.chosen
    ]
    target = targets.scanned(targets.load(settings.target, settings.dtype))
    dialogues.require_known_texts(target, benchmarks)
    drafter = loading.load_drafter(directory, target, settings.dtype) if needed else None
    rows: list[dict[str, Any]] = []
    datastore = settings.open_datastore(target.config.vocab_size)

    def keep(more: list[dict[str, Any]]) -> None:
        if settings.output:
            report.write_json(settings.output, _result(settings, directory, rows + more))

    with line_writer(settings.dump_outputs) as write:
        for temperature, batch_size in itertools.product(settings.temperature, settings.batch_size):
            rows += measuring.evaluate(
                target,
                drafter,
                benchmarks,
                speculations=speculations,
                temperature=temperature,
                batch_size=batch_size,
                max_new_tokens=settings.max_new_tokens,
                seeds=settings.seeds,
                skip_long_prompts=settings.skip_long_prompts,
                on_output=lambda output: write(output.as_json()),
                on_rows=keep,
                datastore=datastore,
            )
    if datastore is not None:
        datastore.save()
    return _result(settings, directory, rows)


def _result(settings: Settings, directory: Path | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from ppow_jax.evaluation import measure as measuring
    from ppow_jax.evaluation import report

    about = {"headline": report.opening(rows), "command": flags.command("experiments.evaluate", settings)}
    used = dataclasses.asdict(settings) | {"drafter": directory and str(directory), "benchmarks": settings.chosen}
    return about | measuring.environment(settings.dtype) | {"settings": used, "results": rows}


def command_line() -> NoReturn:
    """`ppow-evaluate`, and `python -m experiments.evaluate`."""
    cli.run(main, Settings)


if __name__ == "__main__":
    command_line()
