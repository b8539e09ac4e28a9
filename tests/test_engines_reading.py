"""The reports on how serving engines read a drafter: by the properties that its files have."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import small_world as world

from experiments import convert
from ppow_jax import cli
from ppow_jax.engines import reading
from ppow_jax.engines.reading import FAILS, MISREADS, READS, Files
from ppow_jax.training import initialise
from ppow_jax.weights.drafters import export_drafter
from tests.golden import models

SHIPPED = Path(__file__).parents[1] / "drafters" / "smollm2-135m"
SMALL = initialise.drafter_config(world.CONFIG, 20, world.FEATURE_LAYERS)
CONFIG = dataclasses.replace(SMALL, feature_layers=(2, 15, 27), fc_norm=False, norm_output=False)
PLAIN = Files(CONFIG, "flat", "LlamaForCausalLMEagle3", [2, 15, 27], [1, 14, 26], "midlayer.", True, False)


def verdicts(files: Files, field: str) -> dict[str, str]:
    return {x.engine: x.verdict for x in reading.readings(files) if x.field == field}


def with_config(**changes) -> Files:
    return dataclasses.replace(PLAIN, config=dataclasses.replace(CONFIG, **changes))


def run(*argv) -> int:
    with pytest.raises(SystemExit) as left:
        cli.run_command(convert.COMMANDS, [str(x) for x in argv])
    return left.value.code or 0


def test_a_plain_drafter_is_misread_by_nobody():
    assert reading.warnings(reading.readings(PLAIN)) == []
    assert verdicts(PLAIN, "target layers") == dict.fromkeys(("vLLM", "SGLang", "sglang-jax", "EAGLE"), READS)
    assert verdicts(PLAIN, "format")["tpu-inference"] == FAILS  # until its architecture is renamed
    renamed = dataclasses.replace(PLAIN, architecture="Eagle3LlamaForCausalLM")
    assert verdicts(renamed, "format") == {
        "vLLM": READS, "SGLang": FAILS, "sglang-jax": FAILS, "tpu-inference": READS, "EAGLE": READS
    }  # fmt: skip


def test_layer_ids_by_the_place_where_they_are_written():
    top, eagle = (dataclasses.replace(PLAIN, **{name: None}) for name in ("in_eagle", "at_top"))
    assert set(verdicts(top, "target layers").values()) == {READS}
    assert verdicts(eagle, "target layers") == {
        "vLLM": MISREADS, "SGLang": READS, "sglang-jax": READS, "EAGLE": READS
    }  # fmt: skip
    others = dataclasses.replace(CONFIG, feature_layers=(3, 15, 27))
    unusual = dataclasses.replace(PLAIN, config=others, at_top=[3, 15, 27], in_eagle=[2, 14, 26])
    assert verdicts(unusual, "target layers") == {
        "vLLM": READS, "SGLang": READS, "sglang-jax": MISREADS, "EAGLE": MISREADS
    }  # fmt: skip
    only_top = dataclasses.replace(unusual, in_eagle=None)
    assert verdicts(only_top, "target layers")["SGLang"] == MISREADS


@pytest.mark.parametrize(
    ("changes", "field", "who"),
    [
        ({"norm_before_residual": True}, "norm_before_residual", {"SGLang", "sglang-jax", "EAGLE"}),
        ({"fc_norm": True}, "fc_norm", {"sglang-jax", "EAGLE"}),
        ({"norm_output": True}, "norm_output", {"sglang-jax", "EAGLE"}),
        ({"norm_before_fc": True}, "norm_before_fc", {"sglang-jax", "EAGLE"}),
        ({"own_embed": True}, "own embedding", {"SGLang", "sglang-jax"}),
        ({"num_layers": 2}, "layers", {"SGLang", "EAGLE"}),
        ({"attention_bias": True}, "attention_bias", {"vLLM", "SGLang", "sglang-jax", "EAGLE"}),
        ({"attention_bias": True, "output_bias": True}, "attention_bias", {"SGLang", "sglang-jax", "EAGLE"}),
        ({"qk_norm": True}, "norms of queries and keys", {"SGLang", "sglang-jax", "EAGLE"}),
    ],
)
def test_who_misreads_a_property(changes, field, who):
    found = verdicts(with_config(**changes), field)
    assert {engine for engine, verdict in found.items() if verdict == MISREADS} == who


def test_tensor_names_and_heads():
    other = dataclasses.replace(PLAIN, spelling="layers.0.")
    assert verdicts(other, "tensor names") == {"sglang-jax": MISREADS, "EAGLE": MISREADS}
    config = dataclasses.replace(CONFIG, draft_vocab_size=CONFIG.vocab_size)
    headless = dataclasses.replace(PLAIN, config=config, has_head=False)
    assert verdicts(headless, "head") == {"vLLM": READS, "SGLang": READS, "sglang-jax": READS, "EAGLE": MISREADS}
    assert verdicts(dataclasses.replace(headless, tied=True), "head")["vLLM"] == MISREADS


def test_the_card_of_the_shipped_drafter(capsys):
    assert run("card", SHIPPED) == 0
    out = capsys.readouterr().out
    assert "vLLM (0.32.0)\n  reads     format" in out and "inputs of 2, 15, 27, from the top level" in out
    assert "outputs of 1, 14, 26, from eagle_config" in out and "12288 of 49152 tokens, by d2t" in out
    assert "warning" not in out


def test_the_card_warns(tmp_path, capsys):
    config = initialise.drafter_config(world.CONFIG, 20, world.FEATURE_LAYERS)
    config = dataclasses.replace(config, norm_before_residual=True)
    export_drafter(tmp_path, config, models.drafter_params(config), np.arange(20), dtype="float32")
    assert run("card", tmp_path) == 0
    out = capsys.readouterr().out
    assert "warning: SGLang would silently misread norm_before_residual: not read: taken as false" in out
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["eagle_aux_hidden_state_layer_ids"]
    path.write_text(json.dumps(stored))
    assert run("card", tmp_path) == 0
    assert "warning: vLLM would silently misread target layers: eagle_config's" in capsys.readouterr().out


def test_the_card_of_a_speculators_file(tmp_path, capsys):
    config = initialise.drafter_config(world.CONFIG, 20, world.FEATURE_LAYERS)
    params = models.drafter_params(config)
    export_drafter(tmp_path, config, params, np.arange(20), dtype="float32", format="speculators")
    assert run("card", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("refuses   format") == 4 and "speculators, architecture Eagle3DraftModel" in out
    assert run("card", tmp_path / "nowhere") == 2
