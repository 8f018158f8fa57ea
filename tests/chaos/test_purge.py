"""Removing one song from the queues removes no other, whatever happens to the others at that moment."""

import asyncio
import time
from random import Random

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.nats.streams import bootstrap, purge_job
from shared.nats.subjects import DEC, DEC_CONSUMERS, decode_subject
from shared.settings import Settings

SECONDS = 8
_PULL = f"$JS.API.CONSUMER.MSG.NEXT.{DEC}.{DEC_CONSUMERS['normal']}"


async def take(nc: Client) -> Msg | None:
    answer = await nc.request(_PULL, b'{"batch":1,"no_wait":true}', timeout=2, old_style=True)
    return None if (answer.headers or {}).get("Status") else answer


# nats-server 2.15.1 forgets messages of a work queue that wait for an acknowledgement when others are purged by
# subject. They stay in the stream, pending for no consumer. Deleting by sequence has no such effect.
async def test_removing_a_message_loses_no_other(nats_settings: Settings) -> None:
    random = Random(4)
    async with await nats.connect(nats_settings.nats_url) as nc, await nats.connect(nats_settings.nats_url) as other:
        js = nc.jetstream()
        await bootstrap(js, nats_settings)
        deadline, published = time.monotonic() + SECONDS, 0

        async def publish() -> None:
            nonlocal published
            while time.monotonic() < deadline:
                published += 1
                await other.jetstream().publish(decode_subject(str(published)), b"{}")
                await asyncio.sleep(random.uniform(0, 0.02))

        async def work(nc: Client) -> None:
            while time.monotonic() < deadline:
                if message := await take(nc):
                    await asyncio.sleep(random.uniform(0, 0.03))
                    if random.random() < 0.7:  # else the worker dies
                        await message.ack_sync()
                else:
                    await asyncio.sleep(0.005)

        async def cancel() -> None:
            while time.monotonic() < deadline:
                await purge_job(js, str(random.randint(max(1, published - 5), max(1, published))))
                await asyncio.sleep(random.uniform(0, 0.1))

        await asyncio.gather(publish(), work(nc), work(other), work(nc), cancel())
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            while message := await take(nc):
                await message.ack_sync()
            consumer = await js.consumer_info(DEC, DEC_CONSUMERS["normal"])
            if not consumer.num_pending and not consumer.num_ack_pending:
                break
            await asyncio.sleep(0.1)
        state = (await js.stream_info(DEC, subjects_filter=">")).state
        assert not state.subjects
