"""Metrics for Prometheus, under vLLM's names, so that its dashboards show this server too."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ppow_jax.inference.learner import OnlineStats
from ppow_jax.speculation.sources import NAMES

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """Counts of one server. All have the label model_name, as vLLM's.

    A window that drafts nothing (a cooldown of an adaptive one) counts as a draft of 0 tokens, so that 1 + accepted
    tokens / drafts is the mean acceptance length. Nothing is counted there without speculation.
    """

    def __init__(self, model: str, window: int):
        self.registry = CollectorRegistry()
        self._model, self._window = model, window
        self.running = self._gauge("vllm:num_requests_running", "Requests in slots")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a slot")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts that were read")
        self._generation = self._counter("vllm:generation_tokens", "Generated tokens")
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Verifications, also of windows without drafts")
        self._drafted = self._counter("vllm:spec_decode_num_draft_tokens", "Verified drafted tokens")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Accepted drafted tokens")
        per_position = "vllm:spec_decode_num_accepted_tokens_per_pos"
        labels = ("model_name", "position")
        counted = Counter(per_position, "Accepted drafted tokens at a place", labels, registry=self.registry)
        self._per_position = [counted.labels(model, str(position)) for position in range(window)]
        self._by_source = [
            self._each_source("ppow:spec_decode_num_draft_tokens_by_source", "Verified drafted tokens of a source"),
            self._each_source("ppow:spec_decode_num_accepted_tokens_by_source", "Accepted drafted tokens of a source"),
        ]
        labels = ("model_name", "finished_reason")
        self._success = Counter("vllm:request_success", "Finished requests", labels, registry=self.registry)
        labels = ("model_name", "code")
        self._refused = Counter("ppow:request_error", "Requests that got an error", labels, registry=self.registry)
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first tokens")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to the prompt's reading")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token")
        self._online: _Adaptation | None = None

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self.registry).labels(self._model)

    def _each_source(self, name: str, text: str) -> list[Counter]:
        counted = Counter(name, text, ("model_name", "source"), registry=self.registry)
        return [counted.labels(self._model, source) for source in NAMES]

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model_name",), registry=self.registry, buckets=SECONDS).labels(self._model)

    def began(self, prompt_tokens: int, waited: float) -> None:
        """A request got a slot after `waited` seconds."""
        self._prompt.inc(prompt_tokens)
        self._queue.observe(waited)

    def first_tokens(self, seconds: float) -> None:
        """A request has its first tokens, `seconds` after it arrived."""
        self._first.observe(seconds)

    def decoded(
        self,
        tokens: int,
        histogram_K1: Sequence[int],
        drafted: int,
        drafted_S: Sequence[int],
        accepted_S: Sequence[int],
    ) -> None:
        """A request has new tokens. histogram_K1: verifications that accepted 0..K tokens; drafted: tokens.

        drafted_S, accepted_S: tokens by source, see `sources.NAMES`.
        """
        self._generation.inc(tokens)
        if not self._window:
            return
        self._drafts.inc(sum(histogram_K1))
        self._drafted.inc(drafted)
        for position, counter in enumerate(self._per_position):
            reached = sum(histogram_K1[position + 1 :])
            counter.inc(reached)
            self._accepted.inc(reached)
        for counters, tokens_S in zip(self._by_source, (drafted_S, accepted_S), strict=True):
            for counter, count in zip(counters, tokens_S, strict=True):
                counter.inc(count)

    def finished(self, reason: str, seconds: float) -> None:
        """A request is answered, `seconds` after it arrived."""
        self._success.labels(self._model, reason).inc()
        self._whole.observe(seconds)

    def error(self, code: str) -> None:
        """A request got an error. code: of the error object, or the HTTP status."""
        self._refused.labels(self._model, code).inc()

    def adapted(self, stats: OnlineStats) -> None:
        """Sets the figures of online adaptation; see docs/online.md for their names."""
        if self._online is None:
            self._online = _Adaptation(stats, self._model)
            self.registry.register(self._online)
        self._online.stats = stats

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Adaptation(Collector):
    """Online adaptation, as its statistics tell it at the moment of reading."""

    def __init__(self, stats: OnlineStats, model: str):
        self.stats, self._model = stats, model

    def collect(self) -> Iterator[Metric]:
        """One family for each count and for each current value."""
        stats = self.stats
        counts = {
            "requests": ("Requests that were kept to learn from", stats.requests),
            "steps": ("Training steps of the drafter", stats.steps),
            "swaps": ("Adapted drafters that began to serve", stats.swaps),
            "fallbacks": ("Adapted drafters that were refused", stats.fallbacks),
            "seconds": ("Seconds of adaptation while requests waited or ran", stats.spent_seconds),
            "idle_seconds": ("Seconds of adaptation while no request waited or ran", stats.idle_seconds),
        }
        for name, (text, value) in counts.items():
            counter = CounterMetricFamily(f"ppow:online_{name}", text, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
        share = GaugeMetricFamily("ppow:online_time_share", "Share of the busy time", labels=("model_name",))
        share.add_metric((self._model,), stats.share)
        yield share
        labels = "model_name", "drafter"
        length = GaugeMetricFamily("ppow:online_acceptance_length", "Over the newest requests", labels=labels)
        for drafter, value in {"decoded": stats.acceptance_length, **stats.replayed}.items():
            length.add_metric((self._model, drafter), value)
        yield length
