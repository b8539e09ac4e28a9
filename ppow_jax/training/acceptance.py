"""Acceptance length while training: a few held-out answers, decoded with the drafter as it will be used.

The simulated acceptance length weighs every position alike, but a round begins after a miss, and trees and adaptive
windows accept differently from chains. So a drafter can improve in simulation and not in use.
"""

from collections.abc import Callable

from ppow_jax.evaluation.intervals import Counts, micro_average
from ppow_jax.evaluation.replay import replay
from ppow_jax.models.drafter import Drafter, cast
from ppow_jax.speculation.settings import of_mode
from ppow_jax.training.context import RunContext
from ppow_jax.training.replays import measured_cost_table
from ppow_jax.training.texts import batches_of


def decoded_acceptance(context: RunContext, drafter: Drafter) -> Callable[[dict], dict[str, float]]:
    """A function: parameters -> tokens per round in --decoded_mode on the first --decoded_answers held-out answers.

    Its result holds held_out_tau_decoded and the ends of its 95 % interval over answers, ..._low and ..._high. The
    rounds are replayed (`evaluation.replay`), with the counts that decoding at temperature 0 would have. The answers
    have to be the target's own at temperature 0 (`TrainSettings.decodes`).
    """
    s, target, held_out = context.settings, context.target, context.corpus.held_out
    batches = batches_of(s, held_out.examples[: s.decoded_answers])
    speculation = of_mode(s.decoded_mode, s.window)
    cost_table = measured_cost_table(context, cast(drafter, s.dtype), [speculation]) if speculation.adaptive else None

    def measure(params: dict) -> dict[str, float]:
        mine = cast(drafter.replace(params=params, compute_dtype=None, remat="none"), s.dtype)
        found = replay(mine, target.params, target.config, batches, speculation, cost_table)
        tau = micro_average(Counts(found.tokens_N, found.rounds_N))
        name = "held_out_tau_decoded"
        return {name: tau.value, f"{name}_low": tau.low, f"{name}_high": tau.high}

    return measure
