"""Listeners to the songs of a run: whenever one is cut off it comes back, and each hears the whole song."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from shared.schema.job import Job
from tests.chaos.observer import Observer
from tests.chaos.songs import AcceptedSong, Client, PlannedListener
from tests.chaos.verdict import Verdict

_STREAMINFO = 42  # bytes of a FLAC file until the end of its first metadata block
_MP3_FRAME = 1441  # bytes of the longest frame
_AGAIN_SECONDS = 0.2
_NO_BYTE_SECONDS = 15.0  # after which a player gives a connection up
_END_SECONDS = 60.0  # from the end of the last song to that of its stream, with servers that have to come back
_LATER = {409, 429, 500, 502, 503, 504}  # answers after which a player tries again: nothing can be heard now


@dataclass
class Listener:
    """A player of one song that keeps what it has heard."""

    song: AcceptedSong
    planned: PlannedListener
    data: bytearray = field(default_factory=bytearray)
    cuts: int = 0  # connections that broke off
    returns: int = 0  # answers that went on where the one before ended early
    fault: str = ""  # what a gateway did wrong
    over: str = ""  # how the stream ended by itself

    @property
    def name(self) -> str:
        return f"the {self.planned.format} listener of {self.song.planned.name} ({self.song.job_id})"

    @property
    def later(self) -> set[int]:
        """Answers after which the player tries again: a song in the intake is unknown until it is submitted."""
        return _LATER | {404} if self.song.planned.via == "intake" else _LATER


class Audience:
    """All listeners of a run."""

    def __init__(self, urls: Sequence[str], observer: Observer) -> None:
        self.listeners: list[Listener] = []
        self.counts: Counter[str] = Counter()
        self._urls, self._observer = list(urls), observer
        self._tasks: list[asyncio.Task[None]] = []
        timeout, limits = httpx.Timeout(8, read=_NO_BYTE_SECONDS), httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False, limits=limits)

    def admit(self, song: AcceptedSong) -> None:
        """Let the listeners that the plan names listen to a song."""
        for planned in song.planned.listeners:
            listener = Listener(song, planned)
            self.listeners.append(listener)
            self.counts["listeners"] += 1
            self._tasks.append(asyncio.create_task(self._listen(listener)))

    async def finish(self) -> None:
        """Wait until every stream has ended; those that do not are a fault of their listeners."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_SECONDS)
        for listener in self.listeners:
            if not listener.over and not listener.fault:
                listener.fault = f"still waits after {len(listener.data)} bytes"
        await self.close()

    async def close(self) -> None:
        """Send everybody home."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def judge(self, verdict: Verdict, client: Client) -> None:
        """Check that each listener to a song that was completed has all of it, as it is stored."""
        for listener in self.listeners:
            job = self._observer.job(listener.song.job_id)
            if not listener.fault and job is not None and job.status == "completed":
                await self._compare(listener, job, client)
            self.counts["cuts"] += listener.cuts
            self.counts["returns"] += listener.returns
            if listener.fault:
                verdict.others.append(f"{listener.name}: {listener.fault}")

    async def _compare(self, listener: Listener, job: Job, client: Client) -> None:
        wanted, heard = listener.planned.format, bytes(listener.data)
        query = "" if job.request.format == wanted else f"?format={wanted}"
        answer = await client.request("GET", f"/generate/{job.job_id}/result{query}")
        if answer.status_code != 200:
            listener.fault = f"its file: {answer.status_code} {answer.text}"
            return
        if found := difference(wanted, heard, answer.content):
            listener.fault = f"{listener.over}: {found}"
        self.counts["compared"] += 1
        self.counts["bytes"] += len(heard)

    async def _listen(self, listener: Listener) -> None:
        await asyncio.sleep(listener.planned.delay)
        attempt = listener.song.planned.number
        while not listener.over and not listener.fault:
            attempt += 1
            received = len(listener.data)
            try:
                await self._listen_once(listener, self._urls[attempt % len(self._urls)])
            except httpx.TransportError:
                listener.cuts += len(listener.data) > received
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _listen_once(self, listener: Listener, url: str) -> None:
        """Listen until the connection ends. Raises `TransportError` when it was cut."""
        begin = len(listener.data)
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        path = f"{url}/generate/{listener.song.job_id}/stream"
        async with self._http.stream(
            "GET", path, params={"format": listener.planned.format}, headers=headers
        ) as answer:
            if answer.status_code in (200, 206):
                if not _continues(answer, begin):
                    listener.fault = f"asked for byte {begin} and got {answer.status_code}, {dict(answer.headers)}"
                    return
                listener.returns += begin > 0
                async for chunk in answer.aiter_raw():
                    listener.data += chunk
                    if 0 < listener.planned.hangs_up <= len(listener.data) - begin:
                        return
                await self._end(listener, f"ended after {len(listener.data)} bytes")
            elif answer.status_code not in listener.later or self._ended(listener):
                await self._end(listener, f"was refused: {answer.status_code} {(await answer.aread())[:200]!r}")

    async def _end(self, listener: Listener, how: str) -> None:
        """Note that a stream ended by itself, which only that of a song that has ended may do."""
        if await self._observer.until(lambda: self._observer.ended(listener.song.job_id), _END_SECONDS / 2):
            listener.over = how
        else:
            listener.fault = f"{how}, and its song goes on"

    def _ended(self, listener: Listener) -> bool:
        """Whether the song has ended without audio."""
        job = self._observer.job(listener.song.job_id)
        return job is not None and job.status in ("failed", "cancelled")


def _continues(answer: httpx.Response, begin: int) -> bool:
    if begin == 0:
        return answer.status_code == 200
    return answer.status_code == 206 and answer.headers["Content-Range"].startswith(f"bytes {begin}-")


def difference(audio_format: str, heard: bytes, file: bytes) -> str:
    """Describe how what was heard differs from the file; returns "" if it does not."""
    if len(heard) != len(file):
        return f"heard {len(heard)} bytes of {len(file)}"
    ours, theirs = (np.frombuffer(data, np.uint8) for data in (heard, file))
    differing = np.flatnonzero(ours != theirs)
    if differing.size and differing[-1] >= _open_bytes(audio_format, file):
        return f"heard {differing.size} other bytes of {len(file)}, the last at {differing[-1]}"
    return ""


def _open_bytes(audio_format: str, file: bytes) -> int:
    """How many bytes at the beginning of a file may differ from its stream: those that tell how long the song is."""
    match audio_format:
        case "flac":
            return _STREAMINFO
        case "wav":
            return file.index(b"data") + 8
        case "mp3":  # its first frame, behind the tags, whose length has seven bits a byte
            tags = sum(byte << 7 * (3 - at) for at, byte in enumerate(file[6:10])) + 10 if file[:3] == b"ID3" else 0
            return tags + _MP3_FRAME
    return 0
