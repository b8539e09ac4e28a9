import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import UserError
from ppow_jax.training.run.metrics import Mean, MetricsWriter, NonFiniteError, read_metrics, require_finite


def test_means_of_parts_add_up_to_the_mean_of_the_whole():
    values = jnp.arange(10.0)
    mask = jnp.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 0])
    parts = Mean.of(values[:3], mask[:3]) + Mean.of(values[3:], mask[3:])
    assert float(parts.value) == float(Mean.of(values, mask).value) == (0 + 1 + 3 + 8) / 4
    assert float(Mean.of(values).value) == 4.5
    assert float(Mean.of(values, jnp.zeros(10)).value) == 0
    assert float(Mean(0.2, 0.5).value) == pytest.approx(0.4)


def test_mean_ignores_what_lies_past_the_mask_and_is_a_pytree():
    values, mask = jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([True, False, False])
    mean = jax.jit(Mean.of)(values, mask)
    assert float(mean.value) == 1.0
    gradient = jax.grad(lambda x: Mean.of(x, jnp.array([True, False])).value)(jnp.array([1.0, jnp.inf]))
    np.testing.assert_array_equal(gradient, [1, 0])


def test_rows_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        values = {"loss": jnp.float32(0.5), "histogram": np.array([1, 2]), "mean": Mean(3.0, 2.0)}
        writer.write(1, "ppow", values)
        writer.write(2, "ppow", {"loss": float("nan"), "norms": jnp.array([jnp.inf, 1.0]), "low": -np.inf})
        assert len(read_metrics(writer.path)) == 2, "a line is on disk when write returns"
        with pytest.raises(ValueError, match="step"):
            writer.write(3, "ppow", {"step": 1})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "nan"
    first, second = read_metrics(writer.path)
    assert {k: first[k] for k in first if k != "time"} == {
        "step": 1, "stage": "ppow", "loss": 0.5, "histogram": [1, 2], "mean": 1.5,
    }  # fmt: skip
    assert np.isnan(second["loss"]) and second["norms"] == [np.inf, 1.0] and second["low"] == -np.inf


def test_half_a_line_is_cut_off(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "supervised", {"loss": 1.0})
    with open(writer.path, "a") as file:
        file.write('{"step": 2, "sta')
    assert len(read_metrics(writer.path)) == 1
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, "supervised", {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(writer.path)] == [1.0, 2.0]


def test_resume_leaves_no_duplicates_and_other_stages_alone(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for stage in ("supervised", "ppow"):
            for step in range(1, 6):
                writer.write(step, stage, {"loss": float("inf")})
        writer.resume("ppow", 3)
        writer.resume("ppow", 3)
        writer.write(4, "ppow", {"loss": 0.0})
    rows = [(row["stage"], row["step"]) for row in read_metrics(writer.path)]
    assert rows == [("supervised", i) for i in range(1, 6)] + [("ppow", i) for i in range(1, 5)]


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a directory that can be written to"):
        MetricsWriter(tmp_path / "file")


def test_require_finite_names_step_and_metric():
    require_finite(3, {"loss": 1.0, "histogram": [1, 2], "stage": "x"})
    with pytest.raises(NonFiniteError, match="step 7: loss is nan, norm is inf"):
        require_finite(7, {"loss": jnp.float32(jnp.nan), "fine": 1.0, "norm": Mean(jnp.inf, 1.0)})
