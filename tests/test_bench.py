"""`experiments.bench` on the tiny target, its counts of necessary work, and its tables."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
import small_model

from experiments import bench as program
from ppow_jax import cli
from ppow_jax.bench import devices, subjects, tables, training_parts, work
from ppow_jax.bench.decoding_parts import GREEDY
from ppow_jax.errors import UserError
from ppow_jax.inference.batch import draft_round, verify_round
from ppow_jax.inference.costs import synthetic_state
from ppow_jax.models import layers
from ppow_jax.models.config import ModelConfig
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.planning import counting, hlo, published
from ppow_jax.speculation.settings import chain, off
from ppow_jax.training.steps import ppow_sampled, supervised

SMALL = (
    "--target=tiny", "--dtype=float32", "--scan_layers=true", "--draft_vocab_size=64", "--repetitions=1",
    "--batches=2", "--widths=3", "--context=96", "--prompt_tokens=16", "--new_tokens=8", "--rows=2", "--row_length=32",
    "--max_anchors=16", "--window=2",
)  # fmt: skip


def run(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run(program.main, program.Settings, argv=argv)
    return caught.value.code or 0, *capsys.readouterr()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One result with every part."""
    path = tmp_path_factory.mktemp("bench") / "a.json"
    settings = program.Settings(
        target="tiny", dtype="float32", scan_layers=True, draft_vocab_size=64, repetitions=1, batches=(2,), widths=(3,),
        context=96, prompt_tokens=16, new_tokens=8, rows=2, row_length=32, max_anchors=16, window=2, output=str(path),
    )  # fmt: skip
    return program.measure(settings), path


def test_every_part_is_measured_and_written(measured):
    result, path = measured
    assert [row["part"] for row in result["results"]] == [
        "decode", "verify", "draft", "prefill", "answers", "answers", "supervised", "ppow",
    ]  # fmt: skip
    for row in result["results"]:
        assert row["seconds"] > 0 and row["compile_seconds"] > 0 and "error" not in row
        if row["part"] != "answers":
            assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / result["peak"]["flops"])
            assert row["program_bytes"] > 0
    assert json.loads(path.read_text())["results"] == result["results"]
    by_part = {row["part"]: row for row in result["results"]}
    assert by_part["verify"]["ratio"] == pytest.approx(by_part["verify"]["seconds"] / verify_base(by_part))
    assert by_part["answers"]["tau"] >= 1


def verify_base(by_part):
    """A plain step of one row, which verification is compared with, from the ratio of the draft step's batch."""
    return by_part["verify"]["seconds"] / by_part["verify"]["ratio"]


def test_comparison_prints_ratios(measured, tmp_path, capsys):
    result, path = measured
    slower = json.loads(path.read_text())
    slower["results"] = [row | {"seconds": 2 * row["seconds"]} for row in slower["results"][:3]]
    other = tmp_path / "b.json"
    other.write_text(json.dumps(slower))
    code, out, _ = run(capsys, f"--compare={path},{other}", f"--plot={tmp_path / 'p.png'}")
    assert code == 0 and out.count("0.500") == 3 and "supervised" not in out
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert "decode" in tables.table(result["results"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=sleep"], "--parts=sleep: must be one of decode"),
        (["--widths=2,64", "--context=100"], "--widths=2,64: must be at most half of --context=100"),
        (["--random_weights", "--target=nobody"], "--target=nobody: neither a config.json"),
        (["--compare=missing.json"], "--compare=missing.json: cannot be read as a benchmark"),
    ],
)
def test_mistakes(capsys, arguments, message):
    code, _, error = run(capsys, *arguments)
    assert code == 2 and message in error and "Traceback" not in error


def test_a_file_that_is_no_benchmark(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(UserError, match="is not a benchmark, it lacks bench, device"):
        tables.read(str(path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA B200", "B200"), ("Radeon", None),
    ],
)  # fmt: skip
def test_known_devices(kind, name):
    chip = devices.known(kind)
    assert (chip and chip.name) == name


def test_limits_of_a_known_device_take_its_own_memory():
    device = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", id=0, memory_stats=lambda: {"bytes_limit": 60e9}
    )
    chip = devices.limits([device])
    assert (chip.memory, chip.flops, chip.bandwidth) == (60e9, 989e12, 3350e9)


def test_limits_of_half_a_chip():
    """A chip that is presented as two devices at the same coordinates."""
    half = types.SimpleNamespace(platform="tpu", device_kind="TPU v4", coords=(0, 0, 0), memory_stats=lambda: None)
    assert devices.limits([half, half]).flops == 275e12 / 2


def test_weights_of_published_shapes_are_counted():
    """Llama-3.1-8B: 8.03e9 parameters, 0.525e9 of them in the embedding; a token multiplies with all others."""
    config = published.read("llama-3.1-8b")
    assert work.target_forward(config, 1, 0, 1) == pytest.approx(2 * (8.030e9 - 0.525e9), rel=1e-3)
    mixture = published.read("qwen3-30b-a3b")
    assert work.target_forward(mixture, 1, 0, 1) == pytest.approx(2 * (3.35e9 - 0.311e9), rel=0.02)  # 3.3B active


def test_bytes_of_a_mixture_grow_with_the_experts_that_are_touched():
    config = published.read("qwen3-30b-a3b")
    assert isinstance(config, ModelConfig)
    shapes = jax.eval_shape(lambda: subjects.transformer.init(jax.random.key(0), config, jnp.bfloat16))
    nbytes = jax.tree.map(lambda x: types.SimpleNamespace(nbytes=2 * x.size, ndim=x.ndim, shape=x.shape), shapes)
    one, many = (work.target_weights(nbytes, config, tokens) for tokens in (1, 1000))
    assert one == pytest.approx(2 * (3.35e9 - 0.311e9), rel=0.03)
    assert many == pytest.approx(2 * (30.5e9 - 0.311e9), rel=0.01)


def xla(function, *arguments, **static) -> float:
    """Operations of a compiled program's matrix products."""
    return counting.count(hlo.parse(function.lower(*arguments, **static).compile().as_text())).flops


def test_counts_of_decoding_are_those_of_the_compiled_programs(monkeypatch):
    """XLA's products cover every slot of the caches, the necessary work only the filled half: contexts differ."""
    monkeypatch.setattr(layers, "_ours", lambda: False)
    model = small_model.model()
    target, drafter, B, K, L = model.target, model.drafter, 4, 2, 64
    state, drafter_kv, target_kv = synthetic_state(target, drafter, K, L, B)
    found = xla(
        verify_round, target.params, target.config, None, target_kv, state, None, speculation=off(), sampling=GREEDY
    )
    assert found == pytest.approx(work.target_forward(target.config, B, L + 1, B), rel=0.02)
    found = xla(draft_round, target.params, drafter, drafter_kv, state, speculation=chain(K), sampling=GREEDY)
    counted = K * work.drafter_step(drafter.config, B, L + K + 1) + work.drafter_prefix(drafter.config, B * (K + 1))
    assert found == pytest.approx(counted, rel=0.15)


@pytest.mark.full
def test_counts_of_training_are_those_of_the_compiled_programs():
    model = small_model.model()
    subject = subjects.Subject(model.target, model.drafter, True)
    s = training_parts.settings(
        "float32", batch_size=2, row_length=64, max_anchors=32, ttt_steps=2, window=3, windows=2, group=2
    )
    spec, state, update, batch = training_parts._inputs(subject, s)
    static = {"config": model.target.config, "optimizer": update, "answers_are_greedy": True}
    arguments = state, spec, model.target.params, batch
    rows = training_parts._rows(s)
    found = xla(supervised.train_step, *arguments, steps=2, loss=SupervisedLoss(), **static)
    counted = work.supervised_step(model.target.config, spec.config, rows, 2)
    assert found == pytest.approx(counted, rel=0.3)
    rollouts = training_parts.stages.rollout_settings(s, training_parts.CostModel(0.1), True)
    policy = ppow_sampled.PolicySettings(s.clip, s.kl_weight, s.passes)
    found = xla(ppow_sampled.train_step, *arguments, jax.random.key(0), rollouts=rollouts, policy=policy, **static)
    counted = work.ppow_step(model.target.config, spec.config, rows, 2, 2, 3)
    assert found == pytest.approx(counted, rel=0.3)


def test_random_weights_of_a_shape():
    """Weights are random, norms 1, layers as asked, and no token ends an answer."""
    found = {scan: subjects.random_target("tiny", "bfloat16", scan) for scan in (False, True)}
    apart, stacked = found[False].params, found[True].params
    assert len(apart["layers"]) == 7 and len(stacked["layers"]) == 1
    assert apart["layers"][0]["q_proj"].dtype == jnp.bfloat16 and apart["norm"].min() == apart["norm"].max() == 1
    assert float(jnp.std(apart["embed"].astype(jnp.float32))) == pytest.approx(subjects.SCALE, rel=0.05)
    q = apart["layers"]
    assert bool((q[0]["q_proj"] != q[1]["q_proj"]).any())
    assert found[True].config.eos_token_ids == ()
