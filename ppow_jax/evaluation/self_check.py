"""Self-check of a drafter: a short decoding of built-in prompts, with a diagnosis if the drafter does not help.

A drafter whose layer ids, vocabulary or norms are read in another convention than it was trained with loads without any
error and is lossless; only a lower acceptance, or almost none, reveals it. The loss varies: layer ids off by one cost
the shipped drafter of SmolLM2 4 % of its tau. So every reading of the layers is always tried.
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.inference import decoding
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import DrafterConfig, default_feature_layers
from ppow_jax.speculation.settings import chain
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)
LEAST_TAU = 1.05  # tokens per verification; random guesses stay below it, any trained drafter is above
CLEARLY = 1.03  # ratio of tau above which another reading of the files is taken for the right one
LEAST_COVERAGE = 0.5  # share of the target's tokens that the draft vocabulary holds
PROMPTS = (
    "How does a rainbow form?",
    "Write a short story about a lighthouse.",
    "A box holds 12 red and 30 blue balls. How many balls are in it? Explain your answer.",
    "Write a Python function that reverses a list.",
)


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """Result of the check.

    tau: tokens per verification, the bonus token included. accepted: drafted tokens that were accepted, of `drafted`.
    identical: answers that equal the plainly decoded ones, of `prompts` (all of them in float32). coverage: share of
    the target's own tokens that the draft vocabulary holds. otherwise: tau with one property of the drafter changed:
    always every other reading of its target layers, and its norms if it does not help as it is.
    """

    tau: float
    accepted: int
    drafted: int
    identical: int
    prompts: int
    coverage: float
    otherwise: dict[str, float]

    @property
    def helps(self) -> bool:
        """True if a meaningful number of tokens is accepted."""
        return self.tau >= LEAST_TAU

    @property
    def better(self) -> dict[str, float]:
        """Changes that clearly raise tau: signs that its files mean something else."""
        return {what: tau for what, tau in self.otherwise.items() if tau >= max(LEAST_TAU, CLEARLY * self.tau)}

    @property
    def passed(self) -> bool:
        """True if the drafter helps, and no other reading of it helps more."""
        return self.helps and not self.better

    def within_noise(self, tau: float) -> bool:
        """True if a tau differs from the drafter's by no more than the few prompts of the check can tell apart."""
        return max(tau, self.tau) < CLEARLY * min(tau, self.tau)

    def lines(self) -> list[tuple[str, str]]:
        """The result as (what, found), to be printed as a table."""
        lines = [
            ("files", "read; sizes, vocabulary and layers fit the target"),
            ("tau", f"{self.tau:.2f} tokens per verification (1 is plain decoding)"),
            ("accepted", f"{self.accepted} of {self.drafted} drafted tokens"),
            ("vocabulary", f"holds {self.coverage:.0%} of the tokens that the target wrote"),
            ("identical", f"{self.identical} of {self.prompts} answers are those of plain decoding"),
        ]
        for what, tau in self.otherwise.items():
            noise = ", within noise" if self.within_noise(tau) else ""
            lines.append(("otherwise", f"tau would be {tau:.2f} with {what.rstrip(',')}{noise}"))
        return lines

    def refusals(self, exact: bool) -> list[str]:
        """Reasons to refuse the drafter, with advice; none if it passed. exact: all answers have to be identical."""
        found = []
        if exact and self.identical < self.prompts:
            found.append("in float32 all answers must be identical; the decoding itself is broken")
        if not self.passed:
            why = "read in another way, the drafter helps more"
            if not self.helps:
                why = f"tau is below {LEAST_TAU}, so the drafter does not help; likely causes"
            found.append(f"{why}:\n{self.advice()}")
        return found

    def advice(self) -> str:
        """Probable causes of a failed check, most likely first."""
        better = sorted(self.better.items(), key=lambda item: -item[1])
        causes = [f"with {what} tau is {tau:.2f}: that is how it was trained" for what, tau in better[:1]]
        causes += [f"with {what} tau is {tau:.2f}, which is better too" for what, tau in better[1:]]
        if self.coverage < LEAST_COVERAGE:
            causes.append(
                f"its vocabulary holds {self.coverage:.0%} of the tokens that the target writes: a wrong d2t,"
                " or another target's drafter"
            )
        if not causes:
            causes = [
                "target layer ids off by one (in the flat format eagle_config counts outputs, elsewhere inputs count)",
                "a d2t of another vocabulary, or one that does not hold offsets",
                "a drafter for another target, or for another fine-tuning of it",
                "a drafter that is not trained yet",
            ]
        return "\n".join(f"  - {cause}" for cause in causes)


def self_check(target: Target, drafter: Drafter, window: int = 4, max_new_tokens: int = 48) -> SelfCheck:
    """Decodes PROMPTS greedily: plainly, with the drafter, and with some changes to it, see `SelfCheck.otherwise`."""
    prompts = [encode_prompt(target.tokenizer, [Message("user", text)]) for text in PROMPTS]
    settings = decoding.Decoding(chain(window), max_new_tokens=max_new_tokens, batch_size=len(prompts))
    decoding.require_room(target, max(map(len, prompts)), settings, "the self-check")

    def decode(drafter_: Drafter | None) -> decoding.Decoded:
        return decoding.decode(target, drafter_, prompts, settings, range(len(prompts)))

    log.info("decoding %d prompts without and with the drafter; programs are compiled first", len(prompts))
    plain, speculative = decode(None), decode(drafter)
    coverage = float(np.isin(np.concatenate(plain.answers), np.asarray(drafter.target_ids_W)).mean())
    otherwise: dict[str, float] = {}
    if coverage >= LEAST_COVERAGE:  # otherwise the vocabulary explains it
        readings = _readings(drafter.config, target.config.num_layers)
        changes = readings | ({} if _tau(speculative) >= LEAST_TAU else _flipped(drafter.config))
        for what, config in changes.items():
            enough = max(LEAST_TAU, CLEARLY * _tau(speculative))
            if what not in readings and max(otherwise.values(), default=0.0) >= enough:
                break  # the layers explain it; all of their readings are tried and compared
            log.info("tau is %.2f tokens per verification; trying the drafter with %s", _tau(speculative), what)
            otherwise[what] = _tau(decode(drafter.replace(config=config)))
    pairs = zip(plain.answers, speculative.answers, strict=True)
    return SelfCheck(
        tau=_tau(speculative),
        accepted=int(speculative.accepted_BxK1.sum(0) @ np.arange(window + 1)),
        drafted=speculative.drafted,
        identical=sum(np.array_equal(a, b) for a, b in pairs),
        prompts=len(prompts),
        coverage=coverage,
        otherwise=otherwise,
    )


def _tau(decoded: decoding.Decoded) -> float:
    counts_K1 = decoded.accepted_BxK1.sum(0)
    return float(counts_K1 @ (1 + np.arange(len(counts_K1))) / max(counts_K1.sum(), 1))


def _readings(config: DrafterConfig, num_layers: int) -> dict[str, DrafterConfig]:
    """The drafter with every other choice of target layers that its files may mean.

    One lower and one higher (the files' ids read by the other convention); and the default choice, as inputs and as
    outputs, for files whose ids are not the drafter's own.
    """
    result = _shifted(config, num_layers)
    if num_layers < 7:
        return result
    tried = {config.feature_layers} | {other.feature_layers for other in result.values()}
    usual = default_feature_layers(num_layers)
    for shift, word in ((0, "the usual target layers"), (-1, "the usual target layers, one lower")):
        layers = tuple(i + shift for i in usual)
        if layers not in tried:
            what = f"{word}, inputs of {', '.join(map(str, layers))},"
            result[what] = dataclasses.replace(config, feature_layers=layers)
    return result


def _shifted(config: DrafterConfig, num_layers: int) -> dict[str, DrafterConfig]:
    """The drafter with target layers one lower and one higher, where there are such layers."""
    result = {}
    for shift, word in ((1, "higher"), (-1, "lower")):
        layers = tuple(i + shift for i in config.feature_layers)
        if 0 <= layers[0] and layers[-1] <= num_layers:
            what = f"target layers one {word}, inputs of {', '.join(map(str, layers))},"
            result[what] = dataclasses.replace(config, feature_layers=layers)
    return result


def _flipped(config: DrafterConfig) -> dict[str, DrafterConfig]:
    """The drafter with each switch that the weights do not determine flipped."""
    result = {}
    for name in ("norm_before_residual", "norm_output"):
        changes: dict[str, Any] = {name: not getattr(config, name)}
        result[f"{name} = {str(changes[name]).lower()}"] = dataclasses.replace(config, **changes)
    return result
