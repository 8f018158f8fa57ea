"""Tokens that are saved while a song is made: more never becomes less, and the record tells of whole windows alone."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from services.tokenizer_worker.saved_tokens import SavedTokens
from shared.errors import ObjectError, Unavailable
from shared.model.codec_windows import CodecWindows
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.storage.token_file import unpack
from shared.worker.signals import JobStopped

SONG = Job(
    job_id="song",
    tenant="local",
    request=GenerateRequest(lyrics="la", seed=7),
    created_at=1.0,
    status="generating",
    fencing_token=4,
    attempts=2,
    tokens_key="tokens/song/3.safetensors",
    saved_frames=120,
)
WINDOWS = CodecWindows(100, 80)
CODES = np.arange(8 * 300, dtype=np.int16).reshape(8, 300)


class Store:
    """Replacement of the object store: objects in memory. The next puts wait until a test lets them go on."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {str(SONG.tokens_key): b""}
        self.puts = 0
        self.open = asyncio.Event()
        self.open.set()

    async def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectError(f"{key} is missing")
        return self.objects[key]

    async def put(self, key: str, data: bytes) -> None:
        await self.open.wait()
        self.puts += 1
        self.objects[key] = data

    async def delete_one(self, key: str) -> None:
        self.objects.pop(key, None)


class Jobs:
    """Replacement of the job store: one record, how often it was written, and the record of the song before it."""

    def __init__(self, song: Job) -> None:
        self.record, self.writes, self.away = song, 0, False
        self.parent: Job | None = None

    async def get(self, job_id: str, tenant: str) -> Job | None:
        assert (job_id, tenant) == ("parent", "local")
        return self.parent

    async def update(self, job_id: str, tenant: str, decide: Callable[[Job], Job]) -> Job:
        if self.away:
            raise Unavailable("nats", "away")
        self.record, self.writes = decide(self.record), self.writes + 1
        return self.record


class Saved:
    """Saved tokens on replaced servers."""

    def __init__(self, windows: CodecWindows | None = WINDOWS, song: Job = SONG) -> None:
        self.store, self.jobs = Store(), Jobs(song)
        context: Any = SimpleNamespace(job=song, turn=SimpleNamespace(fencing_token=4), stop=lambda: None)
        store: Any = self.store
        jobs: Any = self.jobs
        self.tokens = SavedTokens(context, jobs, store, "trivial", windows, lambda: None)

    @property
    def frames(self) -> int:
        """Frames of the stored object."""
        codes, _ = unpack(self.store.objects[self.tokens.key], "song")
        return int(codes.shape[1])

    async def save(self, frames: int) -> None:
        await self.tokens.save(CODES[:, :frames], ended=False)


async def test_the_first_save_names_the_tokens_and_removes_those_of_the_turn_before() -> None:
    saved = Saved()
    await saved.save(50)
    job = saved.jobs.record
    assert (job.tokens_key, job.attempts) == ("tokens/song/4.safetensors", 0)
    assert job.saved_frames is None, "fewer are saved now than the turn before had"
    assert list(saved.store.objects) == [saved.tokens.key]


async def test_the_record_is_written_once_a_window_and_only_when_that_is_asked_for() -> None:
    saved = Saved()
    told = []
    for frames in (50, 99, 100, 130, 179, 180, 200):
        await saved.save(frames)
        assert saved.frames == frames
    assert saved.jobs.writes == 1
    for frames in (201, 259, 260, 261):
        await saved.save(frames)
        told.append(job.saved_frames if (job := await saved.tokens.note_windows()) else None)
    assert told == [201, None, 260, None]
    assert saved.jobs.writes == 3


async def test_an_engine_without_windows_notes_none() -> None:
    saved = Saved(windows=None)
    await saved.save(300)
    assert await saved.tokens.note_windows() is None
    assert (saved.jobs.record.saved_frames, saved.jobs.writes) == (None, 1)


async def test_an_older_save_that_was_held_up_does_not_replace_a_newer_one() -> None:
    saved = Saved()
    saved.store.open.clear()
    saved.tokens.save_soon(CODES[:, :50])
    await asyncio.sleep(0)  # it waits for the store
    newer = asyncio.create_task(saved.save(200))
    await asyncio.sleep(0)
    saved.tokens.save_soon(CODES[:, :120])
    saved.store.open.set()
    await newer
    await saved.tokens.close()
    assert (saved.frames, saved.tokens.frames) == (200, 200)
    job = await saved.tokens.note_windows() or saved.jobs.record
    assert job.saved_frames == 200


async def test_a_record_that_could_not_be_written_is_written_next_time_and_the_tokens_are_not_stored_again() -> None:
    saved = Saved()
    saved.jobs.away = True
    for _ in range(3):
        with pytest.raises(Unavailable):
            await saved.save(100)
    saved.jobs.away = False
    await saved.save(100)
    assert (saved.store.puts, saved.jobs.record.saved_frames) == (1, 100)


async def test_a_song_of_another_turn_is_left_alone() -> None:
    saved = Saved()
    await saved.save(50)
    saved.jobs.record = taken = msgspec.structs.replace(saved.jobs.record, fencing_token=5)
    await saved.save(150)
    with pytest.raises(JobStopped):
        await saved.tokens.note_windows()
    assert saved.jobs.record == taken


async def test_the_whole_song_is_stored_although_it_is_no_longer_than_what_is_saved() -> None:
    saved = Saved()
    await saved.save(100)
    await saved.tokens.save(CODES[:, :100], ended=True)
    assert unpack(saved.store.objects[saved.tokens.key], "song")[1].ended
