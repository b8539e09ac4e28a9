"""The parts of a step in a profiler's trace, and other outputs of metrics."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import UserError
from ppow_jax.training.run.metrics import MetricsWriter
from ppow_jax.training.run.profile import Profile, own_time, parts_of_text
from ppow_jax.training.run.tensorboard import TensorBoard

PROGRAM = """HloModule jit_train_step

%fused_computation (param: f32[4]) -> f32[4] {
  %mul.1 = f32[4] multiply(%param, %param), metadata={op_name="jit(train_step)/target/mul"}
  ROOT %add.1 = f32[4] add(%mul.1, %param), metadata={op_name="jit(train_step)/transpose(jvp(gradient))/add"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0), metadata={op_name="target_params['update']"}
  %dot.1 = f32[4] dot(%x, %x), metadata={op_name="jit(train_step)/rollouts/while/body/target/dot_general"}
  %fusion = f32[4] fusion(%dot.1), kind=kLoop, calls=%fused_computation
  ROOT %copy.2 = f32[4] copy(%fusion)
}
"""


def test_parts_by_the_names_that_operations_were_written_under():
    part_of = parts_of_text(PROGRAM)
    assert part_of["mul.1"] == "target" and part_of["add.1"] == "gradient"
    assert part_of["dot.1"] == "rollouts"  # the outer scope
    assert part_of["fusion"] == "gradient"  # its last operation's
    assert part_of["copy.2"] == "other"


def test_a_loop_does_not_count_twice():
    events = [(0, 100, "while"), (10, 30, "dot"), (50, 40, "while"), (55, 20, "dot"), (100, 7, "copy")]
    assert own_time(events) == {"while": 100 - 30 - 40 + 40 - 20, "dot": 50, "copy": 7}


@jax.jit
def train_step(x):
    with jax.named_scope("target"):
        y = jnp.sin(x @ x)
    with jax.named_scope("rollouts"):
        y = jax.lax.fori_loop(0, 6, lambda _, y: jnp.cos(y @ x), y)
    with jax.named_scope("update"):
        return x - 0.1 * y


def test_the_chosen_steps_are_traced_and_their_parts_written(tmp_path):
    with Profile(tmp_path / "profile", 2, 3) as profile:
        x = jnp.ones((200, 200))
        for step in range(1, 6):
            profile.before(step)
            x = train_step(x)
            profile.after(step, x)
    assert list(tmp_path.rglob("*.xplane.pb"))
    parts = json.loads((tmp_path / "profile" / "parts.json").read_text())
    assert parts["steps"] == 2
    assert {"target", "rollouts", "update"} <= set(parts["seconds"]) <= {"target", "rollouts", "update", "other"}
    assert all(parts["seconds"][part] > 0 for part in ("target", "rollouts", "update"))


def test_a_stage_that_ends_within_the_chosen_steps_ends_its_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt), Profile(tmp_path / "one", 1, 9) as profile:
        profile.before(1)
        raise KeyboardInterrupt
    with Profile(tmp_path / "two", 1, 1) as profile:  # another one can begin
        profile.before(1)
        profile.after(1, train_step(jnp.ones((200, 200))))
    assert (tmp_path / "two" / "parts.json").exists()


def test_tensorboard_gets_what_the_metrics_get(tmp_path):
    pytest.importorskip("tensorboardX", reason="an extra: pip install 'ppow_jax[tensorboard]'")
    for begin in (1, 2):  # the second run goes on after step 1
        with MetricsWriter(tmp_path, sinks=[TensorBoard(tmp_path / "tensorboard")]) as metrics:
            metrics.resume("ppow", begin - 1)
            for step in range(begin, 4):
                row = {"loss": np.float32(step / begin), "histogram": np.arange(2) + 5, "mode": "chain", "none": None}
                metrics.write(step, "ppow", row)
            metrics.sync()
    shown = events(tmp_path / "tensorboard" / "ppow")
    assert shown == {
        "loss": {1: 1.0, 2: 1.0, 3: 1.5},
        "histogram/1": dict.fromkeys((1, 2, 3), 5.0),
        "histogram/2": dict.fromkeys((1, 2, 3), 6.0),
    }


def events(directory):
    """name -> step -> value, as TensorBoard shows them: a session that starts at a step purges those from it on."""
    from tensorboardX.proto import event_pb2

    shown: dict[str, dict[int, float]] = {}
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # records: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                for steps in shown.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_without_the_writer_the_flag_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"--tensorboard: needs the package tensorboardX: pip install"):
        TensorBoard(tmp_path)
