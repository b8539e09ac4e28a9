import logging
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppow_jax.errors import UserError
from ppow_jax.training.run.checkpoint import Best, Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def make_state(seed: int = 0) -> dict:
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (4, 5)),
        "half": [jax.random.normal(key, (7,), jnp.bfloat16), jnp.array([jnp.nan, -0.0, 1e-40])],
    }
    return {
        "params": params,
        "optimiser": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(key),
        "nothing": None,
    }


ABSTRACT = jax.eval_shape(make_state)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory, steps, keep=3):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


def flip_a_byte(folder: pathlib.Path):
    """In the largest file, which holds the arrays."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_round_trip_is_bit_exact_and_the_oldest_go(tmp_path):
    with Checkpoints(tmp_path / "new" / "dir", keep=2) as checkpoints:
        assert checkpoints.restore_latest(ABSTRACT) is None
        for step in (5, 10, 15):
            checkpoints.save(step, make_state(step), {"position": step, "text": "ü"})
        checkpoints.save(15, make_state(15))  # already there
        with pytest.raises(ValueError, match="step 12 does not come after"):
            checkpoints.save(12, make_state(12))
        assert checkpoints.steps == [10, 15]
    with Checkpoints(tmp_path / "new" / "dir", keep=2) as checkpoints:
        step, state, extra = checkpoints.restore_latest(ABSTRACT)
        assert (step, extra) == (15, {"position": 15, "text": "ü"})
        assert_same_bits(state, make_state(15))
        assert_same_bits(checkpoints.restore_latest(make_state(1))[1], make_state(15))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(500_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(5):
            x = advance(x)
        _, state, _ = checkpoints.restore_latest({"x": x})
    assert float(jnp.abs(state["x"]).max()) == 0


@pytest.mark.parametrize("damage", ["array bytes", "truncated", "manifest", "metadata", "description", "emptied"])
def test_a_damaged_newest_is_named_and_the_previous_taken(tmp_path, caplog, damage):
    save_steps(tmp_path, (1, 2))
    newest = tmp_path / "2"
    if damage == "array bytes":
        flip_a_byte(newest / "state")
    elif damage == "truncated":
        path = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "metadata":
        (newest / "state" / "_METADATA").write_text('{"tree_metadata": {"garb')
    elif damage == "manifest":
        (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    elif damage == "description":
        path = newest / "extra" / "metadata"
        path.write_text(path.read_text().replace("position", "positiom"))
    else:
        for path in newest.rglob("*"):
            if path.is_file():
                path.unlink()
    caplog.set_level(logging.WARNING, logger="ppow_jax")
    with Checkpoints(tmp_path) as checkpoints:
        step, state, extra = checkpoints.restore_latest(ABSTRACT)
        assert (step, extra) == (1, {"position": 1})
        assert_same_bits(state, make_state(1))
        message = next(r.message for r in caplog.records if r.name.startswith("ppow_jax"))
        assert message.startswith(f"checkpoint {newest} (") and message.endswith("resuming from step 1")
        checkpoints.save(2, make_state(2))  # the run comes to this step again
        assert checkpoints.steps == [1, 2] and checkpoints.restore_latest(ABSTRACT)[0] == 2
        assert (tmp_path / "2.damaged").is_dir()


def test_all_damaged_is_an_error_and_never_a_start_from_scratch(tmp_path):
    save_steps(tmp_path, (1, 2))
    for step in ("1", "2"):
        flip_a_byte(tmp_path / step / "state")
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(UserError, match=r"every checkpoint is damaged: .*/2 \(.*/1 \("):
                checkpoints.restore_latest(ABSTRACT)
            assert checkpoints.steps == [1, 2]


def test_a_state_of_another_shape_is_refused(tmp_path):
    save_steps(tmp_path, (1,))
    with Checkpoints(tmp_path) as checkpoints:
        other = ABSTRACT | {"step": jax.ShapeDtypeStruct((2,), jnp.int32)}
        with pytest.raises(UserError, match=r"1: holds another state: .*step.*int32.*\[\]\] there"):
            checkpoints.restore_latest(other)
        assert checkpoints.restore_latest(ABSTRACT)[0] == 1


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: must be a directory that can be written to"):
        Checkpoints(tmp_path / "file")


def test_best_keeps_the_highest_score_over_a_resume(tmp_path):
    with Best(tmp_path) as best:
        assert best.restore(ABSTRACT) is None
        offers = [best.offer(step, score, make_state(step)) for step, score in ((1, 0.5), (2, 0.4), (3, 0.9))]
        assert offers == [True, False, True] and not best.offer(4, float("nan"), make_state(4))
    with Best(tmp_path) as best:  # resumed from step 2: step 3 comes again
        assert (best.step, best.score) == (3, 0.9)
        assert not best.offer(3, 0.9, make_state(3)) and best.offer(2, 0.95, make_state(2), {"a": 1})
        step, state, extra = best.restore(ABSTRACT)
        assert (step, extra, best.score) == (2, {"a": 1}, 0.95)
        assert_same_bits(state, make_state(2))
    flip_a_byte(max(tmp_path.iterdir()) / "state")
    with Best(tmp_path) as best:
        assert best.restore(ABSTRACT)[0] == 3 and best.score == 0.9


SAVER = """
import os, signal, sys
import jax.numpy as jnp
from ppow_jax.training.run.checkpoint import Checkpoints

def die_before_the_fourth_is_in_place(event, arguments):
    if event == "os.rename" and "/4.orbax" in os.fspath(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_before_the_fourth_is_in_place)
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 7):
    checkpoints.save(step, {"x": jnp.arange(2_000.0) + step, "step": jnp.int32(step)}, {"step": step})
"""


def test_kill_in_mid_save_leaves_the_previous_checkpoint(tmp_path):
    abstract = jax.eval_shape(lambda: {"x": jnp.arange(2_000.0), "step": jnp.int32(0)})
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(is_half(p) for p in tmp_path.iterdir()) and not (tmp_path / "4").exists()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, state, extra = checkpoints.restore_latest(abstract)
        assert step == 3 and extra == {"step": 3} and int(state["step"]) == 3
        np.testing.assert_array_equal(state["x"], np.arange(2_000.0, dtype=np.float32) + np.float32(3))
        assert not any(is_half(p) for p in tmp_path.iterdir())
        checkpoints.save(4, state)
        assert checkpoints.steps[-1] == 4


def is_half(path: pathlib.Path) -> bool:
    return "tmp" in path.name
