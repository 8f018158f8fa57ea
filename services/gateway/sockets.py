"""A song's events over a websocket: a snapshot, what was missed, then everything live, and a close that says why."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import msgspec
from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath

from services.gateway.access import Caller
from services.gateway.forecast import moved
from services.gateway.gateway import Gateway
from services.gateway.hub import Mailbox, StoredEvent, following, newest
from services.gateway.outlook import Expectation
from services.gateway.problems import Refusal
from services.gateway.songs import StatusBody, describe, find_job
from shared.errors import HeartMulaError
from shared.events import end_event
from shared.messages import ENDED, AnyEvent, Job, Progress, Queued, cloud_event
from shared.topology import event_subject

log = logging.getLogger(__name__)

Socket = WebSocket[Any, Any, Any]

DONE, REFUSED, FAULT, RECONNECT, UNAUTHORIZED, UNKNOWN = 1000, 1008, 1011, 1012, 4401, 4404
SEND_SECONDS = 10.0
_LOOK_SECONDS = 2.0  # without an event, after which a waiting song's place is looked at
_RECORD_LOOKS = 5  # … and after so many looks the record: an event may be lost, the record is not
_SEND_ERRORS = (WebSocketDisconnect, OSError, TimeoutError)


class SnapshotBody(StatusBody, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """The first frame: the state of the song, and the sequence of its latest event."""

    id: str


class _Close(Exception):
    """Ends a socket with a code that tells the client what to do."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Gone(Exception):
    """Nobody is there any more."""


@websocket("/generate/{job_id:str}/events")
async def events(socket: Socket, gateway: NamedDependency[Gateway], job_id: FromPath[str]) -> None:
    """Follow a song until it has ended."""
    await socket.accept()
    close: _Close | None = None
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_until_gone(socket))
            close = await _follow(socket, gateway, job_id)
            watcher.cancel()
    except* _Gone:
        pass
    if close is not None:
        with contextlib.suppress(*_SEND_ERRORS):
            async with asyncio.timeout(SEND_SECONDS):
                await socket.close(close.code, close.reason)


async def _until_gone(socket: Socket) -> None:
    """Raise once the client has left; what it says is ignored."""
    with contextlib.suppress(WebSocketDisconnect):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass
    raise _Gone


async def _follow(socket: Socket, gateway: Gateway, job_id: str) -> _Close:
    try:
        caller = gateway.access.caller(socket)
        await _Feed(socket, gateway, caller, job_id).run(_after(socket))
    except _Close as close:
        return close
    except Refusal as refusal:
        if refusal.status == 401:  # before it was accepted, a browser could not tell it from a server that is away
            return _Close(UNAUTHORIZED, "an API key is needed")
        return _Close(UNKNOWN, "no song has this id")
    except HeartMulaError as error:
        log.warning("%s: events cannot be followed: %s", job_id[:64], error)
        return _Close(RECONNECT, "a server does not answer; connect again")
    except _SEND_ERRORS as error:  # who does not read would not read a reason either
        raise _Gone from error
    except Exception:
        log.exception("%s: unexpected", job_id[:64])
        return _Close(FAULT, "a fault of the gateway; its log says more")
    return _Close(DONE, "the song has ended")


def _after(socket: Socket) -> int | None:
    text = socket.scope["query_string"].decode("latin-1")
    values = [value for name, _, value in (part.partition("=") for part in text.split("&")) if name == "after"]
    if not values or not values[-1]:
        return None
    if not (values[-1].isascii() and values[-1].isdigit() and len(values[-1]) < 19):
        raise _Close(REFUSED, "after must be the id of an event")
    return int(values[-1])


class _Feed:
    """One client's way through a song's events."""

    def __init__(self, socket: Socket, gateway: Gateway, caller: Caller, job_id: str) -> None:
        self._socket, self._gateway, self._caller, self._job_id = socket, gateway, caller, job_id
        self._sent = 0  # sequence of the latest event that the client knows
        self._progress = 0.0
        self._job: Job  # as of the snapshot; its status as of the latest event
        self._expected = Expectation()  # as the client was told

    async def run(self, after: int | None) -> None:
        """Send everything until the song has ended. Raises `TimeoutError` for a client that does not read."""
        with self._gateway.hub.listen(self._job_id) as mailbox:
            # Events before the record: workers write the record first, so the snapshot is never behind its id.
            job = await find_job(self._gateway, self._caller.tenant, self._job_id)
            subject = event_subject(job.tenant, job.job_id, "*")
            stored = await newest(self._gateway.js, subject)
            last = stored.sequence if stored else 0
            await self._snapshot(last)
            self._sent = last
            if after is not None and after < last:
                await self._replay(subject, after, last)
            if self._job.status not in ENDED:
                await self._live(mailbox)

    async def _snapshot(self, last: int) -> None:
        self._job = await find_job(self._gateway, self._caller.tenant, self._job_id)
        body = await describe(self._gateway, self._job)
        self._progress, self._expected = body.progress, Expectation.told(body.queue_position, body.eta)
        await self._send(msgspec.json.encode(SnapshotBody(id=str(last), **msgspec.structs.asdict(body))))

    async def _replay(self, subject: str, after: int, last: int) -> None:
        sequence = after + 1
        while sequence <= last:
            stored = await following(self._gateway.js, subject, sequence)
            if stored is None or stored.sequence > last:
                return
            await self._event(stored, live=False)
            sequence = stored.sequence + 1

    async def _live(self, mailbox: Mailbox) -> None:
        quiet = 0  # looks since the latest event
        while True:
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    stored = await mailbox.get()
            except TimeoutError:
                quiet += 1
                if await self._look(quiet):
                    return
                continue
            if stored is None:
                raise _Close(RECONNECT, "events were lost; connect again")
            quiet = 0
            if stored.sequence > self._sent:
                self._sent = stored.sequence
                await self._event(stored, live=True)
                if stored.event.data.status in ENDED:
                    return

    async def _look(self, quiet: int) -> bool:
        """Tell what no event tells. Returns whether the song has ended."""
        if self._job.status in ENDED:  # for a while, and its event did not come: whoever was to send it is gone
            await self._tell(end_event(self._job, self._progress))
            return True
        if quiet % _RECORD_LOOKS == 0:
            self._job = await find_job(self._gateway, self._caller.tenant, self._job_id)
        if self._job.status == "queued":
            expected = await self._gateway.outlook.of(self._job)
            told = self._expected
            if expected.position is not None and (
                expected.position != told.position or moved(told.at, expected.at, time.time())
            ):
                self._expected = expected
                await self._tell(
                    Queued(
                        job_id=self._job_id,
                        status="queued",
                        progress=self._progress,
                        queue_position=expected.position,
                        eta=expected.eta,
                    )
                )
        return False

    async def _tell(self, event: AnyEvent) -> None:
        """Send an event that is in no stream, under the id of the latest that is."""
        await self._send(msgspec.json.encode(cloud_event(event, str(self._sent))))

    async def _event(self, stored: StoredEvent, *, live: bool) -> None:
        data = stored.event.data
        self._progress = max(self._progress, data.progress)
        data = msgspec.structs.replace(data, progress=self._progress)
        if live:
            if data.status == "decoding" and self._job.frames is None:
                self._job = await find_job(self._gateway, self._caller.tenant, self._job_id)  # it knows by now how long the song is
            self._job = msgspec.structs.replace(self._job, status=data.status)
            if isinstance(data, Progress):
                data = msgspec.structs.replace(data, eta=(await self._gateway.outlook.of(self._job, data)).eta)
        event = msgspec.structs.replace(stored.event, id=str(stored.sequence), data=data)
        await self._send(msgspec.json.encode(event))

    async def _send(self, frame: bytes) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self._socket.send_data(frame.decode(), mode="text")
