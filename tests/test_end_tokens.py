"""The end tokens of an answer: the union of all files that name them, in directories and in GGUF files."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import pytest
from gguf_files import TOKENIZER, TOKENS, WHOLE, write

from ppow_jax.data.encoding import CHATML_TEMPLATE, tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.inference.model import Model
from ppow_jax.models import transformer
from ppow_jax.weights import ends, huggingface, targets, tiny
from ppow_jax.weights.gguf_file import open_model

CONFIG = dataclasses.replace(
    tiny.CONFIG, hidden_size=32, intermediate_size=48, num_layers=1, head_dim=8, max_position_embeddings=128
)
END = 258  # the tokenizer's <|im_end|>; 256 is <|endoftext|>, 257 <|im_start|>


def directory(path: Path, config_ids=(END,), generation=None, tokenizer=None, template=CHATML_TEMPLATE) -> Path:
    """A target whose files name these end tokens. generation: what generation_config.json holds, or its text."""
    params = transformer.init(jax.random.key(1), CONFIG, scale=0.3)
    huggingface.save_target(path, dataclasses.replace(CONFIG, eos_token_ids=tuple(config_ids)), params)
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (path / ends.GENERATION_CONFIG).write_text(text)
    return path


def loaded_ends(path: Path) -> tuple[int, ...]:
    return targets.load(str(path), "float32").config.eos_token_ids


@pytest.mark.parametrize(
    ("config_ids", "generation", "found"),
    [
        ((END,), None, (END,)),
        ((END,), {}, (END,)),
        ((END,), {"eos_token_id": None}, (END,)),
        ((END,), {"eos_token_id": END}, (END,)),
        ((END,), {"eos_token_id": [END, 7]}, (END, 7)),
        ((256,), {"eos_token_id": 7}, (256, 7, END)),
        ((5, 6), {"eos_token_id": [7, 5]}, (5, 6, 7, END)),
        ((), None, (END,)),
        ((), {"eos_token_id": 9}, (9, END)),
    ],
)
def test_union_of_three_files(tmp_path, config_ids, generation, found):
    assert loaded_ends(directory(tmp_path, config_ids, generation)) == found


def test_ends_of_the_tokenizer(tmp_path):
    """Its tokens of a turn and of a message too, where it names such."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert ends.tokenizer_ids(tokenizer) == []
    tokenizer.eos_token, tokenizer.eot_token, tokenizer.eom_token = "<|im_end|>", "<|endoftext|>", None
    assert ends.tokenizer_ids(tokenizer) == [258, 256]


def test_ids_beyond_the_vocabulary_end_nothing(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|late|>"})
    found = loaded_ends(directory(tmp_path, (END,), {"eos_token_id": [300, 7]}, tokenizer))
    assert found == (END, 7)
    assert "end token 300 is outside the vocabulary of 259" in caplog.text
    assert "end token 259 is outside the vocabulary of 259" in caplog.text


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ('{"eos_token_id": 7,}', "generation_config.json:1: not valid JSON"),
        ("[7]", "must contain a JSON object"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' must be a token id, or a list of token ids"),
        ({"eos_token_id": [7, None]}, "must be a token id"),
        ({"eos_token_id": [[7]]}, "must be a token id"),
        ({"eos_token_id": True}, "must be a token id"),
        ({"eos_token_id": -1}, "must be a token id"),
        ({"eos_token_id": 7.0}, "must be a token id"),
    ],
)
def test_a_broken_generation_config_is_named(tmp_path, generation, said):
    with pytest.raises(UserError, match="generation_config.json") as error:
        loaded_ends(directory(tmp_path, generation=generation))
    assert said in str(error.value)


def test_answers_stop_at_each_of_them(tmp_path):
    """Decoding, with a drafter or without, ends at an id that only generation_config.json names."""
    path = directory(tmp_path)
    target = targets.load(str(path), "float32")
    whole = Model(target).generate("abc", max_new_tokens=16)[0]
    third = whole.token_ids[2]
    assert whole.finish_reason == "length" and third not in whole.token_ids[:2]
    (path / ends.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [third]}))
    result = Model(targets.load(str(path), "float32")).generate("abc", max_new_tokens=16)[0]
    assert (result.token_ids, result.finish_reason) == (whole.token_ids[:3], "stop")


# ---------------------------------------------------------------- GGUF


def gguf_ends(path: Path, extra=(), types=None, **ids) -> tuple[int, ...]:
    """The end tokens of a file with 259 tokens, <|im_start|> and <|im_end|> at 256 and 257, and more from 259 on."""
    tokens = [text if text != "<|im_end|>" else "<|other|>" for text in TOKENS] + list(extra)
    kinds = [1] * 256 + [3, 3, 1] + (types or [3] * len(extra))
    fields = TOKENIZER | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    fields |= {"tokenizer.ggml.eos_token_id": None}
    fields |= {f"tokenizer.ggml.{use}_token_id": i for use, i in ids.items()}
    return ends.of_gguf(open_model(write(path / "m.gguf", WHOLE, fields=fields)))


CASES = {
    "nothing is named": ((), None, {}, ()),
    "eos": ((), None, {"eos": 7}, (7,)),
    "all three": ((), None, {"eos": 7, "eot": 8, "eom": 9}, (7, 8, 9)),
    "one id for two": ((), None, {"eos": 7, "eot": 7}, (7,)),
    "Llama 3": (("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), None, {"eos": 259}, (259, 260, 261)),
    "Llama 3, eot named": (
        ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        None,
        {"eos": 259, "eot": 260},
        (259, 260, 261),
    ),
    "Qwen": (("<|endoftext|>", "<|im_end|>"), None, {"eos": 260}, (260,)),
    "Qwen, base": (("<|endoftext|>", "<|im_end|>"), None, {"eos": 259}, (259, 260)),
    "Qwen, no key": (("<|endoftext|>", "<|im_end|>"), None, {}, (259, 260)),
    "Gemma": (("<eos>", "<end_of_turn>"), None, {"eos": 259}, (259, 260)),
    "Phi-3": (("<|endoftext|>", "<|end|>", "<|assistant|>"), None, {"eos": 259}, (259, 260)),
    "OpenChat": (("</s>", "<|end_of_turn|>"), None, {"eos": 259}, (259, 260)),
    "a part of an answer ends": (("<|return|>", "<|call|>", "<|end|>"), None, {"eos": 259}, (259, 260)),
    "an end of turn that is not control": (("<|im_end|>",), [4], {"eos": 7}, (7, 259)),
    "an end of text that is an ordinary text": (("</s>",), [1], {}, ()),
    "two tokens of one text": (("<|eot_id|>", "<|eot_id|>"), None, {"eot": 260}, (260, 259)),
    "none, as 2**32 - 1": (("</s>",), None, {"eos": 2**32 - 1}, (259,)),
}


@pytest.mark.parametrize(("extra", "types", "ids", "found"), CASES.values(), ids=CASES)
def test_ends_of_a_gguf_file(tmp_path, extra, types, ids, found):
    assert gguf_ends(tmp_path, extra, types, **ids) == found


@pytest.mark.parametrize("use", ["eos", "eot", "eom"])
@pytest.mark.parametrize("value", [259, [-3], "</s>", 7.0, True, [7]])
def test_ids_of_a_gguf_file_that_are_none(tmp_path, use, value):
    fields = TOKENIZER | {f"tokenizer.ggml.{use}_token_id": value}
    with pytest.raises(UserError, match=rf"tokenizer.ggml.{use}_token_id = .* must be a token id of 0..258"):
        ends.of_gguf(open_model(write(tmp_path / "m.gguf", WHOLE, fields=fields)))


def test_the_tokenizer_and_the_target_of_a_gguf_file_agree(tmp_path):
    fields = TOKENIZER | {"tokenizer.ggml.eot_token_id": 256, "tokenizer.chat_template": CHATML_TEMPLATE}
    target = targets.load(str(write(tmp_path / "m.gguf", WHOLE, fields=fields)), "float32")
    assert target.config.eos_token_ids == (257, 256)
    assert target.tokenizer.decode(list(target.config.eos_token_ids), skip_special_tokens=True) == ""


# ---------------------------------------------------------------- chat templates


def warnings_of(caplog) -> str:
    return " | ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def turn(end: str) -> str:
    return (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        f"{{{{ '{end}' if m['role'] == 'assistant' else '' }}}}\n{{% endfor %}}"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML_TEMPLATE, None),
        (None, None),
        (turn(""), None),
        (turn("<|im_end|><|endoftext|>"), None),
        (
            turn("<|endoftext|>"),
            "ends a turn with '<|endoftext|>', which is not an end token (end tokens: 258 '<|im_end|>')",
        ),
        (turn("<|eot_id|>"), "ends a turn with '<|eot_id|>', which is not an end token"),
        (turn("###"), "ends a turn with '###'"),
        ("{{ raise_exception('no') }}", None),
        ("{{ tools[0] }}", None),
        ("hello", None),
    ],
)
def test_a_template_that_ends_turns_with_what_ends_nothing(tmp_path, caplog, template, said):
    loaded_ends(directory(tmp_path, template=template))
    assert (said is None and not warnings_of(caplog)) or said in warnings_of(caplog)


def test_the_same_of_a_gguf_file(tmp_path, caplog):
    fields = TOKENIZER | {"tokenizer.ggml.eos_token_id": 256, "tokenizer.ggml.eot_token_id": 256}
    fields |= {"tokenizer.chat_template": CHATML_TEMPLATE}
    targets.load(str(write(tmp_path / "m.gguf", WHOLE, fields=fields)), "float32")
    told = "m.gguf ends a turn with '<|im_end|>', which is not an end token (end tokens: 256 '<|im_start|>')"
    assert told in caplog.text
    assert "add its token to tokenizer.ggml.eot_token_id of the file" in caplog.text


def test_nothing_ends_an_answer(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert loaded_ends(directory(tmp_path, (), tokenizer=tokenizer)) == ()
    assert "defines no end token: its answers continue to max_new_tokens" in caplog.text
