"""Repeats the paper's comparison: every arm from one drafter, on the same fresh answers, over several seeds.

    python -m experiments.reproduce --flagfile=experiments/configs/study.flags --workdir=runs/study

Writes study.json, study.csv, study.md and plots after every arm. The same command resumes an interrupted study.
"""

from ppow_jax import cli
from ppow_jax.study.settings import StudySettings


def main(settings: StudySettings) -> int:
    """Runs the study; JAX starts only here, after the flags were checked."""
    cli.keep_compiled(settings.compilation_cache)
    from ppow_jax.study import run

    return run.run(settings)


if __name__ == "__main__":
    cli.run(main, StudySettings)
