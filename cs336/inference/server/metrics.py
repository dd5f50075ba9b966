"""What Prometheus reads at /metrics."""

import functools
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from cs336.inference.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Count(Collector):
    """A counter, whose name ends in _total, that is read when it is asked for."""

    def __init__(self, name: str, what: str, read: Callable[[], float]):
        self._name, self._what, self._read = name, what, read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._what, value=self._read())


class Metrics:
    """Of one engine. Histograms are told; gauges and counts are read from the engine when they are asked for."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"cs336_{name}_seconds", what, buckets=SECONDS, registry=registry)

        self.time_to_first_token = histogram("time_to_first_token", "From a request's arrival to its first token.")
        self.inter_token_latency = histogram("inter_token_latency", "Between two tokens of a sequence.")
        self.request_latency = histogram("request_latency", "From a request's arrival to its end.")
        self.requests = Counter("cs336_requests", "Requests that ended, by how.", ["outcome"], registry=registry)
        scheduler, stats, cache = engine.scheduler, engine.stats, engine.cache
        for name, what, read in (
            ("running_sequences", "Sequences that run.", lambda: len(scheduler.running)),
            ("waiting_sequences", "Sequences that wait for a place.", lambda: len(scheduler.waiting)),
            ("cache_use", "Share of the pages that sequences hold.", lambda: cache.in_use / cache.num_pages),
            ("prefix_hit_share", "Share of the prompts' tokens that were found in the cache.", lambda: stats.hit_share),
            ("prompt_tokens_total", "Tokens of prompts that were computed.", lambda: stats.prompt_tokens),
            (
                "prefix_cached_tokens_total",
                "Tokens of prompts that were found in the cache.",
                lambda: stats.cached_tokens,
            ),
            ("generated_tokens_total", "Tokens that were sampled.", lambda: stats.sampled_tokens),
            ("preemptions_total", "Sequences that gave up their pages.", lambda: scheduler.num_preemptions),
            ("steps_total", "Steps of the engine.", lambda: stats.steps),
            ("drafted_tokens_total", "Drafts that were verified.", lambda: sum(stats.drafted)),
            ("accepted_tokens_total", "Drafts that were right.", lambda: sum(stats.accepted)),
        ):
            if name.endswith("_total"):
                registry.register(Count(f"cs336_{name}", what, read))
            else:
                Gauge(f"cs336_{name}", what, registry=registry).set_function(read)

        position = Gauge(
            "cs336_draft_acceptance", "Share of the drafts in a place that were right.", ["place"], registry=registry
        )
        for i in range(len(stats.drafted)):
            position.labels(i + 1).set_function(functools.partial(stats.acceptance, i))

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
