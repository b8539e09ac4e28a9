"""The tokenizer and chat template that a GGUF file carries, without torch (transformers' own reader needs it)."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppow_jax.errors import UserError
from ppow_jax.weights.gguf import open_file

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES])


# How text is cut before byte-level BPE, by GGUF's name for it (`tokenizer.ggml.pre`).
_PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": lambda: _split(rf"{_LETTERS}|\p{{N}}|{_REST}"),
}
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Builds a transformers tokenizer, chat template included, from a GGUF file's metadata.

    Raises UserError for a tokenizer that is not byte-level BPE, has an unknown pre-tokenizer, or is broken.
    """
    reader = open_file(path)

    def get(key, default=None):
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    model, pre = get("model"), get("pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported "
            f"(supported: 'gpt2' with {sorted(_PRE_TOKENIZERS)}); take the model's directory in Hugging Face's form"
        )
    tokens, types, merges = get("tokens"), get("token_type"), get("merges")
    for key, value in {"tokens": tokens, "token_type": types, "merges": merges}.items():
        if not isinstance(value, list):
            raise UserError(f"{path}: tokenizer.ggml.{key} is missing")
    if len(types) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare exceptions
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: tokenizer.ggml.tokens and merges do not fit ({reason})") from None
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=True) if k == kind
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)

    def name(key):
        index = get(f"{key}_token_id")
        if index is not None and not (isinstance(index, int) and 0 <= index < len(tokens)):
            raise UserError(f"{path}: tokenizer.ggml.{key}_token_id = {index!r} must be 0..{len(tokens) - 1}")
        return None if index is None else tokens[index]

    template = reader.get_field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        chat_template=template.contents() if template else None,
        clean_up_tokenization_spaces=False,
    )
