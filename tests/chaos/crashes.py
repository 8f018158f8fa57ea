"""Crashes of the whole stack at once, with orderly restarts between.

nats-server 2.15 brings leases of the dead back that way, if they and their markers ran out while it was down.
"""

import asyncio
from collections import Counter
from dataclasses import replace
from random import Random

import nats

from shared.device.lease_queue import STREAM
from tests.chaos.stack import Stack

_MARKER_SECONDS = 1.0  # for a minute's, as it is else, the stack would have to be down for a minute each time


async def crash_again_and_again(stack: Stack, random: Random, times: int) -> Counter[str]:
    """Kill everything, start it, end it in order, start it, so many times. Returns what was done."""
    done: Counter[str] = Counter()
    if times:
        await _shorten_markers(stack)
    for _ in range(times):
        await asyncio.sleep(random.uniform(1, 4))
        seconds = stack.settings.lease_ttl + _MARKER_SECONDS + random.uniform(0, 1)
        stack.tell(f"stack-kill: everything, for {seconds:.1f} s")
        await stack.crash(seconds)
        done["stack-kill"] += 1
        await asyncio.sleep(random.uniform(1, 4))
        stack.tell("stack-restart: everything, in order")
        await stack.restart()
        done["stack-restart"] += 1
    return done


async def _shorten_markers(stack: Stack) -> None:
    client = await nats.connect(stack.nats.url)
    js = client.jetstream()
    config = (await js.stream_info(STREAM)).config
    await js.update_stream(replace(config, subject_delete_marker_ttl=_MARKER_SECONDS))
    await client.close()
