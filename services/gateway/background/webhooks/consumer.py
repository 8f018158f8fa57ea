"""The consumer of songs: calls the webhook address that was given with a song, at least once.

The job records are the queue. A durable consumer of their bucket, shared by all gateways, hands each record to one of
them; the record of a song that has ended is acknowledged after its address was called. The end of a song is a record,
so there is no moment at which a song has ended and its webhook could be lost. The times of further attempts are kept by
the NATS server: a message that is not acknowledged comes again after the delay that was asked for. The first audio of a
song is in its record too; `audio_webhook` says how it is reported once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

import httpx
from nats.aio.client import Client
from nats.aio.msg import Msg
from prometheus_client import Counter

from services.gateway.background.webhooks import audio_webhook
from services.gateway.background.webhooks.delivery import DeliveryFailed, Sender
from services.gateway.background.webhooks.payload import Call, audio_call, end_call
from services.gateway.background.webhooks.slots import DeliverySlots, SlotsFull
from shared.errors import HeartMulaError, InvalidRequest, Unreadable
from shared.jobs.store import JobStore
from shared.nats.errors import nats_errors
from shared.nats.subjects import HOOKS_DELIVERY, HOOKS_GROUP, dead_subject
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Job
from shared.schema.request import GenerateRequest, WebhookEvent
from shared.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 6 * 3600.0  # seconds; a pause is as long as it is tried already, within these
GIVE_UP = 24 * 3600.0  # seconds after the end
HOST_DELIVERIES = 4  # to one host at once; `DeliverySlots` limits how many there may be in all


class _Result(NamedTuple):
    """What became of an attempt; no failure: the address was called, or nothing was to be sent."""

    host: str = ""
    failure: DeliveryFailed | None = None


class Webhooks:
    """The webhooks that one gateway delivers."""

    def __init__(self, nc: Client, settings: Settings, outcomes: Counter) -> None:
        """`outcomes` counts deliveries by ``outcome``."""
        self._nc, self._js, self._outcomes = nc, nc.jetstream(timeout=5), outcomes
        self._jobs = JobStore(self._js)
        self._sender, self._slots = Sender(settings), DeliverySlots()
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        self._tasks: dict[tuple[str, WebhookEvent], asyncio.Task[None]] = {}  # by song and what is reported

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for an address that cannot be called. Names are looked up at the delivery only."""
        if request.webhook_url is not None:
            self._sender.target(request.webhook_url)
        elif "audio" in request.webhook_events:
            raise InvalidRequest("webhook_events", "needs an address to call: give webhook_url too")

    async def start(self) -> None:
        """Begin to deliver. Without a secret no song has a webhook."""
        if self._sender.enabled:
            await self._nc.subscribe(HOOKS_DELIVERY, queue=HOOKS_GROUP, cb=self._on_record)

    async def close(self) -> None:
        """Stop. Pending webhooks are delivered by another gateway, or later."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._sender.close()

    async def _on_record(self, message: Msg) -> None:
        try:
            job = read_record(message.subject, message.data) if message.data else None
        except Unreadable:  # a newer version wrote it, or it is no record
            job = None
        due = None if job is None else _due(job)
        with contextlib.suppress(HeartMulaError), nats_errors("a record was not settled"):
            if job is None or job.request.webhook_url is None or due is None:
                await message.ack()
            elif pause := audio_webhook.seconds_to_wait(job):
                await message.nak(delay=pause)
            else:
                self._begin(message, job, job.request.webhook_url, due)

    def _begin(self, message: Msg, job: Job, url: str, due: WebhookEvent) -> None:
        key = job.job_id, due
        if key not in self._tasks:  # a redelivery while the first one waits for a slot changes nothing
            deliver = self._report_end if due == "ended" else self._report_audio
            task = self._tasks[key] = asyncio.create_task(self._settled(deliver(message, job, url), job, due))
            task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _settled(self, reporting: Awaitable[None], job: Job, due: WebhookEvent) -> None:
        try:
            with nats_errors("NATS does not answer"):
                await reporting
        except HeartMulaError as error:  # not settled: it comes again
            log.warning("%s: the webhook (%s) may be sent again: %s", job.job_id, due, error)

    async def _report_end(self, message: Msg, job: Job, url: str) -> None:
        async def call() -> Call:
            return end_call(job)

        host, failure = await self._attempt(job, url, call)
        age = max(0.0, time.time() - (job.completed_at or job.created_at))
        if failure is None:
            self._outcomes.labels("delivered").inc()
            await message.ack()
        elif not failure.final and age < GIVE_UP:
            await message.nak(delay=self._pause(job, host, failure, age))
        else:
            self._outcomes.labels("given_up").inc()
            log.warning("%s: the webhook to %s is given up: %s", job.job_id, host, failure)
            reason = str(failure).replace("\n", " ")[:500]
            await self._js.publish(dead_subject("webhook", job.job_id), headers={"Reason": reason})
            await message.ack()

    async def _report_audio(self, message: Msg, job: Job, url: str) -> None:
        begun: Job | None = None

        async def call() -> Call | None:
            nonlocal begun
            begun = await audio_webhook.begin(self._jobs, job)
            return audio_call(begun) if begun else None

        host, failure = await self._attempt(job, url, call)
        if failure is None:
            if begun is not None:
                self._outcomes.labels("delivered").inc()
                await audio_webhook.settle(self._jobs, job, None)
            await message.nak()  # if no later change of the record has replaced it, it is looked at again
            return
        if failure.final:
            self._outcomes.labels("failed").inc()
            log.warning("%s: the webhook to %s about its audio is given up: %s", job.job_id, host, failure)
            await audio_webhook.settle(self._jobs, job, None)
            return
        state = (begun or job).audio_webhook
        pause = self._pause(job, host, failure, time.time() - state.since if state else 0.0)
        await audio_webhook.settle(self._jobs, job, time.time() + pause)

    def _pause(self, job: Job, host: str, failure: DeliveryFailed, age: float) -> float:
        """Seconds until the next attempt; `age` is for how long there have been attempts."""
        self._outcomes.labels("failed").inc()
        pause = min(max(failure.pause, age, FIRST_PAUSE), LONGEST_PAUSE)
        log.info("%s: the webhook to %s failed, trying again in %.0f s: %s", job.job_id, host, pause, failure)
        return pause

    async def _attempt(self, job: Job, url: str, call: Callable[[], Awaitable[Call | None]]) -> _Result:
        """Call an address, unless there is nothing to send after all. Every error but those of NATS is a result."""
        host = ""
        try:
            target = self._sender.target(url)
            host = target.host
            async with self._hosts.setdefault(host, asyncio.Semaphore(HOST_DELIVERIES)), self._slots.take():
                found = await call()
                if found is not None:
                    await self._sender.send(found, target)
        except DeliveryFailed as failure:
            return _Result(host, failure)
        except InvalidRequest as error:  # an older version accepted the address
            return _Result(host, DeliveryFailed(str(error), final=True))
        except SlotsFull:
            return _Result(host, DeliveryFailed("it is slow, and too many other hosts are slow at the moment"))
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            return _Result(host, DeliveryFailed(str(error) or "no answer in time"))
        except HeartMulaError:
            raise
        except Exception as error:
            kind = type(error).__name__
            log.error("%s: unexpected %s during the webhook to %s", job.job_id, kind, host, exc_info=error)
            return _Result(host, DeliveryFailed("an unexpected error; the gateway's log has the details"))
        return _Result(host)


def _due(job: Job) -> WebhookEvent | None:
    """What is to be reported about a song by its record."""
    if job.status in ENDED:
        return "ended" if "ended" in job.webhook_events else None
    return "audio" if audio_webhook.is_due(job) else None
