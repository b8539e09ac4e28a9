"""Pre-tokenizers: rules that split text into words before byte-level BPE, by GGUF name (`tokenizer.ggml.pre`)."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, pre_tokenizers

from ppow_jax.errors import UserError
from ppow_jax.weights.gguf_file import GgufFile

log = logging.getLogger(__name__)

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_CJK = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASIAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A splitting rule. whole_words: a word that is a token is not split by merges (llama.cpp's ignore_merges).

    nfc: text is normalised to Unicode's composed form first. begin: texts get the BOS token if the file does not say.
    """

    patterns: tuple[str, ...] = ()
    gpt2: bool = False  # GPT-2's own pattern is applied last
    whole_words: bool = False
    nfc: bool = False
    begin: bool = False

    def build(self) -> Any:
        """The pre-tokenizer of the `tokenizers` library."""
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2)])


_GPT2, _DIGITS = Rule(gpt2=True), Rule((r"\p{N}",), gpt2=True)
_LLAMA3 = Rule((rf"{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}",), whole_words=True, begin=True)
_QWEN2 = Rule((rf"{_LETTERS}|\p{{N}}|{_OTHERS}",), nfc=True)

RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "jais"), _GPT2),
    **dict.fromkeys(("olmo", "mpt"), dataclasses.replace(_GPT2, nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _LLAMA3),
    **dict.fromkeys(("midm-2.0", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), Rule(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), _QWEN2),
    "tekken": Rule((_TEKKEN,), whole_words=True, begin=True),
    "deepseek-coder": Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-v3": Rule((r"\p{N}{1,3}", _CJK, _DEEPSEEK_WORDS)),
    "seed-coder": Rule((rf"{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",)),
}
_FAMILIES = {"qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2"}  # by architecture
_LLAMA3_TOKENS: Callable[[str], bool] = {"<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"}.__contains__


def rule_of(file: GgufFile, tokens: list[str]) -> Rule:
    """The rule that a file names. Raises UserError for an unknown one.

    Without a name, or with the name "default", which converters use for unknown ones, it is the rule of the
    architecture's family, or of Llama 3 if its tokens are present, or GPT-2's; a warning says which.
    """
    name = file.text("tokenizer.ggml.pre")
    if name in RULES:
        return RULES[name]
    if name not in (None, "", "default"):
        raise UserError(
            f"{file.path}: pre-tokenizer tokenizer.ggml.pre = {name!r} is not supported (supported: "
            f"{', '.join(sorted(RULES))}); take the original model's directory, with its tokenizer.json, as the target"
        )
    architecture = file.text("general.architecture")
    guess = _FAMILIES.get(architecture) or ("llama-bpe" if any(map(_LLAMA3_TOKENS, tokens)) else "gpt-2")
    log.warning(
        "%s: tokenizer.ggml.pre is %s: text is split into words by the rule %r, %s",
        file.path,
        "missing" if not name else f"{name!r}, which names no rule",
        guess,
        f"that of {architecture}" if architecture in _FAMILIES else "a guess: convert the model again",
    )
    return RULES[guess]
