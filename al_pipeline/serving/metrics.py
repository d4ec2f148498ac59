"""What Prometheus reads from a server: requests, batches, the queue, and which model is served. No texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from al_pipeline.drift.look import Looks
from al_pipeline.errors import AlError
from al_pipeline.logs import get_logger
from al_pipeline.serving.versions import Served

_logger = get_logger(__name__)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server."""

    def __init__(
        self,
        waiting: Callable[[], int],
        kept: Callable[[], Mapping[str, int]] | None = None,
        looks: Callable[[], Looks | None] | None = None,
    ) -> None:
        """`waiting` returns the number of texts in the queue, `kept` that of texts that were logged or not, `looks`
        whether requests differ from the pool."""
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("al_serve_requests", "Answered requests", ("route", "status"), **own)
        self._seconds = Histogram(
            "al_serve_request_seconds",
            "Time from a request's first byte to its answer",
            ("route",),
            buckets=_SECONDS,
            **own,
        )
        self._batches = Histogram("al_serve_batch_texts", "Texts computed together", buckets=_TEXTS, **own)
        self._computing = Counter("al_serve_model_seconds", "Time in which the model computed", **own)
        self._predicted = Counter("al_serve_predictions", "Predicted texts", ("round", "label"), **own)
        self._promoted = Gauge("al_serve_round", "Number of the promoted round; -1 without one", **own)
        self._swaps = Counter("al_serve_swaps", "Times that another model became the promoted one", **own)
        self._promoted.set(-1)
        Gauge("al_serve_queue_texts", "Texts that wait", **own).set_function(waiting)
        if kept is not None:
            self._registry.register(_Kept(kept))
        if looks is not None:
            self._registry.register(_Drift(looks))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def computed(self, model: Served, texts: int, seconds: float) -> None:
        """Count a batch."""
        self._batches.observe(texts)
        self._computing.inc(seconds)

    def predicted(self, model: Served, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count predictions by class; those without a label count as `abstained`."""
        for row in rows:
            label = row["label"]
            self._predicted.labels(model.name, "abstained" if label is None else label).inc()

    def swapped(self, model: Served | None) -> None:
        """Note which model is promoted."""
        self._swaps.inc()
        self._promoted.set(-1 if model is None else model.round)

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return generate_latest(self._registry)


class _Kept(Collector):
    """Texts by what became of them in the log of requests."""

    def __init__(self, kept: Callable[[], Mapping[str, int]]) -> None:
        self._kept = kept

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The present counts."""
        found = CounterMetricFamily("al_serve_log_texts", "Texts that were logged, or not and why", labels=["outcome"])
        for outcome, count in self._kept().items():
            found.add_metric([outcome], count)
        yield found


class _Drift(Collector):
    """What the newest look at kept requests found; nothing before the first."""

    def __init__(self, looks: Callable[[], Looks | None]) -> None:
        self._looks = looks

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The newest look."""
        try:
            found = self._looks()
        except (AlError, OSError) as error:  # the other metrics are worth having
            _logger.warning("%s", error)
            return
        look = None if found is None else found.look
        if look is None:
            return
        yield GaugeMetricFamily("al_drift_alarm", "Whether requests differ from the pool", float(look.alarm))
        yield GaugeMetricFamily("al_drift_checked_timestamp_seconds", "Time of the newest look", look.until)
        p_values = GaugeMetricFamily("al_drift_p_value", "Of each test of the newest look", labels=["test"])
        for test, value in look.p_values.items():
            p_values.add_metric([test], value)
        yield p_values
        if look.accuracy.value is not None:
            text = "On these requests, without labels"
            yield GaugeMetricFamily("al_drift_estimated_accuracy", text, look.accuracy.value)
        if look.measured is not None and look.measured.value is not None:
            text = "On requests, by labelled test items from them, as of the model's round"
            yield GaugeMetricFamily("al_drift_measured_accuracy", text, look.measured.value)
