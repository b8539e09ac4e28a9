"""Our side of the comparison with an engine: the same prompts, decoded with the rules that the engine has."""

from collections.abc import Sequence

import numpy as np

from ppow_jax.engines.compare import Answer
from ppow_jax.inference import decoding
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.settings import Speculation, chain, tree
from ppow_jax.weights.targets import Target


def speculation(window: int, temperature: float, greedy_drafts: bool) -> Speculation:
    """The chain that an engine drafts.

    Engines that draft the drafter's most probable token at every temperature accept it with the target's probability
    of it: that is a tree with one branch. Those that sample the draft verify it token by token.
    """
    if temperature and greedy_drafts:
        return tree(branch=1, depth=window, nodes=window)
    return chain(window, block=False)


def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[np.ndarray],
    how: decoding.Decoding,
) -> list[Answer]:
    """Answers the prompts one at a time; times include compilation."""
    answers = []
    for n, prompt in enumerate(prompts):
        found = decoding.decode(target, drafter, [prompt], how, [n])
        seconds = found.prefill_seconds + found.decode_seconds
        histogram_K1 = found.accepted_BxK1.sum(0)
        rounds = int(histogram_K1.sum()) if drafter else None
        accepted = np.cumsum(histogram_K1[::-1])[::-1][1:].tolist() if drafter else None
        answers.append(Answer(found.answers[0].tolist(), seconds, rounds, accepted))
    return answers


def margin(target: Target, prompt: np.ndarray, answer: Sequence[int], position: int) -> float:
    """Difference of the target's two largest logits where the token `position` of an answer is decided."""
    return decoding.top2_margin(target, np.concatenate([prompt, np.asarray(answer[:position], np.int32)]))
