"""Defines the metrics that Prometheus reads: counts, times and sizes, but no content of requests."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The metrics of one server. Each server has its own registry, so that one process can run several servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "blindtune_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "blindtune_request_seconds", "Time from first byte to answer.", ["route"], registry=self.registry
        )
        self.bytes_in = Counter("blindtune_received_bytes", "Body bytes received.", ["route"], registry=self.registry)
        self.bytes_out = Counter("blindtune_sent_bytes", "Body bytes sent.", ["route"], registry=self.registry)
        self.tokens = Counter(
            "blindtune_tokens", "Tokens processed, for each adapter.", ["kind"], registry=self.registry
        )
        self.graphs = Counter(
            "blindtune_graphs", "Backward calls by whether the graph was retained.", ["result"], registry=self.registry
        )
        self.graph_bytes = Gauge("blindtune_graph_bytes", "Bytes held by retained graphs.", registry=self.registry)
        self.adapter_bytes = Gauge("blindtune_adapter_bytes", "Bytes held by adapters.", registry=self.registry)
        self.queue = Gauge("blindtune_queue", "Requests waiting for or in the engine.", registry=self.registry)
