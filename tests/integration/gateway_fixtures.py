"""Fixtures: a gateway process, an HTTP client, and methods that do the work of workers."""

import asyncio
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import nats
import numpy as np
import pytest
import websockets
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError
from websockets.asyncio.client import ClientConnection

from deploy.local.servers.embedded import NatsServer, S3Server, free_port
from deploy.setup import set_up
from services.gateway.container import Container
from services.gateway.server import GatewayServer
from shared.jobs.events import EventPublisher, audible
from shared.jobs.store import JobStore, change
from shared.nats.subjects import EVENTS, TENANT, WORKERS, event_subject
from shared.schema.event import AnyEvent, Completed, Progress, Stage
from shared.schema.job import AudioPart, Decode, Job, Status
from shared.schema.worker import GpuFigures, Role, WorkerStatus
from shared.settings import Settings
from shared.storage.keys import audio_key, part_key, part_peaks_key, state_key, tokens_key
from shared.storage.objects import ObjectStore
from shared.storage.token_file import TokenMeta, pack
from tests.integration.flow import PATIENCE, as_role, environment

TINY = Path(__file__).parents[1] / "golden/data/ckpt"  # whose model has room for 256 positions
SONG = {"lyrics": "[Verse]\nla la la", "tags": "pop,piano", "max_duration_ms": 4000}


class RunningGateway:
    """A gateway process, with an HTTP client, connections to its servers, and the work of workers as methods."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings, self.log = settings, log
        self.base = f"http://{settings.host}:{settings.port}"
        self.http = httpx.AsyncClient(base_url=self.base, timeout=30, trust_env=False)
        self.store = ObjectStore(settings)
        self.files: tuple[int, int] | None = None  # that the process may have open: at first, and if it asks for more
        self.process: asyncio.subprocess.Process
        self.nc: Client
        self.js: JetStreamContext
        self.jobs: JobStore
        self.events: EventPublisher

    async def start(self) -> None:
        """Start the gateway process; return when it serves."""
        limits = "{}:{}".format(*self.files) if self.files else ""
        before = ("prlimit", f"--nofile={limits}") if limits else ()
        with self.log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *before,
                sys.executable,
                "-m",
                "services.gateway",
                env=environment(self.settings, "gateway"),
                stderr=out,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await self.http.get("/readyz")).status_code == 200:
                    return
            assert self.process.returncode is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            await asyncio.sleep(0.05)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the gateway process; returns its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()

    async def connect(self) -> None:
        """Open the test's own connection to NATS."""
        self.nc = await nats.connect(
            self.settings.nats_url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=_ignore
        )
        self.js = self.nc.jetstream()
        self.jobs, self.events = JobStore(self.js), EventPublisher(self.js)

    async def submit(self, **values: Any) -> str:
        """Submit a song; returns its id."""
        answer = await self.http.post("/generate", json=SONG | values)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    async def accepted(self) -> str:
        """Submit a song until it is accepted; returns its id."""

        async def ask() -> str | None:
            answer = await self.http.post("/generate", json=SONG)
            return str(answer.json()["job_id"]) if answer.status_code == 202 else None

        found: str = await eventually(ask, "no song is taken")
        return found

    async def job(self, job_id: str) -> Job:
        """The record of a song."""
        job = await self.jobs.get(job_id)
        assert job is not None
        return job

    async def event(self, job_id: str, kind: str) -> RawStreamMsg:
        """Wait for an event of a kind and return the latest one: some are published after the answer."""

        async def found() -> RawStreamMsg | None:
            with contextlib.suppress(NotFoundError):
                return await self.js.get_msg(EVENTS, subject=event_subject(TENANT, job_id, kind))
            return None

        message: RawStreamMsg = await eventually(found, f"no event {kind}")
        return message

    async def move_to(self, job_id: str, *path: Status, **changes: Any) -> None:
        """Move a song's record through states, as workers do; the changes come with the last one."""
        for status in path:
            more = changes if status == path[-1] else {}
            await self.jobs.update(job_id, TENANT, functools.partial(change, status=status, **more))

    async def publish(self, event: AnyEvent) -> None:
        """Publish an event, as workers do."""
        await self.events.publish(TENANT, event)

    async def progress(self, job_id: str, percent: float) -> None:
        """Publish progress of a song that is being generated."""
        await self.publish(
            Progress(job_id=job_id, status="generating", progress=percent, done=round(percent), total=100)
        )

    async def stage(self, job_id: str) -> None:
        """Publish that generating began."""
        await self.publish(Stage(job_id=job_id, status="generating", progress=0, stage="generating", phase=1))

    async def decode_window(self, job_id: str, seconds: float = 25.6, fence: int = 5) -> AudioPart:
        """Store a further part of a song that is being made, as a codec worker does; returns it."""
        before = (await self.job(job_id)).decode or Decode(fencing_token=fence, sample_rate=48_000)
        key = part_key(job_id, fence, len(before.parts))
        part = AudioPart(key=key, size=10, samples=round(seconds * 48_000))
        await self.store.put(key, b"0123456789")
        await self.store.put(state_key(key), b"state")
        await self.store.put(part_peaks_key(key), b'{"version": 2}', "application/json")
        decode = msgspec.structs.replace(before, parts=(*before.parts, part))
        job = await self.jobs.update(job_id, TENANT, functools.partial(change, decode=decode))
        if before.parts:
            for name in (state_key, part_peaks_key):
                await self.store.delete_one(name(before.parts[-1].key))
        await self.publish(audible(job))
        return part

    async def complete(self, job_id: str, audio: bytes = b"0123456789" * 100) -> None:
        """Finish a song: audio, record, event."""
        job = await self.job(job_id)
        key = audio_key(job_id, 7, job.request.format)
        await self.store.put(key, audio, "audio/flac")
        path: tuple[Status, ...] = ("generating", "decoding", "completed")
        known: tuple[Status, ...] = ("queued", *path)
        await self.move_to(
            job_id, *path[known.index(job.status) :], audio_key=key, audio_bytes=len(audio), duration_s=4.0
        )
        await self.publish(
            Completed(
                job_id=job_id,
                status="completed",
                progress=100,
                result_url=f"/generate/{job_id}/result",
                duration_s=4.0,
                format=job.request.format,
                seed=job.request.seed or 0,
            )
        )

    async def made(self, frames: int, **values: Any) -> tuple[str, np.ndarray]:
        """Have a song made whose tokens are kept; returns its id and its codes, int16 ``[8, frames]``."""
        job_id = await self.submit(**values)
        job, key = await self.job(job_id), tokens_key(job_id, 5)
        codes = np.random.default_rng(frames).integers(0, 8192, (8, frames), np.int16)
        meta = TokenMeta(job_id=job_id, model="HeartMuLa-oss-3B", seed=job.request.seed or 0)
        await self.store.put(key, pack(codes, meta))
        await self.move_to(job_id, "generating", "decoding", tokens_key=key, frames=frames)
        await self.complete(job_id)
        return job_id, codes

    async def heartbeat(self, role: Role, kind: str = "cpu", **changes: object) -> None:
        """Publish a worker's heartbeat, on device gpu-1 unless the changes say otherwise."""
        figures = GpuFigures(id="gpu-1", name="A device", kind=kind, memory_total=1000, memory_used=300)  # type: ignore[arg-type]
        status = WorkerStatus(
            role=role,
            instance=f"{role}-1",
            host="h",
            pid=1,
            engine="native",
            model="m",
            gpu=figures,
            state="idle",
            since=1.0,
            sent=time.time(),
        )
        status = msgspec.structs.replace(status, **changes)
        await self.js.publish(f"$KV.{WORKERS}.{role}.{status.instance}", msgspec.json.encode(status))

    @asynccontextmanager
    async def watch(self, job_id: str, after: object = None) -> AsyncIterator["Watcher"]:
        """Open a websocket for a song's events."""
        url = f"{self.base.replace('http', 'ws', 1)}/generate/{job_id}/events"
        if after is not None:
            url += f"?after={after}"
        async with websockets.connect(url, proxy=None) as connection:
            yield Watcher(connection)


class Watcher:
    """The client's end of a websocket."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def frame(self) -> dict[str, Any]:
        """Wait for the next frame."""
        found: dict[str, Any] = json.loads(await asyncio.wait_for(self.connection.recv(), PATIENCE))
        return found

    async def closed(self) -> int:
        """Wait until the server closes the websocket; returns the code. Fails if a frame comes instead."""
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(self.connection.recv(), PATIENCE)
        return _code(closed.value)

    async def rest(self) -> tuple[list[dict[str, Any]], int]:
        """Read all frames until the server closes the websocket; returns them and the code."""
        frames = []
        while True:
            try:
                frames.append(await self.frame())
            except websockets.ConnectionClosed as closed:
                return frames, _code(closed)


def _code(closed: websockets.ConnectionClosed) -> int:
    assert closed.rcvd is not None, "the server left without a close frame"
    return closed.rcvd.code


async def eventually(ask: Any, what: str) -> Any:
    """Wait until an asynchronous question is answered with something true."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if found := await ask():
            return found
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def fresh_settings(nats_server: NatsServer, s3_server: S3Server, folder: Path) -> Settings:
    """Settings for a gateway that the tests of a module share. All streams of earlier tests are removed."""
    client = await nats.connect(nats_server.url)
    for stream in await client.jetstream().streams_info():
        await client.jetstream().delete_stream(str(stream.config.name))
    await client.close()
    return Settings(
        nats_url=nats_server.url,
        s3_endpoint=s3_server.url,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
        s3_bucket=folder.name.lower().replace("_", "-"),
        data_dir=folder,
        lease_ttl=2,
    )


@asynccontextmanager
async def running_gateway(
    settings: Settings, tmp_path: Path, *, files: tuple[int, int] | None = None, **changes: Any
) -> AsyncIterator[RunningGateway]:
    """A gateway process on real servers, stopped at the end. `files`: soft and hard limit of its open files."""
    gateway = RunningGateway(replace(settings, port=free_port(), **changes), tmp_path / "gateway.log")
    gateway.files = files
    await set_up(as_role(gateway.settings, "bootstrap"))
    try:
        await gateway.start()
        await gateway.connect()
        yield gateway
    finally:
        if gateway.process.returncode is None:
            gateway.process.kill()
            await gateway.process.wait()
        await gateway.http.aclose()
        if hasattr(gateway, "nc"):
            await gateway.nc.close()
        gateway.store.close()


@asynccontextmanager
async def in_process(settings: Settings) -> AsyncIterator[tuple[Container, GatewayServer, str]]:
    """A gateway on the test's own event loop, so that the test can reach its parts; with its server and address."""
    await set_up(as_role(settings, "bootstrap"))
    gateway = await Container.open(as_role(settings, "gateway"))
    server = GatewayServer(gateway)
    server.config.port = free_port()
    serving = asyncio.create_task(server.serve())

    async def started() -> bool:
        return server.started

    try:
        await eventually(started, "the server did not start")
        yield gateway, server, f"http://127.0.0.1:{server.config.port}"
    finally:
        server.stop()
        await serving
        await gateway.close()


async def _ignore(error: Exception) -> None:
    """Errors are expected, since tests kill servers."""
