"""Trains a drafter for a target: its answers, supervised start, PPOW, measurement, export.

    python -m experiments.train --flagfile=experiments/configs/quick.flags --workdir=runs/quick

Everything goes to --workdir. The same command goes on where a stopped or killed run was.
"""

from ppow_jax import cli
from ppow_jax.training.settings import TrainSettings


def main(settings: TrainSettings) -> int:
    """Runs the pipeline; JAX starts only here, after the flags were checked."""
    cli.keep_compiled(settings.compilation_cache)
    from ppow_jax.training import pipeline

    return pipeline.run(settings)


if __name__ == "__main__":
    cli.run(main, TrainSettings)
