"""Encodings of songs that somebody listens to: each is made once, for all who want it, and removed after the last."""

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from services.gateway.errors import ApiError
from services.gateway.media.encoding import Encoding
from services.gateway.media.flac_stream import FlacStream
from services.gateway.media.growing_songs import GrowingSongs
from services.gateway.tasks import BackgroundTasks
from shared.aio import end
from shared.audio.forms import Form
from shared.schema.job import Job
from shared.storage.objects import ObjectStore
from shared.storage.tempdirs import scratch_folder

MOST = 16  # at once
LINGER_SECONDS = 30.0  # without a listener; one whose connection was cut comes back within
_THREADS = 2
_Key = tuple[str, str | None, Form, float]


class EncodersBusy(ApiError):
    """There are as many encodings as may be, and all have listeners."""


@dataclass
class _Entry:
    encoding: Encoding
    task: asyncio.Task[None]
    listeners: int = 0
    removal: asyncio.TimerHandle | None = None  # while it has no listener


class Encodings:
    """Makes encodings, a bounded number at a time."""

    def __init__(self, store: ObjectStore, songs: GrowingSongs, scratch: Path, tasks: BackgroundTasks) -> None:
        self._store, self._songs, self._scratch, self._tasks = store, songs, scratch, tasks
        self._entries: dict[_Key, _Entry] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="encoding")

    def __len__(self) -> int:
        """Number of encodings."""
        return len(self._entries)

    def close(self) -> None:
        """Remove all; background tasks wait until they are gone."""
        for key in list(self._entries):
            self._remove(key)

    @contextlib.contextmanager
    def listen(self, job: Job, form: Form, start: float) -> Iterator[Encoding]:
        """The encoding of a song in a form from a second on, while the context lasts.

        It is that of the audio which the record names, so there should be some: an encoding counts from now on.
        Raises `EncodersBusy` where there are as many as may be.
        """
        key = job.job_id, job.edition, form, start
        entry = self._entries.get(key)
        if entry is not None and entry.encoding.failed:  # its file is being closed
            self._remove(key)
            entry = None
        if entry is None:
            self._make_room()
            encoding = Encoding(job, form, start, self._threads)
            task = asyncio.create_task(self._run(encoding, job), name=f"encode-{job.job_id}")
            task.add_done_callback(functools.partial(self._ended, key, encoding))
            entry = self._entries[key] = _Entry(encoding, task)
        if entry.removal is not None:
            entry.removal.cancel()
            entry.removal = None
        entry.listeners += 1
        try:
            yield entry.encoding
        finally:
            entry.listeners -= 1
            if not entry.listeners and self._entries.get(key) is entry:
                entry.removal = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._remove, key)

    def _make_room(self) -> None:
        if len(self._entries) < MOST:
            return
        unheard = next((key for key, entry in self._entries.items() if not entry.listeners), None)
        if unheard is None:
            detail = (
                f"{MOST} songs are being converted for listeners, as many as may be; FLAC from the beginning needs none"
            )
            raise EncodersBusy(503, "unavailable", detail, headers={"Retry-After": "15"})
        self._remove(unheard)

    def _remove(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        if entry.removal is not None:
            entry.removal.cancel()
        self._tasks.spawn(end(entry.task))

    async def _run(self, encoding: Encoding, job: Job) -> None:
        async with self._songs.follow(job) as song:
            with scratch_folder(self._scratch) as folder:
                await encoding.run(FlacStream(self._store, song, job.edition, any_format=True), folder)
                await asyncio.Event().wait()  # until it is removed

    def _ended(self, key: _Key, encoding: Encoding, task: asyncio.Task[None]) -> None:
        """Report the reason to the listeners; the next one begins a new encoding."""
        encoding.fail((None if task.cancelled() else task.exception()) or asyncio.CancelledError())
        if (entry := self._entries.get(key)) is not None and entry.encoding is encoding:
            self._remove(key)
