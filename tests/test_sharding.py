"""The mesh's flag, the table of axes, and what becomes of every array of the models."""

import jax
import jax.numpy as jnp
import pytest
import small_world as world
from jax.sharding import PartitionSpec as P

from ppow_jax import sharding
from ppow_jax.errors import UserError
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.models import cache, drafter, transformer
from ppow_jax.training.steps.state import TrainState

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
ROWS = ("data", "fsdp")


def test_a_mesh_is_read_as_it_is_written():
    assert MeshShape.parse("data:4,tensor:2") == MeshShape(4, 1, 2, 1)
    assert MeshShape.parse(" tensor:8 , data:1") == MeshShape(1, 1, 8, 1)
    assert MeshShape.parse(None) is None
    assert str(MeshShape(2, 1, 3)) == "data:2,fsdp:1,tensor:3,expert:1"
    assert MeshShape.parse(str(MeshShape(2, 3, 4, 5))) == MeshShape(2, 3, 4, 5)
    assert MeshShape(2, 3, 4, 5).devices == 120 and MeshShape(2, 3, 4, 5).rows == 30


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the axes are data, fsdp, tensor, expert, not ''"),
        ("data", "data is ''"),
        ("data:4,model:2", "not 'model'"),
        ("data:0", "data is '0'"),
        ("data:-1", "data is '-1'"),
        ("data:two", "data is 'two'"),
        ("data:1.5", "data is '1.5'"),
        ("data:2,data:2", "names data twice"),
    ],
)
def test_a_mesh_that_is_none_says_why(text, says):
    with pytest.raises(UserError, match="^--mesh=") as error:
        MeshShape.parse(text)
    assert says in str(error.value)


def test_a_mesh_takes_all_devices_and_no_more():
    assert dict(sharding.make_mesh().shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1, "expert": 1}
    with pytest.raises(UserError, match=r"--mesh=data:2,fsdp:1,tensor:3,expert:1: takes 6 devices"):
        sharding.make_mesh(MeshShape(2, 1, 3))


def test_every_parameter_of_the_target_is_cut_by_the_table():
    specs = sharding.specs(world.target_params(), SIZES, world.CONFIG)
    assert specs["embed"] == P(None, "fsdp")  # 61 tokens: tensor does not divide them
    layer = specs["layers"][1]
    assert layer["q_proj"] == layer["k_proj"] == layer["gate_proj"] == P("tensor", "fsdp")
    assert layer["o_proj"] == layer["down_proj"] == P("fsdp", "tensor")
    assert layer["input_norm"] == specs["norm"] == P()
    known = {name for layer in world.target_params()["layers"] for name in layer} | set(world.target_params())
    assert {name for name in known if name not in sharding.PARAMETERS} == {"layers", "norm", "input_norm", "post_norm"}


def test_heads_are_never_cut_in_two():
    """4 heads of 8 on 8 devices: 32 rows could be cut, heads cannot; the MLP is."""
    layer = sharding.specs(world.target_params(), {"tensor": 8}, world.CONFIG)["layers"][0]
    assert layer["q_proj"] == layer["k_proj"] == P()
    assert layer["gate_proj"] == P("tensor")


def test_experts_and_stacked_layers_come_in_front():
    assert sharding.logical_axes("gate_proj", 3) == ("experts", "mlp", "hidden")
    assert sharding.logical_axes("down_proj", 4, stacked=True) == (None, "experts", "hidden", "mlp")
    assert sharding.logical_axes("q_proj", 3, stacked=True) == (None, "heads", "hidden")
    assert sharding.logical_axes("q_proj", 3) == (None, None, None)
    three = {"layers": {"stacked": {"q_proj": jnp.zeros((3, 8, 4)), "up_proj": jnp.zeros((3, 6, 8, 4))}}}
    specs = sharding.specs(three, SIZES | {"expert": 2})["layers"]["stacked"]
    assert specs["q_proj"] == P(None, "tensor", "fsdp")
    assert specs["up_proj"] == P(None, "expert", "tensor", "fsdp")


def test_the_optimizer_lies_as_the_parameters():
    shell = world.drafter()
    state = jax.eval_shape(lambda: TrainState.create(shell.params, world.OPTIMIZER))
    specs = sharding.specs(state, SIZES, shell.config)
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(specs)}
    for name, spec in sharding.specs(shell.params, SIZES, shell.config).items():
        of_name = [x for path, x in leaves.items() if path.endswith(f"['{name}']")]
        assert of_name == [spec] * 3  # the parameter, and Adam's two moments
    assert specs.params["fc"] == P("fsdp") and specs.step == P()


def test_shapes_in_names_say_how_all_else_lies():
    kv = jax.eval_shape(lambda: cache.empty(4, 2, 16, 8))
    assert sharding.specs([kv], SIZES)[0].k_BxKvxdxL == P(ROWS, "tensor")
    assert sharding.specs(world.batch(), {"data": 2}).anchor_BxM == P("data")
    named = {"features_BxK1xF": jnp.zeros((4, 3, 6)), "done_B": jnp.zeros(4), "odd_BxK": jnp.zeros((3, 2)), "x": 0.0}
    specs = sharding.specs(jax.tree.map(jnp.asarray, named), SIZES)
    assert specs == {"features_BxK1xF": P(ROWS), "done_B": P(ROWS), "odd_BxK": P(), "x": P()}


def test_without_a_mesh_nothing_happens():
    params = drafter.init(jax.random.key(0), world.drafter().config)
    assert sharding.current() is None and sharding.place(params) is params and sharding.constrain(params) is params
    assert sharding.parts("batch", 8) == 1
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        assert sharding.current() is None
    made = sharding.born(lambda key: transformer.init(key, world.CONFIG), jax.random.key(0))
    assert made["embed"].shape == (61, 32)
