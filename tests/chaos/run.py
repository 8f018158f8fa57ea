"""One run: a stack, songs and faults for a while, then no more faults until all songs have ended, and the verdict."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import nats
from nats.js.errors import APIError

from shared.device.lease import read_leases
from shared.errors import Unavailable
from shared.settings import Settings
from tests.chaos.crashes import crash_repeatedly
from tests.chaos.faults import DISK_FAULTS, SYSTEM_FAULTS, Injector, plan_faults
from tests.chaos.listeners import Audience
from tests.chaos.observer import Observer, connect, journals
from tests.chaos.origins import Origins, plan_origins
from tests.chaos.recordings import AcceptedRecording, PlannedRecording, plan_recordings, upload
from tests.chaos.song_faults import SongFaultInjector
from tests.chaos.songs import AcceptedSong, Client, PlannedSong, plan_listeners, plan_songs
from tests.chaos.sound import judge_audio, judge_recordings
from tests.chaos.stack import Stack, open_stack
from tests.chaos.verdict import (
    Verdict,
    is_work,
    judge_accounts,
    judge_devices,
    judge_events,
    judge_objects,
    judge_queues,
    judge_records,
    judge_refusals,
    judge_times,
    queued_messages,
)
from tests.chaos.ways import ask_for_speech, plan_invalid, plan_speeches, plan_ways, shorten_intake, speech_songs, timed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does. A plan and a seed determine every song and every fault."""

    name: str
    seconds: float  # of faults
    songs: int
    length: tuple[float, float]  # of songs, seconds
    gap: float  # seconds between two faults of the system, on average
    burst: int  # songs asked for at once
    settings: Settings
    poison: int = 0  # songs that cannot be made
    listened: float = 0.4  # share of the songs that somebody listens to
    continued: float = 0.3  # share of the songs that go on from another one, or from a recording
    recordings: int = 0
    recorded: tuple[float, float] = (2.0, 40.0)  # length of recordings, seconds
    gateways: int = 1
    invalid: int = 3  # requests that are left in the intake and have to be refused
    speeches: int = 3  # requests for speech whose clients leave
    spoken: tuple[float, float] = (1.0, 4.0)  # length of their songs, seconds
    cards: tuple[str, ...] = ("card-a",)
    crashes: int = 0  # of the whole stack, with orderly restarts between; instead of other faults of the system
    disk_mb: int = 0  # size of a volume for the servers, which is filled now and then; 0: none
    patience: float = 180.0  # while the queue drains, for another song to end, in seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run: its verdict, how often each fault happened, what listeners did, which processes crashed."""

    songs: int
    continued: int  # of them go on from something
    recordings: int
    verdict: Verdict
    faults: Counter[str]
    listening: Counter[str]  # as `judge_listeners` counts it
    crashes: list[str]


async def run(plan: Plan, seed: int, folder: Path) -> Result:
    """Run a plan below `folder`."""
    random = Random(f"{seed} {plan.name}")
    planned_songs = plan_songs(random, plan.songs, plan.seconds, plan.length, plan.burst, plan.poison)
    planned_songs = plan_listeners(Random(f"{seed} {plan.name} listeners"), planned_songs, plan.listened)
    others = Random(f"{seed} {plan.name} recordings")
    planned_recordings = plan_recordings(others, plan.recordings, plan.seconds, plan.recorded)
    ways = Random(f"{seed} {plan.name} ways")
    planned_songs = plan_ways(ways, planned_songs)
    planned_invalid = plan_invalid(ways, plan.songs, plan.invalid, plan.seconds)
    planned_speeches = plan_speeches(ways, plan.songs + plan.invalid, plan.speeches, plan.seconds, plan.spoken)
    planned_songs = plan_origins(others, planned_songs, planned_recordings, plan.continued)
    kinds = DISK_FAULTS if plan.disk_mb else SYSTEM_FAULTS
    faults = [] if plan.crashes else plan_faults(random, plan.seconds, plan.gap, plan.settings.lease_ttl, kinds)
    opening = open_stack(folder, plan.settings, gateways=plan.gateways, cards=plan.cards, disk_mb=plan.disk_mb)
    async with opening as stack, observing(stack) as (observer, client), listening(stack, observer) as audience:
        injector, song_faults = Injector(stack, observer), SongFaultInjector(client, observer, stack.log)
        origins = Origins(observer)
        await shorten_intake(observer.js)
        stack.log(f"{plan.name}: {len(planned_songs)} songs, {len(faults)} faults of the system in {plan.seconds:g} s")
        songs, invalid, recordings, _, _, crashed = await asyncio.gather(
            submit_all(planned_songs, client, song_faults, origins, audience.admit),
            submit_all(planned_invalid, client, song_faults, origins),
            upload_all(planned_recordings, stack, client, origins),
            ask_for_all_speeches(planned_speeches, stack, observer),
            injector.run(faults),
            crash_repeatedly(stack, random, plan.crashes),
        )
        stack.log("all songs are accepted, all faults are over")
        submitted = await observer.until_submitted(plan.patience)
        stack.log("the intake is empty" if submitted else "requests are left in the intake")
        accepted = [*(song.job_id for song in songs), *(recording.recording_id for recording in recordings)]
        ended = await observer.until_ended(accepted, plan.patience)
        ended &= await observer.until(
            lambda: all(observer.ended(song.job_id) for song in speech_songs(planned_speeches, observer.states)),
            plan.patience,
        )
        stack.log("all songs and recordings have ended" if ended else "songs or recordings are left")
        songs += speech_songs(planned_speeches, observer.states)
        await audience.finish()
        stack.log("all streams have ended")
        verdict = await judge(
            stack, observer, client, songs, injector.junk, invalid=invalid, recordings=recordings, audience=audience
        )
        verdict.others += song_faults.broken
        crashes = [line for part in stack.parts for line in part.crashes]
        for line in crashes:
            stack.log(line)
        if verdict.without_event:
            stack.log(f"{verdict.without_event} songs ended without an event")
        return Result(
            songs=len(planned_songs),
            continued=origins.continued,
            recordings=len(recordings),
            verdict=verdict,
            faults=injector.done + crashed + song_faults.done + client.faults,
            listening=audience.counts,
            crashes=crashes,
        )


@asynccontextmanager
async def observing(stack: Stack) -> AsyncIterator[tuple[Observer, Client]]:
    async with await connect(stack.settings) as nc:
        observer, client = Observer(stack.settings, nc), Client(stack.urls, nc, stack.log)
        try:
            yield observer, client
        finally:
            await observer.close()
            await client.close()


@asynccontextmanager
async def listening(stack: Stack, observer: Observer) -> AsyncIterator[Audience]:
    audience = Audience(stack.urls, observer)
    try:
        yield audience
    finally:
        await audience.close()


async def submit_all(
    planned_songs: list[PlannedSong],
    client: Client,
    song_faults: SongFaultInjector,
    origins: Origins,
    on_accepted: Callable[[AcceptedSong], None] = lambda _: None,
) -> list[AcceptedSong]:
    """Submit every song at its time; returns when all are accepted and the faults of each are over."""
    began = time.monotonic()

    async def submit(planned: PlannedSong) -> AcceptedSong:
        await asyncio.sleep(began + planned.at - time.monotonic())
        planned = timed(await origins.resolve(planned))
        song = AcceptedSong(planned=planned, job_id=await client.submit(planned))
        origins.add(song)
        on_accepted(song)
        await song_faults.inject(song)
        return song

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(submit(planned)) for planned in planned_songs]
    return [task.result() for task in asked]


async def ask_for_all_speeches(planned_speeches: list[PlannedSong], stack: Stack, observer: Observer) -> None:
    """Ask for every speech at its time; returns when all clients have left."""
    began = time.monotonic()

    async def ask(planned: PlannedSong) -> None:
        await asyncio.sleep(began + planned.at - time.monotonic())
        await ask_for_speech(planned, stack.urls, observer)

    async with asyncio.TaskGroup() as tasks:
        for planned in planned_speeches:
            tasks.create_task(ask(planned))


async def upload_all(
    planned_recordings: list[PlannedRecording], stack: Stack, client: Client, origins: Origins
) -> list[AcceptedRecording]:
    """Upload every recording at its time; returns when all are accepted."""
    began = time.monotonic()

    async def accepted(planned: PlannedRecording) -> AcceptedRecording:
        await asyncio.sleep(began + planned.at - time.monotonic())
        recording = await upload(planned, stack.urls, client)
        origins.add(recording)
        return recording

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(accepted(planned)) for planned in planned_recordings]
    return [task.result() for task in asked]


async def judge(
    stack: Stack,
    observer: Observer,
    client: Client,
    songs: list[AcceptedSong],
    junk: list[str],
    *,
    invalid: Sequence[AcceptedSong] = (),
    recordings: Sequence[AcceptedRecording] = (),
    audience: Audience | None = None,
) -> Verdict:
    """Check every invariant after a run; stops the workers on the way."""
    verdict, states = Verdict(), observer.states
    judge_records(verdict, songs, states)
    judge_times(verdict, songs, states)
    judge_refusals(verdict, invalid, await observer.refusals())
    keys = await _until_clean(observer, songs)
    judge_objects(verdict, songs, states, [key for key in keys if not key.startswith("recordings/")])
    await judge_recordings(verdict, recordings, observer, keys)
    judge_queues(verdict, songs, await queued_messages(observer), await observer.dead_letters(), junk)
    judge_events(verdict, songs, await observer.events())
    await judge_audio(verdict, songs, observer, client)
    if audience is not None:
        await audience.judge(verdict, client)
    for part, code in zip(stack.workers, await stack.stop_workers(), strict=True):
        if code not in (0, -signal.SIGTERM):  # the latter while it starts: then it has nothing to give back
            verdict.others.append(f"{part.name} ended with exit code {code}")
    await asyncio.sleep(1)
    verdict.others += [f"still waits for a device: {view}" for view in await read_leases(observer.js)]
    judge_accounts(verdict, stack.settings.data_dir)
    deaths = {pid: moment for part in stack.workers for pid, moment in part.deaths.items()}
    judge_devices(verdict, journals(stack.settings.data_dir), deaths)
    return verdict


async def _until_clean(observer: Observer, songs: list[AcceptedSong]) -> list[str]:
    """Wait, for a few rounds of the reconciler at most, until nothing is left over; returns the keys in the store."""
    found = [job for song in songs if (job := observer.job(song.job_id)) and job.status == "completed"]
    tokens = {job.job_id: job.tokens_key for job in found}

    def is_left(key: str) -> bool:
        if key.startswith("recordings/"):
            return key.endswith(".part")
        folder, job_id, _ = key.split("/")
        return is_work(key) or job_id not in tokens or (folder == "tokens" and key != tokens[job_id])

    deadline = time.monotonic() + 3 * observer.settings.sweep_seconds + 5
    while True:
        keys: list[str] = []
        with contextlib.suppress(Unavailable, nats.errors.Error, APIError, TimeoutError):
            keys = await observer.keys()
            if not any(map(is_left, keys)) and not await queued_messages(observer):
                return keys
        if time.monotonic() > deadline:
            return keys
        await asyncio.sleep(0.25)
