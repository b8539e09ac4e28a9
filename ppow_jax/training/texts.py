"""Texts of a run: prompts, the target's answers to them, recorded answers, and the held-out part."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ppow_jax import distributed, flags
from ppow_jax.corpus import answers
from ppow_jax.corpus.answer_pack import read_packs, write_pack
from ppow_jax.data.batches import Batches
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import Example
from ppow_jax.data.known_ids import require_known
from ppow_jax.errors import UserError
from ppow_jax.training.recorded import check_parts, read_recorded
from ppow_jax.training.run.preemption import Stopped, StopSignal
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)
T = TypeVar("T", Example, answers.Question)


def collect_questions(settings: TrainSettings, target: Target) -> list[answers.Question]:
    """The prompts to answer; raises UserError where lengths, texts or numbers do not fit."""
    questions = read_questions(settings, target, settings.data, settings.num_answers)
    if len(questions) <= settings.held_out:
        raise UserError(
            f"--data={settings.data}: {len(questions)} prompts of at most {settings.max_prompt_tokens} tokens, "
            f"but --held_out={settings.held_out} are kept aside"
        )
    return questions


def read_questions(settings: TrainSettings, target: Target, data: str, number: int) -> list[answers.Question]:
    """At most `number` prompts of some sources; raises UserError where lengths or texts do not fit."""
    longest = settings.max_prompt_tokens + settings.answer_tokens
    limit = target.config.max_position_embeddings
    flags.require(longest <= limit, f"--answer_tokens={settings.answer_tokens}: with the prompt, at most {limit}")
    about = _answer_settings(settings, data)
    questions = answers.select_questions(target.tokenizer, load_conversations(data), about, number)
    for question in questions:
        require_known(question.prompt, target.config.vocab_size, question.source, target.tokenizer)
    return questions


def _answer_settings(settings: TrainSettings, data: str) -> answers.AnswerSettings:
    return answers.AnswerSettings(
        source=data,
        target=settings.target,
        dtype=settings.dtype,
        temperature=settings.answer_temperature,
        max_new_tokens=settings.answer_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        turns=settings.turns,
        seed=settings.seed,
        slots=settings.answer_slots,
        chunk=settings.answer_chunk,
    )


def _pack_about(settings: TrainSettings) -> dict[str, object]:
    s = settings
    return {"target": s.target, "dtype": s.dtype, "max_new_tokens": s.answer_tokens, "temperature": 0.0}


class Corpus(NamedTuple):
    """The texts of a run. train: for stage 1. fresh: for stage 2 and its baselines, the same object as `train` unless
    --fresh_answers reserves some. held_out: for choosing checkpoints. test: None without --test_answers.
    """

    train: Batches
    fresh: Batches
    held_out: Batches
    test: Batches | None


def collect_recorded(settings: TrainSettings, target: Target, questions: list[answers.Question]) -> list[Example]:
    """The recorded conversations to mix in unchanged.

    Raises UserError where none is usable, or where these and `questions` leave nothing for a part that is requested.
    """
    recorded = read_recorded(settings, target.tokenizer) if settings.recorded else []
    for example in recorded:
        require_known(example.tokens, target.config.vocab_size, example.source, target.tokenizer)
    *kept, train = split(questions, _kept(settings), settings.seed)
    named = zip(("held_out", "test_answers", "fresh_answers"), _kept(settings), kept, strict=True)
    asked = {f"--{name}={number}": part for name, number, part in named if number}
    parts: dict[str, Sequence[answers.Question | Example]] = dict(asked)
    if "supervised" in settings.stages or not settings.fresh_answers:
        parts["training"] = [*train, *recorded]
    conversations = {_conversation(question) for question in questions}
    check_parts(settings, parts, f"{len(questions)} answers of {len(conversations)} conversations")
    return recorded


def load_corpus(
    settings, workdir: Path, target: Target, questions, recorded: list[Example], stop: StopSignal
) -> Corpus:
    """All texts of the run as batches; missing answers are generated."""
    s = settings
    examples = answer(s, s.data, workdir / "answers", target, questions, stop)
    *kept, train = split(examples, _kept(s), s.seed)
    held_out, test, fresh = kept
    train += recorded

    tokens = sum(int(e.answer_mask.sum()) for e in [*train, *fresh])
    texts = "data: %d answers with %d tokens to train on; %d answers held out to choose checkpoints"
    log.info(texts, len(train) + len(fresh), tokens, len(held_out))
    own = batches_of(s, fresh) if fresh else None
    main = batches_of(s, train) if train else own
    return Corpus(main, own or main, batches_of(s, held_out), batches_of(s, test) if test else None)


def batches_of(settings: TrainSettings, examples: Sequence[Example]) -> Batches:
    """Batches of the run's shape, in the order of its seed."""
    s = settings
    shape = {"batch_size": s.batch_size, "row_length": s.row_length, "max_anchors": s.max_anchors}
    return Batches(examples, seed=s.seed, **shape)


def answer(
    settings: TrainSettings,
    data: str,
    directory: Path,
    target: Target,
    questions: list[answers.Question],
    stop: StopSignal,
) -> list[Example]:
    """The target's answers to prompts of some sources, kept in a directory, and beside it as a pack if they are greedy.

    Answers in --answers_from are not generated again. Raises Stopped on a signal.
    """
    packs, about = read_packs(settings.answers_from, _pack_about(settings)), _answer_settings(settings, data)
    found = answers.regenerate(directory, target.params, target.config, questions, about, lambda: stop.requested, packs)
    if stop.requested:
        raise Stopped
    if settings.answer_temperature == 0:
        pack = directory.with_name(f"{directory.name}.npz")
        distributed.by_leader(lambda: write_pack(pack, found, _pack_about(settings)))
    return found


def _kept(settings: TrainSettings) -> tuple[int, int, int]:
    return settings.held_out, settings.test_answers, settings.fresh_answers


def split(examples: Sequence[T], numbers: Sequence[int], seed: int) -> list[list[T]]:
    """Splits by conversations into parts of about `numbers` examples each, and the remainder: len(numbers) + 1 parts.

    Every requested part has at least one conversation, and so has the remainder, where there are enough of them.
    Parts depend on the sources alone: prompts are split in the same way as their answers will be.
    """
    conversations = sorted({_conversation(e) for e in examples})
    order = np.random.default_rng(seed).permutation(len(conversations))
    part_of: dict[str, int] = {}
    begin = 0
    for part, number in enumerate(numbers):
        later = sum(n > 0 for n in numbers[part + 1 :]) + (sum(numbers) < len(examples))  # one conversation each
        most = len(conversations) - begin - later
        share = max(1, min(round(number * len(conversations) / len(examples)), most)) if number else 0
        part_of |= {conversations[i]: part for i in order[begin : begin + share]}
        begin += share
    parts: list[list[T]] = [[] for _ in range(len(numbers) + 1)]
    for example in examples:
        parts[part_of.get(_conversation(example), len(numbers))].append(example)
    return parts


def _conversation(example: Example | answers.Question) -> str:
    return example.source.rsplit(" turn ", 1)[0]
