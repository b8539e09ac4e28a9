"""A model of the Python API that compiles in seconds, and writes few different tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import small_world

from ppow_jax.data.encoding import tiny_tokenizer
from ppow_jax.inference.model import Model
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import adaptive, chain, mixture, ngram, off, tree
from ppow_jax.training import initialise
from ppow_jax.weights.targets import Target

POSITIONS, NEW = 1200, 30
CONFIG = dataclasses.replace(
    small_world.CONFIG, vocab_size=259, num_layers=2, max_position_embeddings=POSITIONS, eos_token_ids=(258,)
)
MODES = {
    "off": off(),
    "chain": chain(2),
    "adaptive": adaptive(2),
    "tree": tree(3, 2, 8),
    "ngram": ngram(2),
    "mixture": mixture(2, 2, 4, 3),
}
JOINT = "ngram", "mixture"  # rows decide together: statistics, but no answers, depend on the neighbours
DEAR = CostTable.of(0.05, np.array([1.0, 1.1, 1.1]))  # so that some adaptive rows rest while others draft
WIDE = CostTable.of(0.05, 1 + 0.05 * np.arange(5))


@functools.cache
def tokenizer():
    return tiny_tokenizer()


@functools.cache
def model() -> Model:
    """Writes few different tokens, among them the bytes of two characters, so that drafts are right now and then."""
    written = sorted({*tokenizer()("abcd é€")["input_ids"], 258})
    params = dict(transformer.init(jax.random.key(1), CONFIG, scale=0.3))
    often_V = np.isin(np.arange(CONFIG.vocab_size), written)
    params["lm_head"] = params["lm_head"] * np.where(often_V, 1.5, 0.0)[:, None].astype(np.float32)
    config = initialise.drafter_config(CONFIG, len(written), (0, 1, 2), fc_norm=True)
    drafter = Drafter(config, drafting.init(jax.random.key(2), config, scale=0.2), jnp.array(written))
    tables = {"adaptive": DEAR, "ngram": DEAR, "mixture": WIDE}
    cost_table = {
        (MODES[mode], rows, greedy): table
        for mode, table in tables.items()
        for rows in (1, 2, 4, 8)
        for greedy in (True, False)
    }
    return Model(Target("small", CONFIG, params, tokenizer()), drafter, cost_table)


@functools.cache
def free() -> Model:
    """The small model where drafts cost nothing: each row drafts all it can, whoever it decides with.

    Except in mixtures: whether their drafter backs off depends on what all rows lost, in tokens that the lookup alone
    would have gained.
    """
    tables = {key: CostTable.of(0.0, np.ones(len(table.verify_N1))) for key, table in model().cost_table.items()}
    return dataclasses.replace(model(), cost_table=tables)
