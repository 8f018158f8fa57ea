"""The consumer of ended songs: calls the webhook address that was given with a song, at least once.

The job records are the queue. A durable consumer of their bucket, shared by all gateways, hands each record to one of
them; the record of a song that has ended is acknowledged after its address was called. The end of a song is a record,
so there is no moment at which a song has ended and its webhook could be lost. The times of further attempts are kept by
the NATS server: a message that is not acknowledged comes again after the delay that was asked for.
"""

import asyncio
import contextlib
import logging
import time
from weakref import WeakValueDictionary

import httpx
from nats.aio.client import Client
from nats.aio.msg import Msg
from prometheus_client import Counter

from services.gateway.background.webhooks.delivery import DeliveryFailed, Sender
from services.gateway.background.webhooks.slots import DeliverySlots, SlotsFull
from shared.errors import HeartMulaError, InvalidRequest, Unreadable
from shared.nats.errors import nats_errors
from shared.nats.subjects import HOOKS_DELIVERY, HOOKS_GROUP, dead_subject
from shared.schema.decoding import read_record
from shared.schema.job import ENDED, Job
from shared.settings import Settings

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 6 * 3600.0  # seconds; a pause is as long as the song has been ended, within these
GIVE_UP = 24 * 3600.0  # seconds after the end
HOST_DELIVERIES = 4  # to one host at once; `DeliverySlots` limits how many there may be in all


class Webhooks:
    """The webhooks that one gateway delivers."""

    def __init__(self, nc: Client, settings: Settings, outcomes: Counter) -> None:
        """`outcomes` counts deliveries by ``outcome``."""
        self._nc, self._js, self._outcomes = nc, nc.jetstream(timeout=5), outcomes
        self._sender, self._slots = Sender(settings), DeliverySlots()
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # those in use
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by song

    def check(self, url: str | None) -> None:
        """Raise `InvalidRequest` for an address that cannot be called. Names are looked up at the delivery only."""
        if url is not None:
            self._sender.target(url)

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
        if job is None or job.status not in ENDED or job.request.webhook_url is None:
            with contextlib.suppress(HeartMulaError), nats_errors("a record was not acknowledged"):
                await message.ack()
        elif job.job_id not in self._tasks:  # a redelivery while the first one waits for a slot changes nothing
            task = asyncio.create_task(self._deliver(message, job, job.request.webhook_url))
            self._tasks[job.job_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job.job_id, None))

    async def _deliver(self, message: Msg, job: Job, url: str) -> None:
        """Deliver, and settle the message. Every error but those of NATS is an outcome."""
        host, failure = "", None
        try:
            target = self._sender.target(url)
            host = target.host
            async with self._hosts.setdefault(host, asyncio.Semaphore(HOST_DELIVERIES)), self._slots.take():
                await self._sender.send(job, target)
        except DeliveryFailed as found:
            failure = found
        except InvalidRequest as error:  # an older version accepted the address
            failure = DeliveryFailed(str(error), final=True)
        except SlotsFull:
            failure = DeliveryFailed("it is slow, and too many other hosts are slow at the moment")
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            failure = DeliveryFailed(str(error) or "no answer in time")
        except Exception as error:
            kind = type(error).__name__
            log.error("%s: unexpected %s during the webhook to %s", job.job_id, kind, host, exc_info=error)
            failure = DeliveryFailed("an unexpected error; the gateway's log has the details")
        try:
            with nats_errors("NATS does not answer"):
                if failure is None:
                    self._outcomes.labels("delivered").inc()
                    await message.ack()
                else:
                    await self._settle_failure(message, job, host, failure)
        except HeartMulaError as error:  # not settled: it comes again
            log.warning("%s: the webhook to %s may be sent again: %s", job.job_id, host, error)

    async def _settle_failure(self, message: Msg, job: Job, host: str, failure: DeliveryFailed) -> None:
        age = max(0.0, time.time() - (job.completed_at or job.created_at))
        if not failure.final and age < GIVE_UP:
            self._outcomes.labels("failed").inc()
            pause = min(max(failure.pause, age, FIRST_PAUSE), LONGEST_PAUSE)
            log.info("%s: the webhook to %s failed, trying again in %.0f s: %s", job.job_id, host, pause, failure)
            await message.nak(delay=pause)
        else:
            self._outcomes.labels("given_up").inc()
            log.warning("%s: the webhook to %s is given up: %s", job.job_id, host, failure)
            reason = str(failure).replace("\n", " ")[:500]
            await self._js.publish(dead_subject("webhook", job.job_id), headers={"Reason": reason})
            await message.ack()
