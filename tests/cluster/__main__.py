"""``make cluster``: songs on a NATS cluster of three whose leaders are killed and cut off, judged as in ``make chaos``.

Two gateways and two pairs of workers on streams with three replicas. Then, without faults, songs a second against the
number of pairs. JSON lines; the exit code says whether an invariant is broken.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random, randrange

import nats.errors
from nats.js import JetStreamContext
from nats.js.errors import APIError

from deploy.local.servers.embedded import S3Server, free_port, s3_server
from deploy.setup import set_up
from shared.nats.subjects import GPU_LOCK, JOBS, TOK
from shared.settings import Settings
from tests.chaos.observer import Observer
from tests.chaos.origins import Origins
from tests.chaos.run import judge, observing, submit_all
from tests.chaos.song_faults import SongFaultInjector
from tests.chaos.songs import plan_songs
from tests.chaos.stack import Stack
from tests.cluster.nodes import Node, open_cluster
from tests.integration.flow import as_role

SETTINGS = Settings(
    engine="trivial",
    trivial_step_ms=20,
    batch=4,
    lease_ttl=10,
    turn_seconds=2,
    checkpoint_seconds=0.4,
    sweep_seconds=5,
    queue_limit=200,
    sequential_offload=True,
    cpu_device_mb=60,
    nats_replicas=3,
)
GAP = 15.0  # seconds from one fault to the next
AWAY = 8.0  # seconds for which a fault lasts
PATIENCE = 300.0


@asynccontextmanager
async def running_stack(folder: Path, pairs: int, gateways: int) -> AsyncIterator[tuple[Stack, list[Node]]]:
    """A cluster, a store, and services on them."""
    async with (
        open_cluster(folder / "nodes") as nodes,
        s3_server(folder, free_port(S3Server.ports), "cluster", "secretsecret") as store,
    ):
        settings = replace(
            SETTINGS,
            nats_url=",".join(node.url for node in nodes),
            s3_endpoint=store.url,
            s3_access_key=store.access_key,
            s3_secret_key=store.secret_key,
            data_dir=folder / "data",
        )
        await set_up(as_role(settings, "bootstrap"))
        cards = [f"card-{n + 1}" for n in range(pairs)]
        stack = Stack(settings, store, folder / "logs", gateways, cards)
        try:
            await stack.start()
            yield stack, nodes
        finally:
            await stack.stop()


async def leader(js: JetStreamContext, stream: str) -> str:
    """Name of the node that leads a stream."""
    while True:
        try:
            info = await js.stream_info(stream)
            if info.cluster and info.cluster.leader:
                return info.cluster.leader
        except (nats.errors.Error, APIError, TimeoutError, OSError):
            pass
        await asyncio.sleep(0.5)


async def disturb_leaders(nodes: list[Node], observer: Observer, seconds: float, stack: Stack) -> Counter[str]:
    """Kill or cut off the leader of one stream after the other. Returns how often each was done."""
    done: Counter[str] = Counter()
    began, number = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        await asyncio.sleep(GAP - AWAY)
        stream = (TOK, f"KV_{GPU_LOCK}", f"KV_{JOBS}")[number % 3]
        name = await leader(observer.js, stream)
        node = next(node for node in nodes if node.name == name)
        if number % 2:
            stack.log(f"{name}, which leads {stream}, is cut off for {AWAY:g} s")
            await node.cut(off=True)
            await asyncio.sleep(AWAY)
            await node.cut(off=False)
            done["cut off"] += 1
        else:
            stack.log(f"{name}, which leads {stream}, is killed")
            node.process.kill()
            await node.process.wait()
            await asyncio.sleep(AWAY)
            await node.process.start()
            done["killed"] += 1
        number += 1
    return done


async def faults(folder: Path, seed: int, minutes: float) -> bool:
    """Make songs while nodes are killed and cut off. Returns whether every invariant held."""
    seconds = 60 * minutes
    planned_songs = plan_songs(Random(seed), round(40 * minutes), seconds, (0.5, 8), 20, 2)
    async with running_stack(folder, pairs=2, gateways=2) as (stack, nodes), observing(stack) as (observer, client):
        song_faults = SongFaultInjector(client, observer, stack.log)
        songs, done = await asyncio.gather(
            submit_all(planned_songs, client, song_faults, Origins(observer)),
            disturb_leaders(nodes, observer, seconds, stack),
        )
        ended = await observer.until(lambda: all(observer.ended(song.job_id) for song in songs), PATIENCE)
        verdict = await judge(stack, observer, client, songs, [])
        verdict.others += song_faults.broken
        found = {"songs": len(songs), "ended": ended, "ends": verdict.ends, "faults": done, "resumed": verdict.resumed}
        crashes = [line for part in stack.parts for line in part.crashes]
        print(json.dumps({"cluster": "faults", "seed": seed} | found | {"crashes": crashes}), flush=True)
        print(*verdict.broken, sep="\n", file=sys.stderr)
        return ended and not verdict.broken


async def throughput(folder: Path, pairs: int) -> None:
    """Measure songs a second, all submitted at once."""
    planned_songs = [replace(planned, at=0.0) for planned in plan_songs(Random(1), 40 * pairs, 1, (4, 4), 0, 0)]
    async with running_stack(folder, pairs=pairs, gateways=1) as (stack, _), observing(stack) as (observer, client):
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(client.submit(planned)) for planned in planned_songs]
        ids = [task.result() for task in asked]
        if not await observer.until(lambda: all(observer.ended(job_id) for job_id in ids), PATIENCE):
            raise TimeoutError("songs are left")
        took = time.monotonic() - began
    print(json.dumps({"cluster": "throughput", "pairs": pairs, "songs_per_s": round(len(ids) / took, 2)}), flush=True)


async def main(seed: int, minutes: float) -> int:
    """Run everything; returns the exit code."""
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    well = await faults(folder / "faults", seed, minutes) if minutes else True
    for pairs in (1, 2, 4):
        await throughput(folder / f"pairs-{pairs}", pairs)
    if well:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}", file=sys.stderr)
    return 0 if well else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="Songs on a cluster of three.")
    parser.add_argument("--seed", type=int, default=randrange(1_000_000), help="of the songs")
    parser.add_argument("--minutes", type=float, default=2, help="of faults; 0: throughput alone")
    chosen = parser.parse_args()
    sys.exit(asyncio.run(main(chosen.seed, chosen.minutes)))
