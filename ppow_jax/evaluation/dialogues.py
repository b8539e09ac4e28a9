"""Prompts of a benchmark as dialogues with the target: turn by turn, in batches."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.data.known_ids import require_known
from ppow_jax.errors import UserError
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.flags import require
from ppow_jax.inference.decoding import Decoding, require_room
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Dialogue:
    """A prompt, its index in the benchmark, and the messages so far."""

    prompt: Prompt
    number: int
    messages: list[Message] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of a dialogue (0, 1, ...) that waits for its answer: token ids int32 [T]."""

    dialogue: Dialogue
    index: int
    tokens: np.ndarray

    @property
    def id(self) -> int:
        """A number that no other turn of the benchmark has."""
        return self.dialogue.number * 1000 + self.index

    def answer(self, target: Target, ids: np.ndarray) -> None:
        """Continues the dialogue: the next turn's prompt will hold this answer."""
        text = target.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        self.dialogue.messages.append(Message("assistant", text.strip()))


def short_enough(target: Target, benchmark: Benchmark, longest: int) -> Benchmark:
    """The prompts of at most `longest` tokens, with all their turns; all of them if none is that short."""
    kept = tuple(prompt for prompt, length in askable(target, benchmark) if length <= longest)
    if 0 < len(kept) < len(benchmark.prompts):
        left_out = len(benchmark.prompts) - len(kept)
        log.info("%s: %d prompts left out, they have more than %d tokens", benchmark.name, left_out, longest)
    return dataclasses.replace(benchmark, prompts=kept) if kept else benchmark


def askable(target: Target, benchmark: Benchmark) -> list[tuple[Prompt, int]]:
    """The prompts that the target's chat template accepts, each with its tokens, empty answers between its turns.

    The others are left out, with a log line. Raises UserError if none is left.
    """
    taken: list[tuple[Prompt, int]] = []
    refused: list[str] = []
    for prompt in benchmark.prompts:
        try:
            taken.append((prompt, _length(target, prompt)))
        except UserError as error:
            refused.append(str(error))
    require(bool(taken), f"benchmark {benchmark.name}: none of its prompts can be asked; {(refused or [''])[0]}")
    if refused:
        log.warning("%s: %d prompts left out, the first: %s", benchmark.name, len(refused), refused[0])
    return taken


def _length(target: Target, prompt: Prompt) -> int:
    """Number of tokens of the prompt with all its turns, with (almost) empty answers between them."""
    for answer in ("", "."):  # some templates refuse empty ones
        messages = [m for turn in prompt.turns for m in (Message("user", turn), Message("assistant", answer))]
        try:
            return len(encode_prompt(target.tokenizer, messages[:-1], prompt.source))
        except UserError:
            if answer or len(prompt.turns) == 1:
                raise
    raise AssertionError


def fitting(target: Target, benchmark: Benchmark, settings: Decoding, skip: bool) -> list[Prompt]:
    """The prompts whose longest possible dialogue fits the target's positions.

    Raises UserError at the first that does not, unless `skip`, and when none is left.
    """
    kept = []
    taken = askable(target, benchmark)
    for prompt, length in taken:
        answered = (len(prompt.turns) - 1) * settings.max_new_tokens
        try:
            require_room(target, length + answered, settings, prompt.source)
        except UserError as error:
            if not skip:
                raise UserError(f"{error} (--skip_long_prompts leaves such prompts out)") from None
        else:
            kept.append(prompt)
    left_out = len(taken) - len(kept)
    hint = "lower --max_new_tokens"
    require(bool(kept), f"benchmark {benchmark.name}: none of its {left_out} prompts fits; {hint}")
    if left_out:
        log.warning("%s: %d prompts left out, they are too long", benchmark.name, left_out)
    return kept


def require_known_texts(target: Target, benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError, naming the prompt, for a turn with a token that has no embedding in the target.

    Turns that the chat template refuses are left to `askable`.
    """
    for prompt in (prompt for benchmark in benchmarks for prompt in benchmark.prompts):
        for turn in prompt.turns:
            try:
                tokens = encode_prompt(target.tokenizer, [Message("user", turn)], prompt.source)
            except UserError:
                continue
            require_known(tokens, target.config.vocab_size, prompt.source, target.tokenizer)


def _prompt_ids(target: Target, messages: Sequence[Message], source: str) -> np.ndarray:
    tokens = encode_prompt(target.tokenizer, messages, source)
    require_known(tokens, target.config.vocab_size, source, target.tokenizer)
    return tokens


def batches(
    target: Target,
    prompts: Sequence[Prompt],
    settings: Decoding,
    skipped: Callable[[int], Any] = lambda turns: None,
) -> Iterator[list[Turn]]:
    """Batches of all first turns, then of all second ones, ...; within a turn, prompts of similar length together.

    Every turn of a batch must be answered before the next batch is requested. skipped: called with the
    number of turns of a dialogue that are left out, because it has become too long.
    """
    dialogues = [Dialogue(prompt, i) for i, prompt in enumerate(prompts)]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        waiting = []
        dialogues = [dialogue for dialogue in dialogues if len(dialogue.prompt.turns) > turn]
        for dialogue in dialogues[:]:
            dialogue.messages.append(Message("user", dialogue.prompt.turns[turn]))
            try:  # `fitting` counted answers as generated; retokenised, a text can take more tokens
                tokens = _prompt_ids(target, dialogue.messages, dialogue.prompt.source)
                require_room(target, len(tokens), settings, dialogue.prompt.source)
            except UserError as error:
                log.warning("left out: %s", error)
                dialogues.remove(dialogue)
                skipped(len(dialogue.prompt.turns) - turn)
            else:
                waiting.append(Turn(dialogue, turn, tokens))
        waiting.sort(key=lambda turn: len(turn.tokens))
        for i in range(0, len(waiting), settings.batch_size):
            yield waiting[i : i + settings.batch_size]
