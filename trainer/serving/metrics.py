"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        """Begin at 0."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "shardline_requests", "Requests by path and HTTP status.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "shardline_request_seconds",
            "From a request's headers to the end of its answer.",
            ["path"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.batch_rows = Histogram(
            "shardline_batch_rows", "Rows that were computed together.", registry=self._registry, buckets=_ROWS
        )
        self.queue_rows = Gauge("shardline_queue_rows", "Rows that wait.", registry=self._registry)
        self.active_requests = Gauge(
            "shardline_active_requests", "Requests that are read or answered.", registry=self._registry
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
