"""Plans a run for devices that are not available: compiles its programs, and reports memory and a lower bound of time.

    python -m experiments.plan --target=llama-3.1-8b --topology=v5e:4x4 --mesh=data:4,tensor:4 --program=supervised \\
        --output=plan.json

It accepts the flags of `experiments.train`, so --flagfile=FILE plans that run. It needs no weights: --target may be a
config.json. The result is an estimate, not a measurement: memory is what XLA allocates, time is a lower bound from the
chip's published peaks. docs/plans.md explains every figure. TPU topologies need libtpu: pip install 'ppow_jax[plan]'.
"""

import json
from typing import NoReturn

from ppow_jax import cli, files
from ppow_jax.planning.settings import DEFAULTS, PlanSettings


def main(settings: PlanSettings) -> None:
    """Compiles, prints and writes the plan; with --compare prints and plots plans that were written before."""
    cli.check_output("--output", settings.output)
    cli.check_output("--plot", settings.plot)
    from ppow_jax.planning import run, tables

    if settings.compare:
        plans = [tables.read(path) for path in settings.compare]
        print(tables.table(plans))
        if settings.plot:
            tables.plot(settings.plot, plans)
            print(f"plot: {settings.plot}")
        return
    result = run.plan(settings)
    print(tables.text(result))
    if settings.output:
        files.write_atomic(settings.output, json.dumps(result, indent=1) + "\n")
        print(f"plan: {settings.output}")


def command_line() -> NoReturn:
    """`ppow-plan`, and `python -m experiments.plan`."""
    cli.run(main, PlanSettings, DEFAULTS)


if __name__ == "__main__":
    command_line()
