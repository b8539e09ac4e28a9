"""Online adaptation in the endpoint, its flags, and what its study computes."""

import dataclasses
import functools
import json
import signal

import pytest
from small_model import MODES, NEW
from small_online import PROMPTS, online
from small_server import patient, running, ticket, until

from experiments import generate, online_study, serve
from ppow_jax import cli
from ppow_jax.inference.model import SPECULATIONS, Model
from ppow_jax.online import study
from ppow_jax.online.study import Served
from ppow_jax.serving.engine import Engine
from ppow_jax.serving.machine import Machine
from ppow_jax.serving.metrics import Metrics

MODE = MODES["tree"]


def adapting_engine() -> Engine:
    found = dataclasses.replace(patient(), online=None)
    online(found)
    return Engine(Machine(found, MODE, 4, 512, 4), Metrics("small", MODE.window), 64)


@pytest.mark.full
def test_the_endpoint_adapts_between_rounds():
    """Answers are those without adaptation, before and after swaps; then a failing learner ends nothing."""
    engine = adapting_engine()
    model, session = engine.machine.model, engine.online
    settings = [{"temperature": 0.9 * (i % 2), "seed": i, "max_new_tokens": NEW} for i in range(len(PROMPTS))]
    columns = {name: [one[name] for one in settings] for name in settings[0]}
    frozen = Model(model.target, session.frozen)
    expected = [result.token_ids for result in frozen.generate(PROMPTS, speculation=MODE, **columns)]

    def ask():
        tickets = [ticket(prompt, **how) for prompt, how in zip(PROMPTS, settings, strict=True)]
        for one in tickets:
            engine.submit([one])
        return [one.emit.last.result.token_ids for one in tickets]

    with running(engine):
        for _ in range(4):
            assert ask() == expected
            until(lambda: engine.idle and not session.pending())  # idle: all that is left is done
        stats = session.stats()
        assert stats.requests == 4 * len(PROMPTS) and stats.steps >= 4 and stats.swaps >= 1 and stats.idle_seconds > 0
        assert engine.machine.drafter is model.drafter is not session.frozen
        page = engine.metrics.page().decode()
        assert f'ppow:online_requests_total{{model_name="small"}} {float(stats.requests)}' in page
        assert 'ppow:online_acceptance_length{drafter="frozen",model_name="small"}' in page

        def broken(*_, **__):
            raise MemoryError

        for name in ("finished", "work"):
            working = getattr(session, name)
            setattr(session, name, broken)
            assert ask() == expected
            until(lambda: engine.online is None)
            assert ask() == expected
            setattr(session, name, working)
            engine.online = session


@pytest.mark.parametrize(
    ("program", "flags", "part"),
    [
        (generate, ["--prompt=a", "--online"], "--online: needs --chat, it adapts between answers"),
        (generate, ["--chat", "--online_save=x"], "--online_save=x: needs --online"),
        (generate, ["--chat", "--online", "--speculation=ngram"], "--online: --speculation=ngram uses no drafter"),
        (generate, ["--chat", "--online", "--target=tiny"], "--online: needs a drafter, but --target=tiny has none"),
        (serve, ["--online", "--drafter=none"], "--online: needs a drafter to adapt, but --drafter=none"),
        (serve, ["--online", "--speculation=off"], "--online: --speculation=off uses no drafter"),
        (serve, ["--online", "--target=tiny", "--port=0"], "--online: needs a drafter, but --target=tiny has none"),
        (serve, ["--online", "--online_budget=0"], "--online_budget=0.0: must be above 0"),
        (online_study, [], "--workdir=DIR: must be given"),
        (online_study, ["--workdir=x", "--drafter=none"], "--drafter=none: there is nothing to adapt"),
    ],
)
def test_mistakes_are_told_in_one_line(program, flags, part, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(program.main, program.Settings, argv=flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and part in last


def request(rounds: int, frozen_rounds: int, **changes) -> Served:
    usual = {"adapting_seconds": 0.5, "plain_seconds": None, "identical": True, "share": 0.1}
    counts = {"steps": 3, "swaps": 1, "fallbacks": 0}
    times = {"seconds": float(rounds), "frozen_seconds": float(frozen_rounds)}
    return Served("code", 40, frozen_rounds, rounds, **(usual | counts | times | changes))


def test_the_study_sums_up(tmp_path):
    served = [request(20, 20), request(20, 20, plain_seconds=40.0), request(10, 20), request(8, 20)]
    served.append(dataclasses.replace(request(20, 20), workload="chat"))
    code, chat = study.summary(served)
    assert (code["workload"], code["requests"], code["identical"], code["requests_last"]) == ("code", 4, 4, 1)
    assert code["adapted_all"] == 160 / 58 and code["frozen_all"] == 2.0 and code["adapted_last"] == 5.0
    assert code["ratio_last"][0] == 2.5 and code["slowest_to_plain"] == 0.5
    assert code["time_share"] == 2.0 / 60.0 and code["won_back_after"] == 3
    assert chat["won_back_after"] is None and chat["slowest_to_plain"] is None
    study.plot(str(tmp_path / "plot.png"), served)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_a_kill_left_incomplete_is_served_again(tmp_path):
    path, served = tmp_path / "served.jsonl", [request(20, 20), request(10, 20, plain_seconds=3.0)]
    assert study.read_served(path) == [] and path.read_text() == ""
    whole = "".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in served)
    path.write_text(whole + whole[:30])
    assert study.read_served(path) == served and path.read_text() == whole


@pytest.mark.full
def test_the_study_serves_and_resumes():
    """Two requests, then the others, as after a kill; every answer is the same with both drafters."""
    found = dataclasses.replace(patient(), online=None)
    session = online(found)
    questions = [study.Question("small", found.job([prompt], "off").requests[0].prompt_ids) for prompt in PROMPTS]
    first = study.serve(session, questions, MODE, NEW, plain_every=4)
    served = [next(first), next(first)]
    session.close()
    session = online(dataclasses.replace(patient(), online=None))
    served += study.serve(session, questions, MODE, NEW, plain_every=4, before=served)
    assert len(served) == len(PROMPTS) and all(one.identical for one in served)
    assert [one.plain_seconds is not None for one in served] == [n % 4 == 0 for n in range(len(PROMPTS))]
    assert served[0].rounds == served[0].frozen_rounds and served[-1].steps >= 2
    assert study.summary(served)[0]["requests"] == len(PROMPTS)


@pytest.mark.full
def test_sigterm_stops_the_study_and_the_same_command_goes_on(tmp_path, monkeypatch, caplog):
    """The signal comes during the fourth request, which is finished; nothing that was trained is lost."""
    prompts = [patient().job([prompt], "off").requests[0].prompt_ids for prompt in PROMPTS]
    questions, serve = [study.Question("small", ids) for ids in prompts], study.serve

    def interrupted(*arguments, **how):
        for number, one in enumerate(serve(*arguments, **how)):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
            yield one

    monkeypatch.setattr("ppow_jax.inference.model.load", lambda *_: dataclasses.replace(patient(), online=None))
    monkeypatch.setitem(SPECULATIONS, "tree", MODE)
    monkeypatch.setattr("ppow_jax.weights.loading.find_drafter", lambda *_: tmp_path)
    monkeypatch.setattr(study, "questions_of", lambda *_: questions)
    adapt = functools.partialmethod(lambda _, model, save: online(model, save=save, save_every=100))
    monkeypatch.setattr(online_study.Settings, "adapt", adapt)
    settings = online_study.Settings(workdir=str(tmp_path / "run"), mode="tree", max_new_tokens=NEW)
    found = []
    for serving, code in ((interrupted, 128 + signal.SIGTERM), (serve, 0)):
        monkeypatch.setattr(study, "serve", serving)
        assert online_study.main(settings) == code
        found.append(study.read_served(tmp_path / "run" / "served.jsonl"))
        assert json.loads((tmp_path / "run" / "result.json").read_text())["results"][0]["requests"] == len(found[-1])
    first, last = found
    assert len(first) == 4 and len(last) == len(PROMPTS) and last[:4] == first
    assert last[-1].steps >= first[-1].steps > 0 and "lost by a kill" not in caplog.text
