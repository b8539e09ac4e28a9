"""The texts of a run: prompts, the target's answers to them, recorded ones, and what is held out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ppow_jax import config as config_lib
from ppow_jax.data.batches import Batches
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.training import answers
from ppow_jax.training.context import Stopped
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.recorded import check_parts, read_recorded
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)

Text = TypeVar("Text", Example, answers.Job)


def collect_jobs(settings: TrainSettings, target: Target) -> list[answers.Job]:
    """The prompts to answer; raises UserError where lengths, texts or numbers do not fit."""
    longest = settings.max_prompt_tokens + settings.answer_tokens
    limit = target.config.max_position_embeddings
    config_lib.require(longest <= limit, f"--answer_tokens={settings.answer_tokens}: with the prompt, at most {limit}")
    conversations = load_conversations(settings.data)
    jobs = answers.collect_jobs(target.tokenizer, conversations, _answer_settings(settings), settings.num_answers)
    if len(jobs) <= settings.held_out:
        raise UserError(
            f"--data={settings.data}: {len(jobs)} prompts of at most {settings.max_prompt_tokens} tokens, "
            f"but --held_out={settings.held_out} are kept aside"
        )
    return jobs


def _answer_settings(settings: TrainSettings) -> answers.AnswerSettings:
    return answers.AnswerSettings(
        source=settings.data,
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


def collect_recorded(settings: TrainSettings, target: Target, jobs: list[answers.Job]) -> list[Example]:
    """The conversations to mix in as they stand.

    Raises UserError where they are of no use, or where these and `jobs` will leave nothing to train or to hold out.
    """
    recorded = read_recorded(settings, target.tokenizer) if settings.recorded else []
    held_out, train = split(jobs, settings.held_out, settings.seed)
    check_parts(settings, {"held-out": held_out, "training": [*train, *recorded]})
    return recorded


def load_batches(
    settings, workdir: Path, target: Target, jobs, recorded: list[Example], stop: StopSignal
) -> tuple[Batches, Batches]:
    """The training and the held-out batches; answers that are missing are generated."""
    examples = answers.regenerate(
        workdir / "answers",
        target.params,
        target.config,
        jobs,
        _answer_settings(settings),
        lambda: stop.requested,
    )
    if stop.requested:
        raise Stopped
    held_out, train = split(examples, settings.held_out, settings.seed)
    train += recorded
    shape = {
        "batch_size": settings.batch_size,
        "row_length": settings.row_length,
        "max_anchors": settings.max_anchors,
    }
    tokens = sum(int(e.answer_mask.sum()) for e in train)
    log.info("data: %d examples with %d answer tokens; %d held out", len(train), tokens, len(held_out))
    return Batches(train, seed=settings.seed, **shape), Batches(held_out, seed=settings.seed, **shape)


def split(examples: Sequence[Text], number: int, seed: int) -> tuple[list[Text], list[Text]]:
    """(held out, the rest): whole conversations, about `number` examples of them, and never all of several.

    They depend on the sources alone: prompts are parted as their answers will be.
    """
    conversations = sorted({_conversation(e) for e in examples})
    order = np.random.default_rng(seed).permutation(len(conversations))
    share = round(number * len(conversations) / len(examples))
    share = max(1, min(share, len(conversations) - 1))
    chosen = {conversations[i] for i in order[:share]}
    return [e for e in examples if _conversation(e) in chosen], [e for e in examples if _conversation(e) not in chosen]


def _conversation(example: Example | answers.Job) -> str:
    return example.source.rsplit(" turn ", 1)[0]
