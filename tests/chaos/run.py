"""One run: a stack, songs and faults for a while, then peace, and the verdict."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import nats
from nats.js.errors import APIError

from shared.device.lease import read_leases
from shared.errors import Unavailable
from shared.settings import Settings
from tests.chaos.crashes import crash_again_and_again
from tests.chaos.faults import DISK_FAULTS, HOUSE_FAULTS, Injector, plan_faults
from tests.chaos.outside import Outside, connect
from tests.chaos.songs import Client, Taken, Wish, plan_songs
from tests.chaos.stack import Stack, open_stack
from tests.chaos.trouble import Trouble
from tests.chaos.verdict import (
    Verdict,
    judge_accounts,
    judge_audio,
    judge_devices,
    judge_events,
    judge_objects,
    judge_queues,
    judge_records,
    left_in_queues,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does; together with the seed, everything that will happen follows from it."""

    name: str
    seconds: float  # of faults
    songs: int
    length: tuple[float, float]  # of songs, seconds
    gap: float  # seconds between two faults of the system, on average
    burst: int  # songs asked for at once
    settings: Settings
    poison: int = 0  # songs that cannot be made
    gateways: int = 1
    cards: tuple[str, ...] = ("card-a",)
    crashes: int = 0  # of the whole stack, with orderly restarts between; instead of other faults of the system
    disk_mb: int = 0  # size of a volume for the servers, which is filled now and then; 0: none
    patience: float = 180.0  # while the queue drains, for another song to end, in seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    songs: int
    verdict: Verdict
    faults: Counter[str]
    crashes: list[str]


async def run(plan: Plan, seed: int, folder: Path) -> Result:
    """Run a plan below `folder`."""
    random = Random(f"{seed} {plan.name}")
    wishes = plan_songs(random, plan.songs, plan.seconds, plan.length, plan.burst, plan.poison)
    kinds = DISK_FAULTS if plan.disk_mb else HOUSE_FAULTS
    faults = [] if plan.crashes else plan_faults(random, plan.seconds, plan.gap, plan.settings.lease_ttl, kinds)
    stacked = open_stack(folder, plan.settings, gateways=plan.gateways, cards=plan.cards, disk_mb=plan.disk_mb)
    async with stacked as stack, _watching(stack) as (outside, client):
        injector, trouble = Injector(stack, outside), Trouble(client, outside, stack.tell)
        stack.tell(f"{plan.name}: {len(wishes)} songs, {len(faults)} faults of the system in {plan.seconds:g} s")
        songs, _, crashed = await asyncio.gather(
            _ask_for_all(wishes, client, trouble),
            injector.run(faults),
            crash_again_and_again(stack, random, plan.crashes),
        )
        stack.tell("all songs are taken, all faults are over")
        ended = await outside.until_ended([song.job_id for song in songs], plan.patience)
        stack.tell("all songs have ended" if ended else "songs are left")
        verdict = await _judge(stack, outside, client, songs, injector.junk)
        verdict.others += trouble.broken
        crashes = [line for part in stack.parts for line in part.crashes]
        for line in crashes:
            stack.tell(line)
        if verdict.untold:
            stack.tell(f"{verdict.untold} songs ended without an event")
        return Result(
            songs=len(songs),
            verdict=verdict,
            faults=injector.done + crashed + trouble.done + client.faults,
            crashes=crashes,
        )


@asynccontextmanager
async def _watching(stack: Stack) -> AsyncIterator[tuple[Outside, Client]]:
    async with await connect(stack.settings) as nc:
        outside, client = Outside(stack.settings, nc), Client(stack.urls, nc, stack.tell)
        try:
            yield outside, client
        finally:
            await outside.close()
            await client.close()


async def _ask_for_all(wishes: list[Wish], client: Client, trouble: Trouble) -> list[Taken]:
    """Ask for every song at its time; returns when all are taken and each has had its trouble."""
    began = time.monotonic()

    async def ask(wish: Wish) -> Taken:
        await asyncio.sleep(began + wish.at - time.monotonic())
        song = Taken(wish=wish, job_id=await client.take(wish))
        await trouble.make(song)
        return song

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(wish)) for wish in wishes]
    return [task.result() for task in asked]


async def _judge(stack: Stack, outside: Outside, client: Client, songs: list[Taken], junk: list[str]) -> Verdict:
    verdict, states = Verdict(), outside.states
    judge_records(verdict, songs, states)
    keys = await _until_clean(outside, songs)
    judge_objects(verdict, songs, states, keys)
    judge_queues(verdict, songs, await left_in_queues(outside), await outside.dead(), junk)
    judge_events(verdict, songs, await outside.events())
    await judge_audio(verdict, songs, outside, client)
    for part, code in zip(stack.workers, await stack.stop_workers(), strict=True):
        if code not in (0, -signal.SIGTERM):  # the latter while it starts: then it has nothing to give back
            verdict.others.append(f"{part.name} ended with exit code {code}")
    await asyncio.sleep(1)
    verdict.others += [f"still waits for a device: {view}" for view in await read_leases(outside.js)]
    judge_accounts(verdict, stack.settings.data_dir)
    deaths = {pid: moment for part in stack.workers for pid, moment in part.deaths.items()}
    judge_devices(verdict, outside.journals(), deaths)
    return verdict


async def _until_clean(outside: Outside, songs: list[Taken]) -> list[str]:
    """Give the sweeper its time; returns the keys of what is in the store then."""
    completed = {song.job_id for song in songs if (job := outside.job(song.job_id)) and job.status == "completed"}
    deadline = time.monotonic() + 3 * outside.settings.sweep_seconds + 5
    while True:
        keys: list[str] = []
        with contextlib.suppress(Unavailable, nats.errors.Error, APIError, TimeoutError):
            keys = await outside.keys()
            rest = [key for key in keys if not key.startswith("audio/") or key.split("/")[1] not in completed]
            if not rest and not await left_in_queues(outside):
                return keys
        if time.monotonic() > deadline:
            return keys
        await asyncio.sleep(0.25)
