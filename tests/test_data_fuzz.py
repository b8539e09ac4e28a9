"""Damaged data files and chat templates: one UserError, or what they really say; never anything else, nor a hang."""

import gzip
import json
import random
import re
import time

import pyarrow
import pyarrow.parquet
import pytest

from ppow_jax.data import conversations, templates
from ppow_jax.data.conversations import Conversation, Message
from ppow_jax.data.encoding import encode_conversation, encode_prompt, tiny_tokenizer
from ppow_jax.data.records import whole_text
from ppow_jax.errors import UserError

LIMIT = 20.0  # seconds of processor time, for what takes milliseconds: whatever else the machine does
CHAT = [{"role": "user", "content": "zebra one"}, {"role": "assistant", "content": "quagga two"}]
TOOLS = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "okapi"}}]}]
RECORDS = [
    {"messages": [{"role": "system", "content": "be brief"}, *CHAT, *CHAT], "id": 7},
    {"conversations": [{"from": "human", "value": "zebra"}, {"from": "gpt", "value": "quagga"}], "tools": None},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "onager"}]},
    {"messages": [CHAT[0], *TOOLS, {"role": "tool", "content": "sunny"}, CHAT[1]]},
    {"prompt": "zebra", "response": None, "answer": "quagga"},
    {"question": "zebra", "answer": 0},
    {"instruction": "zebra", "input": "kiang", "output": "quagga"},
    {"turns": ["zebra", "kiang"]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "zebra"}]}, CHAT[1]]},
]
FLAT = [{"prompt": "zebra", "answer": "quagga"}, {"prompt": "kiang, or not", "answer": ""}] * 3
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\x00",
    "\ud83d",
    "x" * 5000,
    [],
    {},
)
VALUES += ([None], [[]], {"role": "user"}, [{"type": "text"}], "[]", "{", [1, "x"], {"a": [1], "b": [2, 3]}, "\ufeff")
BYTES = (
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"[",
    b"]",
    b"\\u",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b",",
    b"9" * 4400,
)


def strings(value):
    """Every text within a value, numbers as JSON writes them; texts that are JSON themselves are opened."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    try:
        return [value, *strings(json.loads(value))] if isinstance(value, str) and value[:1] in "[{" else [str(value)]
    except ValueError:
        return [value]


def check(path, said):
    """Loads a file. True where it loads: then every message was said in it; else it is named in one line."""
    begin = time.process_time()
    try:
        found = conversations.load_conversations(str(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        found = []
    assert time.process_time() - begin < LIMIT
    known = "".join(whole_text(text) for text in [*said, "true", "false"]).replace('"', "")
    for chat in found:
        assert isinstance(chat, Conversation) and chat.user_turns and chat.source.startswith(str(path))
        chat_roles = [message.role for message in chat.messages if message.role != "system"]
        alternates = ["user", "assistant"] * len(chat_roles)
        assert chat_roles in (alternates[: len(chat_roles)], ["user"] * len(chat_roles))
        for message in chat.messages:
            assert message.role == "system" or message.content.strip()
            message.content.encode()
            for piece in message.content.split("\n\n"):
                assert piece.strip().replace('"', "") in known, (piece, chat.source)  # quotes: of CSV
    return bool(found)


def places(value):
    """(container, key) of every value within one."""
    for key in list(value) if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield value, key
        yield from places(value[key])


def change_values(seed, path):
    """One to three values of a record replaced, doubled, renamed or taken away."""
    rng = random.Random(seed)
    records = json.loads(json.dumps([rng.choice(RECORDS) for _ in range(4)]))
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice([place for record in records for place in places(record)])
        match rng.randrange(4):
            case 0 if isinstance(container, dict):
                container[rng.choice(("messages", "prompt", "content", "role", "chosen", "x", "system"))] = (
                    container.pop(key)
                )
            case 1:
                del container[key]
            case 2:
                container[key] = [container[key], container[key]]
            case _:
                container[key] = rng.choice(VALUES)
    text = "\n".join(json.dumps(record) for record in records)
    path = path.with_suffix(rng.choice((".jsonl", ".json", ".ndjson")))
    path.write_text(text)
    return check(path, [text for line in text.splitlines() for text in strings(json.loads(line))])


def damage(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 3:
                data[at : at + rng.randrange(3)] = rng.choice(BYTES)
            case 4:
                del data[at : at + rng.randrange(1, 20)]
        data = data or bytearray(b"\n")
    return bytes(data)


def sound_files():
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    table = "prompt,answer\n" + "".join(f'"{r["prompt"]}",{r["answer"]}\n' for r in FLAT)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FLAT), sink)
    return {
        "a.jsonl": lines,
        "b.json": json.dumps(RECORDS, indent=1).encode(),
        "c.jsonl.gz": gzip.compress(lines, mtime=0),
        "d.csv": table.encode(),
        "e.parquet": sink.getvalue().to_pybytes(),
        "f.txt": b"zebra\nkiang\n",
        "g.jsonl": lines.decode().encode("utf-16"),
    }


FILES = sound_files()
TABLES = ("d.csv", "e.parquet", "f.txt")


def change_bytes(seed, path, names=tuple(FILES)):
    """Bytes cut, flipped, doubled, overwritten: in texts that still parse, anything that they say is right."""
    rng = random.Random(seed)
    name = rng.choice(names)
    data = damage(rng, FILES[name])
    path = path.with_name(name)
    path.write_bytes(data)
    try:
        text = (
            gzip.decompress(data).decode()
            if name.endswith(".gz")
            else data.decode("utf-16" if name[0] == "g" else "utf-8")
        )
    except (ValueError, EOFError, OSError):
        text = None if name == "c.jsonl.gz" else data.decode(errors="replace")
    except Exception:  # zlib's
        text = None
    if name == "e.parquet" or text is None:
        return check(path, [json.dumps(RECORDS + FLAT, ensure_ascii=False)])
    parsed = []
    decoder = json.JSONDecoder(parse_int=lambda digits: digits)
    for part in [text, *text.splitlines()]:
        try:
            parsed += strings(decoder.decode(part.removeprefix("\ufeff")))
        except ValueError:
            parsed += [part.replace('""', '"')]
    return check(path, parsed)


def test_sound_files_load(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        assert check(tmp_path / name, [json.dumps(RECORDS + FLAT, ensure_ascii=False)])


@pytest.mark.parametrize("seed", range(6))
def test_a_few_damaged_records(tmp_path, seed):
    change_values(seed, tmp_path / "x")
    change_bytes(seed, tmp_path / "x", names=("a.jsonl", "b.json", "c.jsonl.gz", "g.jsonl"))


@pytest.mark.slow
def test_damaged_records(tmp_path):
    loaded = sum(change_values(seed, tmp_path / "x") for seed in range(1000, 1110))
    assert 25 < loaded < 105


@pytest.mark.slow
def test_damaged_files(tmp_path):
    loaded = sum(change_bytes(seed, tmp_path / "x") for seed in range(2000, 2120))
    assert 10 < loaded < 100


# Chat templates

THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PICKY = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{%- for m in messages -%}{%- if (m['role'] == 'user') != "
    "(loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}{%- if m['role'] == 'user' -%}"
    "[INST] {{ m['content'] }} [/INST]{%- else -%}{{ ' ' + m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
DATED = (
    "{%- if tools is not none and tools %}{{ tools | tojson }}{% endif %}{%- set today = strftime_now('%d %b %Y') %}"
    "Today: {{ today }}\n" + templates.CHATML_TEMPLATE
)
SOUND = (templates.CHATML_TEMPLATE, THINK, PICKY, DATED)
PIECES = (
    *("{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ tools | length }}", "{% if %}"),
    *("{{ nothing.at.all }}", "{% include 'x' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% break %}"),
    *("{{ ''.__class__.__mro__ }}", "{{ messages | tojson }}", "{% for i in range(10 ** 7) %}{% endfor %}"),
    *("{% generation %}", "{{ 'x' | int }}", "{% set messages = [] %}", "{% set messages = messages[:1] %}"),
    *("{{ messages.pop() }}", "{{ messages[0].update(a=1) }}", "{{ strftime_now('%Q %') }}", "{{ strftime_now(1) }}"),
    *("{%", "{#", "{{ bos_token }}", "{{ '\ud83d' }}", "{{ namespace(a=1).b.c }}"),
)
WORDS = (
    "messages",
    "content",
    "role",
    "user",
    "assistant",
    "system",
    "if",
    "for",
    "endfor",
    "endif",
    "loop",
    "not",
    "==",
    "[",
    "]",
)
ASKED = Conversation((Message("user", "zebra?"), Message("assistant", "quagga."), Message("user", "kiang?")), "chats:3")


def change_template(seed):
    """Spans cut, doubled or replaced, words exchanged: a prompt holds the question, or there is none."""
    rng = random.Random(seed)
    template = rng.choice(SOUND)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(template))
        match rng.randrange(5):
            case 0:
                template = template[:at] + template[at + rng.randrange(1, 30) :]
            case 1:
                template = template[:at] + template[at : at + rng.randrange(1, 30)] + template[at:]
            case 2:
                at = rng.choice([0, *(m.end() for m in re.finditer(r"%}|}}", template))])
                template = template[:at] + rng.choice(PIECES) + template[at:]
            case 3:
                word = rng.choice([word for word in WORDS if word in template])
                template = template.replace(word, rng.choice(WORDS), 1)
            case 4:
                template = template[:at]
        template = template or " "
    return check_template(template)


def check_template(template):
    """Whether a template serves to ask: then the question is in the prompt, and only answers are trained."""
    begin, used = time.process_time(), False
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for dated in (tokenizer, templates.with_date(tokenizer, "2026-02-05")):
        for messages in (ASKED.messages[:1], ASKED.messages, (Message("system", "be brief"), ASKED.messages[0])):
            try:
                text = tokenizer.decode(encode_prompt(dated, messages, "chats:3").tolist())
            except UserError as error:
                assert "'tiny'" in str(error) and "\n" not in str(error) and len(str(error)) < 500
            else:
                assert messages[-1].content in text and used is not None
                used = True
        try:
            example = encode_conversation(dated, ASKED, 500)
        except UserError as error:
            assert str(error).startswith(("chats:3: ", "the chat template")) and "'tiny'" in str(error)
        else:
            assert example is None or "quagga" in tokenizer.decode(example.tokens[example.answer_mask].tolist())
    assert time.process_time() - begin < LIMIT
    return used


def test_sound_templates_serve():
    assert all(map(check_template, SOUND))


@pytest.mark.parametrize("seed", range(8))
def test_a_few_damaged_templates(seed):
    change_template(seed)


@pytest.mark.slow
def test_damaged_templates():
    used = sum(change_template(seed) for seed in range(3000, 3130))
    assert 10 < used < 100
