"""The trace of a song, from the request to the audio, as a collector receives it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from shared.settings import Settings
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import eventually, running_gateway


class Collector:
    """A collector that receives spans over OTLP."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []  # the service, and the span
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                length = next(line for line in head.split("\r\n") if line.startswith("content-length:"))
                message = ExportTraceServiceRequest.FromString(await reader.readexactly(int(length.split(":")[1])))
                for resource in message.resource_spans:
                    service = {item.key: item.value.string_value for item in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        self.spans += [(service["service.name"], span) for span in scope.spans]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    found = Collector()
    server = await asyncio.start_server(found.handle, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{found.port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield found
    server.close()


async def test_a_song_is_one_trace_across_all_processes(settings: Settings, collector: Collector) -> None:
    async with (
        running_gateway(settings, settings.data_dir) as gateway,
        open_flow(settings, "tokenizer", "codec") as flow,
    ):
        job_id = await gateway.submit()
        await flow.ended(job_id)
        wanted = {
            ("heartmula-gateway", "submit"),
            ("heartmula-tokenizer", "wait"),
            ("heartmula-tokenizer", "generating"),
            ("heartmula-tokenizer", "store tokens"),
            ("heartmula-codec", "wait"),
            ("heartmula-codec", "decoding"),
            ("heartmula-codec", "store audio"),
        }

        async def all_reported() -> bool:
            return wanted <= {(service, span.name) for service, span in collector.spans}

        await eventually(all_reported, "spans are missing")
    assert len({span.trace_id for _, span in collector.spans}) == 1
    parents = {span.name: span.parent_span_id for service, span in collector.spans if span.name != "wait"}
    ids = {span.name: span.span_id for _, span in collector.spans}
    assert parents["submit"] == b""
    assert parents["generating"] == ids["submit"]
    assert parents["decoding"] == ids["generating"]
    assert parents["store audio"] == ids["decoding"]
    decoding = next(span for _, span in collector.spans if span.name == "decoding")
    assert [(item.key, item.value.string_value) for item in decoding.attributes] == [("job_id", job_id)]


def test_missing_packages_are_reported() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; from shared import tracing; tracing.start('x')"
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode
    assert "heartmula-jetstream[otel]" in run.stderr
