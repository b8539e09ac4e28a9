"""experiments.serve_bench: the endpoint and `generate` answer the same prompts, and both are timed."""

import json

import numpy as np
import pytest
from small_model import MODES
from small_server import new_engine, patient

from experiments import serve_bench
from ppow_jax import cli
from ppow_jax.bench import serving
from ppow_jax.errors import UserError

TINY = ["--target=tiny", "--drafter=none", "--dtype=float32"]
PROMPTS = [np.frombuffer(text, np.uint8).astype(np.int32) for text in (b"a", b"Once upon a time", b"zz top")]


def test_both_sides_give_the_same_answers():
    work = serving.Workload(PROMPTS, clients=2, max_new_tokens=12, temperature=0.7)
    engine = new_engine("chain")
    found = serving.compare(engine, work, repetitions=2)
    generate, endpoint = found["results"]
    assert (generate["side"], endpoint["side"]) == ("generate", "endpoint")
    assert generate["tokens"] == endpoint["tokens"] == 3 * 12
    assert (found["identical"], found["answers"]) == (3, 3)
    for row in found["results"]:
        assert len(row["passes"]) == 2 and row["seconds"] > 0 and row["tokens_per_cpu_second"] > 0
    ratios = [b / a for a, b in zip(generate["passes"], endpoint["passes"], strict=True)]
    assert found["ratio"] == pytest.approx(np.median(ratios))
    text = serving.table(found)
    assert "3 of 3 answers identical" in text and "endpoint / generate" in text
    assert engine.idle and not engine.accepting  # it has ended


def test_every_prompt_is_answered_once_and_with_its_own_seed():
    work = serving.Workload(PROMPTS * 3, clients=4, max_new_tokens=5, temperature=1.0)
    with serving.running(new_engine("chain")) as address:
        answers = serving.by_clients(address, work)
    assert answers == serving.by_generate(patient(), MODES["chain"], work)
    assert len({text for text, _ in answers[::3]}) > 1  # of one prompt, by three seeds


def test_an_error_of_the_endpoint_ends_it():
    work = serving.Workload([np.zeros(600, np.int32)], clients=1, max_new_tokens=5)
    with serving.running(new_engine("chain")) as address, pytest.raises(UserError, match="prompt 0: .*512 tokens"):
        serving.by_clients(address, work)


@pytest.mark.full
def test_the_command_measures_and_writes(tmp_path, capsys):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abcabc", "one two one two")))
    flags = [*TINY, f"--prompts={prompts}", "--context=128"]
    flags += ["--clients=2", "--slots=2", "--repetitions=1", "--max_new_tokens=8", f"--output={output}"]
    with pytest.raises(SystemExit) as ended:
        cli.run(serve_bench.main, serve_bench.Settings, argv=flags)
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "tiny, ngram, 2 clients, 2 slots, 2 prompts" in out and "2 of 2 answers identical" in out
    result = json.loads(output.read_text())
    assert result["mode"] == "ngram" and result["ratio"] > 0 and result["device"].startswith("cpu")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--speculation=tree", "--drafter=none"], "--speculation=tree: needs a drafter, but --drafter=none"),
        (["--clients=0"], "--clients=0: must be at least 1"),
        ([*TINY, "--benchmarks=arithmetic", "--max_new_tokens=120", "--context=128"], "exceed the context, 128"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, part, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(serve_bench.main, serve_bench.Settings, argv=flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and part in last
