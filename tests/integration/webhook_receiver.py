"""A server that receives webhooks, and the part of a gateway that sends them, in the test's own process."""

import asyncio
import base64
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from prometheus_client import CollectorRegistry, Counter

from services.gateway.background.webhooks import consumer
from shared.jobs.store import JobStore, change
from shared.nats.streams import bootstrap
from shared.nats.subjects import TENANT
from shared.schema.job import AudioPart, Decode, Job, Status
from shared.schema.request import GenerateRequest, WebhookEvent
from shared.settings import Settings
from shared.storage.keys import part_key
from tests.integration.gateway_fixtures import RunningGateway, eventually

WORD = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


@dataclass
class Receiver:
    """An HTTP server that receives webhooks. It gives the answers that are listed, then 204."""

    answers: list[bytes] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    came: list[float] = field(default_factory=list)  # when each came, seconds since the epoch
    at_once = most_at_once = 0
    hold: asyncio.Event | None = None  # answers wait for it
    port: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            signed = dict(line.split(": ", 1) for line in lines[1:] if line)
            headers |= {name.lower(): value for name, value in signed.items()}
            body = await reader.readexactly(int(headers["content-length"]))
            self.got.append((headers, body))
            self.came.append(time.time())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if self.hold:
                    await self.hold.wait()
            finally:
                self.at_once -= 1
            answer = self.answers.pop(0) if self.answers else b"204 No Content"
            writer.write(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    def url(self, host: str = "127.0.0.1") -> str:
        """An address of this server."""
        return f"http://{host}:{self.port}/done?of=mine"


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Receive webhooks while the context lasts."""
    found = Receiver()
    server = await asyncio.start_server(found.handle, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()


class Songs:
    """Ends songs, and runs the part of a gateway that delivers their webhooks in this process."""

    def __init__(self, nc: Client, settings: Settings) -> None:
        self.nc, self.js, self.settings = nc, nc.jetstream(), settings
        self.jobs = JobStore(self.js)
        self.outcomes = Counter("outcomes", "", ["outcome"], registry=CollectorRegistry())

    async def start(self) -> None:
        """Begin to deliver."""
        self.hooks = consumer.Webhooks(self.nc, self.settings, self.outcomes)
        await self.hooks.start()

    async def submit(self, url: str, *events: WebhookEvent) -> str:
        """Record a song whose address wants to be called about these events; returns its id."""
        request = GenerateRequest(lyrics="la", seed=1, max_duration_ms=800, webhook_url=url)
        job = Job(job_id=str(uuid.uuid4()), tenant=TENANT, request=request, created_at=time.time())
        await self.jobs.create(msgspec.structs.replace(job, webhook_events=events or job.webhook_events))
        return job.job_id

    async def decode(self, job_id: str, windows: int = 1) -> None:
        """Record that so many windows of a song can be heard, 25.6 seconds each."""
        parts = tuple(
            AudioPart(key=part_key(job_id, 5, number), size=1, samples=1_228_800) for number in range(windows)
        )
        decode = Decode(fencing_token=5, sample_rate=48_000, parts=parts)
        await self.jobs.update(job_id, TENANT, lambda job: change(job, status="generating", decode=decode))


@asynccontextmanager
async def open_songs(settings: Settings) -> AsyncIterator[Songs]:
    """Deliver webhooks while the context lasts."""
    nc = await nats.connect(settings.nats_url)
    await bootstrap(nc.jetstream(), settings)
    songs = Songs(nc, settings)
    await songs.start()
    yield songs
    await songs.hooks.close()
    await nc.close()


async def end(gateway: RunningGateway | Songs, job_id: str, status: Status = "failed", **more: Any) -> Job:
    """End a song; returns its record."""
    return await JobStore(gateway.js).update(job_id, "local", lambda job: change(job, status=status, **more))


async def received(receiver: Receiver, count: int) -> list[dict[str, Any]]:
    """Wait until so many webhooks came; returns their bodies."""

    async def all_there() -> bool:
        return len(receiver.got) >= count

    await eventually(all_there, f"{len(receiver.got)} webhooks came, not {count}")
    return [json.loads(body) for _, body in receiver.got]


async def settled(gateway: RunningGateway | Songs) -> None:
    """Wait until every record that was written is settled."""
    last = (await gateway.js.stream_info("KV_JOBS")).state.last_seq

    async def nothing_left() -> bool:
        info = await gateway.js.consumer_info("KV_JOBS", "hooks")
        # A record that was just written is neither pending nor delivered for a moment (1 % of the time when measured).
        delivered = info.delivered is not None and info.delivered.stream_seq >= last
        return delivered and not (info.num_pending or info.num_ack_pending)

    await eventually(nothing_left, "a webhook is not settled")
