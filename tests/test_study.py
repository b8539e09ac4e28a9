"""A study of a tiny target: all arms run, are compared in pairs, and resume."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import small_run

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.study import page, run
from ppow_jax.study.arms import ARMS, find_arm, settings_of
from ppow_jax.study.settings import StudySettings

ARMS_TRIED = ("eagle3", "cst", "ppow:eta=0.5", "recipe", "recipe_tree_answer")
CHANGES = {
    "stages": "data,ppow",
    "num_answers": 24,
    "held_out": 4,
    "fresh_answers": 12,
    "test_answers": 4,
    "ppow_steps": 2,
    "evaluate_every": 2,
    "arms": ",".join(ARMS_TRIED),
    "seeds": "0,1",
}


@functools.cache
def start():
    return small_run.whole() / "drafter_supervised"


def study_settings(workdir, **changes):
    arguments = small_run.arguments(workdir, **(CHANGES | {"drafter": start(), "draft_vocab_size": 8192} | changes))
    return flags.parse(StudySettings, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study") / "run"
    assert run.run(study_settings(workdir)) == 0
    return workdir


def test_a_small_study_compares_an_arm_with_its_start(tmp_path):
    workdir = tmp_path / "run"
    modes = "tree,mixture,ngram"  # compared in the first one, which does not depend on measured costs
    changes = {"arms": "eagle3,recipe_mixture", "seeds": "0", "modes": modes}
    changes |= {"test_data": "builtin[500:520]", "test_data_answers": 3}
    assert run.run(study_settings(workdir, **changes, ppow_learning_rate=0.3)) == 0
    study = json.loads((workdir / "study.json").read_text())
    start, trained = study["arms"]
    assert study["test_answers"] == 4 + 3  # of --data and of --test_data
    assert (start["arm"], trained["arm"]) == ("eagle3", "recipe_mixture")
    assert start["tau_by_mode"]["ngram"] == trained["tau_by_mode"]["ngram"]  # which knows no drafter
    ratio = trained["tau"]["mean"] / start["tau"]["mean"]
    assert trained["paired_ratios"]["eagle3"]["mean"] == pytest.approx(ratio) and ratio != 1
    assert trained["tau"]["low"] <= trained["tau"]["mean"] <= trained["tau"]["high"]
    assert len((workdir / "study.csv").read_text().splitlines()) == 3
    assert "recipe" in (workdir / "study.md").read_text()
    assert (workdir / "tau_by_step.png").stat().st_size > 5000
    assert trained["candidates_by_mode"]["tree"] > trained["candidates_by_mode"]["ngram"] > 0
    assert start["flat_groups"] is None and 0 <= trained["flat_groups"] <= 1


@pytest.mark.full
def test_every_arm_is_reported_with_intervals_and_pairs(finished):
    study = json.loads((finished / "study.json").read_text())
    assert [row["arm"] for row in study["arms"]] == list(ARMS_TRIED) and study["seeds"] == [0, 1]
    rows = {row["arm"]: row for row in study["arms"]}
    for name, row in rows.items():
        assert row["tau"]["low"] <= row["tau"]["mean"] <= row["tau"]["high"]
        assert set(row["tau_by_mode"]) == {"chain", "adaptive", "tree"} and len(row["tau_by_seed"]) == 2
        assert set(row["paired_ratios"]) == set(ARMS_TRIED) - {name}
        assert ("paired_difference_to_start" in row) == (name != "eagle3")
    start, trained = rows["eagle3"], rows["recipe"]
    assert start["tau_by_seed"][0] == start["tau_by_seed"][1]
    gain = trained["tau"]["mean"] - start["tau"]["mean"]
    assert trained["paired_difference_to_start"]["mean"] == pytest.approx(gain, abs=1e-9)
    assert trained["paired_ratios"]["eagle3"]["mean"] == pytest.approx(trained["tau"]["mean"] / start["tau"]["mean"])
    text = (finished / "study.md").read_text()
    assert "CST rises a little over EAGLE-3" in text and "recipe_tree_answer" in text
    lines = (finished / "study.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(ARMS_TRIED)
    for name in ("tau_by_step", "acceptance_by_position", "difference_to_cst", "adaw_switch"):
        assert (finished / f"{name}.png").stat().st_size > 5000


@pytest.mark.full
def test_arms_read_the_same_batches_and_differ_by_their_objective(finished):
    """The seed alone decides which answers a step reads, and the arm what it makes of them."""
    rows = {}
    for name in ("cst", "recipe"):
        path = finished / "arms" / name / "seed1" / "metrics.jsonl"
        rows[name] = [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    assert len(rows["cst"]) == len(rows["recipe"]) == 2
    assert rows["cst"][0]["loss"] != rows["recipe"][0]["loss"]


@pytest.mark.full
def test_a_study_resumes_where_it_was(finished, monkeypatch):
    before = (finished / "study.json").read_text()
    (finished / "arms" / "cst" / "seed1" / "result.json").unlink()
    trained, train = [], run.train_stage_2

    def watch(context, start, stage):
        trained.append((stage, context.settings.seed))
        return train(context, start, stage)

    monkeypatch.setattr(run, "train_stage_2", watch)
    assert run.run(study_settings(finished)) == 0
    assert trained == [("cst", 1)]
    again, first = json.loads((finished / "study.json").read_text()), json.loads(before)
    for row in (*again["arms"], *first["arms"]):
        row.pop("seconds")
    assert again["arms"] == first["arms"]


@pytest.mark.full
def test_another_mode_is_replayed_without_training(finished, monkeypatch):
    """Modes that a finished study lacks are replayed with the drafters that it left."""
    path = finished / "arms" / "recipe" / "seed0" / "result.json"
    result = json.loads(path.read_text())
    tree = result["replayed"].pop("tree")
    path.write_text(json.dumps(result))
    monkeypatch.setattr(run, "train_stage_2", lambda *_: pytest.fail("it trained"))
    assert run.run(study_settings(finished)) == 0
    assert json.loads(path.read_text())["replayed"]["tree"] == tree


@pytest.mark.full
def test_rates_are_chosen_by_the_held_out_answers(tmp_path):
    workdir = tmp_path / "run"
    assert run.run(study_settings(workdir, arms="eagle3,cst", seeds="0", rates="1e-9,1e-2")) == 0
    study = json.loads((workdir / "study.json").read_text())
    tried = {
        rate: json.loads(next((workdir / "tuning" / rate).rglob("result.json")).read_text())
        for rate in ("1e-09", "0.01")
    }

    def tau(result):
        return np.mean([np.sum(found["tokens"]) / np.sum(found["rounds"]) for found in result["replayed"].values()])

    best = max(tried, key=lambda rate: tau(tried[rate]))
    assert study["rates"] == {"cst": float(best)}
    assert study["arms"][1]["rate"] == float(best)


def test_arms_and_what_they_change(tmp_path):
    base = study_settings(tmp_path)
    assert settings_of(find_arm("ppow_neither"), base, 3).eta == 0.0
    changed = settings_of(find_arm("ppow:eta=0.5;adaw=false"), base, 3)
    assert (changed.eta, changed.adaw, changed.seed, changed.estimator) == (0.5, False, 3, "sampled")
    for name in ("cst", "recipe"):
        changed = settings_of(find_arm(f"{name}:supervised_loss=acceptance;step_weights=acceptance"), base, 3)
        assert (changed.supervised_loss, changed.step_weights) == ("acceptance", "acceptance")
    exact = settings_of(find_arm("recipe"), base, 0, rate=3e-4)
    assert (exact.estimator, exact.ppow_learning_rate, exact.cst_learning_rate) == ("exact", 3e-4, 3e-4)
    for arm in ARMS.values():
        settings_of(arm, base, 0)  # settings that do not fit each other are refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "eagle3,pow"}, "--arms=pow: there is no arm 'pow'"),
        ({"arms": "eagle3,ppow:et=1"}, "'et=1' must be FIELD=VALUE"),
        ({"arms": "eagle3,ppow:group=0"}, "^--arms=ppow:group=0: --group=0: must be at least"),
        (
            {"arms": "eagle3,cst:step_weights=acceptance", "ttt_decay": 0.7},
            "^--arms=cst:step_weights=acceptance: --ttt_decay=0.7: has no effect with --step_weights=acceptance",
        ),
        ({"arms": "cst"}, "must include eagle3"),
        ({"arms": "eagle3,cst,cst"}, "names an arm twice"),
        ({"test_answers": 0}, "--test_answers=0: must be at least 2"),
        ({"test_data": "arithmetic"}, "--test_data and --test_data_answers: name both, or none"),
    ],
)
def test_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        study_settings(tmp_path, **changes)


@pytest.mark.parametrize("name", ["study", "study_tiny", "sensitivity"])
def test_shipped_studies_have_arms_that_can_run(name):
    path = Path(__file__).parents[1] / "experiments" / "configs" / f"{name}.flags"
    settings = flags.parse(StudySettings, [f"--flagfile={path}", "--workdir=anywhere"])
    assert settings.arms[0] == "eagle3" and len(settings.arms) > 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("builtin[:20]", r"--test_data=.*: builtin.* are in --data, too"),
        ("builtin[500:502]", r"has 2 prompts of at most \d+ tokens, but --test_data_answers=3"),
    ],
)
def test_prompts_to_compare_on_are_others(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        run.run(study_settings(tmp_path / "run", test_data=data, test_data_answers=3))


@pytest.mark.parametrize(
    ("low", "high", "claimed", "said"),
    [
        (0.9, 0.99, None, "does not hold"),
        (0.99, 1.01, None, "within noise"),
        (1.01, 1.03, None, "holds"),
        (1.01, 1.03, (1.051, 1.075), "holds, differs in size"),
        (1.04, 1.06, (1.051, 1.075), "holds"),
    ],
)
def test_verdicts(low, high, claimed, said):
    assert page.verdict({"mean": (low + high) / 2, "low": low, "high": high}, claimed) == said


def test_changed_settings_are_compared_with_the_first_arm_of_their_name():
    def row(name, flat=None):
        ratios = {other: {"mean": mean, "low": 0.9, "high": 1.1} for other, mean in (("ppow", 0.98), ("cst", 0.5))}
        return {"arm": name, "paired_ratios": ratios, "flat_groups": flat}

    rows = [row("cst"), row("ppow", 0.25), row("ppow:eta=1;eps=2", 0.125), row("recipe:gamma=0.2")]
    (line,) = page.settings_table(rows).splitlines()[2:]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "ppow",
        "eta=1, eps=2",
        "0.980 (0.900 to 1.100)",
        "0.12",
    ]
    assert page.settings_table(rows[:2]) == ""
