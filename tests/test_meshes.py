"""8 virtual devices: on every mesh the programs give what one device gives, and are compiled once.

Everything runs in one process of its own (`mesh_programs.py`), because the number of devices is fixed when JAX starts.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick_compilation
import suites

SCRIPT = pathlib.Path(__file__).parent / "support" / "mesh_programs.py"
PIECES = {  # of gate_proj [64, 32] of the target and up_proj [64, 32] of the drafter, on the first device
    "8,1,1": [[64, 32]] * 2,
    "4,2,1": [[64, 16]] * 2,
    "2,2,2": [[32, 16]] * 2,
    "1,1,8": [[8, 32]] * 2,
}
KEPT = "2,2,2"  # uses every axis
OTHERS = [mesh for mesh in PIECES if mesh != KEPT]
MESHES = suites.keep([KEPT], PIECES)


def run(which, directory):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick_compilation.flags()}"
        " --xla_llvm_disable_expensive_passes=true",  # compiling is what takes the time here
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    command = [sys.executable, str(SCRIPT), which, str(directory / "found.json"), str(directory / "checkpoints")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the results on a mesh and on one device: the default suite's mesh is run alone, the others together."""

    @functools.cache
    def run_of(which):
        return run(which, tmp_path_factory.mktemp("meshes"))

    return lambda mesh: run_of(f"meshes:{KEPT}" if mesh == KEPT else f"meshes:{';'.join(OTHERS)}")


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return run("rest", tmp_path_factory.mktemp("rest"))


def assert_close(ours, theirs, rtol=1e-4, atol=1e-5, where=""):
    """Compares two trees, whose lists are arrays."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], rtol, atol, f"{where}.{name}")
    else:
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=rtol, atol=atol, err_msg=where)


def assert_same_training(many, one):
    """Compares every metric of every step, and all parameters after the last."""
    for ours, theirs in zip(many["history"], one["history"], strict=True):
        assert_close(ours, theirs)
    assert_close(many["params"], one["params"])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", ["supervised", "ppow"])
def test_training_is_that_of_one_device(runs, mesh, stage):
    """Every metric of every step, and all parameters after the last."""
    found = runs(mesh)
    one, many = found["one"][stage], found[mesh][stage]
    assert_same_training(many, one)
    first, last = one["history"][0], one["history"][-1]
    assert first["loss"] != last["loss"]  # it moves


@pytest.mark.parametrize("mesh", MESHES)
def test_decoding_gives_the_tokens_of_one_device(runs, mesh):
    """Half of the rows greedy, half sampled."""
    found = runs(mesh)
    assert found[mesh]["chain"] == found["one"]["chain"]
    tokens, length, histogram = map(np.array, found["one"]["chain"])
    assert length.min() > 8 and histogram[:, 1:].sum() > 0  # drafts are accepted now and then


@pytest.mark.parametrize("mesh", MESHES)
def test_every_program_is_compiled_once(runs, mesh):
    """Three steps of each stage; decoding in two calls."""
    assert runs(mesh)[mesh]["compilations"] == [1, 1, 1, 1]


@pytest.mark.parametrize("mesh", MESHES)
def test_matrices_are_cut_into_pieces(runs, mesh):
    assert runs(mesh)[mesh]["pieces"] == PIECES[mesh]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tree", "adaptive"])
def test_trees_give_the_tokens_of_one_device(rest, mode):
    assert rest["many"][mode] == rest["one"][mode]
    assert np.array(rest["one"][mode][2])[:, 1:].sum() > 0  # drafts are accepted now and then


@pytest.mark.slow
@pytest.mark.parametrize("step", ["hybrid", "exact"])
def test_losses_of_the_acceptance_rate_are_those_of_one_device(rest, step):
    """In stage 1, and beside the expected reward; draft steps are weighted by acceptance."""
    one, many = rest["one"][step], rest["many"][step]
    assert_same_training(many, one)
    assert one["history"][0]["loss"] != one["history"][1]["loss"]  # it moves


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["supervised", "ppow"])
def test_microbatches_give_the_whole_batch(rest, stage):
    """Two microbatches of a row per device, on data:2,tensor:2,expert:2, against the whole batch on one device."""
    one, many = rest["one"][stage], rest["many"][stage]
    assert_same_training(many, one)


@pytest.mark.slow
def test_bfloat16_trains_on_a_mesh(rest):
    """Rounding differs: sums go in another order."""
    one, many = rest["one"]["bfloat16"], rest["many"]["bfloat16"]
    assert_close(many["history"][0], one["history"][0], rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_experts_give_the_hidden_states_of_one_device(rest):
    """4 experts on 2 devices, each cut in two once more; 3 experts are left whole."""
    for ours, theirs in zip(rest["many"]["experts"], rest["one"]["experts"], strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 1])
def test_a_checkpoint_of_8_devices_goes_on_with_fewer(rest, devices):
    saved, restored = rest["saved"], rest[f"restored on {devices}"]
    assert restored["devices"] == devices
    assert_close(restored["metrics"], saved["metrics"])
    assert_close(restored["params"], saved["params"])


def test_this_process_has_one_device():
    assert jax.device_count() == 1
