"""What songs of a run go on from: other songs and recordings of the run, once these are there."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Literal

import msgspec

from shared.frames import milliseconds_of
from shared.schema.request import ContinueFrom
from tests.chaos.observer import Observer
from tests.chaos.recordings import AcceptedRecording, PlannedRecording
from tests.chaos.songs import AcceptedSong, PlannedOrigin, PlannedSong

_PATIENCE = 300.0  # for an origin to be completed, seconds


def plan_origins(
    random: Random, songs: Sequence[PlannedSong], recordings: Sequence[PlannedRecording], share: float
) -> list[PlannedSong]:
    """Let a share of the songs go on from an earlier song, without a fault of its own, or from a recording."""
    found, moments = [], Counter(song.at for song in songs)
    for song in songs:
        if moments[song.at] > 1:  # one of a burst, which has to come at once to find the queue full
            found.append(song)
            continue
        before = [other.number for other in songs[: song.number // 2] if other.fault is None]
        ready = [recording.number for recording in recordings if recording.at < song.at]
        kind: Literal["song", "recording"] = "recording" if ready and random.random() < 0.5 else "song"
        numbers = ready if kind == "recording" else before
        if numbers and song.fault != "poison" and random.random() < share:
            origin = PlannedOrigin(kind=kind, number=random.choice(numbers), share=random.uniform(0.1, 1))
            song = replace(song, origin=origin)
        found.append(song)
    return found


class Origins:
    """The songs and recordings of a run that were accepted, by number."""

    def __init__(self, observer: Observer) -> None:
        self.continued = 0  # songs that go on from something
        self._observer = observer
        self._ids: dict[tuple[str, int], str] = {}
        self._added = asyncio.Event()

    def add(self, accepted: AcceptedSong | AcceptedRecording) -> None:
        """Note that something was accepted."""
        song = isinstance(accepted, AcceptedSong)
        key = ("song" if song else "recording", accepted.planned.number)
        self._ids[key] = accepted.job_id if isinstance(accepted, AcceptedSong) else accepted.recording_id
        self._added.set()
        self._added = asyncio.Event()

    async def resolve(self, song: PlannedSong) -> PlannedSong:
        """Wait for what a song goes on from; returns the song with it in its request.

        Raises `RuntimeError` where that is not completed.
        """
        origin = song.origin
        if origin is None:
            return song
        while (job_id := self._ids.get((origin.kind, origin.number))) is None:
            await self._added.wait()
        await self._observer.until_ended([job_id], _PATIENCE)
        job = self._observer.job(job_id)
        if job is None or job.status != "completed" or not job.frames:
            raise RuntimeError(f"{song.name} cannot go on from {job_id}, which is {job.status if job else 'gone'}")
        kept = max(1, round(job.frames * origin.share))
        asked = ContinueFrom(
            job_id=job_id if origin.kind == "song" else None,
            recording_id=job_id if origin.kind == "recording" else None,
            at_ms=milliseconds_of(kept),
        )
        length = milliseconds_of(kept) + (song.request.max_duration_ms or 0)
        self.continued += 1
        request = msgspec.structs.replace(song.request, continue_from=asked, max_duration_ms=length)
        return replace(song, request=request)
