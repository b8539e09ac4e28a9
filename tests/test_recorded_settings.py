"""Checks before anything is answered: bad chats are left out and counted, hopeless runs refused."""

import dataclasses
import datetime
import json
import logging

import pytest
from small_run import arguments, settings

from ppow_jax import flags
from ppow_jax.data.templates import CHATML_TEMPLATE, with_date
from ppow_jax.errors import UserError
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.evaluation.dialogues import askable, batches, fitting, short_enough
from ppow_jax.inference.decoding import Decoding
from ppow_jax.speculation.settings import chain
from ppow_jax.training import texts
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.workdir import fix_date
from ppow_jax.weights import tiny
from ppow_jax.weights.targets import Target

PICKY = "{% for m in messages %}{% if 'zebra' in m.content %}{{ raise_exception('no zebras') }}{% endif %}{% endfor %}"
STRICT = (  # as some that know tool calls
    "{% for m in messages %}{% if not m.content %}{{ raise_exception('an answer must not be empty') }}{% endif %}"
    "{% endfor %}"
)


def target(template=CHATML_TEMPLATE):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Target("tiny", tiny.CONFIG, {}, tokenizer)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


LONG = chat(*"abcdefghijklmnopqrst")


def collect(tmp_path, data=None, recorded=None, template=CHATML_TEMPLATE, **changes):
    """(sources of the prompts, sources of the recorded examples), as a run collects them before it answers."""
    if data:
        changes["data"] = lines(tmp_path / "data.jsonl", *data)
    if recorded:
        changes["recorded"] = lines(tmp_path / "recorded.jsonl", *recorded)
    s = settings(tmp_path / "run", **changes)
    jobs = texts.collect_questions(s, target(template))
    found = texts.collect_recorded(s, target(template), jobs)
    return [source.source.rpartition("/")[2] for source in jobs], [e.source.rpartition("/")[2] for e in found]


def test_chats_that_the_template_refuses_are_left_out_and_counted(tmp_path, caplog):
    data = [{"prompt": f"{'zebra' if i % 4 == 1 else 'horse'} {i}"} for i in range(12)]
    recorded = [chat("hi", "yes"), chat("hi", "a zebra"), chat("zebra?", "yes"), chat("hi"), chat("hi", "no")]
    with caplog.at_level(logging.WARNING):
        jobs, examples = collect(tmp_path, data, recorded, PICKY + CHATML_TEMPLATE, held_out=2)
    assert sorted(jobs) == sorted(f"data.jsonl:{i + 1} turn 0" for i in range(12) if i % 4 != 1)
    assert examples == ["recorded.jsonl:1", "recorded.jsonl:5"]
    assert "3 conversations left out: the chat template refuses them; the first: " in caplog.text
    assert "--recorded: 3 conversations left out, the first: " in caplog.text and "no zebras" in caplog.text


EIGHT_LONG = [{"prompt": str(i) * 150} for i in range(8)]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"template": "{{ raise_exception('not me') }}"}, "none of 60 conversations can be asked; the first: .*not me"),
        ({"template": "{{ messages[0].content | length }}"}, "cannot be used: it omits the user's text"),
        ({"recorded": [chat("hi"), chat("there")]}, "--recorded=.*none of 2 conversations can be trained; .*:1:"),
        ({"recorded": [chat("hi", "x" * 9), chat("long " * 50, "x")]}, None),
        ({"recorded": [chat("long " * 50, "x")]}, "none of 1 conversations can be trained; .* its first 112 of"),
        ({"data": [LONG], "turns": 20, "held_out": 3}, "leaves nothing for training; 4 answers of 1 conversation"),
        ({"data": [LONG], "turns": 20, "held_out": 3, "recorded": [chat("hi", "there")]}, None),
        ({"data": [chat(*"abcdef"), chat(*"ghijkl")], "turns": 3, "held_out": 5}, None),
        ({"data": EIGHT_LONG, "held_out": 2, "max_prompt_tokens": 200}, "--row_length=112: none of"),
    ],
)
def test_hopeless_runs_are_refused_before_anything_is_answered(tmp_path, what, reason):
    if reason is None:
        assert collect(tmp_path, **what)[0]
        return
    with pytest.raises(UserError, match=reason) as error:
        collect(tmp_path, **what)
    assert "\n" not in str(error.value)


def test_the_parts_of_a_few_conversations_are_never_empty():
    @dataclasses.dataclass
    class Example:
        source: str

    for n in (2, 3, 5):
        examples = [Example(f"{i % n}:1 turn {i}") for i in range(40)]
        for number in (1, 20, 39):
            held_out, rest = texts.split(examples, (number,), seed=1)
            assert held_out and rest and len(held_out) + len(rest) == 40


def test_the_date_is_kept_in_the_workdir(tmp_path, monkeypatch):
    def on(day, *more):
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(day)

        monkeypatch.setattr(datetime, "date", Date)
        return fix_date(flags.parse(TrainSettings, [*arguments(tmp_path), *more]))

    first = on("2026-02-28")
    assert first.date == "2026-02-28"
    assert on("2026-03-01").date == "2026-03-01"  # nothing was begun
    flags.write_flagfile(tmp_path / "flags.txt", first)
    assert on("2026-03-01").date == "2026-02-28"
    assert on("2026-03-01", "--date=2020-01-01").date == "2020-01-01"  # which is refused as any other change is
    (tmp_path / "flags.txt").write_text("--seed=0\n")  # of before there was a date
    assert on("2026-03-01").date is None
    monkeypatch.undo()
    assert with_date(tiny.tokenizer(), first.date).chat_date == datetime.date(2026, 2, 28)


@pytest.mark.parametrize("date", ["today", "2026-2-3", "20260203", "2026-13-01", ""])
def test_dates_that_are_none(date):
    with pytest.raises(UserError, match=f"--date={date}: must be a day, such as 2026-01-31"):
        settings("anywhere", date=date)


def test_prompts_of_benchmarks_that_the_template_refuses(caplog):
    prompts = [Prompt((f"{animal} 1",), f"b:{i}") for i, animal in enumerate(("horse", "zebra", "horse"))]
    prompts.append(Prompt(("horse", "zebra"), "b:3"))
    picky, how = target(PICKY + CHATML_TEMPLATE), Decoding(chain(2), max_new_tokens=8)
    with caplog.at_level(logging.WARNING):
        kept = fitting(picky, Benchmark("animals", tuple(prompts)), how, skip=False)
    assert [prompt.source for prompt in kept] == ["b:0", "b:2"]
    assert "animals: 2 prompts left out, the first: b:1: " in caplog.text
    with pytest.raises(UserError, match="benchmark animals: none of its prompts can be asked; b:1: .*no zebras"):
        short_enough(picky, Benchmark("animals", (prompts[1],)), 100)


def test_an_answer_that_the_template_refuses_ends_a_dialogue_alone(caplog):
    picky = target(PICKY + CHATML_TEMPLATE)
    prompts = [Prompt(("horse", "and?"), "b:0"), Prompt(("donkey", "and?"), "b:1")]
    asked, skipped = [], []
    for batch in batches(picky, prompts, Decoding(chain(2), max_new_tokens=8, batch_size=2), skipped.append):
        asked.append([request.dialogue.prompt.source for request in batch])
        for request in batch:
            text = "a zebra" if request.dialogue.prompt.source == "b:0" else "fine"
            request.answer(picky, tiny.tokenizer()(text, return_tensors="np")["input_ids"][0])
    assert asked == [["b:0", "b:1"], ["b:1"]] and skipped == [1] and "no zebras" in caplog.text


def test_templates_that_take_no_empty_answers_get_short_ones():
    two = Benchmark("b", (Prompt(("one", "two"), "b:0"),))
    (_, strict), (_, plain) = (askable(target(t + CHATML_TEMPLATE), two)[0] for t in (STRICT, ""))
    assert strict == plain + 1


def test_long_prompts_are_left_out_of_benchmarks(tmp_path, caplog):
    prompts = tuple(Prompt((text,), f"here:{i}") for i, text in enumerate(("a", "b" * 90, "c" * 40)))
    found = short_enough(target(), Benchmark("letters", prompts), 80)
    assert [prompt.source for prompt in found.prompts] == ["here:0", "here:2"]
    assert short_enough(target(), Benchmark("letters", prompts), 5).prompts == prompts  # better long ones than none


def test_a_workdir_of_another_version_is_named(tmp_path):
    (tmp_path / "flags.txt").write_text("--seed=0\n--confidence_head=false\n")
    with pytest.raises(UserError, match=r"holds a run of another version \(.*flags.txt:2: --confidence_head: unknown"):
        fix_date(flags.parse(TrainSettings, arguments(tmp_path)))
