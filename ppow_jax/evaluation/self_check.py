"""Whether a drafter really helps its target: a short decoding of built-in prompts, and what is wrong if it does not.

A drafter whose layer ids, vocabulary or norms were read in another way than it was trained loads without any error and
is lossless; only that hardly any of its tokens is accepted gives it away.
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.evaluation import decoding
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.settings import chain
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)
LEAST_TAU = 1.05  # tokens per verification; a drafter that guesses at random stays below, any that was trained is above
LEAST_COVERAGE = 0.5  # of the target's tokens that the draft vocabulary holds
PROMPTS = (
    "How does a rainbow form?",
    "Write a short story about a lighthouse.",
    "A box holds 12 red and 30 blue balls. How many balls are in it? Explain your answer.",
    "Write a Python function that reverses a list.",
)


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """What the decoding gave.

    tau: tokens per verification, the bonus token included. accepted: drafted tokens that were accepted, of `drafted`.
    identical: answers that are the plainly decoded ones, of `prompts` (all are in float32). coverage: part of the
    target's own tokens that the draft vocabulary holds. otherwise: tau with one thing about the drafter changed, tried
    where it does not help as it is.
    """

    tau: float
    accepted: int
    drafted: int
    identical: int
    prompts: int
    coverage: float
    otherwise: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the drafter helps."""
        return self.tau >= LEAST_TAU

    def advice(self) -> str:
        """What is likely to be wrong, the likeliest first; for a check that failed."""
        better = {what: tau for what, tau in self.otherwise.items() if tau >= LEAST_TAU and tau > self.tau}
        causes = [f"with {what} tau is {tau:.2f}: that is how it was trained" for what, tau in better.items()]
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
    """Decodes PROMPTS greedily, plainly and with the drafter (and with changed ones if that one does not help)."""
    prompts = [encode_prompt(target.tokenizer, [Message("user", text)]) for text in PROMPTS]
    how = decoding.Decoding(chain(window), max_new_tokens=max_new_tokens, batch_size=len(prompts))
    decoding.require_room(target, max(map(len, prompts)), how, "the self-check")

    def decode(drafter_: Drafter | None) -> decoding.Decoded:
        return decoding.decode(target, drafter_, prompts, how, range(len(prompts)))

    plain, speculative = decode(None), decode(drafter)
    coverage = float(np.isin(np.concatenate(plain.answers), np.asarray(drafter.target_ids_W)).mean())
    otherwise: dict[str, float] = {}
    if _tau(speculative) < LEAST_TAU and coverage >= LEAST_COVERAGE:  # else the vocabulary explains it
        for what, changed in _variants(drafter, target.config.num_layers).items():
            log.info("it does not help; trying %s", what)
            otherwise[what] = _tau(decode(changed))
            if otherwise[what] >= LEAST_TAU:
                break
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


def _variants(drafter: Drafter, num_layers: int) -> dict[str, Drafter]:
    """The drafter, read in each of the other ways that files are confused by."""
    config, result = drafter.config, {}
    for shift, word in ((1, "higher"), (-1, "lower")):
        layers = tuple(i + shift for i in config.feature_layers)
        if 0 <= layers[0] and layers[-1] <= num_layers:
            changed = dataclasses.replace(config, feature_layers=layers)
            result[f"target layers one {word}, inputs of {', '.join(map(str, layers))},"] = changed
    for name in ("norm_before_residual", "norm_output"):
        value = not getattr(config, name)
        changes: dict[str, Any] = {name: value}
        result[f"{name} = {str(value).lower()}"] = dataclasses.replace(config, **changes)
    return {what: drafter.replace(config=changed) for what, changed in result.items()}
