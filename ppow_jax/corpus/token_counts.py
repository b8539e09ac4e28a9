"""Token counts of texts and stored answers, and the draft vocabulary that follows from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppow_jax.corpus.answer_pack import read_packs
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import encode_text
from ppow_jax.models import transformer
from ppow_jax.weights import draft_vocabulary, targets
from ppow_jax.weights.drafters import export_drafter, import_drafter


def count_tokens(tokenizer: Any, vocab_size: int, data: str, answers_from: Sequence[str], target: str) -> np.ndarray:
    """Occurrences [V] of each token in all messages of `data` and in the answers of packs (`corpus.answer_pack`).

    data: as --data of training, may be empty. Raises UserError for data or packs that cannot be read, and for answers
    of another target.
    """
    count_V = np.zeros(vocab_size, np.int64)
    for conversation in load_conversations(data) if data else ():
        for message in conversation.messages:
            if message.content:
                ids = encode_text(tokenizer, message.content, conversation.source)
                count_V += np.bincount(ids, minlength=vocab_size)[:vocab_size]
    for answer in read_packs(answers_from, {"target": target}).values():
        count_V += np.bincount(answer, minlength=vocab_size)[:vocab_size]
    return count_V


class Enlarged(NamedTuple):
    """Size of the old vocabulary, number of counted tokens, and the shares of these that both vocabularies hold."""

    old_size: int
    counted: int
    old_coverage: float
    coverage: float


def enlarge_vocabulary(
    source: Path, output: Path, target_name: str, size: int, data: str, answers_from: Sequence[str]
) -> Enlarged:
    """Writes a drafter whose vocabulary has the most frequent missing tokens of texts, without a model card.

    Args:
      source, output: directories of the drafter and for the new files.
      target_name: the target, as for `targets.load`.
      size: tokens of the new draft vocabulary; see `draft_vocabulary.enlarge`.
      data, answers_from: the texts, see `count_tokens`.

    Raises:
      UserError: for files that cannot be read or do not fit each other, and for an impossible size.
    """
    target = targets.load(target_name)
    stored = import_drafter(source, num_target_layers=target.config.num_layers, target_embed_VxD=target.params["embed"])
    count_V = count_tokens(target.tokenizer, target.config.vocab_size, data, answers_from, target_name)
    head_VxD = jax.device_get(transformer.head(target.params))
    config, params, ids_W = draft_vocabulary.enlarge(
        stored.config, stored.params, stored.target_ids_W, head_VxD, count_V, size
    )
    export_drafter(
        output,
        config,
        params,
        ids_W,
        dtype=None,
        target_name=stored.target_name or target_name,
        target_architecture=target.config.architecture,
        embed_VxE=stored.embed_VxE,
    )
    before, after = (draft_vocabulary.coverage(ids, count_V) for ids in (stored.target_ids_W, ids_W))
    return Enlarged(stored.config.draft_vocab_size, int(count_V.sum()), before, after)
