"""Measurements of decoding: plain steps, verification, drafting, prefill, and whole answers."""

import functools
import statistics
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.bench import work
from ppow_jax.bench.subjects import Subject
from ppow_jax.bench.timing import Bench, Row, compiled, median_seconds
from ppow_jax.bench.work import Work
from ppow_jax.inference import decoding
from ppow_jax.inference.batch import draft_round, verify_round
from ppow_jax.inference.costs import synthetic_state
from ppow_jax.speculation import generate
from ppow_jax.speculation.propose import Draft
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import chain, off
from ppow_jax.training.run.clock import compile_seconds

GREEDY = Sampling()


class Decoding:
    """Measurements of one subject with caches of L slots, half of them filled. K: window of drafting."""

    def __init__(self, bench: Bench, subject: Subject, L: int, K: int):
        self.bench, self.subject, self.L, self.K = bench, subject, L, K
        self.plain = functools.cache(self._plain)

    def _plain(self, batch: int) -> Row:
        """A step of plain decoding."""
        return self._verified("decode", batch, 0)

    def decode(self, batches: Sequence[int]) -> Iterator[Row]:
        """A plain step for each batch size."""
        for batch in batches:
            row = self.plain(batch)
            yield row | {"tokens_per_second": batch / row["seconds"]}

    def verify(self, batch: int, widths: Sequence[int]) -> Iterator[Row]:
        """Verification of `width` tokens of a row at once, its last committed one included; ratio: to a plain step."""
        for width in widths:
            row = self._verified("verify", batch, width - 1)
            yield row | {"ratio": row["seconds"] / self.plain(batch)["seconds"]}

    def _verified(self, part: str, batch: int, drafted: int) -> Row:
        target, drafter = self.subject.target, self.subject.drafter if drafted else None
        state, _, kv = synthetic_state(target, self.subject.drafter, max(drafted, 1), self.L, batch)
        draft: Draft | None = None
        speculation = off()
        if drafted:
            tokens = jax.random.randint(jax.random.key(1), (batch, 1, drafted), 0, target.config.vocab_size)
            draft, speculation = Draft(tokens, jnp.zeros_like(tokens), None, jnp.zeros(tokens.shape)), chain(drafted)
            draft = sharding.place(draft)
        arguments = target.params, target.config, drafter, kv, state, draft
        program = compiled(verify_round, *arguments, sampling=GREEDY, speculation=speculation)
        size = work.cache_bytes(kv, self.L / 2)

        def once(kv):
            return program.call(target.params, drafter, kv, state, draft, sampling=GREEDY)[0]

        seconds = median_seconds(once, kv, self.bench.repetitions)
        tokens_read = batch * (drafted + 1)
        needed = Work(
            work.target_forward(target.config, tokens_read, self.L / 2 + drafted / 2, tokens_read),
            work.target_weights(target.params, target.config, tokens_read) + size,
        )
        return self.bench.row(part, seconds, needed, batch=batch, width=drafted + 1, **program.columns())

    def draft(self, batches: Sequence[int]) -> Iterator[Row]:
        """Drafting of a chain of K tokens, for one draft step; ratio: gamma, to a plain step of the same batch."""
        target, drafter, K = self.subject.target, self.subject.drafter, self.K
        for batch in batches:
            state, kv, _ = synthetic_state(target, drafter, K, self.L, batch)
            arguments = target.params, drafter, kv, state
            program = compiled(draft_round, *arguments, sampling=GREEDY, speculation=chain(K))
            size = work.cache_bytes(kv, self.L / 2)

            def once(kv, program=program, state=state):
                return program.call(target.params, drafter, kv, state, sampling=GREEDY)[0]

            seconds = median_seconds(once, kv, self.bench.repetitions) / K
            flops = work.drafter_step(drafter.config, batch, self.L / 2)
            flops += work.drafter_prefix(drafter.config, batch * (K + 1)) / K
            needed = Work(flops, work.drafter_weights(drafter.params, 0) + size)
            row = self.bench.row("draft", seconds, needed, batch=batch, width=K, **program.columns())
            yield row | {"ratio": seconds / self.plain(batch)["seconds"]}

    def prefill(self, batches: Sequence[int], tokens: int) -> Iterator[Row]:
        """Reading of prompts of `tokens` tokens, into the caches of target and drafter."""
        target, drafter = self.subject.target, self.subject.drafter
        L = generate.cache_length(tokens, 1, self.K)
        for batch in batches:
            row_B = jnp.full(batch, tokens, jnp.int32)
            prompt_BxP = jax.random.randint(jax.random.key(2), (batch, tokens), 0, target.config.vocab_size)
            keys = jax.random.split(jax.random.key(3), batch)
            rows = sharding.place(generate.Prompts(prompt_BxP, row_B, row_B + 1, keys))
            arguments = drafter, *rows
            sizes = {"K": self.K, "L": L}
            program = compiled(generate.prefill, target.params, target.config, *arguments, sampling=GREEDY, **sizes)

            def once(_, program=program, arguments=arguments):
                return program.call(target.params, *arguments, sampling=GREEDY).length_B

            seconds = median_seconds(once, None, self.bench.repetitions)
            flops = work.target_forward(target.config, batch * tokens, tokens / 2, batch)
            needed = Work(flops + work.drafter_prefix(drafter.config, batch * tokens))
            row = self.bench.row("prefill", seconds, needed, batch=batch, width=tokens, **program.columns())
            yield row | {"tokens_per_second": batch * tokens / seconds}

    def answers(self, batches: Sequence[int], prompt_tokens: int, new_tokens: int) -> Iterator[Row]:
        """Whole answers to random prompts, plain and with chains of K tokens: prefill and decoding."""
        target, drafter = self.subject.target, self.subject.drafter
        high = target.config.vocab_size if target.tokenizer is None else min(
            target.config.vocab_size, len(target.tokenizer)
        )
        for batch in batches:
            prompts = list(np.random.default_rng(0).integers(0, high, (batch, prompt_tokens)).astype(np.int32))
            for mode, speaker in (("off", None), ("chain", drafter)):
                how = decoding.Decoding(chain(self.K), max_new_tokens=new_tokens, batch_size=batch)
                one = functools.partial(decoding.decode, target, speaker, prompts, how, range(batch))
                before = compile_seconds()
                one(rounds=1)
                made = compile_seconds() - before
                runs = [one() for _ in range(self.bench.repetitions)]
                seconds = statistics.median(run.prefill_seconds + run.decode_seconds for run in runs)
                tokens = sum(map(len, runs[0].answers))
                tau = runs[0].decode_tokens / max(runs[0].verifications, 1)
                row = self.bench.row("answers", seconds, None, batch=batch, mode=mode, compile_seconds=made)
                yield row | {
                    "answers_per_second": batch / seconds, "tokens_per_second": tokens / seconds, "tau": tau,
                }  # fmt: skip
