"""What a server counts and times, as Prometheus reads it. Labels are names of models and routes, never of clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.serve.inference.engine import FAILED, IDLE, LOADING, READY, RESTARTING, STOPPING, Told
from pipeline.serve.inference.models import Model, Models
from pipeline.serve.web.health import Pace

KIND = "text/plain; version=0.0.4; charset=utf-8"

_STATES = (LOADING, READY, IDLE, RESTARTING, FAILED, STOPPING)
_WAITS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180, 600)
_STEPS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
# Name, what it says, and the field of `engine.Counts`.
_COUNTS = (
    ("prompt_tokens", "Tokens of prompts that were answered.", "prompt_tokens"),
    ("cached_prompt_tokens", "Those of them that were known from an earlier request.", "cached_tokens"),
    ("generated_tokens", "Tokens of answers.", "tokens"),
    ("model_requests", "Answers that were asked of a model; a request may ask for several.", "requests"),
    ("model_refused", "Those of them that found the queue full.", "refused"),
    ("model_failed", "Those that ended with an error.", "failed"),
    ("model_cancelled", "Those that were given up, most of them because the client had gone.", "cancelled"),
    ("model_timed_out", "Those that took too long.", "timed_out"),
    ("model_restarts", "Times that a process ended and another one was started.", "restarts"),
)


class Metrics:
    """The counters, histograms and gauges of a server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.paces = {model.name: Pace() for model in models}
        self._requests = Counter(
            "qwen_onnx_requests", "Requests by route and status.", ("endpoint", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "qwen_onnx_request_seconds",
            "Until a response was sent.",
            ("endpoint",),
            buckets=_WAITS,
            registry=self.registry,
        )
        self._first = Histogram(
            "qwen_onnx_time_to_first_token_seconds",
            "From a request to its first token, the wait in the queue included.",
            ("model",),
            buckets=_WAITS,
            registry=self.registry,
        )
        self._step = Histogram(
            "qwen_onnx_inter_token_seconds",
            "From one token of an answer to its next.",
            ("model",),
            buckets=_STEPS,
            registry=self.registry,
        )
        self.registry.register(_Engines(models, self.paces))
        for model in models:
            self._watch(model)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _watch(self, model: Model) -> None:
        first, step = self._first.labels(model.name), self._step.labels(model.name)
        pace, engine = self.paces[model.name], model.engine

        def observe(told: Told) -> None:
            if told.what == "first":
                first.observe(told.seconds)
            elif told.what == "token":
                step.observe(told.seconds)
                pace.note(told.seconds, engine.running)

        engine.observe = observe


class _Engines(Collector):
    """What the engines know themselves, read when somebody asks."""

    def __init__(self, models: Models, paces: dict[str, Pace]) -> None:
        self._models, self._paces = models, paces

    def describe(self) -> list[Metric]:
        """Nothing in advance; the registry would collect instead."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of all models."""
        for name, text, field in _COUNTS:
            counter = CounterMetricFamily(f"qwen_onnx_{name}", text, labels=["model"])
            for model in self._models:
                counter.add_metric([model.name], getattr(model.engine.counts, field))
            yield counter
        states = GaugeMetricFamily("qwen_onnx_model_state", "1 for the state it is in.", labels=["model", "state"])
        waiting = GaugeMetricFamily("qwen_onnx_queue_length", "Requests that wait.", labels=["model"])
        running = GaugeMetricFamily("qwen_onnx_running", "Requests that are being answered.", labels=["model"])
        speed = GaugeMetricFamily("qwen_onnx_tokens_per_second", "Of late, of all answers together.", labels=["model"])
        passed = GaugeMetricFamily("qwen_onnx_self_test_passed", "Whether the golden answers hold.", labels=["model"])
        memory = GaugeMetricFamily("qwen_onnx_memory_bytes", "Resident memory of a process.", labels=["process"])
        memory.add_metric(["server"], psutil.Process().memory_info().rss)
        for model in self._models:
            engine: Any = model.engine
            for state in _STATES:
                states.add_metric([model.name, state], float(engine.state == state))
            waiting.add_metric([model.name], engine.waiting)
            running.add_metric([model.name], engine.running)
            speed.add_metric([model.name], self._paces[model.name].tokens_per_second or 0.0)
            if engine.self_test:
                passed.add_metric([model.name], float(not engine.self_test["problem"]))
            if (held := _resident(engine.pid)) is not None:
                memory.add_metric([model.name], held)
        yield from (states, waiting, running, speed, passed, memory)


def _resident(pid: int | None) -> int | None:
    """Bytes of memory of a process; None when it has gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None
