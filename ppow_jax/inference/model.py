"""Text generation with a target and its drafter, for notebooks and programs.

    from ppow_jax import load

    model = load("smollm2-135m", drafter="auto")
    result = model.chat("How do I write a Python function that computes the factorial of a number?", max_new_tokens=200)
    print(result.text, result.stats.mean_acceptance_length)
    results = model.generate(["Once upon a time", "import "], temperature=0.8, seed=[1, 2], speculation="tree")

Prompts are decoded in batches, each a prefill and one program that runs until all its answers are finished; with stop
texts, and when streaming, the host reads the text every few rounds. The result of a request depends on its own prompt,
settings and seed, not on its neighbours or its place in the batch.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import defaults, sharding
from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_answer, encode_prompt
from ppow_jax.flags import require
from ppow_jax.inference import batch, shown
from ppow_jax.inference.batch import TO_THE_END
from ppow_jax.inference.costs import measure_cost_table
from ppow_jax.inference.datastore import Datastore
from ppow_jax.inference.learner import Learner, OnlineStats
from ppow_jax.inference.requests import Answer, Batch, Job, Result, Stats, Stop, Text, pack
from ppow_jax.models.drafter import Drafter
from ppow_jax.programs import make_room
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import LOOKUP_MODES, MODES, Speculation, of_mode
from ppow_jax.weights import loading, targets
from ppow_jax.weights.targets import Target

__all__ = ["SPECULATIONS", "Model", "Result", "Stats", "Stream", "load"]

log = logging.getLogger(__name__)

# Modes given by name, with the sizes of `ppow_jax.defaults`.
SPECULATIONS = {mode: of_mode(mode, defaults.WINDOW) for mode in ("off", *MODES, *LOOKUP_MODES)}
LOOK = 4  # rounds between two reads of the text by the host, when it streams or waits for a stop text
ROLES = ("system", "user", "assistant")


def load(target: str, drafter: str | None = "auto", dtype: str = "bfloat16") -> "Model":
    """Loads a target by name or path (see `weights.targets.load`) and its drafter, matrices in `dtype`.

    drafter: a directory; "auto" takes `drafters/TARGET` if it exists; None decodes plainly.
    Raises UserError for files that are missing, broken, or inconsistent with each other.
    """
    require(dtype in targets.DTYPES, f"dtype={dtype}: must be one of {', '.join(targets.DTYPES)}")
    directory = loading.find_drafter(drafter, target)
    loaded = targets.scanned(targets.load(target, dtype))
    return Model(loaded, loading.load_drafter(directory, loaded, dtype) if directory else None)


@dataclasses.dataclass
class Model:
    """A target, and a drafter or None. See `load`.

    cost_table: cost tables of adaptive windows, per (speculation, rows, greedy), measured by
    `inference.costs.measure_cost_table` on first use. The distribution of an answer does not depend on them, but with
    adaptive chains at temperature > 0 the answer that a seed draws does: keep them to reproduce it elsewhere.
    online: what adapts the drafter to the answers (`ppow_jax.online.session.Online` attaches itself), or None. It works
    after each batch of answers, and may replace `drafter` then.
    datastore: earlier answers, which n-gram lookups search as well; finished answers are added to it. It is not saved.
    """

    target: Target
    drafter: Drafter | None = None
    datastore: Datastore | None = dataclasses.field(default=None, kw_only=True)
    cost_table: dict[tuple[Speculation, int, bool], CostTable] = dataclasses.field(default_factory=dict)
    online: Learner | None = None
    _warm: set[tuple[Any, ...]] = dataclasses.field(default_factory=set, init=False, repr=False)

    def __repr__(self) -> str:
        return shown.model_line(self)

    def generate(
        self,
        prompts: Text | Sequence[Text],
        *,
        max_new_tokens: int | Sequence[int] = 256,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        stop: Stop = (),
        seed: int | Sequence[int] = 0,
        speculation: str | Speculation | None = None,
        batch_size: int = 8,
    ) -> list[Result]:
        """Continues prompts (texts, or token ids) -> their results, in order.

        Settings are one value for all prompts, or a list with one for each. A prompt has 1 token or more, and at most
        as many as the target has positions; where these end before max_new_tokens, so does the answer (the last token
        needs no position: a prompt that fills them gets one token).

        Args:
          prompts: one or several.
          max_new_tokens: maximum length of an answer.
          temperature: 0 is greedy.
          top_k: number of most probable tokens to draw from; 0 takes all.
          top_p: share of probability to draw from, after top_k; 1 takes all.
          stop: a text, or several, that end an answer; or one list of texts per prompt. The text of a special token
            stops at that token; a stop text that contains one beside other text is refused.
          seed: seed of sampling. The same prompt with the same seed and settings gets the same answer.
          speculation: "off", "chain", "adaptive", "tree", "mixture", "ngram" (which needs no drafter; sizes:
            SPECULATIONS), or a `Speculation`; by default "mixture" if there is a drafter, else "ngram". The answers are
            the same, or have the same distribution, in all modes.
          batch_size: prompts decoded at once.

        Raises:
          UserError: a prompt without tokens or with too many, a setting out of range, or a target whose logits are not
            finite; names the prompt.
        """
        job = self.job(
            prompts,
            speculation,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            batch_size=batch_size,
        )
        results: dict[int, Result] = {}
        for members in job.batches():
            begin = time.perf_counter()
            *_, answers = self.run(job, members, LOOK if any(job.requests[i].stops for i in members) else TO_THE_END)
            found = [answer.result for answer in answers]
            results |= zip(members, found, strict=True)
            self.learn_from(found, time.perf_counter() - begin)
        return [results[i] for i in range(len(job.requests))]

    def stream(self, prompt: Text, **settings: Any) -> "Stream":
        """Continues one prompt -> an iterator over pieces of its text; settings as in `generate`."""
        return Stream(self, self.job([prompt], **settings))

    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[False] = False, **settings: Any) -> Result: ...

    @overload
    def chat(self, messages: str | Sequence[Any], *, stream: Literal[True], **settings: Any) -> "Stream": ...

    def chat(self, messages, *, stream=False, **settings):
        """Answers a user's message, or a list of {"role", "content"}; settings as in `generate`.

        stream: returns a `Stream` instead of a `Result`.
        """
        prompt = self.chat_prompt(messages)
        return self.stream(prompt, **settings) if stream else self.generate(prompt, **settings)[0]

    def chat_prompt(self, messages: str | Sequence[Any]) -> np.ndarray:
        """Token ids int32 [T] of a chat: the target's chat template, with the generation prompt."""
        if isinstance(messages, str):
            messages = [Message("user", messages)]
        require(len(messages) > 0, "messages: there must be at least one")
        return encode_prompt(self.target.tokenizer, [_message(message) for message in messages])

    def adapt(
        self, prompts: Text | Sequence[Text], answers: Text | Sequence[Text] | None = None, **settings: Any
    ) -> OnlineStats:
        """Adapts the drafter to answers, whatever time it takes -> statistics; needs `online`.

        The drafters are replayed on the answers before they are trained on: a worse drafter never serves.

        Args:
          prompts: one or several, as in `generate`.
          answers: to the prompts, as texts or token ids, which should be the target's own; by default the target
            answers them now, with the settings of `generate`.

        Raises:
          UserError: nothing is attached as `online`, or there are not as many answers as prompts.
        """
        require(self.online is not None, "adapt: nothing adapts this model; ppow_jax.online.session.Online(model) does")
        if answers is None:
            self.generate(prompts, **settings)
            return self.online.learn()
        texts = [answers] if isinstance(answers, str) else list(answers)
        encoded = [encode_answer(self.target.tokenizer, x) if isinstance(x, str) else x for x in texts]
        asked, given = (self.job(several, "off").requests for several in (prompts, encoded))
        require(len(given) == len(asked), f"answers: {len(given)} for {len(asked)} prompts; give one for each")
        for question, answer in zip(asked, given, strict=True):
            self.online.keep(question.prompt_ids, answer.prompt_ids)
            self.online.work(idle=True)
        return self.online.learn()

    def learn_from(self, results: Sequence[Any], seconds: float) -> None:
        """Gives results to `online`, and lets it work within its budget. seconds: that decoding them took."""
        if self.online is not None:
            self.online.decoded(seconds)
            for result in results:
                self.online.finished(result)
            self.online.work()

    def warm_up(self, prompts: Text | Sequence[Text], **settings: Any) -> None:
        """Compiles every program that `generate`, or `stream`, needs with these arguments, by decoding one round.

        Does nothing for programs that an earlier call compiled.
        """
        job = self.job(prompts, **settings)
        for members in job.batches():
            given = jax.tree.structure(job.sampling_of(members))  # which of the settings of sampling there are
            programs = job.speculation, job.rows, *self._lengths(job, members), given
            if programs not in self._warm:
                next(self.run(job, members, rounds=1))
                self._warm.add(programs)

    def resolve(self, speculation: str | Speculation | None) -> Speculation:
        """The `Speculation` of a name, or of None. Raises UserError for unknown names and missing drafters."""
        if speculation is None:
            speculation = defaults.mode(self.drafter is not None)
        if isinstance(speculation, str):
            names = ", ".join(SPECULATIONS)
            require(speculation in SPECULATIONS, f"speculation={speculation}: must be one of {names}")
            speculation = SPECULATIONS[speculation]
        given = f"speculation={speculation.mode}"
        available = not speculation.needs_drafter or self.drafter is not None
        require(available, f"{given}: needs a drafter, but there is none")
        return speculation

    def cost_table_of(self, speculation: Speculation, rows: int, greedy: bool) -> CostTable | None:
        """Cost table of an adaptive window, see `cost_table`; None for other windows.

        The output of sampled chains depends on it: they use the costs at one row, whatever the batch.
        """
        if not speculation.adaptive:
            return None
        sampling = Sampling.of(0.0 if greedy else 1.0)
        key = speculation, rows if speculation.decides_together(sampling) else 1, greedy
        if key not in self.cost_table:
            log.info("measuring the times of drafting and verifying on this device, once (adaptive windows need them)")
            L = generate.cache_length(256, 256, speculation.window)
            self.cost_table[key] = measure_cost_table(
                self.target, self.drafter, speculation, L, key[1], sampling=sampling
            )
        return self.cost_table[key]

    def job(self, prompts: Text | Sequence[Text], speculation: str | Speculation | None = None, **settings: Any) -> Job:
        """The arguments of `generate` as a checked `Job`."""
        return Job.of(self.target, prompts, self.resolve(speculation), **settings)

    def begin(self, job: Job, members: Sequence[int]) -> Batch:
        """Prefills some requests of a job, at most `job.rows`: a batch that is ready to be decoded."""
        make_room()
        requests, sampling = [job.requests[i] for i in members], job.sampling_of(members)
        config, speculation = self.target.config, job.speculation
        cost_table = self.cost_table_of(speculation, job.rows, sampling.greedy)
        P, L = self._lengths(job, members)
        rows = pack(requests, job.rows, P, config.max_position_embeddings)
        begin = time.perf_counter()
        generation = batch.Generation.begin(
            self.target.params, config, self.drafter, rows, speculation, sampling, L, cost_table, self.store_S
        )
        jax.block_until_ready(generation.state.length_B)  # for the clock: nothing is transferred to the host
        seconds = time.perf_counter() - begin
        source_BxL = jnp.zeros(generation.state.tokens_BxL.shape, jnp.int8)
        generation.state = generation.state.replace(**sharding.place({"source_BxL": source_BxL}))
        answers = [Answer(self.target, request, seconds) for request in requests]
        return Batch(generation, answers)

    def _lengths(self, job: Job, members: Sequence[int]) -> tuple[int, int]:
        """The lengths of a batch's prompts, padded, and of its caches: P and L."""
        requests, positions = [job.requests[i] for i in members], self.target.config.max_position_embeddings
        P = batch.bucket(max(len(request.prompt_ids) for request in requests))
        limit = max(request.limit(positions) for request in requests)
        return P, batch.cache_length_within(limit, P, positions, job.speculation.window)

    @property
    def store_S(self) -> jax.Array | None:
        """Tokens of earlier answers for lookups; None without a datastore."""
        return None if self.datastore is None else self.datastore.array

    def run(self, job: Job, members: Sequence[int], rounds: int) -> Iterator[list[Answer]]:
        """Answers requests as one batch; yields the answers so far, every `rounds` rounds and at the end."""
        rows = self.begin(job, members)
        begin = time.perf_counter()
        while not rows.finished:
            rows.generation.decode(rounds)
            rows.look(begin)
            yield rows.answers
        for answer in rows.answers if self.datastore else ():
            self.datastore.add(answer.request.prompt_ids, answer.ids)


class Stream:
    """Pieces of an answer's text, as the target commits them: joined they are the text of `result`.

    Incomplete characters (bytes still missing), and text that may become a stop text, are held back.
    result: the whole answer, once the iterator is exhausted; None before.
    """

    def __init__(self, model: Model, job: Job):
        self.result: Result | None = None
        self._pieces = self._iterate(model, job)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _iterate(self, model: Model, job: Job) -> Iterator[str]:
        count, seconds, begin = 0, 0.0, time.perf_counter()
        for (answer,) in model.run(job, [0], LOOK):
            seconds += time.perf_counter() - begin
            piece, self.result = answer.settled[count:], answer.result
            if piece:
                yield piece
            count, begin = count + len(piece), time.perf_counter()
        model.learn_from([self.result], seconds)


def _message(message: Any) -> Message:
    if isinstance(message, Message):
        return message
    rule = f'message {message!r}: must be {{"role": {" or ".join(ROLES)}, "content": a text}}'
    require(isinstance(message, Mapping) and set(message) == {"role", "content"}, rule)
    require(message["role"] in ROLES and isinstance(message["content"], str), rule)
    return Message(message["role"], message["content"])
