"""The mapping of records to conversations: every shape, nulls, numbers, parts, preferences, and what ends a chat."""

from collections import Counter

import pytest

from ppow_jax.data.records import (
    EMPTY,
    HALVES,
    MEDIA,
    ORDER,
    SHAPES,
    TOOL,
    UNUSABLE,
    conversation_from_record,
    whole_text,
)
from ppow_jax.errors import UserError

HELLO = [("user", "hi"), ("assistant", "hello")]
ASK, SAY, BAD = ([{"role": r, "content": c}] for r, c in (("user", "hi"), ("assistant", "hello"), ("assistant", "no")))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}


def read(record, notes=None):
    found = conversation_from_record(record, "r:1", notes)
    return None if found is None else [(m.role, m.content) for m in found.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASK, "completion": SAY},
        {"prompt": ASK, "chosen": SAY, "rejected": BAD},
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"prompt": "hi", "chosen": ASK + SAY, "rejected": ASK + BAD},  # the prompt again
        {"prompt": "hi", "completion": SAY},
        {"chosen": ASK + SAY, "rejected": ASK + BAD},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"messages": [{"from": None, "role": "user", "value": None, "content": "hi", "tool_calls": None}, *SAY]},
        {"messages": None, "conversations": None, "prompt": "hi", "response": None, "answer": "hello"},
        {"prompt": "hi", "response": "", "completion": " ", "answer": "hello", "output": "not this"},
        {"Question": "hi", "Answer ": "hello"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                *SAY,
            ]
        },
        {
            "messages": [
                {"role": "user", "content": ["hi"]},
                {"role": "assistant", "content": {"type": "text", "text": "hello"}},
            ]
        },
        {"messages": [{"role": "user", "content": [{"text": "hi", "type": None}]}, *SAY]},
        {"prompt": [{"type": "text", "text": "hi"}], "response": "hello"},
        {"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'},
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "hello"]}},
        {"conversation": [{"human": "hi", "assistant": "hello"}]},
        {"conversation": [{"system": "", "input": "hi", "output": "hello"}]},
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        {"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "system", "content": None}, *ASK, *SAY]},
        {"messages": [*ASK, {"role": "assistant", "content": "hello", "tool_calls": [], "function_call": None}]},
        {"instruction": "hi", "input": None, "output": "hello"},
        {"query": "hi", "response": "hello", "history": []},
        {"input": "hi", "output": "hello"},
        {"question": "hi", "answer": ["hello", "good day"]},
        {"messages": [*ASK, *SAY, {"role": "user", "content": "  "}]},
    ],
    ids=lambda record: str(record)[:60],
)
def test_shapes(record):
    assert read(record) == HELLO


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"system": "be brief", "prompt": "hi"}, [("system", "be brief"), ("user", "hi")]),
        ({"system_prompt": "s", "question": "hi", "response": "hello"}, [("system", "s"), *HELLO]),
        (
            {"system": "not this", "messages": [{"role": "system", "content": "s"}, *ASK]},
            [("system", "s"), ("user", "hi")],
        ),
        ({"system": "", "prompt": "hi"}, [("user", "hi")]),
        ({"instruction": "do", "context": "this", "response": "done"}, [("user", "do\n\nthis"), ("assistant", "done")]),
        ({"instruction": "b", "history": [["hi", "hello"]]}, [*HELLO, ("user", "b")]),
        ({"prompt": "hi", "completion": "no", "label": False}, [("user", "hi")]),
        ({"prompt": "hi", "completion": "hello", "label": True}, HELLO),
    ],
)
def test_fields_beside_the_chat(record, messages):
    assert read(record) == messages


@pytest.mark.parametrize(
    ("answer", "text"),
    [(0, "0"), (False, "false"), (0.5, "0.5"), (12, "12"), ("0", "0"), (None, None), ("", None), ([], None)],
)
def test_answers_that_are_no_texts(answer, text):
    expected = [("user", "hi")] + ([("assistant", text)] if text else [])
    assert read({"prompt": "hi", "answer": answer}) == read({"question": "hi", "answer": answer}) == expected


def test_reasoning_is_kept_apart():
    for turn in (
        {"content": "hello", "reasoning_content": "hm"},
        {"content": "hello", "reasoning": "hm", "reasoning_content": None},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}]},
    ):
        messages = conversation_from_record({"messages": [*ASK, {"role": "assistant"} | turn]}, "here").messages
        assert (messages[1].content, messages[1].reasoning) == ("hello", "hm")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([CALL, {"role": "tool", "content": "sunny"}, *SAY], TOOL),
        ([{"role": "assistant", "content": "let me see", "tool_calls": CALL["tool_calls"]}], TOOL),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}], TOOL),
        ([{"from": "function_call", "value": "{}"}, {"from": "observation", "value": "sunny"}], TOOL),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], TOOL),
        ([{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}], TOOL),
        ([*SAY, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], MEDIA),
        ([*SAY, *SAY], ORDER),
        ([*SAY, {"role": "system", "content": "x"}, *ASK], ORDER),
        ([{"role": "assistant", "content": " "}, *ASK], EMPTY),
    ],
)
def test_what_ends_a_conversation_is_counted(turns, reason):
    notes = Counter()
    found = read({"messages": [*ASK, *turns]}, notes)
    assert found == (HELLO if SAY[0] in turns[:1] else HELLO[:1])
    assert notes == {reason: 1}


@pytest.mark.parametrize(
    ("record", "reasons"),
    [
        ({"messages": []}, {UNUSABLE: 1}),
        ({"messages": None}, {UNUSABLE: 1}),
        ({"prompt": None, "answer": "x"}, {UNUSABLE: 1}),
        ({"messages": [*SAY, *ASK]}, {UNUSABLE: 1, ORDER: 1}),
        ({"messages": [CALL]}, {UNUSABLE: 1, TOOL: 1}),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image> what?"}]}, {UNUSABLE: 1, MEDIA: 1}),
    ],
)
def test_records_of_no_use_are_counted(record, reasons):
    notes = Counter()
    assert read(record, notes) is None and notes == reasons


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no known field .* in a record with none"),
        ({"text": "User: hi"}, "in a record with 'text'; a plain text has no roles"),
        ({"role": "user", "content": "hi"}, 'a record is a whole chat: {"messages"'),
        ({f"column {i}": 1 for i in range(99)}, r"'column 7', \.\.\.$"),
        ({"messages": "hi"}, "must be a JSON list of messages"),
        ({"messages": "[" * 100_000}, "must be a JSON list of messages"),
        ({"messages": {"role": "user"}}, "must be a list of messages"),
        ({"messages": [[1]]}, "must be an object with role and content"),
        ({"messages": [{"content": "hi"}]}, "role None"),
        ({"messages": [{"role": 7, "content": "hi"}]}, "role 7"),
        ({"messages": [{"role": "user", "content": [1]}]}, "must be a text or an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "must be a string, not 1"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "must be a string"),
        ({"chosen": "hello", "rejected": "no"}, "must begin with"),
        ({"prompt": "hi", "answer": {"text": "x"}}, "must be a string"),
        ({"prompt": "hi", "answer": float("nan")}, "must be a string, not nan"),
        ({"prompt": 0}, "must be a string, not 0"),
        ({"instruction": "hi", "history": [["q"]]}, "a question and its answer"),
        ({"system": 3, "prompt": "hi"}, "must be a string, not 3"),
        (None, "must be a JSON object, not NoneType"),
        ("hi", "must be a JSON object, not str"),
    ],
)
def test_malformed_records_are_named(record, reason):
    with pytest.raises(UserError, match=reason) as error:
        read(record)
    assert str(error.value).startswith("r:1: ") and len(str(error.value)) < 400


def test_records_that_are_nested_as_deeply_as_can_be_read():
    value: list = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(UserError, match="r:1: nested too deeply"):
        read({"prompt": value})


def test_half_surrogates_are_replaced_and_counted():
    notes = Counter()
    record = {"prompt": "a \ud83d b", "answer": "\ud83d\ude00 \udc00"}
    assert read(record, notes) == [("user", "a \ufffd b"), ("assistant", "\U0001f600 \ufffd")] and notes == {HALVES: 2}
    assert whole_text("fine é 漢 🙂") == "fine é 漢 🙂"


def test_the_table_names_each_field_once():
    keys = [shape.key for shape in SHAPES]
    assert len(keys) == len(set(keys)) and all(key == key.lower() for key in keys)
