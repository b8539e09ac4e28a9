"""The texts of a run: prompts, the target's answers to them, recorded ones, and what is held out."""

import logging
from pathlib import Path

import numpy as np

from ppow_jax import config as config_lib
from ppow_jax.data.batches import Batches
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import Example, encode_conversation
from ppow_jax.data.known_ids import require_known
from ppow_jax.errors import UserError
from ppow_jax.training import answers
from ppow_jax.training.context import Stopped
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)


def collect_jobs(settings: TrainSettings, target: Target) -> list[answers.Job]:
    """The prompts to answer; raises UserError where lengths, texts or numbers do not fit."""
    longest = settings.max_prompt_tokens + settings.answer_tokens
    limit = target.config.max_position_embeddings
    config_lib.require(longest <= limit, f"--answer_tokens={settings.answer_tokens}: with the prompt, at most {limit}")
    conversations = load_conversations(settings.data)
    jobs = answers.collect_jobs(target.tokenizer, conversations, _answer_settings(settings), settings.num_answers)
    for job in jobs:
        require_known(job.prompt, target.config.vocab_size, job.source, target.tokenizer)
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


def load_batches(settings, workdir: Path, target: Target, jobs, stop: StopSignal) -> tuple[Batches, Batches]:
    """The training and the held-out batches; answers that are missing are generated."""
    recorded = _recorded(settings, target) if settings.recorded else []  # what is wrong with them comes before answers
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


def split(examples: list[Example], number: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(held out, the rest): whole conversations, about `number` examples of them."""
    conversations = sorted({_conversation(e) for e in examples})
    order = np.random.default_rng(seed).permutation(len(conversations))
    share = max(1, round(number * len(conversations) / len(examples)))
    chosen = {conversations[i] for i in order[:share]}
    return [e for e in examples if _conversation(e) in chosen], [e for e in examples if _conversation(e) not in chosen]


def _conversation(example: Example) -> str:
    return example.source.rsplit(" turn ", 1)[0]


def _recorded(settings: TrainSettings, target: Target) -> list[Example]:
    conversations = load_conversations(settings.recorded, settings.num_recorded or None)
    encoded = (encode_conversation(target.tokenizer, c, settings.row_length) for c in conversations)
    examples = [example for example in encoded if example is not None]
    for example in examples:
        require_known(example.tokens, target.config.vocab_size, example.source, target.tokenizer)
    return examples
