"""Fixtures: worker processes on real servers, and songs put into the queue as the gateway does it."""

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec
import nats
from nats.aio.client import Client
from nats.js import JetStreamContext

from deploy.local.servers.embedded import Role
from deploy.setup import set_up
from shared.jobs.queues import queue_tokens
from shared.jobs.store import JobStore
from shared.nats.subjects import EVENTS, TENANT
from shared.schema.event import CloudEvent
from shared.schema.job import ENDED, Job
from shared.schema.request import GenerateRequest, Priority
from shared.settings import Settings
from shared.storage.objects import PROBES, ObjectStore

PATIENCE = 60.0  # seconds; generous, because a busy machine is not a fault

WorkerProcess = Literal["tokenizer", "codec"]  # the encoder is in the codec's


def as_role(settings: Settings, role: Role) -> Settings:
    """Settings with the rights of one role: on the servers of tests all roles have one password."""
    user = urlsplit(settings.nats_url.partition(",")[0]).username
    return replace(settings, nats_url=settings.nats_url.replace(f"//{user}:", f"//{role}:")) if user else settings


@asynccontextmanager
async def connect_client(settings: Settings) -> AsyncIterator[Client]:
    """Connect with the rights of the user `client`."""
    client = await nats.connect(as_role(settings, "client").nats_url, inbox_prefix=b"_INBOX_client")
    yield client
    await client.close()


def environment(settings: Settings, role: Role) -> dict[str, str]:
    """Environment that gives a child process these settings and the rights of its role."""
    settings = as_role(settings, role)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEARTMULA_")}
    for item in fields(Settings):
        value = getattr(settings, item.name)
        if value != item.default:
            env[item.metadata["variable"]] = _text(value)
    return env | {"OMP_NUM_THREADS": "1"}


def _text(value: object) -> str:
    """A setting as its variable has it."""
    if isinstance(value, tuple):  # frames of a window, and from one to the next
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Flow:
    """Worker processes and the songs they work on."""

    def __init__(self, settings: Settings, js: JetStreamContext) -> None:
        self.settings, self.js = settings, js
        self.jobs, self.store = JobStore(js), ObjectStore(settings)
        self.processes: list[asyncio.subprocess.Process] = []

    async def worker(self, role: WorkerProcess) -> asyncio.subprocess.Process:
        """Start a worker process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"services.{role}_worker", env=environment(self.settings, role)
        )
        self.processes.append(process)
        return process

    async def submit(
        self, seconds: float = 4, *, priority: Priority = "normal", lyrics: str = "la la", seed: int = 1, **more: object
    ) -> str:
        """Put a song into the queue; returns its id."""
        values = {"lyrics": lyrics, "max_duration_ms": round(seconds * 1000), "seed": seed, "priority": priority} | more
        job = Job(
            job_id=str(uuid.uuid4()),
            tenant=TENANT,
            request=msgspec.convert(values, GenerateRequest),
            created_at=time.time(),
        )
        await self.jobs.create(job)
        await queue_tokens(self.js._nc, job)
        return job.job_id

    async def until(self, job_id: str, condition: Callable[[Job], bool]) -> Job:
        """Wait until a song's record fulfils a condition."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            job = await self.jobs.get(job_id)
            assert job is not None
            if condition(job):
                return job
            await asyncio.sleep(0.05)
        raise AssertionError(f"the song is still {job}")

    async def ended(self, job_id: str) -> Job:
        """Wait for a song's end."""
        return await self.until(job_id, lambda job: job.status in ENDED)

    async def until_empty(self, stream: str) -> None:
        """Wait until a queue holds no message. A message is removed only after its song's record has changed."""
        deadline = time.monotonic() + PATIENCE
        while messages := (await self.js.stream_info(stream)).state.messages:
            assert time.monotonic() < deadline, f"{stream} holds {messages} messages still"
            await asyncio.sleep(0.05)

    async def until_event(self, job_id: str, kind: str) -> None:
        """Wait until an event of a kind was published."""
        deadline = time.monotonic() + PATIENCE
        while kind not in [event.data.__struct_config__.tag for event in await self.events(job_id)]:
            assert time.monotonic() < deadline, f"no {kind} event"
            await asyncio.sleep(0.05)

    async def events(self, job_id: str) -> list[CloudEvent]:
        """Every event of a song so far, in order."""
        found: list[CloudEvent] = []
        info = await self.js.stream_info(EVENTS, subjects_filter=f"events.{TENANT}.{job_id}.*")
        if not info.state.subjects:
            return found
        subscription = await self.js.subscribe(f"events.{TENANT}.{job_id}.*", ordered_consumer=True, stream=EVENTS)
        for _ in range(sum(info.state.subjects.values())):
            message = await subscription.next_msg(timeout=5)
            found.append(msgspec.json.decode(message.data, type=CloudEvent))
        await subscription.unsubscribe()
        return found

    async def keys(self, prefix: str = "") -> list[str]:
        """Keys of the stored objects, without those of the write probe."""
        client, bucket = self.store._client, self.store.bucket
        found = await asyncio.to_thread(
            lambda: [str(o.object_name) for o in client.list_objects(bucket_name=bucket, prefix=prefix, recursive=True)]
        )
        return sorted(key for key in found if not key.startswith(PROBES))

    def journal(self, gpu: str = "*") -> list[dict[str, object]]:
        """All moves onto and off the device, in order."""
        (path,) = Path(self.settings.data_dir).glob(f"device/{gpu}/journal.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    async def stop(self, process: asyncio.subprocess.Process, number: int = signal.SIGTERM) -> int:
        """Stop a worker; returns its exit code."""
        if process.returncode is None:
            process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            return await process.wait()


@asynccontextmanager
async def open_flow(settings: Settings, *roles: WorkerProcess) -> AsyncIterator[Flow]:
    """A flow with one worker process of each role. All are killed at the end."""
    client = await nats.connect(settings.nats_url, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    js = client.jetstream()
    await set_up(as_role(settings, "bootstrap"))
    flow = Flow(settings, js)
    await flow.store.ensure_bucket()
    try:
        for role in roles:
            await flow.worker(role)
        yield flow
    finally:
        for process in flow.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        flow.store.close()
        await client.close()


def overlaps(journal: list[dict[str, object]], one: str = "heartmula", other: str = "heartcodec") -> int:
    """How often both labels were on the device at the same time."""
    resident: set[object] = set()
    met = 0
    for move in journal:
        if move["move"] == "place":
            resident.add(move["label"])
        else:
            resident.discard(move["label"])
        met += {one, other} <= resident
    return met
