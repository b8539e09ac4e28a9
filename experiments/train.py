"""Trains a drafter for a target: answers of the target, supervised training, PPOW, measurement, export.

    python -m experiments.train --flagfile=experiments/configs/quick.flags --workdir=runs/quick

All results are written to --workdir. The same command resumes a run that was stopped or killed.
"""

from typing import NoReturn

from ppow_jax import cli
from ppow_jax.training.settings import TrainSettings


def main(settings: TrainSettings) -> int:
    """Runs the pipeline; JAX starts only here, after the flags were checked."""
    cli.keep_compiled(settings.compilation_cache)
    from ppow_jax.training import pipeline

    return pipeline.run(settings)


def command_line() -> NoReturn:
    """`ppow-train`, and `python -m experiments.train`."""
    cli.run(main, TrainSettings)


if __name__ == "__main__":
    command_line()
