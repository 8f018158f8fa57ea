"""The intake: requests that are stored first and submitted later, for clients that do not wait for an answer.

A gateway stores a request in the stream INTAKE and answers with the stream's acknowledgement. The gateways share a
durable consumer of it, and submit one request after the other. A request leaves the stream once its song is accepted,
or its refusal is an event; where the queue is full, a limit is reached or a server is away, it waits. The id of a song
follows from the key that is stored with the request, so that a request which is delivered again makes no second song.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.gateway.auth.authenticate import Authenticator
from services.gateway.background.deferred import TooManyDeferred
from services.gateway.errors import ApiError, Problem, to_api_error
from services.gateway.submission.idempotency import song_of
from services.gateway.submission.outage import Outage
from services.gateway.submission.refused import Refused, RefusedEvent
from services.gateway.submission.service import Submission
from services.gateway.submission.validation import too_large
from shared.aio import end
from shared.causes import NO_ANSWER
from shared.errors import (
    HeartMulaError,
    InvalidRequest,
    NewerRecord,
    NotFound,
    QueueFull,
    StreamFull,
    Unavailable,
)
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.subjects import INTAKE, INTAKE_CONSUMER, event_subject, intake_queue_subject
from shared.schema.base import timestamp
from shared.schema.decoding import UNREADABLE
from shared.schema.request import MAX_BODY
from shared.tracing import span, trace_headers
from shared.waiting import ThrottledLog

log = logging.getLogger(__name__)

_KEY_HEADER = "Heartmula-Key"
_FETCH = f"$JS.API.CONSUMER.MSG.NEXT.{INTAKE}.{INTAKE_CONSUMER}"
_FETCH_SECONDS, _POLL_SECONDS = 2.0, 1.0
_PAUSE_SECONDS = 2.0  # at most, before the next request, when the queue is full or a server is away
_CLOSE_PATIENCE = 5.0
_FAULTS = 5  # of the gateway with one request, after which that is refused
_FAULT_PAUSE = 5.0  # seconds


@dataclass(frozen=True)
class Stored:
    """A request that is on disk, and will be submitted."""

    sequence: int
    duplicate: bool  # the same request was stored just before, under the same key
    job_id: str  # that its song will have; of the first, where it asks for several


class Intake:
    """The intake of one gateway. Gateways share what is stored."""

    def __init__(self, nc: Client, authenticator: Authenticator, submission: Submission, outage: Outage) -> None:
        self._nc, self._js = nc, nc.jetstream(timeout=5)
        self._jobs = JobStore(self._js)
        self._authenticator, self._submission, self._outage = authenticator, submission, outage
        self._task: asyncio.Task[None] | None = None
        self._wake, self._closing = asyncio.Event(), asyncio.Event()
        self._held: dict[str, float] = {}  # by tenant that has reached a limit, until when (monotonic)
        self._faults: Counter[int] = Counter()  # by sequence
        self._trouble = ThrottledLog(log.warning)

    def start(self) -> None:
        """Begin to submit what is stored."""
        self._task = asyncio.create_task(self._run(), name="intake")

    async def close(self) -> None:
        """Stop; a request that is being submitted is finished, if that does not take long."""
        self._closing.set()
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_CLOSE_PATIENCE)
            await end(self._task)

    async def store(self, tenant: str, data: bytes, key: str | None) -> Stored:
        """Store a request of a tenant; return once it is on disk. While NATS is away for a short time it waits.

        The body is not looked at here. Raises `ApiError` for an unknown tenant or a body that is too large,
        `InvalidRequest` for a malformed key, `QueueFull`, or `Unavailable`; it may be stored in the last case.
        """
        name = self._authenticator.tenant(tenant).tenant
        if len(data) > MAX_BODY:
            raise too_large()
        key = secrets.token_hex(16) if key is None else key
        job_id = song_of(key, name)
        # A corrected request under the same key is another one; its song, if it has one by then, is found later.
        headers = {"Nats-Msg-Id": f"{job_id}.{hashlib.sha256(data).hexdigest()[:32]}", _KEY_HEADER: key}
        wait, repeated = self._outage.begin_request(), False
        while True:
            try:
                try:
                    async with wait.attempt():
                        with nats_errors("NATS does not answer", refusal="NATS did not take the request"):
                            ack = await self._js.publish(
                                intake_queue_subject(name), data, headers=headers | trace_headers()
                            )
                        if ack.duplicate and await self._was_refused(name, job_id, ack.seq):
                            headers["Nats-Msg-Id"] = f"{job_id}.{secrets.token_hex(16)}"  # it may be accepted now
                            continue
                        break
                except TimeoutError:
                    raise Unavailable("nats", f"NATS does not answer: {NO_ANSWER}") from None
            except StreamFull:
                raise QueueFull("as many requests wait in the intake as may; try again in a while") from None
            except Unavailable as error:
                repeated = True
                await wait.until_back(error)
        self._wake.set()
        return Stored(ack.seq, bool(ack.duplicate) and not repeated, job_id)

    async def _was_refused(self, tenant: str, job_id: str, sequence: int) -> bool:
        """Whether a request left the intake without a song. Raises `Unavailable`."""
        try:
            with nats_errors("the intake cannot be read"):
                await self._js.get_msg(INTAKE, seq=sequence)
        except NotFound:
            with contextlib.suppress(NewerRecord):
                return await self._jobs.get(job_id, tenant) is None
        return False

    # --- submitting

    async def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            pause = 0.0
            try:
                while not self._closing.is_set() and (message := await self._fetch()) is not None:
                    if pause := await self._settle(message):
                        break
                self._trouble.reset()
            except HeartMulaError as error:
                self._trouble.log(f"the intake waits: {error}")
            except Exception:
                log.exception("the intake met an unexpected error, and goes on")
                pause = _FAULT_PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause or _POLL_SECONDS):
                    await (self._closing if pause else self._wake).wait()

    async def _fetch(self) -> Msg | None:
        """The next request, if there is one. A pull request that waits would stall across a reconnect."""
        try:
            with nats_errors("the intake cannot be read"):
                answer = await self._nc.request(
                    _FETCH, b'{"batch":1,"no_wait":true}', timeout=_FETCH_SECONDS, old_style=True
                )
        except NotFound as error:
            raise Unavailable("nats", str(error)) from error
        headers = answer.headers or {}
        status = headers.get("Status")
        if status is None:
            return answer
        if status in ("404", "408"):
            return None
        raise Unavailable("nats", f"the intake answers {status} {headers.get('Description', '')}")

    async def _settle(self, message: Msg) -> float:
        """Submit one request. Returns for how many seconds no other one needs to be tried.

        Raises `Unavailable` where NATS is not reached; then it is delivered again.
        """
        tenant, key = message.subject.split(".")[2], (message.headers or {}).get(_KEY_HEADER, "")
        sequence = message.metadata.sequence.stream
        try:
            job_id = song_of(key, tenant)
        except InvalidRequest:
            UNREADABLE.labels("message").inc()
            log.warning("request %d in the intake was stored by no gateway: dropped", sequence)
            await _acknowledge(message)
            return 0.0
        if (pause := self._held.get(tenant, 0.0) - time.monotonic()) > 0:
            await _give_back(message, pause)
            return 0.0
        try:
            caller = self._authenticator.tenant(tenant)
            with span("intake", message.headers):
                await self._submission.submit(caller, message.data, key)
        except Exception as error:
            found = to_api_error(error)
            seconds = float(found.headers.get("Retry-After", _FAULT_PAUSE))
            match found.kind:
                case "too-many-requests":
                    self._held[tenant] = time.monotonic() + seconds
                    await _give_back(message, seconds)
                    return 0.0
                case "queue-full" if isinstance(error, TooManyDeferred):
                    await _give_back(message, seconds)
                    return 0.0
                case "queue-full" | "unavailable":
                    # Longer each time: what is given back comes first again, and would keep the others back for good
                    # where it alone cannot be submitted, such as many variants in a queue with little room.
                    await _give_back(message, min(seconds, _PAUSE_SECONDS * message.metadata.num_delivered))
                    return min(seconds, _PAUSE_SECONDS)
                case "internal" if self._faults[sequence] + 1 < _FAULTS:
                    self._faults[sequence] += 1
                    await _give_back(message, _FAULT_PAUSE)
                    return 0.0
            await self._report(tenant, job_id, key, sequence, found)
        self._held.pop(tenant, None)
        del self._faults[sequence]
        await _acknowledge(message)
        return 0.0

    async def _report(self, tenant: str, job_id: str, key: str, sequence: int, error: ApiError) -> None:
        """Publish that a request was refused. Raises `Unavailable`."""
        event_id = f"{job_id}:refused:{sequence}"
        problem = msgspec.convert(error.body(), Problem)
        event = RefusedEvent(
            id=event_id,
            type="heartmula.song.refused",
            subject=job_id,
            time=timestamp(time.time()),
            data=Refused(job_id=job_id, key=key, problem=problem),
        )
        log.info("%s: refused: %s", job_id, error.kind)
        with nats_errors("the refusal of a request could not be published"):
            await self._js.publish(
                event_subject(tenant, job_id, "refused"),
                msgspec.json.encode(event),
                headers={"Nats-Msg-Id": event_id},
            )


async def _acknowledge(message: Msg) -> None:
    with nats_errors("a request cannot be taken out of the intake"):
        await message.ack_sync()


async def _give_back(message: Msg, seconds: float) -> None:
    with nats_errors("a request cannot be given back to the intake"):
        await message.nak(delay=seconds)
