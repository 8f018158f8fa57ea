"""Retries of the client: after which answers, how long it waits, and what it logs; against a scripted server."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from heartmula_client import AsyncClient, ClientError, Refused, ServiceFault

QUEUED = b'{"job_id": "1", "status": "queued", "status_url": "", "result_url": "", "events_url": ""}'


class Server:
    """An HTTP server that gives one scripted answer after another."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        """`answers` are statuses and values of Retry-After, or "" for none."""
        self._answers = list(answers)
        self.requests: list[bytes] = []
        self.times: list[float] = []  # when each request came, monotonic seconds

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(length[1]))
        self.requests.append(head)
        self.times.append(time.monotonic())
        status, retry_after = self._answers.pop(0)
        later = f"Retry-After: {retry_after}\r\n" if retry_after else ""
        writer.write(
            f"HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {len(QUEUED)}\r\n{later}\r\n".encode()
        )
        writer.write(QUEUED)
        await writer.drain()
        writer.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """Create a client of this server, which listens meanwhile."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            async with AsyncClient(f"http://{host}:{port}") as client:
                yield client


async def test_a_request_is_repeated_with_its_key_while_the_service_is_unavailable() -> None:
    server = Server((503, "0"), (502, ""), (504, "soon"), (202, ""))
    async with server.client() as client:
        assert (await client.generate("la")).job_id == "1"
    keys = {line for request in server.requests for line in request.split(b"\r\n") if line.startswith(b"Idempotency")}
    assert (len(server.requests), len(keys)) == (4, 1)


@pytest.mark.parametrize(("status", "kind"), [(400, Refused), (409, Refused), (429, Refused), (500, ServiceFault)])
async def test_no_other_failure_is_repeated(status: int, kind: type[ClientError]) -> None:
    server = Server((status, "7"))
    async with server.client() as client:
        with pytest.raises(kind) as failure:
            await client.generate("la")
    assert (failure.value.status, failure.value.retry_after, len(server.requests)) == (status, 7, 1)


async def test_the_client_waits_as_long_as_the_service_asks_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    server = Server((503, "1.5"), (503, ""), (200, ""))
    async with server.client() as client:
        with caplog.at_level(logging.WARNING):
            await client.status("1")
    assert server.times[1] - server.times[0] >= 1.5
    assert [record.getMessage() for record in caplog.records] == ["127.0.0.1 answered 503 x; trying again in 1.5 s"]


async def test_the_fourth_failure_in_a_row_is_the_last() -> None:
    server = Server(*[(503, "")] * 4)
    async with server.client() as client:
        with pytest.raises(ServiceFault):
            await client.cancel("1")
    assert len(server.requests) == 4
