"""Further ways to ask for songs: the intake, invalid requests left there, songs for later, clients that leave."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import httpx
import msgspec
from nats.js import JetStreamContext

from shared.aio import end
from shared.nats.subjects import INTAKE, INTAKE_CONSUMER
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from tests.chaos.observer import Observer
from tests.chaos.songs import AcceptedSong, PlannedSong

_BY_INTAKE, _LATER = 0.2, 0.25  # shares of the songs that may be asked for in such a way
_LATEST = 0.7  # of the time, before which songs for later are asked for, so that they do not prolong the run
_WAIT = (2.0, 6.0)  # seconds
_LEAVES = (0.0, 4.0)  # seconds after a song has a record
_PATIENCE = 300.0  # until then, seconds
_AGAIN_SECONDS = 0.3
_ACK_WAIT = 5.0  # seconds; a gateway may be stopped for longer, so that two have a request at once


def plan_ways(random: Random, songs: Sequence[PlannedSong]) -> list[PlannedSong]:
    """Leave some of the songs in the intake, and make some songs for later, a third of which is cancelled meanwhile."""
    found, moments, later = [], Counter(song.at for song in songs), 0
    for song in songs:
        # A burst has to come at once, and a song that is queued a second time has to be in the queue.
        if moments[song.at] == 1 and song.fault != "duplicate-job":
            if random.random() < _BY_INTAKE:
                song = replace(song, via="intake")
            if random.random() < _LATER and song.fault is None and song.at < _LATEST * songs[-1].at:
                song = replace(song, wait=round(random.uniform(*_WAIT), 2))
                later += 1
                if later % 3 == 2:
                    song = replace(song, fault="cancel", stage="queued")
        found.append(song)
    return found


def plan_invalid(random: Random, first: int, count: int, seconds: float) -> list[PlannedSong]:
    """Plan `count` invalid requests that are left in the intake, with numbers from `first`."""
    return [
        PlannedSong(
            number=number,
            at=random.uniform(0, seconds),
            request=GenerateRequest(lyrics="la", topk=0, title=f"song {number}"),
            via="intake",
            fault="invalid",
            key=f"key-{number}-{random.getrandbits(64):x}",
        )
        for number in range(first, first + count)
    ]


def plan_speeches(
    random: Random, first: int, count: int, seconds: float, length: tuple[float, float]
) -> list[PlannedSong]:
    """Plan `count` clients who ask for speech and leave, in the first half of `seconds`, with numbers from `first`."""
    return [
        PlannedSong(
            number=number,
            at=random.uniform(0, seconds / 2),
            request=GenerateRequest(
                lyrics="la",
                max_duration_ms=round(random.uniform(*length) * 1000),
                seed=1000 + number,
                title=f"song {number}",
            ),
            via="speech",
            fault="leave",
            delay=random.uniform(*_LEAVES),
        )
        for number in range(first, first + count)
    ]


async def shorten_intake(js: JetStreamContext) -> None:
    """Give requests that a gateway took along into its death to another one after seconds, instead of a minute."""
    config = (await js.consumer_info(INTAKE, INTAKE_CONSUMER)).config
    await js.add_consumer(INTAKE, replace(config, ack_wait=_ACK_WAIT))


def timed(song: PlannedSong) -> PlannedSong:
    """A song with the time before which it is not to be begun in its request, if it has one, counted from now."""
    if not song.wait:
        return song
    moment = datetime.now(UTC) + timedelta(seconds=song.wait)
    return replace(song, request=msgspec.structs.replace(song.request, not_before=moment))


async def ask_for_speech(song: PlannedSong, urls: Sequence[str], observer: Observer) -> None:
    """Ask for a song as OpenAI's clients do, and leave some time after it has a record, sent or not."""
    asking = asyncio.create_task(_ask_for_speech(song, urls))
    await observer.until(lambda: bool(speech_songs([song], observer.states)), _PATIENCE)
    await asyncio.wait({asking}, timeout=song.delay)
    await end(asking)


async def _ask_for_speech(song: PlannedSong, urls: Sequence[str]) -> None:
    """Ask one gateway after the other until a song was sent whole."""
    body = {"model": "heartmula", "input": song.request.lyrics} | {
        name: getattr(song.request, name) for name in ("max_duration_ms", "seed", "title")
    }
    attempt = song.number
    async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
        while True:
            attempt += 1
            url = f"{urls[attempt % len(urls)]}/v1/audio/speech"
            with suppress(httpx.TransportError):
                async with http.stream("POST", url, json=body) as answer:
                    async for _ in answer.aiter_raw():
                        pass
                if answer.status_code == 200:
                    return
            await asyncio.sleep(_AGAIN_SECONDS)


def speech_songs(planned: Sequence[PlannedSong], states: Mapping[str, Sequence[Job]]) -> list[AcceptedSong]:
    """The songs that requests for speech have made: none, or one or several where a client asked again."""
    by_title = {song.request.title: song for song in planned}
    made = [history[-1] for history in states.values()]
    return [
        AcceptedSong(planned=by_title[job.request.title], job_id=job.job_id)
        for job in made
        if job.recording is None and job.request.title in by_title
    ]
