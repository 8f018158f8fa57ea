"""Crashes of the whole stack at once, with orderly restarts between.

This makes nats-server 2.15 bring back leases of dead workers, if they and their markers expired while it was down.
"""

import asyncio
from collections import Counter
from dataclasses import replace
from random import Random

import nats

from shared.device.lease_queue import STREAM
from tests.chaos.stack import Stack

_MARKER_SECONDS = 1.0  # instead of a minute, for which the stack would have to be down each time


async def crash_repeatedly(stack: Stack, random: Random, times: int) -> Counter[str]:
    """Kill and start the whole stack, then restart it in order, `times` times. Returns how often each was done."""
    done: Counter[str] = Counter()
    if times:
        await _shorten_markers(stack)
    for _ in range(times):
        await asyncio.sleep(random.uniform(1, 4))
        seconds = stack.settings.lease_ttl + _MARKER_SECONDS + random.uniform(0, 1)
        stack.log(f"stack-kill: everything, for {seconds:.1f} s")
        await stack.crash(seconds)
        done["stack-kill"] += 1
        await asyncio.sleep(random.uniform(1, 4))
        stack.log("stack-restart: everything, in order")
        await stack.restart()
        done["stack-restart"] += 1
    return done


async def _shorten_markers(stack: Stack) -> None:
    client = await nats.connect(stack.nats.url)
    js = client.jetstream()
    config = (await js.stream_info(STREAM)).config
    await js.update_stream(replace(config, subject_delete_marker_ttl=_MARKER_SECONDS))
    await client.close()
