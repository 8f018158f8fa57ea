"""``make bench-flow``: the system's own cost of a song, on real servers, with an engine that takes no time.

The last line is JSON. `own_ms`: from before the POST to the completed event, of songs made one by one; `songs_per_s`:
many at once, from the first POST to the last completed event; `handover_ms`: from a release of the lease to the next
holder's `acquire`; `*_ops_per_song`: messages that NATS received, and requests that the object store answered.
"""

import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.device.lease import Lease
from shared.settings import Settings
from tests.chaos.stack import Stack, open_stack

LONE, MANY, CLIENTS, HANDOVERS = 150, 600, 8, 400
SONG = {"lyrics": "[Verse]\nla la la", "tags": "pop,piano", "max_duration_ms": 1000}
PAUSE = 0.1  # seconds between lone songs: the device is free again and everybody waits
PATIENCE = 120.0
SETTINGS = Settings(engine="trivial", batch=8, gpu_id="card", queue_limit=2 * MANY)


@dataclass
class Bench:
    """A running stack, an HTTP client, and a subscription to the ends of all songs."""

    stack: Stack
    http: httpx.AsyncClient
    nc: Client
    ends: dict[str, float] = field(default_factory=dict)  # song → monotonic time at which its end was published
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        """Record every completed event from now on."""

        async def on_completed(message: Msg) -> None:
            self.ends[message.subject.split(".")[2]] = time.monotonic()
            self._ended.set()

        await self.nc.subscribe("events.local.*.completed", cb=on_completed)
        await self.nc.flush()

    async def song(self, seed: int, **changes: object) -> tuple[str, float]:
        """Submit a song; returns its id and the time at which it was submitted."""
        began = time.monotonic()
        answer = await self.http.post("/generate", json=SONG | {"seed": seed} | changes)
        if answer.status_code != 202:
            raise RuntimeError(f"not taken: {answer.status_code} {answer.text}")
        return str(answer.json()["job_id"]), began

    async def until_ended(self, job_ids: list[str], patience: float = PATIENCE) -> None:
        """Wait until all of the songs are completed."""
        async with asyncio.timeout(patience):
            while not all(job_id in self.ends for job_id in job_ids):
                self._ended.clear()
                await self._ended.wait()

    async def lone(self) -> list[float]:
        """Make `LONE` songs one after the other; returns the seconds that each took."""
        found = []
        for seed in range(LONE):
            job_id, began = await self.song(seed)
            await self.until_ended([job_id])
            found.append(self.ends[job_id] - began)
            await asyncio.sleep(PAUSE)
        return found

    async def many(self) -> float:
        """Make `MANY` songs, submitted by `CLIENTS` clients; returns the seconds that all of them took."""
        seeds = iter(range(MANY))
        taken: list[tuple[str, float]] = []

        async def client() -> None:
            while (seed := next(seeds, None)) is not None:
                taken.append(await self.song(seed))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        submitted = time.monotonic()
        await self.until_ended([job_id for job_id, _ in taken])
        began = min(moment for _, moment in taken)
        print(f"{MANY} songs were taken in {submitted - began:.2f} s", file=sys.stderr)
        return max(self.ends[job_id] for job_id, _ in taken) - began

    async def operations(self) -> tuple[int, int]:
        """Number of messages that NATS has received so far, and of requests for objects of our bucket."""
        nats_figures = await self.http.get(f"http://127.0.0.1:{self.stack.nats.monitor_port}/varz")
        s3_figures = await self.http.get(f"http://127.0.0.1:{self.stack.store.metrics_port}/metrics")
        bucket = re.escape(self.stack.settings.s3_bucket)
        counts = re.findall(rf'^SeaweedFS_s3_request_total{{bucket="{bucket}".*}} (\S+)$', s3_figures.text, re.M)
        return int(nats_figures.json()["in_msgs"]), sum(int(float(count)) for count in counts)


async def handovers(settings: Settings) -> list[float]:
    """Let two leases take turns on one device; returns the seconds from each release to the other's `acquire`."""
    leases = [Lease(settings, gpu="bench", role=role, instance=role) for role in ("tokenizer", "codec")]
    for lease in leases:
        await lease.start()
    found = []

    async def acquired(lease: Lease) -> tuple[float, Callable[[], Awaitable[None]]]:
        held = await lease.acquire()
        return time.monotonic(), held.release

    _, release = await acquired(leases[0])
    for n in range(HANDOVERS):
        waiting = asyncio.create_task(acquired(leases[(n + 1) % 2]))
        await asyncio.sleep(0.02)  # it stands in the queue
        began = time.monotonic()
        await release()
        moment, release = await waiting
        found.append(moment - began)
    await release()
    for lease in leases:
        await lease.close()
    return found


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1)


async def main() -> dict[str, float]:
    """Run everything on a stack of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-flow-") as folder:
        async with (
            open_stack(Path(folder), SETTINGS, figures=True) as stack,
            httpx.AsyncClient(base_url=stack.urls[0], timeout=30, trust_env=False) as http,
            await nats.connect(stack.settings.nats_url) as nc,
        ):
            bench = Bench(stack, http, nc)
            await bench.listen()
            await bench.song(0)  # what is done only once
            await asyncio.sleep(1)
            before = await bench.operations()
            own = await bench.lone()
            between = await bench.operations()
            seconds = await bench.many()
            await asyncio.sleep(1)  # the last songs are cleaned up
            after = await bench.operations()
            await stack.stop_workers()
            handed = await handovers(stack.settings)
    for name, one, other, songs in (("lone", before, between, LONE), ("many", between, after, MANY)):
        counts = [(y - x) / songs for x, y in zip(one, other, strict=True)]
        print(f"{name}: {counts[0]:.1f} NATS messages and {counts[1]:.1f} S3 requests a song", file=sys.stderr)
    own_p50, own_p99 = percentiles(own)
    handover_p50, handover_p99 = percentiles(handed)
    return {
        "own_ms_p50": own_p50,
        "own_ms_p99": own_p99,
        "songs_per_s": round(MANY / seconds, 1),
        "handover_ms_p50": handover_p50,
        "handover_ms_p99": handover_p99,
        "nats_ops_per_song": round((after[0] - before[0]) / (LONE + MANY), 1),
        "s3_ops_per_song": round((after[1] - before[1]) / (LONE + MANY), 1),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
