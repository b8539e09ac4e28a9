"""Damaged files of drafters and targets: one UserError, or what the files really say; never anything else.

Memory is watched throughout: a lying size must not be allocated before it is checked.
"""

import dataclasses
import json
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from eagle3_files import IDS, PLAIN, W, params_of
from golden import models
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.drafter_config import parameter_shapes
from ppow_jax.weights import huggingface
from ppow_jax.weights.drafters import export_drafter, import_drafter

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SMALL = 8 << 20  # bytes; the files are a hundred times smaller
FORMATS = ("flat", "speculators")
TARGET = dataclasses.replace(models.TARGETS["untied"], num_layers=1)


@pytest.fixture(autouse=True)
def watch_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < SMALL


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A drafter of each format and a target, in one file and in two."""
    root = tmp_path_factory.mktemp("sound")
    for format in FORMATS:
        export_drafter(root / format, PLAIN, params_of(PLAIN), IDS, dtype="float32", format=format)
    params = jax.tree.map(np.asarray, transformer.init(jax.random.key(0), TARGET))
    huggingface.save_target(root / "target", TARGET, params)
    shutil.copytree(root / "target", root / "sharded")
    (root / "sharded" / WEIGHTS).unlink()
    tensors = load_file(root / "target" / WEIGHTS)
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        mine = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(mine, root / "sharded" / shard)
    (root / "sharded" / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return {path.name: path for path in root.iterdir()}


def broken(sound: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "broken", ignore_errors=True)
    return Path(shutil.copytree(sound, tmp_path / "broken"))


def read_drafter(directory: Path) -> bool:
    """Whether it loads; then shapes and ids are those that the config promises."""
    try:
        stored = import_drafter(directory)
    except UserError as error:
        assert str(directory) in str(error)
        return False
    assert {name: value.shape for name, value in stored.params.items()} == parameter_shapes(stored.config)
    ids = stored.target_ids_W
    assert len(ids) == stored.config.draft_vocab_size and (np.diff(ids) > 0).all()
    assert ids[0] >= 0 and ids[-1] < stored.config.vocab_size
    return True


def read_target(directory: Path) -> bool:
    try:
        config, params = huggingface.load_target(directory, np.float32)
    except UserError as error:
        assert str(directory) in str(error)
        return False
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    return True


READERS: dict[str, Callable[[Path], bool]] = {
    "flat": read_drafter,
    "speculators": read_drafter,
    "target": read_target,
    "sharded": read_target,
}


def test_the_sound_ones_are_read(sound):
    assert all(read(sound[name]) for name, read in READERS.items())


@pytest.mark.parametrize(("name", "number"), [("flat", 80), ("speculators", 60), ("target", 40), ("sharded", 30)])
def test_damaged_bytes(sound, tmp_path, name, number):
    """Cut, flipped, doubled and overwritten bytes of any file, most of them near its start, where headers are."""
    refused = 0
    for seed in range(number):
        rng, directory = random.Random(seed), broken(sound[name], tmp_path)
        path = rng.choice(sorted(directory.iterdir()))
        data = bytearray(path.read_bytes())
        at = rng.randrange(min(len(data), 1500) if rng.random() < 0.7 else len(data))
        match rng.randrange(4):
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 3:
                data[at : at + 8] = bytes(rng.choice(b'\x00\xff9"{]-') for _ in range(8))
        path.write_bytes(bytes(data))
        refused += not READERS[name](directory)
    assert number // 3 < refused < number


def header_size(size: int) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", size) + data[8:]


def header(edit: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + size])
        edit(value)
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return apply


def first(value: dict) -> dict:
    return next(entry for name, entry in sorted(value.items()) if "proj" in name)


HEADERS = {
    "empty file": lambda data: b"",
    "half a length": lambda data: data[:5],
    "length zero": header_size(0),
    "length of everything": header_size(2**63),
    "length past the end": header_size(1 << 40),
    "header of noise": lambda data: data[:8] + b"\xff" * (len(data) - 8),
    "no data": lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]],
    "data too long": lambda data: data + bytes(16),
    "huge shape": header(lambda h: first(h).update(shape=[1 << 40, 1 << 40])),
    "negative shape": header(lambda h: first(h).update(shape=[-1, 4])),
    "shape of texts": header(lambda h: first(h).update(shape=["a"])),
    "another shape of that size": header(lambda h: first(h)["shape"].reverse()),
    "unknown type": header(lambda h: first(h).update(dtype="Q4")),
    "half the type": header(lambda h: first(h).update(dtype="F16")),
    "a type of the same size": header(lambda h: first(h).update(dtype="I32")),
    "offsets past the end": header(lambda h: first(h).update(data_offsets=[0, 1 << 50])),
    "offsets backwards": header(lambda h: first(h)["data_offsets"].reverse()),
    "one tensor unnamed": header(lambda h: h.pop(sorted(h)[-1])),
    "a list": lambda data: struct.pack("<Q", 2) + b"[]" + data[8:],
    "deep nesting": lambda data: struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["flat", "speculators", "target"])
@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_refused(sound, tmp_path, name, damage):
    path = broken(sound[name], tmp_path) / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    assert not READERS[name](path.parent)


VALUES = (None, True, -1, 0, 7, 2**31, 2**62, 1.5, 1e308, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1})
FREE = {  # what the weights cannot contradict, and what nothing here reads
    *("rope_theta", "rms_norm_eps", "max_position_embeddings", "norm_before_residual", "norm_output", "eos_token_id"),
    *("torch_dtype", "dtype", "target_name_or_path", "speculators_config", "model_type", "tie_word_embeddings"),
    *("rope_scaling", "rope_parameters", "eagle_config", "eagle_aux_hidden_state_layer_ids"),
}


@pytest.mark.parametrize("name", ["flat", "speculators", "target"])
def test_config_values_of_every_kind(sound, tmp_path, name):
    """Each key, in turn, with each of many values, and absent: a lie about a size never loads."""
    directory = broken(sound[name], tmp_path)
    whole = json.loads((directory / CONFIG).read_text())
    scopes = [(), ("transformer_layer_config",)] if name == "speculators" else [()]
    for scope in scopes:
        for key in whole[scope[0]] if scope else whole:
            for value in (*VALUES, "absent"):
                config = json.loads(json.dumps(whole))
                inner = config[scope[0]] if scope else config
                before = inner.pop(key)
                if value != "absent":
                    inner[key] = value
                (directory / CONFIG).write_text(json.dumps(config))
                loaded = READERS[name](directory)
                means_the_same = value in ("absent", None) or (value == before and type(value) is type(before))
                copied = key == "num_hidden_layers" and value == 7 and name != "target"  # of the target's depth
                assert not loaded or key in FREE or copied or means_the_same, (key, value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', '{"a": 1,}', "{'a': 1}", "\x00", "[" * 100_000, "1" * 5000, '{"a": NaN']
)
@pytest.mark.parametrize("name", ["flat", "target"])
def test_broken_json(sound, tmp_path, name, text):
    directory = broken(sound[name], tmp_path)
    (directory / CONFIG).write_text(text)
    assert not READERS[name](directory)
    (directory / CONFIG).write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    assert not READERS[name](directory)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "float64", "bool"])
def test_types_of_the_vocabulary_and_of_weights(sound, tmp_path, dtype):
    directory = broken(sound["flat"], tmp_path)
    tensors = load_file(directory / WEIGHTS)
    for name in ("fc.weight", "norm.weight", "d2t", "t2d"):
        save_file(tensors | {name: tensors[name].astype(dtype)}, directory / WEIGHTS)
        right = {"d2t": ("int32", "int64"), "t2d": ("bool",)}.get(name, ("float64",))
        assert read_drafter(directory) == (dtype in right)


def test_ids_out_of_range(sound, tmp_path):
    directory = broken(sound["flat"], tmp_path)
    tensors = load_file(directory / WEIGHTS)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        d2t = tensors["d2t"].copy()
        d2t[rng.integers(W)] = rng.choice([-(2**63), 2**63 - 1, -1, 20, 19, 2**31, -(2**31)])
        for names in ((), ("t2d",)):
            save_file({k: v for k, v in (tensors | {"d2t": d2t}).items() if k not in names}, directory / WEIGHTS)
            loaded = read_drafter(directory)
            assert loaded <= (sorted(set(d2t + np.arange(W))) == sorted(d2t + np.arange(W)) and bool(names))


@pytest.mark.parametrize("damage", ["no shard", "no index", "index of others", "index of paths", "twice"])
def test_damaged_shards(sound, tmp_path, damage):
    directory = broken(sound["sharded"], tmp_path)
    index = directory / huggingface.INDEX
    value = json.loads(index.read_text())
    match damage:
        case "no shard":
            (directory / "1.safetensors").unlink()
        case "no index":
            index.unlink()
        case "index of others":
            value["weight_map"] = {name: "0.safetensors" for name in value["weight_map"]}
        case "index of paths":
            value["weight_map"] = {name: "../target/model.safetensors" for name in value["weight_map"]}
        case "twice":
            shutil.copy(directory / "0.safetensors", directory / "2.safetensors")
            value["weight_map"]["another"] = "2.safetensors"
    if index.exists():
        index.write_text(json.dumps(value))
    assert not read_target(directory)
