"""Webhooks: whoever left an address with a song is told when it has ended, at least once.

The job records are the queue. A durable consumer of their bucket, shared by all gateways, hands each record to one of
them; one that has ended is told to its address before the message is acknowledged. An end is a record, so there is no
moment at which a song has ended and its webhook could be lost. The form is that of Standard Webhooks
(https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md).
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import time
from weakref import WeakValueDictionary

import httpx
import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError
from prometheus_client import Counter

from services.gateway.background.webhooks.addresses import Address, LookUps, check_host, is_public
from services.gateway.background.webhooks.slots import Crowded, HostSlots
from shared.errors import InvalidRequest, Unreadable
from shared.nats.subjects import HOOKS_DELIVERY, HOOKS_GROUP, dead_subject
from shared.schema.base import timestamp
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Job, Status
from shared.schema.request import AudioFormat
from shared.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 6 * 3600.0  # seconds; a pause is as long as the song has been ended, within these
GIVE_UP = 24 * 3600.0  # seconds after the end
AT_ONCE_EACH = 4  # deliveries to one host; `HostSlots` has how many there may be in all
_TIMEOUT = 15.0

_NATS_ERRORS = (nats.errors.Error, APIError, OSError, TimeoutError)


class Ended(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is told of a song."""

    job_id: str
    status: Status
    created_at: str  # RFC 3339
    completed_at: str
    result_url: str | None = None  # below the service's address
    title: str | None = None
    format: AudioFormat | None = None
    duration: float | None = None  # seconds
    seed: int | None = None
    group: str | None = None
    error: str | None = None


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a webhook."""

    type: str  # heartmula.song.completed, .failed or .cancelled
    timestamp: str  # when the song ended
    data: Ended


class _Failure(Exception):
    """Not delivered. `final`: it never will be; else `pause` seconds, or more, may help."""

    def __init__(self, reason: str, *, pause: float = 0.0, final: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.final = pause, final


def payload_of(job: Job) -> Payload:
    """What is told of a song that has ended."""
    done = job.status == "completed"
    ended = timestamp(job.completed_at or job.created_at)
    return Payload(
        type=f"heartmula.song.{job.status}",
        timestamp=ended,
        data=Ended(
            job_id=job.job_id,
            status=job.status,
            created_at=timestamp(job.created_at),
            completed_at=ended,
            result_url=f"/generate/{job.job_id}/result" if done else None,
            title=job.request.title,
            format=job.request.format if done else None,
            duration=job.duration_s,
            seed=job.request.seed,
            group=job.group,
            error=job.error if job.status == "failed" else None,
        ),
    )


def sign(secret: bytes, message_id: str, seconds: int, body: bytes) -> str:
    """The ``webhook-signature`` header, version 1 of Standard Webhooks."""
    signed = f"{message_id}.{seconds}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


def _target(url: str, private: bool) -> httpx.URL:
    """An address as it is called. Raises `InvalidRequest` for one that cannot be."""
    words = "must be an address beginning with https:// or http://"
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidRequest("webhook_url", f"{words}: {str(error)[:200]}") from None
    if (
        not target.host
        or target.scheme not in ("http", "https")
        or any(c.isspace() or not c.isprintable() for c in url)
    ):
        raise InvalidRequest("webhook_url", words)
    if target.port is not None and not 0 < target.port < 65536:
        raise InvalidRequest("webhook_url", f"{words}, with a port from 1 to 65535 if it has one")
    if target.userinfo:
        raise InvalidRequest("webhook_url", "must hold no user and password; the signature proves who calls")
    check_host(target.raw_host.decode(), private=private)
    return target


class Webhooks:
    """One gateway's share in telling ends."""

    def __init__(self, nc: Client, settings: Settings, told: Counter) -> None:
        """`told` counts deliveries by ``outcome``."""
        self._nc, self._js, self._told = nc, nc.jetstream(timeout=5), told
        self._secret = base64.b64decode(settings.webhook_secret.removeprefix("whsec_"))
        self._private = settings.webhook_private
        self._places, self._look_ups = HostSlots(), LookUps()
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by song
        # No proxy: it would resolve the name anew, and reach what must not be reached. No connection is used again:
        # they are kept by address, and what one name has proved there says nothing of another.
        alone = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False, follow_redirects=False, limits=alone)

    def check(self, url: str | None) -> None:
        """Raise `InvalidRequest` for an address that could not be told. Names are looked up only when they are."""
        if url is None:
            return
        if not self._secret:
            raise InvalidRequest("webhook_url", "cannot be used: HEARTMULA_WEBHOOK_SECRET is not set on this service")
        _target(url, self._private)

    async def start(self) -> None:
        """Begin to tell. Without a secret nobody could have left an address."""
        if self._secret:
            await self._nc.subscribe(HOOKS_DELIVERY, queue=HOOKS_GROUP, cb=self._on_record)

    async def close(self) -> None:
        """Stop; what is not told yet is told by another gateway, or later."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._http.aclose()

    async def _on_record(self, message: Msg) -> None:
        try:
            job = read_record(message.subject, message.data) if message.data else None
        except Unreadable:  # of a newer version, or none
            job = None
        if job is None or job.status not in ENDED or job.request.webhook_url is None:
            with contextlib.suppress(nats.errors.Error):
                await message.ack()
        elif job.job_id not in self._tasks:  # else it waits for a free place, and comes again in vain
            task = asyncio.create_task(self._tell(message, job, job.request.webhook_url))
            self._tasks[job.job_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job.job_id, None))

    async def _tell(self, message: Msg, job: Job, url: str) -> None:
        """Deliver, and settle the message accordingly. Every error but those of NATS is an outcome."""
        host, failure = "", None
        try:
            target = _target(url, self._private)
            host = target.host
            async with self._hosts.setdefault(host, asyncio.Semaphore(AT_ONCE_EACH)), self._places.take():
                await self._deliver(job, target)
        except _Failure as found:
            failure = found
        except InvalidRequest as error:  # an older version took it
            failure = _Failure(str(error), final=True)
        except Crowded:
            failure = _Failure("it is slow, and so are too many others at the moment")
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            failure = _Failure(str(error) or "no answer in time")
        except Exception as error:
            log.error("%s: unexpected %s while %s was called", job.job_id, type(error).__name__, host, exc_info=error)
            failure = _Failure("an unexpected error, of which the gateway's log tells more")
        try:
            if failure is not None:
                await self._failed(message, job, host, failure)
                return
            self._told.labels("delivered").inc()
            await message.ack()
        except _NATS_ERRORS as error:  # not settled: it comes again
            log.warning("%s: %s may be told again, NATS does not answer: %r", job.job_id, host, error)

    async def _failed(self, message: Msg, job: Job, host: str, failure: _Failure) -> None:
        age = max(0.0, time.time() - (job.completed_at or job.created_at))
        if not failure.final and age < GIVE_UP:
            self._told.labels("failed").inc()
            pause = min(max(failure.pause, age, FIRST_PAUSE), LONGEST_PAUSE)
            log.info("%s: %s was not reached, trying again in %.0f s: %s", job.job_id, host, pause, failure)
            await message.nak(delay=pause)
        else:
            self._told.labels("given_up").inc()
            log.warning("%s: the webhook to %s is given up: %s", job.job_id, host, failure)
            reason = str(failure).replace("\n", " ")[:500]
            await self._js.publish(dead_subject("webhook", job.job_id), headers={"Reason": reason})
            await message.ack()

    async def _deliver(self, job: Job, target: httpx.URL) -> None:
        port = target.port or (443 if target.scheme == "https" else 80)
        body = msgspec.json.encode(payload_of(job))
        message_id, now = f"{job.job_id}-{job.status}", int(time.time())
        headers = {
            "Host": target.netloc.decode(),
            "Content-Type": "application/json",
            "User-Agent": "HeartMuLa-on-JetStream",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(self._secret, message_id, now, body),
        }
        name = target.raw_host.decode()
        async with asyncio.timeout(_TIMEOUT):
            # Called by the address that was checked, not by the name: it could mean another one by now.
            there = target.copy_with(host=str(await self._address(name, port)), port=port)
            request = self._http.build_request(
                "POST", there, content=body, headers=headers, extensions={"sni_hostname": name}
            )
            answer = await self._http.send(request, stream=True)
            await answer.aclose()  # what it says does not matter
        if answer.is_success:
            return
        pause = answer.headers.get("retry-after", "")
        raise _Failure(
            f"it answered {answer.status_code}",
            pause=float(pause) if pause.isascii() and pause.isdigit() and len(pause) < 7 else 0.0,
            final=answer.status_code == 410,
        )

    async def _address(self, host: str, port: int) -> Address:
        for address in await self._look_ups.find(host, port):
            if self._private or is_public(address):
                return address
        raise _Failure("its address is a private one", final=True)
