"""Files of every kind, sound and damaged, directories and patterns: the same chats, or one line that says why not."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ppow_jax.data.conversations import load_conversations, read_records
from ppow_jax.data.readers import ending, is_place, read_directory, stem
from ppow_jax.errors import UserError
from ppow_jax.evaluation.benchmarks import load_benchmark

LINES = '{"prompt": "one é", "answer": "1"}\n{"prompt": "two", "answer": null}\n'
ARRAY = json.dumps([json.loads(line) for line in LINES.splitlines()])
CSV = "prompt,answer\none é,1\ntwo,\n"
CHATS = [  # lists of messages
    [{"role": "user", "content": "one é"}, {"role": "assistant", "content": "1"}],
    [{"role": "user", "content": "two"}],
]
BOTH = [("one é", "1"), ("two",)]


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def chats(path):
    return [tuple(m.content for m in c.messages) for c in load_conversations(str(path))]


def parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "one é"}, {"role": "assistant", "content": "1"}], "prompt": None}]
    rows += [{"messages": None, "prompt": "two"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.JSONL", LINES.replace("\n", "\r\n").encode()),
        ("a.ndjson", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.json", LINES.encode()),  # JSON Lines by another name
        ("a.json", ARRAY.encode("utf-8-sig")),
        ("a.Json", json.dumps(json.loads(ARRAY), indent=2).encode()),
        ("a.jsonl", ARRAY.encode()),
        ("a.json", json.dumps(CHATS).encode()),
        ("a.jsonl", "".join(json.dumps(chat) + "\n" for chat in CHATS).encode()),
        ("a.jsonl", "".join(json.dumps(r, indent=1) for r in json.loads(ARRAY)).encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.json", ARRAY.encode("utf-32")),
        ("a.jsonl", LINES.rstrip("\n").encode()),
        ("a", LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("A.JSON.GZ", gzip.compress(ARRAY.encode(), mtime=0)),
        ("a.jsonl.gz", LINES.encode()),  # unpacked, and not renamed
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.jsonl.zst", zstd(LINES.encode())),
        ("a.csv", CSV.encode()),
        ("a.CSV", CSV.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.csv", CSV.replace(",", ";").encode()),
        ("a.csv", CSV.encode("utf-16")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("a.parquet", parquet),
        ("a.data", parquet),
    ],
)
def test_kinds_of_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data(tmp_path) if callable(data) else data)
    assert chats(tmp_path / name) == BOTH


def test_an_array_of_messages_is_one_chat(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CHATS[0], indent=1))
    assert chats(tmp_path / "a.json") == BOTH[:1]


def test_text_files_hold_a_prompt_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone é\r\n\r\ntwo\r\n".encode())
    assert [(c.user_turns, c.source) for c in load_conversations(f"{tmp_path}/a.txt")] == [
        (("one é",), f"{tmp_path}/a.txt:1"),
        (("two",), f"{tmp_path}/a.txt:3"),
    ]


def test_values_of_tables_are_texts_as_they_are_written(tmp_path):
    rows = ["007,NA", "NA,null", '"a\nb",1.50', "None,0"]
    (tmp_path / "a.csv").write_text("prompt,answer\n" + "".join(f"{row}\n" for row in rows))
    assert chats(tmp_path / "a.csv") == [("007", "NA"), ("NA", "null"), ("a\nb", "1.50"), ("None", "0")]
    (tmp_path / "b.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""hi""}]"\n')
    assert chats(tmp_path / "b.csv") == [("hi",)]


PACKED = gzip.compress((LINES * 500).encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl.gz", PACKED[:70], "damaged or truncated"),
        ("a.jsonl.gz", PACKED[:40] + bytes(8) + PACKED[48:], "damaged or truncated"),
        ("a.jsonl.gz", PACKED[:-8] + bytes(8), "damaged or truncated"),
        ("a.jsonl.xz", lzma.compress((LINES * 500).encode())[:90], "damaged or truncated"),
        ("a.jsonl.bz2", bz2.compress((LINES * 500).encode())[:90], "damaged or truncated"),
        ("a.jsonl.zst", zstd((LINES * 500).encode())[:60], "cannot read data file"),
        ("a.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "a.jsonl:2: not readable JSON: nested too deeply"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "a.json:1: not readable JSON: nested too deeply"),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl:1: not readable JSON: nested too deeply"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "a.jsonl:2: not UTF-8 text"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": "\xe9"}]', "a.json:2: not UTF-8 text"),
        ("a.jsonl", LINES.encode("utf-16")[:-3], "its byte order mark indicates UTF-16"),
        ("a.jsonl", b"\x00" * 50, "a.jsonl:1: not JSON"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": \n', "a.json:2: not JSON"),
        ("a.csv", b"prompt,answer\na,b,c,d\n", "Expected 2 fields in line 2, saw 4"),
        ("a.csv", b"prompt,answer\na,b\na,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"", "EmptyDataError"),
        ("a.csv", b"prompt,answer\n", "no usable record"),
        ("a.csv", b"prompt\n\xe9\n", "UnicodeDecodeError"),
        ("a.csv", b"text\nhi\n", "no known field .* in a record with 'text'"),
        ("a.csv.gz", gzip.compress(bytes(range(40, 120)) * 99, mtime=0)[:50], "EOFError"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: ArrowInvalid"),
        ("a.arrow", b"ARROW1 and no more", "a.arrow: "),
        ("a.txt", b"x\xe9\n", "UnicodeDecodeError"),
        ("a.zip", b"PK\x03\x04 and so on", "it is a zip archive; use one of .json"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason) as error:
        load_conversations(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_long_numbers_harm_nothing_but_what_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": %s, "prompt": "hi"}\n' % ("7" * 5000))  # noqa: UP031
    assert chats(tmp_path / "a.jsonl") == [("hi",)]
    (tmp_path / "a.jsonl").write_text('{"prompt": "hi", "answer": -%s}\n' % ("7" * 5000))  # noqa: UP031
    with pytest.raises(UserError, match="a.jsonl:1: the text in 'answer' must be a string, not -inf"):
        chats(tmp_path / "a.jsonl")


def test_what_is_cut_and_replaced_is_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    ask = {"role": "user", "content": "weather?"}
    records = [{"messages": [ask, call]}] * 3 + [{"messages": [ask, ask, call]}, {"prompt": "a \ud83d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert len(chats(tmp_path / "a.jsonl")) == 5
    assert "5 conversations, 0 records skipped" in caplog.text
    assert "cut: 4 at tool calls or results; unpaired surrogates replaced by U+FFFD in 1 messages" in caplog.text


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(LINES.encode(), mtime=0),)).start()
    assert chats(tmp_path / "pipe") == BOTH


# Directories and patterns


def line(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": text}) + "\n")


def test_directories_by_split(tmp_path):
    line(tmp_path / "b.jsonl", "b")
    line(tmp_path / "data" / "a.ndjson", "a")
    line(tmp_path / "test.jsonl", "test")
    line(tmp_path / "dev" / "x.jsonl", "dev")
    line(tmp_path / ".cache" / "x.jsonl", "hidden")
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "LICENSE.txt").write_text("text")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "c.csv").write_text("prompt\nc\n")
    assert chats(tmp_path) == chats(f"{tmp_path}:train") == [("b",), ("c",), ("a",)]
    assert chats(f"{tmp_path}:test") == [("test",)] and chats(f"{tmp_path}:validation[0:1]") == [("dev",)]
    with pytest.raises(UserError, match="no split 'dev', but train, validation, test; name one, as in .*:train"):
        chats(f"{tmp_path}:dev")
    assert [p.turns for p in load_benchmark(str(tmp_path / "data")).prompts] == [("a",)]
    with pytest.raises(UserError, match="it is a directory"):
        list(read_records(tmp_path))


def test_a_directory_without_data(tmp_path):
    with pytest.raises(UserError, match="it contains no data files"):
        chats(tmp_path)
    (tmp_path / "prompts.txt").write_text("hi\n")
    assert chats(tmp_path) == [("hi",)]


def test_what_datasets_saved(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "hi"}, {"prompt": "there"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert chats(tmp_path / "one") == chats(tmp_path / "two") == [("hi",), ("there",)]
    assert chats(f"{tmp_path}/two:test") == [("there",)]
    assert load_conversations(f"{tmp_path}/one[1:]")[0].source == f"{tmp_path}/one[1]"
    with pytest.raises(UserError, match="no split 'dev', but test, train"):
        list(read_directory(tmp_path / "two", "dev"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot read data directory"):
        chats(tmp_path / "one")


def test_patterns(tmp_path):
    for name in "ba":
        line(tmp_path / f"{name}.jsonl", name)
    assert chats(f"{tmp_path}/*.jsonl") == [("a",), ("b",)] and chats(f"{tmp_path}/?.jsonl[1:]") == [("b",)]
    with pytest.raises(UserError, match="no file matches it"):
        chats(f"{tmp_path}/*.csv")
    (tmp_path / "odd [1].jsonl").write_text('{"prompt": "odd"}\n')
    (tmp_path / "odd [2].csv").write_text("prompt\nodd\n")
    assert chats(f"{tmp_path}/odd [1].jsonl") == chats(f"{tmp_path}/odd [2].csv[0:1]") == [("odd",)]


@pytest.mark.parametrize(
    "name",
    [
        "none.csv",
        "none.PARQUET",
        "/none",
        "./none",
        "~/none/at/all",
        "none.jsonl.gz",
        "/dev/null/x",
        "x" * 300 + ".json",
    ],
)
def test_places_that_are_not_there(name):
    with pytest.raises(UserError, match="cannot read data file .*(No such file|Not a directory|name too long)"):
        load_conversations(name)


def test_names():
    assert [ending(name) for name in ("a.JSON.gz", "b.tsv", "c.ndjson.zst", "owner/name", "d.gz")] == [
        ".json",
        ".tsv",
        ".ndjson",
        None,
        None,
    ]
    assert is_place("x.csv") and is_place("/") and not is_place("owner/name") and not is_place("sharegpt")
    assert [stem(name) for name in ("a/mine.v2.JSONL.gz", "b/c.csv", "dir/")] == ["mine.v2", "c", "dir"]


def test_a_file_named_like_a_source_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").mkdir()  # a directory of that name hides nothing
    assert len(load_conversations("builtin[:3]")) == 3


def test_reading_json_needs_no_datasets(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    code = (
        "import sys; from ppow_jax.data.conversations import load_conversations as load; "
        "print(len(load(sys.argv[1])), 'datasets' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.jsonl"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False", "False"]
