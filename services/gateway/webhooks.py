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
import ipaddress
import logging
import socket
import time
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httpx
import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError
from prometheus_client import Counter

from shared.errors import InvalidRequest
from shared.messages import ENDED, AudioFormat, Job, Status, timestamp
from shared.settings import Settings
from shared.topology import HOOKS_DELIVERY, HOOKS_GROUP, dead_subject

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 6 * 3600.0  # seconds; a pause is as long as the song has been ended, within these
GIVE_UP = 24 * 3600.0  # seconds after the end
AT_ONCE, AT_ONCE_EACH = 64, 4  # deliveries: in all, and to one host, so that a dead one does not hold up the others
_TIMEOUT = 15.0
_NEVER = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))

_NATS_ERRORS = (nats.errors.Error, APIError, OSError, TimeoutError)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in net for net in _NEVER):  # they lead to IPv4 addresses of all kinds
            return False
    return address.is_global and not address.is_multicast


class Webhooks:
    """One gateway's share in telling ends."""

    def __init__(self, nc: Client, settings: Settings, told: Counter) -> None:
        """`told` counts deliveries by ``outcome``."""
        self._nc, self._js, self._told = nc, nc.jetstream(timeout=5), told
        self._secret = base64.b64decode(settings.webhook_secret.removeprefix("whsec_"))
        self._private = settings.webhook_private
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by song
        # No proxy: it would resolve the name anew, and reach what must not be reached.
        self._http = httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False, follow_redirects=False)

    def check(self, url: str | None) -> None:
        """Raise `InvalidRequest` for an address that could not be told. Names are looked up only when they are."""
        if url is None:
            return
        if not self._secret:
            raise InvalidRequest("webhook_url", "cannot be used: HEARTMULA_WEBHOOK_SECRET is not set on this service")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if (
            host is None
            or parts.scheme not in ("http", "https")
            or any(c.isspace() or not c.isprintable() for c in url)
        ):
            raise InvalidRequest("webhook_url", "must be an address beginning with https:// or http://")
        if parts.username is not None or parts.password is not None:
            raise InvalidRequest("webhook_url", "must hold no user and password; the signature proves who calls")
        with contextlib.suppress(ValueError):
            if not (self._private or is_public(ipaddress.ip_address(host))):
                raise InvalidRequest("webhook_url", "is a private address, which this service does not call")

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
            job = msgspec.json.decode(message.data, type=Job) if message.data else None
        except msgspec.DecodeError:  # of a newer version, or none
            job = None
        if job is None or job.status not in ENDED or job.request.webhook_url is None:
            with contextlib.suppress(nats.errors.Error):
                await message.ack()
        elif job.job_id not in self._tasks:  # else it waits for a free place, and comes again in vain
            task = asyncio.create_task(self._tell(message, job, job.request.webhook_url))
            self._tasks[job.job_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job.job_id, None))

    async def _tell(self, message: Msg, job: Job, url: str) -> None:
        """Deliver, and settle the message accordingly."""
        host = urlsplit(url).hostname or ""
        try:
            async with self._hosts.setdefault(host, asyncio.Semaphore(AT_ONCE_EACH)), self._at_once:
                await self._deliver(job, url)
            self._told.labels("delivered").inc()
            await message.ack()
        except _Failure as failure:
            await self._failed(message, job, host, failure)
        except _NATS_ERRORS as error:  # not settled: it comes again
            log.warning("%s: %s may be told again, NATS does not answer: %r", job.job_id, host, error)

    async def _failed(self, message: Msg, job: Job, host: str, failure: _Failure) -> None:
        age = max(0.0, time.time() - (job.completed_at or job.created_at))
        try:
            if not failure.final and age < GIVE_UP:
                self._told.labels("failed").inc()
                pause = min(max(failure.pause, age, FIRST_PAUSE), LONGEST_PAUSE)
                log.info("%s: %s was not told, trying again in %.0f s: %s", job.job_id, host, pause, failure)
                await message.nak(delay=pause)
            else:
                self._told.labels("given_up").inc()
                log.warning("%s: %s is not told: %s", job.job_id, host, failure)
                reason = str(failure).replace("\n", " ")[:500]
                await self._js.publish(dead_subject("webhook", job.job_id), headers={"Reason": reason})
                await message.ack()
        except _NATS_ERRORS as error:
            log.warning("%s: %s is told again, NATS does not answer: %r", job.job_id, host, error)

    async def _deliver(self, job: Job, url: str) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        body = msgspec.json.encode(payload_of(job))
        message_id, now = f"{job.job_id}-{job.status}", int(time.time())
        headers = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "User-Agent": "HeartMuLa-on-JetStream",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(self._secret, message_id, now, body),
        }
        try:
            async with asyncio.timeout(_TIMEOUT):
                # Called by the address that was checked, not by the name: it could mean another one by now.
                address = await self._address(host, port)
                target = httpx.URL(url).copy_with(host=str(address), port=port)
                request = self._http.build_request(
                    "POST", target, content=body, headers=headers, extensions={"sni_hostname": host}
                )
                answer = await self._http.send(request, stream=True)
                await answer.aclose()  # what it says does not matter
        except (httpx.HTTPError, OSError, TimeoutError, UnicodeError) as error:
            raise _Failure(str(error) or type(error).__name__) from None
        if answer.is_success:
            return
        pause = answer.headers.get("retry-after", "")
        raise _Failure(
            f"it answered {answer.status_code}",
            pause=float(pause) if pause.isascii() and pause.isdigit() and len(pause) < 7 else 0.0,
            final=answer.status_code == 410,
        )

    async def _address(self, host: str, port: int) -> Address:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            if self._private or is_public(address):
                return address
        raise _Failure("its address is a private one", final=True)
