"""Observation of a running stack: records as they change, events, queues, objects, moves on the devices."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from services.gateway.submission.refused import RefusedEvent
from shared.nats.subjects import EVENTS, FAULTS, INTAKE, JOBS
from shared.schema.event import AnyEvent, CloudEvent
from shared.schema.job import ENDED, Job
from shared.settings import Settings
from shared.storage.objects import PROBES, ObjectStore

_COLLECT_SECONDS = 0.03  # after a change, for more: looking at each of thousands would make the observer late
_SILENCE = 2.5  # seconds without even a heartbeat after which the consumer is created again


async def connect(settings: Settings) -> Client:
    """Open a connection to NATS that survives server restarts and logs nothing."""

    async def ignore(error: Exception) -> None:
        """Errors are expected, since servers are killed."""

    return await nats.connect(
        settings.nats_url.split(","),
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.1,
        ping_interval=5,
        error_cb=ignore,
    )


class Observer:
    """Observes a stack. Records are followed while it runs, as their bucket has no history; the rest is read later."""

    def __init__(self, settings: Settings, nc: Client) -> None:
        self.settings, self.nc = settings, nc
        self.js: JetStreamContext = nc.jetstream()
        self.store = ObjectStore(settings)
        self.states: dict[str, list[Job]] = {}  # every state that a record was ever in
        self._last = 0  # sequence of the latest change seen
        self._changed = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop observing."""
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        self.store.close()

    def job(self, job_id: str) -> Job | None:
        """The latest state of a record."""
        states = self.states.get(job_id)
        return states[-1] if states else None

    async def until(self, ask: Callable[[], bool], patience: float) -> bool:
        """Wait until the records fulfil a condition; returns whether they do."""
        deadline = time.monotonic() + patience
        while not ask():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            changed = self._changed
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()
                    await asyncio.sleep(_COLLECT_SECONDS)
        return True

    async def until_ended(self, job_ids: Sequence[str], patience: float) -> bool:
        """Wait until songs have ended; returns whether all have. Gives up when none ends within `patience` seconds.

        A busy machine may take as long as it needs for all of them.
        """
        while waiting := [job_id for job_id in job_ids if not self.ended(job_id)]:
            if not await self.until(lambda: any(map(self.ended, waiting)), patience):
                return False
        return True

    def ended(self, job_id: str) -> bool:
        """Whether a song has ended."""
        job = self.job(job_id)
        return job is not None and job.status in ENDED

    async def _follow(self) -> None:
        while True:
            try:
                await self._consume()
            except (nats.errors.Error, APIError, TimeoutError, OSError):
                await asyncio.sleep(0.1)

    async def _consume(self) -> None:
        """Follow the records with a push consumer: nats-py's own is silent for seconds after a server restart."""
        inbox = self.nc.new_inbox()
        subscription = await self.nc.subscribe(inbox)
        try:
            await self.js.add_consumer(
                f"KV_{JOBS}",
                ConsumerConfig(
                    deliver_subject=inbox,
                    deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=self._last + 1,
                    ack_policy=AckPolicy.NONE,
                    idle_heartbeat=1,
                    inactive_threshold=5,
                    mem_storage=True,
                ),
            )
            received = 0
            while True:
                message = await subscription.next_msg(timeout=_SILENCE)
                headers = message.headers or {}
                if headers.get("Status"):
                    continue
                received += 1
                if message.metadata.sequence.consumer != received:
                    return  # something was dropped on the way
                self._last = message.metadata.sequence.stream
                if message.data:  # else a song that was rolled back: no event was published
                    job = msgspec.json.decode(message.data, type=Job)
                    self.states.setdefault(job.job_id, []).append(job)
                else:
                    self.states.pop(message.subject.rpartition(".")[2], None)
                self._changed.set()
                self._changed = asyncio.Event()
        finally:
            with suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def until_submitted(self, patience: float) -> bool:
        """Wait until the intake is empty; returns whether it is."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with suppress(nats.errors.Error, APIError, TimeoutError):
                if not await self.subjects(INTAKE):
                    return True
            await asyncio.sleep(0.2)
        return False

    # --- afterwards

    async def events(self) -> dict[str, list[AnyEvent]]:
        """Every event of every song, in order."""
        found: dict[str, list[AnyEvent]] = {}
        for message in await self._stored(EVENTS, "events.>"):
            if not message.subject.endswith(".refused"):  # these are about no song
                event = msgspec.json.decode(message.data, type=CloudEvent).data
                found.setdefault(event.job_id, []).append(event)
        return found

    async def refusals(self) -> dict[str, list[RefusedEvent]]:
        """Every refusal of a request from the intake, by the id that its song would have had."""
        found: dict[str, list[RefusedEvent]] = {}
        for message in await self._stored(EVENTS, "events.*.*.refused"):
            event = msgspec.json.decode(message.data, type=RefusedEvent)
            found.setdefault(event.data.job_id, []).append(event)
        return found

    async def subjects(self, stream: str, subject: str = ">") -> Counter[str]:
        """How many messages a stream has, by subject."""
        info = await self.js.stream_info(stream, subjects_filter=subject)
        return Counter(info.state.subjects or {})

    async def dead_letters(self) -> Counter[str]:
        """How many dead-lettered messages each subject has."""
        return await self.subjects(FAULTS, "dead.>")

    async def keys(self, prefix: str = "") -> list[str]:
        """Keys of the stored objects, without those of the write probe. Raises `Unavailable`."""
        client, bucket = self.store._client, self.store.bucket
        found = await self.store._run(
            lambda: [str(o.object_name) for o in client.list_objects(bucket_name=bucket, prefix=prefix, recursive=True)]
        )
        return [key for key in found if not key.startswith(PROBES)]

    async def _stored(self, stream: str, subject: str) -> list[Msg]:
        count = sum((await self.subjects(stream, subject)).values())
        subscription = await self.js.subscribe(subject, stream=stream, ordered_consumer=True)
        found = [await subscription.next_msg(timeout=10) for _ in range(count)]
        await subscription.unsubscribe()
        return found


def journals(data_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Every move onto and off each device of a stack, by the device's name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in data_dir.glob("device/*/"):
        paths = [path for name in ("journal.1.jsonl", "journal.jsonl") if (path := folder / name).exists()]
        found[folder.name] = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return found
