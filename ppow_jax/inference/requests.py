"""Requests and their results: settings of each request, batches of requests, and answers as they grow."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.data.encoding import encode_text
from ppow_jax.data.known_ids import require_known
from ppow_jax.flags import require
from ppow_jax.inference import batch, shown
from ppow_jax.inference.answer_text import AnswerText, split_stops
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.sources import ORIGINS
from ppow_jax.weights.targets import Target

Text = str | Sequence[int] | np.ndarray  # a prompt: text, or token ids
Stop = str | Sequence[str] | Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Speculation statistics of one request, under vLLM's names. The prefill, and the first token, are not counted.

    num_spec_steps: verifications (steps of plain decoding without speculation, and during an adaptive cooldown).
    num_draft_tokens: all verified tokens, so for a tree all its nodes. acceptance_histogram: numbers of verifications
    that accepted 0, 1, .. K drafted tokens; the last verification counts in full, even where the answer ended within
    it, and so do those after a stop text, until the host read it. mean_acceptance_length: tokens per verification, the
    target's own included. draft_acceptance_rate: accepted per drafted token. nan where nothing was verified.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: tuple[int, ...]
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int

    @classmethod
    def of(cls, histogram_K1: Sequence[int], drafted: int) -> "Stats":
        """Statistics from the numbers of verifications that accepted 0..K tokens, and the number of drafted tokens."""
        steps, accepted = sum(histogram_K1), sum(k * count for k, count in enumerate(histogram_K1))
        mean, rate = 1 + accepted / (steps or math.nan), accepted / (drafted or math.nan)
        return cls(mean, rate, tuple(histogram_K1), steps, drafted, accepted)


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """An answer.

    text: the continuation of the prompt's text (including the blank it may begin with), without special tokens, cut
    before a stop text. token_ids: the new tokens, including an end token or those of a stop text. finish_reason: "stop"
    after an end token or a stop text; "length" at max_new_tokens, or where the target's positions end.
    prefill_seconds, decode_seconds: times of the whole batch, compilation included. sources: for each new token, who
    proposed it: "target" (the target itself), "drafter", "ngram" (n-gram lookup) or "both". text_of: decodes the new
    tokens.

    A notebook shows the text with its drafted tokens coloured.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_ids: list[int]
    stats: Stats
    prefill_seconds: float
    decode_seconds: float
    sources: list[str] = dataclasses.field(default_factory=list)
    text_of: AnswerText | None = dataclasses.field(default=None, compare=False)

    @property
    def drafted(self) -> list[bool]:
        """For each new token, True if it was drafted and accepted, False if the target added it itself."""
        return [source != ORIGINS[0] for source in self.sources]

    def __repr__(self) -> str:
        return shown.result_line(self)

    def _repr_html_(self) -> str:
        return shown.page(self)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, token ids [T], and its own settings. name: used in errors.

    stop: texts that end the answer; stop_ids: special tokens that end it.
    """

    name: str
    prompt_ids: np.ndarray
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    stop_ids: tuple[int, ...] = ()

    def limit(self, positions: int) -> int:
        """Total length at which the answer stops; its last token needs no position."""
        return min(len(self.prompt_ids) + self.max_new_tokens, positions + 1)

    @property
    def stops(self) -> bool:
        """True if the host has to check for stop texts or stop tokens."""
        return bool(self.stop or self.stop_ids)

    def check(self, target: Target) -> None:
        """Raises UserError if the request cannot be answered."""
        ids, config = self.prompt_ids, target.config
        require(len(ids) > 0, f"{self.name}: has no tokens")
        known = np.issubdtype(ids.dtype, np.integer) and (ids >= 0).all() and (ids < config.vocab_size).all()
        rule = f"{self.name}: token ids must be whole numbers of 0..{config.vocab_size - 1}"
        if not known and np.issubdtype(ids.dtype, np.integer):
            require_known(ids, config.vocab_size, rule, target.tokenizer)
        require(bool(known), rule)
        most = config.max_position_embeddings
        require(len(ids) <= most, f"{self.name}: it has {len(ids)} tokens, but {target.name} has {most} positions")
        rule = f"{self.name}: max_new_tokens={self.max_new_tokens}: must be at least 1"
        require(_is_whole(self.max_new_tokens) and self.max_new_tokens >= 1, rule)
        good = _is_whole(self.seed) and 0 <= self.seed < 2**31
        require(good, f"{self.name}: seed={self.seed}: must be a whole number of 0..{2**31 - 1}")
        texts = all(isinstance(text, str) and text for text in self.stop)
        require(texts, f"{self.name}: stop={self.stop}: must be texts that are not empty")


@dataclasses.dataclass(frozen=True)
class Job:
    """Requests that are answered in one call. sampling: one row for each request."""

    requests: list[Request]
    sampling: Sampling
    speculation: Speculation
    batch_size: int

    @classmethod
    def of(
        cls,
        target: Target,
        prompts: Text | Sequence[Text],
        speculation: Speculation,
        *,
        max_new_tokens: int | Sequence[int] = 256,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        stop: Stop = (),
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
    ) -> "Job":
        """Checks the arguments of `Model.generate`. Raises UserError."""
        require(_is_whole(batch_size) and batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
        require(np.iterable(prompts), f"prompts={prompts!r}: must be a text, token ids, or a list of these")
        several = prompts if _are_several(prompts) else [prompts]
        n = len(several)
        budgets, seeds, stops = _each("max_new_tokens", max_new_tokens, n), _each("seed", seed, n), _stops(stop, n)
        requests = []
        for i, prompt in enumerate(several):
            name = f"prompt {i}" if n > 1 else "prompt"
            ids = encode_text(target.tokenizer, prompt, name) if isinstance(prompt, str) else prompt
            request = Request(name, _flat(ids), budgets[i], stops[i], seeds[i])
            request.check(target)
            texts, stop_ids = split_stops(target.tokenizer, stops[i], name)
            requests.append(dataclasses.replace(request, stop=texts, stop_ids=stop_ids))
        numbers = _numbers("temperature", temperature, n), _numbers("top_k", top_k, n), _numbers("top_p", top_p, n)
        return cls(requests, Sampling.of(*numbers), speculation, batch_size)

    @property
    def rows(self) -> int:
        """Rows of every batch: the least power of two that holds all requests, or batch_size."""
        return min(self.batch_size, 1 << (len(self.requests) - 1).bit_length())

    def batches(self) -> list[list[int]]:
        """Indices of the requests that are decoded together, grouped by prompt length."""
        order = sorted(range(len(self.requests)), key=lambda i: len(self.requests[i].prompt_ids))
        return [order[i : i + self.rows] for i in range(0, len(order), self.rows)]

    def sampling_of(self, members: Sequence[int]) -> Sampling:
        """Sampling settings of a batch, padded to `rows`."""
        filled = np.resize(members, self.rows)
        return jax.tree.map(lambda x: x[filled], self.sampling)


class Answer:
    """An answer as it grows; `text` and `result` once it is finished."""

    def __init__(self, target: Target, request: Request, prefill_seconds: float):
        self.target, self.request, self.prefill_seconds = target, request, prefill_seconds
        self.ids: list[int] = []
        self.text = ""
        self._text_of = AnswerText(target.tokenizer, request.prompt_ids)
        self.result: Result | None = None

    def read(self, tokens_L, length, done, healthy, histogram_K1, drafted, source_L, *, seconds: float) -> None:
        """Updates the answer from its row of a `generate.State`, `seconds` after decoding began."""
        prompt_ids = self.request.prompt_ids
        before, self.ids = len(self.ids), tokens_L[len(prompt_ids) : length].tolist()
        require(
            bool(healthy),
            f"{self.request.name}: after {len(self.ids)} new tokens the logits of {self.target.name} are not finite "
            "(NaN or infinite): its weights are damaged, or too large for this dtype",
        )
        by_id = (n for n in range(before, len(self.ids)) if self.ids[n] in self.request.stop_ids)
        count = 1 + next(by_id, len(self.ids))  # tokens up to and including a special one, or one more than there are
        if self.request.stop and self._stop_at(self.decode(len(self.ids))) is not None:
            counts = range(before, len(self.ids) + 1)
            count = min(count, next(n for n in counts if self._stop_at(self.decode(n)) is not None))
        stopped = count <= len(self.ids)
        if done or stopped:
            self.ids = self.ids[:count]
            self.text = self.decode(count)
            self.text = self.text[: self._stop_at(self.text)]
            stopped |= self.ids[-1] in self.target.config.eos_token_ids
            stats = Stats.of(histogram_K1.tolist(), int(drafted))
            reason: Literal["stop", "length"] = "stop" if stopped else "length"
            ids = prompt_ids.tolist()
            n = len(prompt_ids)
            sources = [ORIGINS[source] for source in source_L[n : n + len(self.ids)].tolist()]
            about = stats, self.prefill_seconds, seconds, sources, self._text_of
            self.result = Result(self.text, self.ids, reason, ids, *about)

    @property
    def settled(self) -> str:
        """The text that no later token can change and no stop text can cut."""
        if self.result:
            return self.text
        text = self._text_of.settled(self.ids)
        held = (n for stop in self.request.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(held, default=0)]

    def decode(self, count: int) -> str:
        """Decodes the first `count` tokens."""
        return self._text_of.decode(self.ids[:count])

    def _stop_at(self, text: str) -> int | None:
        """Index of the first stop text in `text`; None if it has none."""
        return min((at for stop in self.request.stop if (at := text.find(stop)) >= 0), default=None)


@dataclasses.dataclass
class Batch:
    """Requests that are decoded together, and their answers so far."""

    generation: batch.Generation
    answers: list[Answer]

    @property
    def finished(self) -> bool:
        """True if all answers are finished."""
        return all(answer.result for answer in self.answers)

    def look(self, begin: float) -> None:
        """Reads the answers from the state, decoded since the time `begin`, and ends those with a stop text."""
        s = self.generation.state
        read = s.tokens_BxL, s.length_B, s.done_B, s.healthy_B, s.histogram_BxK1, s.drafted_B, s.source_BxL
        rows = sharding.fetch(read)
        seconds = time.perf_counter() - begin
        finished_B = np.array(rows[2])
        for b, answer in enumerate(self.answers):
            answer.read(*(row[b] for row in rows), seconds=seconds)
            finished_B[b] = answer.result is not None
        self.generation.state = s.replace(**sharding.place({"done_B": jnp.asarray(finished_B)}))


def pack(requests: Sequence[Request], B: int, P: int, positions: int) -> generate.Prompts:
    """The requests as B rows of P tokens, for a target with that many positions."""
    ids = [request.prompt_ids for request in requests]
    limits = [request.limit(positions) for request in requests]
    seed_B = np.zeros(B, np.int32)
    seed_B[: len(requests)] = [request.seed for request in requests]
    return batch.pack(ids, limits, jax.vmap(jax.random.key)(seed_B), P)


def _are_several(prompts: Text | Sequence[Text]) -> bool:
    """True for a sequence of prompts, False for one text or one list of token ids."""
    return not isinstance(prompts, str) and all(isinstance(prompt, str) or np.iterable(prompt) for prompt in prompts)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _flat(ids: Any) -> np.ndarray:
    """Token ids as an array [T]; anything else becomes an object array, which `Request.check` refuses."""
    try:
        return np.asarray(ids).reshape(-1)
    except ValueError:  # lists of different lengths
        return np.array([None])


def _each(name: str, value: Any, n: int) -> list[Any]:
    """One value per prompt."""
    if not isinstance(value, list | tuple | np.ndarray):
        return [value] * n
    require(len(value) == n, f"{name}: {len(value)} values for {n} prompts; give one, or one for each")
    return list(value)


def _numbers(name: str, value: Any, n: int) -> list[Any]:
    """One number per prompt."""
    found = _each(name, value, n)
    wrong = [x for x in found if isinstance(x, bool) or not isinstance(x, int | float | np.number)]
    require(not wrong, f"{name}={(wrong or [0])[0]!r}: must be a number")
    return found


def _stops(stop: Stop, n: int) -> list[tuple[str, ...]]:
    """Stop texts of each prompt."""
    if isinstance(stop, str) or stop is None:
        return [() if stop is None else (stop,)] * n
    require(np.iterable(stop), f"stop={stop!r}: must be a text, a list of texts, or one such list per prompt")
    if all(isinstance(text, str) for text in stop):
        return [tuple(map(str, stop))] * n
    each = _each("stop", stop, n)
    return [tuple(texts) if np.iterable(texts) and not isinstance(texts, str) else (texts,) for texts in each]
