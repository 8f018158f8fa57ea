"""One side of `tests.bench.stream_pairs`: songs a second of the code that PYTHONPATH leads to, without listeners.

Run as ``stream_side.py CHECKPOINT {wall,cpu} STEP_MS``. Each line of its input is JSON, ``[songs, milliseconds of
each]``; it answers with the seconds from the first POST to the last completed event, or with the CPU time of all
services for them. It uses of a checkout what every version has.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
import nats
from nats.aio.msg import Msg

from shared.settings import Settings
from tests.bench.gateway import cpu_seconds
from tests.chaos.stack import open_stack

CLIENTS = 8
PATIENCE = 600.0


async def songs(http: httpx.AsyncClient, ends: dict[str, float], count: int, milliseconds: int) -> float:
    """Make songs, submitted by several clients; returns the seconds that all of them took."""
    numbers = iter(range(count))
    taken: list[str] = []

    async def client() -> None:
        while (number := next(numbers, None)) is not None:
            song = {"lyrics": "[Verse]\nla la la", "tags": "pop", "max_duration_ms": milliseconds, "seed": number}
            answer = await http.post("/generate", json=song)
            answer.raise_for_status()
            taken.append(str(answer.json()["job_id"]))

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    async with asyncio.timeout(PATIENCE):
        while not all(job_id in ends for job_id in taken):
            await asyncio.sleep(0.01)
    return max(ends[job_id] for job_id in taken) - began


async def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    checkpoint, clock, step_ms = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    settings = Settings(
        engine="trivial", trivial_step_ms=step_ms, batch=8, gpu_id="card", queue_limit=2000, model_path=checkpoint
    )
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as folder:
        async with (
            open_stack(Path(folder), settings) as stack,
            httpx.AsyncClient(base_url=stack.urls[0], timeout=30, trust_env=False) as http,
            await nats.connect(stack.settings.nats_url) as nc,
        ):
            ends: dict[str, float] = {}

            async def on_completed(message: Msg) -> None:
                ends[message.subject.split(".")[2]] = time.monotonic()

            await nc.subscribe("events.local.*.completed", cb=on_completed)
            await nc.flush()
            while line := await asyncio.to_thread(sys.stdin.readline):
                count, milliseconds = json.loads(line)
                spent = sum(cpu_seconds(part.pid) for part in stack.parts)
                took = await songs(http, ends, count, milliseconds)
                await asyncio.sleep(1)  # the last songs are cleaned up
                if clock == "cpu":
                    took = sum(cpu_seconds(part.pid) for part in stack.parts) - spent
                print(took, file=replies, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
