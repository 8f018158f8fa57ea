"""Traces a song from the request to its audio, with OpenTelemetry: off unless OTEL_EXPORTER_OTLP_ENDPOINT is set.

Every other OTEL_ variable means what the SDK says. Context travels as W3C `traceparent` in the headers of the jobs.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from shared.errors import ConfigError

_tracer: Any = None
_propagator: Any = None


def start(service: str) -> None:
    """Begin to trace under the name of a service. Raises `ConfigError` when tracing is on and not installed."""
    global _tracer, _propagator
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT needs pip install 'heartmula-jetstream[otel]' ({error.name} is missing)"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))  # sends what is left at the end
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer, _propagator = provider.get_tracer("heartmula"), TraceContextTextMapPropagator()


@contextmanager
def span(name: str, headers: Mapping[str, str] | None = None, **attributes: str) -> Iterator[None]:
    """Record the body as a span, below the span that is under way or the one that a message's headers carry."""
    if _tracer is None:
        yield
        return
    context = _propagator.extract(headers) if headers else None
    with _tracer.start_as_current_span(name, context=context, attributes=attributes):
        yield


def record_wait(name: str, headers: Mapping[str, str] | None, since: datetime) -> None:
    """Record a span from some moment until now."""
    if _tracer is not None:
        began = _tracer.start_span(
            name, context=_propagator.extract(headers or {}), start_time=int(since.timestamp() * 1e9)
        )
        began.end(time.time_ns())


def trace_headers() -> dict[str, str]:
    """The headers that carry the span that is under way; none when tracing is off."""
    headers: dict[str, str] = {}
    if _tracer is not None:
        _propagator.inject(headers)
    return headers
