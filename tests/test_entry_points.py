"""experiments.evaluate and experiments.generate from the command line, on the tiny target."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from eagle3_files import make_drafter

from experiments import evaluate, generate
from ppow_jax import cli
from ppow_jax.inference import model
from ppow_jax.inference.datastore import LEAD, Datastore
from ppow_jax.weights import loading, targets

ROOT = Path(__file__).parent.parent
PLAIN = ("--target=tiny", "--dtype=float32", "--max_new_tokens=8")  # compiled once for all tests
SHAPES = (*PLAIN, "--window=2")


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return make_drafter(tmp_path_factory.mktemp("drafters") / "small")


@pytest.fixture
def run(capsys):
    """Runs an entry point in this process -> (exit code, standard output, standard error)."""

    def call(module, *argv: str):
        with pytest.raises(SystemExit) as caught:
            cli.run(module.main, module.Settings, argv=argv)
        return caught.value.code or 0, *capsys.readouterr()

    return call


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_evaluate(run, drafter, tmp_path):
    prompts = write(tmp_path / "mine.jsonl", '{"prompt": "What is 3 + 4?"}\n{"turns": ["Count."]}\n')
    paths = {name: tmp_path / "new" / f"{name}.png" for name in ("output", "dump_outputs", "plot")}
    flags = [f"--{name}={path}" for name, path in paths.items()]
    store = f"--datastore={tmp_path / 'store'}"
    code, out, _ = run(evaluate, *SHAPES, f"--drafter={drafter}", f"--prompts={prompts}", *flags, store)
    assert code == 0 and "mine" in out and "2/2" in out and "acceptance by position" in out
    assert all(str(path) in out and path.exists() for path in paths.values())

    result = json.loads(paths["output"].read_text())
    assert set(result) == {"headline", "command", "schema", "device", "precision", "versions", "settings", "results"}
    assert out.startswith(result["headline"] + "\n") and result["command"].startswith("python -m experiments.evaluate ")
    assert result["schema"] == 1 and result["precision"] == "float32"
    assert result["settings"]["window"] == [2] and result["settings"]["benchmarks"] == [prompts]
    assert [row["benchmark"] for row in result["results"]] == ["mine"]
    assert len(result["results"][0]["accepted_histogram"]) == 16  # a mixture may accept all 15 looked-up tokens
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")

    lines = [json.loads(line) for line in paths["dump_outputs"].read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"{prompts}:1", f"{prompts}:2"]
    for line in lines:
        assert line["autoregressive_ids"] == line["speculative_ids"] and line["prompt_ids"][0] == 257
        assert set(line) >= {"benchmark", "turn"}
    parts = [[*line["prompt_ids"][-LEAD:], *line["autoregressive_ids"]] for line in lines]
    stored = Datastore(tmp_path / "store", 10_000).tokens.tolist()
    assert stored in (parts[0] + parts[1], parts[1] + parts[0])  # shorter prompts are answered first


def test_generate(run, drafter, tmp_path):
    code, plain, _ = run(generate, *PLAIN, "--speculation=off", "--prompt=What is 3 + 4?")
    assert code == 0 and "tau" not in plain
    number = re.search(r"without a drafter: (\d) tokens, [\d.]+ token/s \(prefill [\d.]+ s\)$", plain.strip())
    assert number and 1 <= int(number[1]) <= 8

    path = write(tmp_path / "prompt.txt", "What is 3 + 4?\n")
    flags = (*SHAPES, "--speculation=chain", f"--drafter={drafter}", f"--prompt_file={path}")
    code, both, _ = run(generate, *flags, "--compare")
    assert code == 0 and "the outputs are identical" in both and "speedup" in both
    told = r"with the drafter: \d tokens, .*, tau \d\.\d\d, \d+ of \d+ drafted tokens accepted \(prefill .*\n"
    assert re.search(told, both) and "\033" not in both  # no colours where there is no terminal
    assert both.splitlines()[0] == plain.splitlines()[0]  # the same text

    code, streamed, _ = run(generate, *flags, "--stream")
    assert code == 0 and streamed.splitlines()[0] == plain.splitlines()[0]
    stop = plain[2:4]
    assert "\n" not in stop
    code, stopped, _ = run(generate, *flags, f"--stop={stop}")
    assert code == 0 and stopped.startswith(plain[: plain.find(stop)] + "\n\n")

    code, raw, _ = run(generate, *flags, "--raw", f"--datastore={tmp_path / 'store'}")
    assert len(Datastore(tmp_path / "store", 10_000).tokens) > 1
    assert code == 0 and raw.splitlines()[0] != plain.splitlines()[0]


def test_generate_writes_a_trace(run, drafter, tmp_path):
    page = tmp_path / "new" / "trace.html"
    sizes = ("--speculation=tree", "--tree_branch=2", "--tree_depth=2", "--tree_nodes=4", "--max_new_tokens=8")
    code, out, _ = run(
        generate, "--target=tiny", "--dtype=float32", f"--drafter={drafter}", *sizes, "--prompt=a", f"--trace={page}"
    )
    assert code == 0 and f"{page}: open it in a browser" in out
    assert "tree of 4 nodes, depth 2, branch 2" in page.read_text(encoding="utf-8")


def test_chat(run, monkeypatch):
    asked = []
    plain = model.Model.chat_prompt

    def ask(model, messages):
        asked.append([dict(message) for message in messages])
        return plain(model, messages)

    monkeypatch.setattr(model.Model, "chat_prompt", ask)
    for text, turns in (("hi\n\nwhat?\n/quit\nnever\n", 2), ("hi", 1), ("", 0)):
        asked.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code, out, _ = run(generate, *PLAIN, "--chat")
        assert code == 0 and len(asked) == turns and bool(out) == bool(turns)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand?\n"))
    asked.clear()
    code, out, _ = run(generate, *PLAIN, "--chat")
    first, second = asked
    assert first == [{"role": "user", "content": "hi"}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert out.strip().startswith(second[1]["content"]) and second[2]["content"] == "and?"


def test_texts_that_are_not_utf8(run, monkeypatch, tmp_path, caplog):
    asked = []
    plain = model.Model.chat_prompt
    monkeypatch.setattr(model.Model, "chat_prompt", lambda m, said: asked.append(said) or plain(m, said))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfcaf\xe9\n"), encoding="ascii"))
    monkeypatch.setattr(cli, "setup_logging", lambda: None)
    code, out, _ = run(generate, *PLAIN, "--chat")
    assert code == 0 and out and asked[0][0]["content"] == "caf\ufffd"
    assert "replaced by U+FFFD" in caplog.text
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert generate.read_prompt(generate.Settings(prompt_file=str(path))) == "hello"
    path.write_bytes(b"caf\xe9")
    code, _, err = run(generate, *PLAIN, f"--prompt_file={path}")
    assert code == 2 and err == f"error: --prompt_file={path}: must be a text file in UTF-8\n"
    command = [sys.executable, "-m", "experiments.generate", "--target=tiny", b"--prompt=caf\xe9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stderr == b"error: '--prompt=caf\\udce9': must be UTF-8 text\n"


def test_a_drafter_of_the_target_s_name_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.find_drafter("auto", "tiny") is None
    make_drafter(tmp_path / "drafters" / "tiny")
    assert loading.find_drafter("auto", "tiny") == Path("drafters/tiny")
    assert loading.find_drafter(None, "tiny") is None
    assert loading.find_drafter("auto", "some/where/tiny") is None


def test_matrices_take_the_dtype_and_norms_stay_exact(drafter):
    loaded = loading.load_drafter(drafter, targets.load("tiny", "bfloat16"), "bfloat16")
    kinds = {name: str(value.dtype) for name, value in loaded.params.items()}
    assert kinds["fc"] == kinds["lm_head"] == "bfloat16"
    assert kinds["fc_norm"] == kinds["norm"] == kinds["input_norm"] == "float32"


EVALUATE_MISTAKES = [
    (("--drafter=nowhere",), "--drafter=nowhere: there is no such directory"),
    (("--drafter=EMPTY",), "not a drafter, it has no config.json"),
    (("--drafter=none",), "--drafter=none: name the directory of a drafter for tiny"),
    (("--prompts=nowhere.jsonl",), "nowhere.jsonl"),
    (("--prompts=BROKEN",), "broken.jsonl:2: not JSON"),
    (("--benchmarks=gsm9k",), "unknown benchmark 'gsm9k'"),
    (("--output=BROKEN/result.json",), "--output=BROKEN/result.json: "),
    (("--dump_outputs=EMPTY",), "--dump_outputs=EMPTY: must be a file"),
    (("--plot=plot.jpgg",), "--plot=plot.jpgg: must end in .png"),
    (("--window=0",), "--window=0: must be at least 1"),
    (("--window=65",), "--window=65: must be at most 64"),
    (("--max_new_tokens=1",), "--max_new_tokens=1: must be at least 2"),
    (("--num_prompts=0",), "--num_prompts=0: must be at least 1"),
    (("--temperature=-1",), "--temperature=-1.0: must be at least 0"),
    (("--dtype=float16",), "--dtype=float16: must be one of bfloat16, float32"),
    (("--batchsize=2",), "did you mean --batch_size?"),
]
GENERATE_MISTAKES = [
    ((), "--prompt=TEXT or --prompt_file=FILE: one of them must be given"),
    (("--prompt=a", "--prompt_file=b"), "one of them must be given"),
    (("--prompt= ",), "--prompt: must not be empty"),
    (("--prompt_file=nowhere.txt",), "--prompt_file=nowhere.txt: cannot be read"),
    (("--prompt_file=BLANK",), "blank.txt: is empty"),
    (("--prompt_file=BINARY",), "binary.txt: must be a text file"),
    (("--prompt=a", "--compare", "--drafter=none"), "--compare: needs a drafter"),
    (("--prompt=a", "--compare", "--speculation=chain"), "--compare: needs a drafter, but --target=tiny has none"),
    (("--prompt=a", "--drafter=nowhere"), "--drafter=nowhere: there is no such directory"),
    (("--prompt=a", "--window=0"), "--window=0: must be at least 1"),
    (("--prompt=a", "--speculation=trees"), "--speculation=trees: must be one of off, chain, tree, adaptive"),
    (("--prompt=a", "--speculation=tree"), "--speculation=tree: needs a drafter, but --target=tiny has none"),
    (("--prompt=a", "--tree_depth=3"), "--tree_depth=3: needs --speculation=tree"),
    (("--prompt=a", "--speculation=tree", "--window=3", "--tree_depth=3"), "--window=3 and --tree_depth=3: name the"),
    (("--prompt=a", "--speculation=tree", "--drafter=DRAFTER", "--tree_nodes=900"), "tree_nodes=900: must be 1 to 30"),
    (("--prompt=a", "--compare", "--speculation=off"), "--compare: needs another mode than --speculation=off"),
    (("--prompt=a", "--window=3", "--speculation=off"), "--window=3: needs a drafter, and another mode than"),
    (("--prompt=a", "--window=3", "--drafter=none"), "--window=3: needs a drafter"),
    (("--prompt=a", "--window=3"), "--window=3: needs a drafter, but --target=tiny has none"),
    (("--prompt=a", "--speculation=tree", "--drafter=none"), "--speculation=tree: needs a drafter, but --drafter=none"),
    (("--prompt=a", "--speculation=mixture"), "--speculation=mixture: needs a drafter, but --target=tiny has none"),
    (("--prompt=a", "--speculation=ngram", "--window=3"), "--window=3: --speculation=ngram has --ngram_tokens instead"),
    (("--prompt=a", "--speculation=ngram", "--tree_nodes=3"), "--tree_nodes=3: needs --speculation=tree, adaptive or"),
    (("--prompt=a", "--ngram_tokens=0"), "--ngram_tokens=0: must be at least 1"),
    (("--prompt=a", "--compilation_cache=BINARY"), "binary.txt: must be a directory that can be written to"),
    (("--prompt=a", "--top_p=0"), "--top_p=0.0: must be above 0"),
    (("--prompt=a", "--stop="), "--stop: must not be empty"),
    (("--prompt=a", "--chat"), "one of them must be given, or --chat"),
    (("--chat", "--compare"), "--chat: cannot be combined with --compare"),
    (("--prompt=a", "--trace=a.html", "--stream"), "--trace: cannot be combined with --stream"),
    (("--prompt=a", "--trace=EMPTY"), "--trace=EMPTY: must be a file"),
]


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [(evaluate, *case) for case in EVALUATE_MISTAKES] + [(generate, *case) for case in GENERATE_MISTAKES],
)
def test_mistakes_cost_no_loading(module, flags, message, run, drafter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "load", lambda *args: pytest.fail("a target was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    places = {
        "EMPTY": str(tmp_path / "empty"),
        "BROKEN": write(tmp_path / "broken.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        "BLANK": write(tmp_path / "blank.txt", "\n"),
        "BINARY": str(tmp_path / "binary.txt"),
        "DRAFTER": drafter,
    }
    for name, place in places.items():
        flags, message = tuple(flag.replace(name, place) for flag in flags), message.replace(name, place)
    base = ["--target=tiny", *([f"--drafter={drafter}"] if module is evaluate else [])]
    code, out, err = run(module, *base, *flags)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_mistakes_that_only_the_target_shows(run, drafter, tmp_path):
    other = make_drafter(tmp_path / "other", vocab_size=200)
    code, _, err = run(generate, *SHAPES, "--prompt=a", f"--drafter={other}")
    assert code == 2 and f"--drafter={other}: the drafter is for a vocabulary of 200 tokens" in err
    code, _, err = run(generate, *PLAIN, f"--prompt={'x' * 2040}")
    assert code == 2 and re.search(r"prompt: .*20\d\d tokens.* but tiny has 2048", err)
    path = write(tmp_path / "long.jsonl", json.dumps({"prompt": "x" * 2040}))
    code, _, err = run(evaluate, *SHAPES, f"--drafter={drafter}", f"--prompts={path}")
    assert code == 2 and f"{path}:1: a prompt of 20" in err


def test_a_process_of_its_own_fails_fast_and_helps():
    def program(name, *argv):
        command = [sys.executable, "-m", f"experiments.{name}", *argv]
        env = os.environ | {"COLUMNS": "100"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    bad = program("generate", "--prompt=a", "--windw=3")
    assert (bad.returncode, bad.stderr) == (2, "error: --windw: unknown flag; did you mean --window?\n")
    shown = program("evaluate", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("Measures a drafter")
    assert "--dump_outputs=TEXT" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 120
