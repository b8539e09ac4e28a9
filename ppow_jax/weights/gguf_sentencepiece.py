"""SentencePiece vocabularies of GGUF files (`tokenizer.ggml.model` = "llama") as BPE of the `tokenizers` library.

SentencePiece repeatedly joins the two neighbours whose union is the token with the highest score, and encodes
unknown characters as bytes. Merges in the order of the scores are equivalent. A blank is written before each text, and
before the text after a control token, as in llama.cpp.
"""

import math
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from ppow_jax.errors import UserError
from ppow_jax.weights.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # token types of GGUF
_BLANK = "\u2581"
_LONGEST = 512  # maximum number of characters of a merged token; SentencePiece's default is 16


def build(file: GgufFile, names: Sequence[str], types: Sequence[int], unknown: int | None, clean: list) -> Tokenizer:
    """Builds the tokenizer, without added tokens.

    names: the tokens, all different. unknown: the id for characters that are in no token. clean: decoders
    that come first.

    Raises:
      UserError: for scores that are missing, too few or no numbers, and if neither bytes nor an unknown token can
        represent a character without a token.
    """
    scores = file.array("tokenizer.ggml.scores", (int, float))
    if scores is None:
        raise UserError(f"{file.path}: tokenizer 'llama' needs tokenizer.ggml.scores, which is missing")
    if len(scores) != len(names):
        raise UserError(f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(names)} tokens")
    if any(math.isnan(score) for score in scores):
        raise UserError(f"{file.path}: tokenizer.ggml.scores contains nan")
    if file.array("tokenizer.ggml.precompiled_charsmap", int):
        raise UserError(f"{file.path}: tokenizer.ggml.precompiled_charsmap is not supported with tokenizer 'llama'")
    vocabulary = {name: i for i, name in enumerate(names)}
    bytes_ = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if unknown is None:
        unknown = next((i for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    if not bytes_ and unknown is None:
        raise UserError(f"{file.path}: the tokens contain neither all bytes <0x00>..<0xFF> nor an unknown token")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges(names, types, scores),
            byte_fallback=bytes_,
            unk_token=None if unknown is None else names[unknown],
            fuse_unk=True,
        )
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list = []
    if file.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    steps += [normalizers.Prepend(_BLANK)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _BLANK)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [*clean, decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def merges(names: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of ordinary tokens that form an ordinary token, best score first; ties in order of the first token."""
    ids = {name: i for i, name in enumerate(names) if types[i] == _NORMAL}
    found = []
    for name, i in ids.items():
        if len(name) > _LONGEST:
            continue
        for cut in range(1, len(name)):
            left, right = ids.get(name[:cut]), ids.get(name[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    return [(names[left], names[right]) for *_, left, right in sorted(found)]
