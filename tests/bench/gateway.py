"""``make bench-gateway``: the gateway's own cost, on real servers. Prints two JSON lines.

`post`: one client's POSTs one after the other, alternating with POSTs to an empty handler that makes one durable
JetStream publish, in a process of its own. `sockets`: 1,000 websockets on ten songs; every song has ten events a
second, so each socket gets ten, 10,000 messages a second in all. Another process listens; latency is from
before the publish to receipt.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import nats
import uvicorn
import websockets

from deploy.local.servers.embedded import ROLES, S3Server, free_port, nats_server, s3_server
from shared.schema.event import Progress
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, RunningGateway, running_gateway

SONGS, EVENTS_PER_S = 10, 10
PATIENCE = 60.0  # seconds, with what a loaded machine is late by


@dataclass(frozen=True)
class Size:
    """Numbers of requests and websockets in a measurement."""

    posts: int = 400
    sockets: int = 1000
    seconds: int = 10


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return round(cuts[49] * 1000, 2), round(cuts[98] * 1000, 2)


async def serve_floor(url: str, port: int) -> None:
    """Serve the empty handler for comparison: one durable publish, then 202."""
    js = (await nats.connect(url)).jetstream()
    await js.add_stream(name="FLOOR", subjects=["floor"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        await js.publish("floor", body)
        await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off")).serve()


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run this module in another process."""
    command = (sys.executable, "-m", "tests.bench.gateway", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, limit=1 << 24)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answering(http: httpx.AsyncClient, address: str) -> None:
    """Return when a server answers a POST. Raises `TransportError` if it still does not after `PATIENCE`."""
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            await http.post(address, content=b"{}")
        except httpx.TransportError:
            if time.monotonic() > limit:
                raise
            await asyncio.sleep(0.05)
        else:
            return


async def posts(gateway: RunningGateway, count: int) -> dict[str, float | str]:
    """Measure requests for songs, in turns with requests for the empty handler."""
    port = free_port()
    body = json.dumps(SONG).encode()
    headers = {"Content-Type": "application/json"}
    found: tuple[list[float], list[float]] = ([], [])
    async with (
        child("floor", gateway.settings.nats_url, str(port)),
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http,
    ):
        addresses = (f"{gateway.base}/generate", f"http://127.0.0.1:{port}/")
        await answering(http, addresses[1])
        for n in range(2 * count):
            began = time.perf_counter()
            answer = await http.post(addresses[n % 2], content=body, headers=headers)
            answer.raise_for_status()
            found[n % 2].append(time.perf_counter() - began)
    ours, floor = percentiles(found[0]), percentiles(found[1])
    return {
        "bench": "gateway_post",
        "posts_per_s": round(count / sum(found[0]), 1),
        "post_ms_p50": ours[0],
        "post_ms_p99": ours[1],
        "publish_ms_p50": floor[0],
        "publish_ms_p99": floor[1],
    }


async def listen(base: str, size: Size, job_ids: list[str]) -> None:
    """Open the websockets, report that, and record the latency of every progress event until all have come,
    or `PATIENCE` is over."""
    found: list[float] = []

    async def follow(client: websockets.ClientConnection) -> None:
        async for frame in client:
            moment = time.time()
            at = frame.find('"done":') if isinstance(frame, str) else -1
            if at > 0:  # microseconds at which it was published; decoding all of it would burden the machine
                found.append(moment - int(frame[at + 7 : frame.index(",", at)]) / 1e6)  # type: ignore[arg-type]

    clients = []
    for n in range(size.sockets):
        url = f"{base}/generate/{job_ids[n % len(job_ids)]}/events"
        clients.append(await websockets.connect(url, proxy=None, compression=None))
        await clients[-1].recv()
    tasks = [asyncio.create_task(follow(client)) for client in clients]
    print("open", flush=True)
    limit = time.monotonic() + size.seconds + PATIENCE
    while len(found) < size.sockets * size.seconds * EVENTS_PER_S and time.monotonic() < limit:
        await asyncio.sleep(0.1)
    print(json.dumps([*percentiles(found), len(found)]), flush=True)
    for task in tasks:
        task.cancel()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_kib(pid: int) -> int:
    """Resident memory of a process, in KiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def sockets(gateway: RunningGateway, size: Size) -> dict[str, float | str]:
    """Measure latency and memory with many websockets."""
    job_ids = [await gateway.submit() for _ in range(SONGS)]
    for job_id in job_ids:
        await gateway.move_to(job_id, "generating")
    pid = gateway.process.pid
    before = resident_kib(pid)
    numbers = (str(size.sockets), str(size.seconds))
    async with child("listen", gateway.base.replace("http", "ws", 1), *numbers, *job_ids) as listener:
        assert listener.stdout is not None
        if (await listener.stdout.readline()).strip() != b"open":
            raise RuntimeError("the sockets could not be opened")
        await asyncio.sleep(1)
        memory = resident_kib(pid) - before
        spent, began = cpu_seconds(pid), time.perf_counter()
        for n in range(size.seconds * EVENTS_PER_S * SONGS):
            await asyncio.sleep(max(0.0, began + n / (EVENTS_PER_S * SONGS) - time.perf_counter()))
            done = round(time.time() * 1e6)
            await gateway.publish(
                Progress(job_id=job_ids[n % SONGS], status="generating", progress=1, done=done, total=2 * done)
            )
        took = time.perf_counter() - began
        spent = cpu_seconds(pid) - spent
        p50, p99, received = json.loads(await listener.stdout.readline())
    return {
        "bench": "gateway_sockets",
        "sockets": size.sockets,
        "events_per_s_each": round(size.seconds * EVENTS_PER_S / took, 2),
        "received": received,
        "latency_ms_p50": p50,
        "latency_ms_p99": p99,
        "core_percent": round(100 * spent / took, 1),
        "kib_per_socket": round(memory / size.sockets, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


async def main(size: Size) -> None:
    """Run both measurements on servers of their own."""
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as name:
        folder = Path(name)
        async with (
            nats_server(folder, free_port(), dict.fromkeys(ROLES, "secret")) as broker,
            s3_server(folder, free_port(S3Server.ports), "bench", "secretsecret") as store,
        ):
            settings = Settings(
                nats_url=broker.url,
                s3_endpoint=store.url,
                s3_access_key="bench",
                s3_secret_key="secretsecret",
                data_dir=folder,
                queue_limit=size.posts + SONGS,
            )
            async with running_gateway(settings, folder) as gateway:
                print(json.dumps(await posts(gateway, size.posts)), flush=True)
                print(json.dumps(await sockets(gateway, size)), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["floor", url, port]:
            asyncio.run(serve_floor(url, int(port)))
        case ["listen", base, count, seconds, *job_ids]:
            asyncio.run(listen(base, Size(sockets=int(count), seconds=int(seconds)), job_ids))
        case ["--smoke"]:
            asyncio.run(main(Size(posts=5, sockets=20, seconds=1)))
        case _:
            asyncio.run(main(Size()))
