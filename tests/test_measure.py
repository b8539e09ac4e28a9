"""The measurement on a tiny target with a drafter of random weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.errors import UserError
from ppow_jax.evaluation import measure, measured, plots, report
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.inference import decoding
from ppow_jax.inference.batch import bucket
from ppow_jax.inference.costs import Costs, measure_cost_table
from ppow_jax.inference.datastore import LEAD, Datastore
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import adaptive_tree, chain, mixture, ngram, tree
from ppow_jax.weights import targets


def benchmark(*prompts: tuple[str, ...], name: str = "mine") -> Benchmark:
    return Benchmark(name, tuple(Prompt(turns, f"{name}.jsonl:{i}") for i, turns in enumerate(prompts, 1)))


SINGLE = benchmark(*((f"What is {i} + {i}?",) for i in range(11)), name="sums")
TURNS = benchmark(("Count.", "Go on."), ("Hello!",), ("Why?", "Really?"), name="turns")
HOW = decoding.Decoding(chain(3), max_new_tokens=20, batch_size=3)  # one set of shapes for most tests
SETTINGS = {"speculations": [chain(3)], "max_new_tokens": 20, "batch_size": 3}


@pytest.fixture(scope="module")
def target():
    """Two layers of the tiny target, damped, so that it often repeats a token."""
    tiny = targets.load("tiny", "float32")
    layers = [layer | {name: 0.4 * layer[name] for name in ("o_proj", "down_proj")} for layer in tiny.params["layers"]]
    config = dataclasses.replace(tiny.config, num_layers=2)
    return dataclasses.replace(tiny, config=config, params=tiny.params | {"layers": layers[:2]})


@pytest.fixture(scope="module")
def drafter(target):
    """Guesses that the target repeats its last token, which is often accepted; no draft for tokens below 10."""
    c, ids = target.config, jnp.arange(10, target.config.vocab_size)
    config = small_configs.drafter_config(c, len(ids))
    params = drafting.init(jax.random.key(1), config, scale=0.05)
    last_feature = jnp.concatenate([jnp.zeros((c.hidden_size, 2 * c.hidden_size)), jnp.eye(c.hidden_size)], 1)
    params |= {"fc": last_feature, "lm_head": target.params["embed"][ids]}
    return Drafter(config=config, params=params, target_ids_W=ids)


@pytest.fixture(scope="module")
def greedy(target, drafter):
    """Both benchmarks at temperature 0: (rows, outputs)."""
    outputs = []
    return measure.evaluate(target, drafter, [SINGLE, TURNS], **SETTINGS, on_output=outputs.append), outputs


def test_outputs_are_identical_and_in_order(target, greedy):
    rows, outputs = greedy
    assert [(row["identical"], row["total"], row["num_prompts"]) for row in rows] == [(11, 11, 11), (5, 5, 3)]
    assert [(o.source, o.turn) for o in outputs[:11]] == [(p.source, 0) for p in SINGLE.prompts]
    expected = [(f"turns.jsonl:{i}", turn) for i, turn in ((1, 0), (1, 1), (2, 0), (3, 0), (3, 1))]
    assert [(o.source, o.turn) for o in outputs[11:]] == expected
    end = target.config.eos_token_ids[0]
    for o in outputs:
        assert o.autoregressive_ids.tolist() == o.speculative_ids.tolist()
        assert 1 <= len(o.speculative_ids) <= 20 and end not in o.speculative_ids[:-1]
        assert len(o.speculative_ids) == 20 or o.speculative_ids[-1] == end
    assert json.loads(json.dumps(outputs[0].as_json()))["prompt_ids"] == outputs[0].prompt_ids.tolist()


def test_neighbours_do_not_matter(target, drafter, greedy):
    for output in greedy[1][:2]:
        alone = decoding.decode(target, drafter, [output.prompt_ids], HOW)
        assert [ids.tolist() for ids in alone.answers] == [output.speculative_ids.tolist()]
        assert alone.accepted_BxK1.shape == (1, 4)


def test_a_later_turn_follows_plain_decoding_s_answer(target, greedy):
    first, second = greedy[1][11:13]
    text = target.tokenizer.decode(first.autoregressive_ids.tolist(), skip_special_tokens=True).strip()
    said = (("user", "Count."), ("assistant", text), ("user", "Go on."))
    prompt = encode_prompt(target.tokenizer, [Message(*message) for message in said])
    assert second.prompt_ids.tolist() == prompt.tolist()


def test_tokens_and_verifications_add_up(greedy):
    rows, outputs = greedy
    for row in rows:
        answers = [o.speculative_ids for o in outputs if o.benchmark == row["benchmark"]]
        histogram = row["accepted_histogram"]
        assert row["new_tokens"] == row["baseline_new_tokens"] == sum(len(a) - 1 for a in answers)
        assert len(histogram) == 4 and row["num_verifications"] == sum(histogram)
        assert sum(histogram[1:]) > 0, "the test wants some accepted drafts"
        behind_the_end = sum((k + 1) * n for k, n in enumerate(histogram)) - row["new_tokens"]
        assert 0 <= behind_the_end <= 3 * len(answers)
        assert row["tau"] == row["new_tokens"] / row["num_verifications"] > 1
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["baseline_tokens_per_second"])
        assert row["tokens_per_second"] == pytest.approx(row["new_tokens"] / row["decode_seconds"])


def test_a_mixture_reports_its_sources_and_lookup_needs_no_drafter(target, drafter, monkeypatch, tmp_path):
    def cost_table(target, drafter, speculation, *_, **__):
        return CostTable.of(0.05, 1 + 0.05 * np.arange(speculation.verified + 1))

    monkeypatch.setattr(measure, "measure_cost_table", cost_table)
    monkeypatch.setattr(measure, "measure_costs", lambda *_, **__: Costs(0.2, 1.0, 0.5, 2))
    limits = {"max_new_tokens": 20, "batch_size": 3}
    (alone,) = measure.evaluate(target, None, [TURNS], speculations=[ngram(3)], **limits)
    outputs: list[measured.Output] = []
    store, kept = Datastore(tmp_path, target.config.vocab_size, 2048), {"on_output": outputs.append}
    (stored,) = measure.evaluate(target, None, [TURNS], speculations=[ngram(3)], **limits, **kept, datastore=store)
    assert stored["identical"] == stored["total"] == 5 and stored["tau"] > 1
    assert len(store.tokens) == sum(min(len(o.prompt_ids), LEAD) + len(o.autoregressive_ids) for o in outputs)
    lookup, mixed = measure.evaluate(target, drafter, [TURNS], speculations=[ngram(3), mixture(2, 2, 4, 3)], **limits)
    assert [row["mode"] for row in (alone, lookup, mixed)] == ["ngram", "ngram", "mixture"]
    assert all(row["identical"] == row["total"] == 5 for row in (alone, lookup, mixed))
    assert alone["accepted_histogram"] == lookup["accepted_histogram"] and alone["tau"] > 1
    assert "sources" not in lookup and set(mixed["sources"]) == {"drafter", "ngram", "both"}
    counts = mixed["sources"].values()
    assert sum(count["drafted"] for count in counts) == mixed["num_draft_tokens"]
    accepted = sum(k * n for k, n in enumerate(mixed["accepted_histogram"]))
    assert sum(count["accepted"] for count in counts) == accepted
    of, both = mixed["sources"]["ngram"], mixed["sources"]["both"]
    assert mixed["ngram_share"] == of["accepted"] / accepted
    assert mixed["ngram_acceptance_rate"] == (of["accepted"] + both["accepted"]) / (of["drafted"] + both["drafted"])
    assert "n-gram share" in report.console_table([mixed]) and "n-gram share" not in report.console_table([lookup])


def test_acceptance_from_a_histogram():
    conditional, marginal = measured.acceptance([4, 3, 2, 1])
    assert conditional == [6 / 10, 3 / 6, 1 / 3] and marginal == [6 / 10, 3 / 10, 1 / 10]
    assert measured.acceptance([5, 0, 0]) == ([0.0, None], [0.0, 0.0])
    assert measured.acceptance([0, 0]) == ([None], [None])


def test_rows_have_the_documented_keys(greedy, tmp_path):
    row = greedy[0][0]
    page = (Path(__file__).parent.parent / "docs" / "results_schema.md").read_text()
    assert all(f"`{key}`" in page for key in row)
    assert row["mode"] == "chain" and row["window"] == 3 and row["temperature"] == 0.0 and row["batch_size"] == 3
    seconds = (
        "draft_seconds",
        "verify_seconds",
        "plain_seconds",
        "prefill_seconds",
        "baseline_prefill_seconds",
    )
    assert all(row[key] > 0 for key in (*seconds, "gamma", "verify_cost_ratio"))
    assert row["gamma"] == pytest.approx(row["draft_seconds"] / 3 / row["plain_seconds"])
    whole = measure.environment("float32") | {"settings": {}, "results": greedy[0]}
    report.write_json(tmp_path / "r.json", whole)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["schema"] == 1 and read["device"].startswith("cpu (") and read["results"][0]["tau"] == row["tau"]
    plots.plot_results(tmp_path / "r.png", whole | {"arms": [report.arm("x", greedy[0])]})
    assert "11/11" in report.console_table(greedy[0])


@pytest.mark.full
def test_all_ways_to_speculate_side_by_side(target, drafter, greedy):
    ways = [chain(3), adaptive_tree(3, 3, 8), tree(3, 3, 8), tree(3, 3, 4)]
    outputs: list[measured.Output] = []
    settings = SETTINGS | {"speculations": ways, "on_output": outputs.append}
    before = generate.decode._cache_size(), generate.prefill._cache_size()
    rows = measure.evaluate(target, drafter, [SINGLE, TURNS], **settings)
    compiled = generate.decode._cache_size() - before[0], generate.prefill._cache_size() - before[1]
    lengths = {bucket(len(output.prompt_ids)) for output in outputs}
    assert compiled == (3, 0) and len(lengths) == 2  # one for each new way, whatever the prompts' lengths
    assert [(row["benchmark"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("sums", "turns") for mode in ("chain", "adaptive", "tree", "tree")
    ]
    assert all(row["identical"] == row["total"] for row in rows)
    assert [row["tree"] and row["tree"]["nodes"] for row in rows[:4]] == [None, 8, 8, 4]
    assert rows[0]["accepted_histogram"] == greedy[0][0]["accepted_histogram"]
    assert {row["baseline_decode_seconds"] for row in rows[:4]} == {rows[0]["baseline_decode_seconds"]}
    for row in rows:
        assert row["tau_interval"][0] <= row["tau"] <= row["tau_interval"][1]
        assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
        accepted = sum(k * n for k, n in enumerate(row["accepted_histogram"]))
        if row["mode"] == "adaptive" and not row["num_draft_tokens"]:  # on this machine, drafting may never pay
            assert row["draft_acceptance_rate"] is None and row["tau"] == 1
        else:
            assert row["draft_acceptance_rate"] == accepted / row["num_draft_tokens"] > 0
    assert rows[2]["num_draft_tokens"] == 8 * rows[2]["num_verifications"]
    assert [o.mode for o in outputs[:44]] == ["chain"] * 11 + ["adaptive"] * 11 + ["tree"] * 22
    best = report.winners(rows)
    assert {way["mode"] for way in best} == {"chain", "adaptive", "tree"}
    assert [way["mean_speedup"] for way in best] == sorted((way["mean_speedup"] for way in best), reverse=True)


def test_the_margin_where_answers_part(target):
    tokens = np.array([5, 6, 7])
    out = transformer.forward(
        target.params, target.config, tokens[None], np.arange(3)[None], transformer.causal_mask(1, 3)
    )
    best = np.sort(np.asarray(transformer.logits(target.params, out.hidden_BxSxD[0, -1])))
    assert decoding.top2_margin(target, tokens) == pytest.approx(best[-1] - best[-2], abs=1e-4)


@pytest.mark.full
def test_sampling(target, drafter):
    def run(seed):
        outputs = []
        settings = SETTINGS | {"temperature": 1, "seeds": (seed,), "on_output": outputs.append}
        row = measure.evaluate(target, drafter, [benchmark(("a",), ("b",))], **settings)[0]
        return row, [o.speculative_ids.tolist() for o in outputs]

    row, ids = run(0)
    assert row["identical"] is None and row["total"] == 2
    assert row["new_tokens"] == sum(len(a) - 1 for a in ids)
    assert run(0)[1] == ids != run(1)[1]


@pytest.mark.full
def test_sampled_trees_give_the_answers_of_plain_decoding(target, drafter):
    settings = SETTINGS | {"temperature": 1, "seeds": (0, 1), "speculations": [tree(3, 3, 8), adaptive_tree(3, 3, 8)]}
    rows = measure.evaluate(target, drafter, [benchmark(("a",), ("b",))], **settings)
    assert [(row["identical"], row["total"]) for row in rows] == [(4, 4)] * 2


def test_programs_are_compiled_once_per_length_bucket(target, drafter, greedy):
    before = generate.decode._cache_size(), generate.prefill._cache_size()
    for n in (1, 5, 40, 64):
        for arm in (None, drafter):
            decoding.decode(target, arm, [np.full(n, 7, np.int32)], HOW, rounds=1)
            decoding.decode(target, arm, [np.full(n, 7, np.int32)] * 2, HOW, (3, 4))
    assert (generate.decode._cache_size(), generate.prefill._cache_size()) == before


def test_length_buckets_hold_their_length_and_are_few():
    buckets = [bucket(n) for n in range(1, 4097)]
    assert all(0 <= r - n < max(64, n / 2) for n, r in enumerate(buckets, 1))
    assert buckets == sorted(buckets) and set(np.array(buckets) % 64) == {0}
    assert sorted(set(buckets)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]


def test_costs(target, drafter, greedy):
    costs = measure.measure_costs(target, drafter, chain(3), HOW.cache_length(64), batch=3, repetitions=2)
    assert costs.gamma == costs.draft / 3 / costs.plain_step > 0
    assert costs.verify_ratio == costs.verify / costs.plain_step > 0
    cost_table = measure_cost_table(
        target, drafter, adaptive_tree(3, 3, 8), HOW.cache_length(64), batch=3, repetitions=2
    )
    verify = np.asarray(cost_table.verify_N1)  # compiled for 0, 2, 4, 7 and 8 drafts
    assert cost_table.step > 0 and verify[0] == 1 and (np.diff(verify) >= 0).all() and len(set(verify[5:8])) == 1
    with pytest.raises(ValueError, match="too short for a window of 8"):
        measure.measure_costs(target, drafter, chain(8), 10)


LONG = benchmark(("short",), ("x" * 2100,))


@pytest.mark.parametrize(
    ("bench", "changes", "message"),
    [
        (SINGLE, {"speculations": [chain(0)]}, "--window=0: must be at least 1"),
        (SINGLE, {"max_new_tokens": 1}, "--max_new_tokens=1: must be at least 2"),
        (SINGLE, {"temperature": -1}, "--temperature=-1.0: must be 0 or more"),
        (SINGLE, {"batch_size": 0}, "--batch_size=0: must be at least 1"),
        (LONG, {}, r"mine\.jsonl:2: a prompt of \d+ tokens .* but tiny has 2048 \(--skip_long_prompts"),
        (TURNS, {"max_new_tokens": 1000}, r"turns\.jsonl:1: a prompt of 1\d\d\d tokens"),
        (TURNS, {"max_new_tokens": 2048, "skip_long_prompts": True}, "none of its 3 prompts fits"),
    ],
)
def test_bad_input(target, drafter, bench, changes, message):
    with pytest.raises(UserError, match=message):
        measure.evaluate(target, drafter, [bench], **(SETTINGS | changes))


def test_a_stop_ends_between_two_batches(target, drafter, monkeypatch):
    decoded, decode = [], measure._Comparison.decode

    def watch(comparison, batch, *args, **settings):
        decoded.append(len(batch))
        return decode(comparison, batch, *args, **settings)

    monkeypatch.setattr(measure._Comparison, "decode", watch)
    monkeypatch.setattr(measure, "measure_costs", lambda *args, **_: pytest.fail("it went on"))
    assert measure.evaluate(target, drafter, [SINGLE, TURNS], **SETTINGS, stop=lambda: len(decoded) == 2) == []
    assert decoded == [3, 3]


def test_rows_are_given_as_soon_as_a_benchmark_ends(target, drafter, greedy, monkeypatch):
    found, whole = [], measure._measure

    def fail_in_the_second(comparison, name, *rest):
        if found:
            raise KeyboardInterrupt
        return whole(comparison, name, *rest)

    monkeypatch.setattr(measure, "_measure", fail_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure.evaluate(target, drafter, [SINGLE, TURNS], **SETTINGS, on_rows=lambda rows: found.extend(rows))
    (row,), first = found, greedy[0][0]
    assert (row["benchmark"], row["tau"], row["total"]) == (first["benchmark"], first["tau"], first["total"])


def test_long_prompts_can_be_skipped(target, drafter, caplog):
    row = measure.evaluate(target, drafter, [LONG], **SETTINGS, skip_long_prompts=True)[0]
    assert (row["num_prompts"], row["total"]) == (1, 1)
    assert "mine: 1 prompts left out" in caplog.text
