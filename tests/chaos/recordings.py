"""The recordings of a run, and the client that uploads them until they are accepted."""

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import httpx
import numpy as np
import soundfile

from tests.chaos.songs import Client

_CHUNK = 8 * 1024  # bytes that are sent at once, so that faults hit an upload on its way
_PAUSE_SECONDS = 0.01  # between them
_UPLOAD_SECONDS = 20.0
_LATER = {408, 429, 503}


@dataclass(frozen=True, kw_only=True)
class PlannedRecording:
    """A recording that will be uploaded."""

    number: int
    at: float  # seconds after the begin
    seconds: float
    rate: int  # Hz
    format: Literal["wav", "flac"]

    @property
    def name(self) -> str:
        """The name of the recording in messages, and its title."""
        return f"recording {self.number}"

    def audio(self) -> np.ndarray:
        """What is recorded: int16 ``[samples, 2]``."""
        random = np.random.default_rng(self.number)
        return random.integers(-3000, 3000, (round(self.seconds * self.rate), 2), dtype=np.int16)

    def file(self) -> bytes:
        """The file that is uploaded."""
        file = io.BytesIO()
        soundfile.write(file, self.audio(), self.rate, "PCM_16", format=self.format.upper())
        return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class AcceptedRecording:
    """A recording that a gateway has accepted."""

    planned: PlannedRecording
    recording_id: str


def plan_recordings(random: Random, count: int, seconds: float, length: tuple[float, float]) -> list[PlannedRecording]:
    """Plan `count` recordings in the first half of `seconds`, so that songs can go on from them."""
    moments = sorted(random.uniform(0, seconds / 2) for _ in range(count))
    return [
        PlannedRecording(
            number=number,
            at=at,
            seconds=round(random.uniform(*length), 2),
            rate=random.choice((8000, 24_000)),
            format=random.choice(("wav", "flac")),
        )
        for number, at in enumerate(moments)
    ]


async def upload(planned: PlannedRecording, urls: Sequence[str], client: Client) -> AcceptedRecording:
    """Upload a recording, to one gateway after the other, until one accepts it."""
    data, attempt = planned.file(), planned.number
    async with httpx.AsyncClient(timeout=_UPLOAD_SECONDS, trust_env=False) as http:
        while True:
            attempt += 1
            url = f"{urls[attempt % len(urls)]}/recordings"
            try:
                answer = await http.post(url, content=_slowly(data), params={"title": planned.name})
            except httpx.TransportError:
                client.faults["upload-cut"] += 1
                await asyncio.sleep(0.3)
                continue
            if answer.status_code in (200, 202):
                return AcceptedRecording(planned=planned, recording_id=str(answer.json()["recording_id"]))
            if answer.status_code not in _LATER:
                raise RuntimeError(f"{planned.name} was refused: {answer.status_code} {answer.text}")
            await asyncio.sleep(float(answer.headers.get("Retry-After", 0.3)))


async def _slowly(data: bytes):  # type: ignore[no-untyped-def]
    for at in range(0, len(data), _CHUNK):
        yield data[at : at + _CHUNK]
        await asyncio.sleep(_PAUSE_SECONDS)
