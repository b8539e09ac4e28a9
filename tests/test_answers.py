"""Regenerated answers: the target's own text, whatever the slots, the chunks, or the kills in between."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest

from ppow_jax.corpus import answers
from ppow_jax.corpus.answer_pack import prompt_key
from ppow_jax.data.conversations import Conversation, Message, load_conversations
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.weights import tiny

SETTINGS = answers.AnswerSettings(
    source="builtin",
    target="small",
    dtype="float32",
    temperature=0.0,
    max_new_tokens=12,
    max_prompt_tokens=60,
    turns=1,
    seed=3,
    slots=4,
    chunk=5,
    segment=4,
)
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2, hidden_size=32, intermediate_size=48, head_dim=8)


@functools.cache
def params():
    return jax.jit(lambda key: transformer.init(key, CONFIG, scale=0.3))(jax.random.key(1))


@functools.cache
def tokenizer():
    return tiny.tokenizer()


@functools.cache
def jobs():
    """13 prompts of different lengths: three chunks of 5, 5, 3."""
    conversations = load_conversations("builtin[0:60]")
    return tuple(answers.select_questions(tokenizer(), conversations, SETTINGS, 13))


def make(directory, settings=SETTINGS, jobs_=None, stop=lambda: False):
    return answers.regenerate(directory, params(), CONFIG, jobs_ or jobs(), settings, stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(directory, examples) of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("answers")
    return directory, make(directory)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def same(left, right):
    assert [e.source for e in left] == [e.source for e in right]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.answer_mask, b.answer_mask)


def test_the_answers_are_the_targets_greedy_text(whole):
    """Against one forward pass over each whole text: every answer token is the argmax, up to the end or the limit."""
    directory, examples = whole
    assert sorted(path.name for path in directory.glob("chunk*")) == [f"chunk-0000{c}.json" for c in range(3)]
    assert sorted(e.source for e in examples) == sorted(job.source for job in jobs())
    T = 80
    tokens = np.zeros((13, T), np.int32)
    for row, e in zip(tokens, examples, strict=True):
        row[: len(e.tokens)] = e.tokens

    @jax.jit
    def argmax(tokens):
        position = np.broadcast_to(np.arange(T), tokens.shape)
        out = transformer.forward(params(), CONFIG, tokens, position, transformer.causal_mask(13, T))
        return transformer.logits(params(), out.hidden_BxSxD).argmax(-1)

    best = np.asarray(argmax(tokens))
    prompts = {job.source: job.prompt for job in jobs()}
    for e, row in zip(examples, best, strict=True):
        first = len(prompts[e.source])
        np.testing.assert_array_equal(e.tokens[:first], prompts[e.source])
        np.testing.assert_array_equal(e.answer_mask, np.arange(len(e.tokens)) >= first)
        np.testing.assert_array_equal(e.tokens[first:], row[first - 1 : len(e.tokens) - 1])
        ended = e.tokens[-1] in CONFIG.eos_token_ids
        assert ended or len(e.tokens) - first == SETTINGS.max_new_tokens
        assert not np.isin(e.tokens[first:-1], CONFIG.eos_token_ids).any()


def test_lost_chunks_are_made_again_with_the_same_bytes(whole, tmp_path):
    first = make(tmp_path, stop=(tmp_path / "chunk-00000.json").exists)
    same(first, whole[1][:5])  # what there is
    (tmp_path / "chunk-00000.json").unlink()
    (tmp_path / "chunk-00002.json").write_bytes(contents(whole[0])["chunk-00002.json"])
    same(make(tmp_path), whole[1])
    assert contents(tmp_path) == contents(whole[0])


def test_a_stop_within_a_chunk_does_not_wait_for_its_end(whole, tmp_path):
    looks = iter([False, False, True])  # before the chunk, before two segments of it
    assert make(tmp_path, stop=lambda: next(looks)) == []
    assert not list(tmp_path.glob("chunk-*"))
    same(make(tmp_path), whole[1])
    assert contents(tmp_path) == contents(whole[0])


def test_finished_answers_are_only_read(whole, monkeypatch):
    monkeypatch.setattr(answers, "_generate_chunk", None)
    same(make(whole[0]), whole[1])


@pytest.mark.parametrize("content", [b"", b"[[1, 2], [3", b"\xff\xfe", b"null", b'{"a": 1}', b"[[99999999999999]]"])
def test_a_broken_chunk_is_named_and_made_again(whole, tmp_path, content, caplog):
    for name, data in contents(whole[0]).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "chunk-00001.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        same(make(tmp_path), whole[1])
    assert "chunk-00001.json" in caplog.text and "generated again" in caplog.text
    assert contents(tmp_path) == contents(whole[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"temperature": 0.5}, "temperature=0.0 (now 0.5)"), ({"seed": 4, "target": "other"}, "seed=3 (now 4)")],
)
def test_answers_of_other_settings_are_refused(whole, change, named):
    before = contents(whole[0])
    with pytest.raises(UserError) as error:
        make(whole[0], dataclasses.replace(SETTINGS, **change))
    assert named in str(error.value) and str(whole[0]) in str(error.value)
    assert "slots" not in str(error.value)
    assert contents(whole[0]) == before


def test_answers_to_other_prompts_are_refused(whole, tmp_path):
    """The data file changed, or more answers are asked for, so that chunks hold other prompts."""
    before = contents(whole[0])
    for other in (jobs()[::-1], jobs()[1:], jobs()[:12]):
        with pytest.raises(UserError, match=r"chunk-0000\d.json: the prompts that it answers have changed"):
            make(whole[0], jobs_=other)
    assert contents(whole[0]) == before
    # a cache of before prompts were noted is taken as it is, unless the numbers do not fit
    for name, data in before.items():
        if name != "prompts.json":
            (tmp_path / name).write_bytes(data)
    same(make(tmp_path), whole[1])
    (tmp_path / "prompts.json").unlink()
    (tmp_path / "chunk-00001.json").write_bytes(before["chunk-00002.json"])
    with pytest.raises(UserError, match=r"chunk-00001.json: holds 3 answers to 5 prompts"):
        make(tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_number_of_slots_changes_no_answer(whole, tmp_path, temperature):
    """Randomness belongs to the job, not to the row in which it is decoded."""
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    one = whole[1] if temperature == 0 else make(tmp_path / "a", settings)
    other = make(tmp_path / "b", dataclasses.replace(settings, slots=2, segment=3))
    same(one, other)
    if temperature:
        assert any(
            (a.tokens.shape != b.tokens.shape) or (a.tokens != b.tokens).any()
            for a, b in zip(one, whole[1], strict=True)
        )


def test_jobs_are_shuffled_by_the_seed_and_fit():
    conversations = load_conversations("builtin[0:60]")
    collect = functools.partial(answers.select_questions, tokenizer(), conversations)
    one, again = collect(SETTINGS, 20), collect(SETTINGS, 20)
    assert [j.source for j in one] == [j.source for j in again]
    assert [j.source for j in collect(SETTINGS, 7)] == [j.source for j in one[:7]]  # asking for more keeps the first
    assert [j.source for j in collect(dataclasses.replace(SETTINGS, seed=4), 20)] != [j.source for j in one]
    assert all(0 < len(j.prompt) <= SETTINGS.max_prompt_tokens and j.prompt.dtype == np.int32 for j in one)
    everything = collect(dataclasses.replace(SETTINGS, max_prompt_tokens=1000), 1000)
    prompts = {tuple(j.prompt) for j in everything}
    assert len(everything) == len(prompts) == 57 and max(len(j.prompt) for j in everything) > SETTINGS.max_prompt_tokens


def test_turns():
    """Each user turn up to the limit, with what was said before; a turn without a recorded answer ends it."""

    def chat(source, *roles):
        return Conversation(tuple(Message(r, f"{source[0]} {r}{i}") for i, r in enumerate(roles)), source)

    conversations = [
        chat("a:1", "user", "assistant", "user", "assistant", "user"),
        chat("b:1", "system", "user", "assistant", "user"),
        chat("c:1", "user", "user"),
    ]
    for turns, expected in (
        (1, {"a:1 turn 0", "b:1 turn 1", "c:1 turn 0"}),
        (2, {"a:1 turn 0", "a:1 turn 2", "b:1 turn 1", "b:1 turn 3", "c:1 turn 0"}),
        (9, {"a:1 turn 0", "a:1 turn 2", "a:1 turn 4", "b:1 turn 1", "b:1 turn 3", "c:1 turn 0"}),
    ):
        settings = dataclasses.replace(SETTINGS, turns=turns, max_prompt_tokens=500)
        jobs_ = answers.select_questions(tokenizer(), conversations, settings, 100)
        assert {job.source for job in jobs_} == expected
    prompt = next(j.prompt for j in jobs_ if j.source == "a:1 turn 2")
    np.testing.assert_array_equal(prompt, encode_prompt(tokenizer(), conversations[0].messages[:3]))
    assert tokenizer().decode(prompt).endswith("a user2<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_too_long_ends_its_conversation():
    long = Message("user", "x" * 100)
    conversation = Conversation(
        (Message("user", "a"), Message("assistant", "b"), long, Message("assistant", "b"), Message("user", "c")), "d:1"
    )
    settings = dataclasses.replace(SETTINGS, turns=5, max_prompt_tokens=80)
    found = answers.select_questions(tokenizer(), [conversation], settings, 9)
    assert [job.source for job in found] == ["d:1 turn 0"]


def test_unreadable_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json: cannot be read"):
        make(tmp_path)


def test_known_answers_are_not_made_again(whole, tmp_path, monkeypatch):
    """A run with a pack of another one generates what the pack lacks alone, and ends with the same answers."""
    first = [int(e.answer_mask.argmax()) for e in whole[1]]
    known = {prompt_key(e.tokens[:n]): e.tokens[n:] for e, n in zip(whole[1], first, strict=True)}
    lost = prompt_key(jobs()[0].prompt)
    del known[lost]
    asked, generate_chunk = [], answers._generate_chunk

    def watch(params, config, jobs, *rest):
        asked.extend(jobs)
        return generate_chunk(params, config, jobs, *rest)

    monkeypatch.setattr(answers, "_generate_chunk", watch)
    again = answers.regenerate(tmp_path / "again", params(), CONFIG, jobs(), SETTINGS, known=known)
    assert [prompt_key(job.prompt) for job in asked] == [lost]
    same(whole[1], again)


def test_a_prompt_that_recurs_is_answered_once():
    twice = [Conversation((Message("user", "Hello there"),), f"here:{i}") for i in range(3)]
    assert len(answers.select_questions(tokenizer(), twice, SETTINGS, 9)) == 1
