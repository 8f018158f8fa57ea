"""A recording's audio, from the object store into a file that is mapped: it may be larger than memory."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.audio.reading import read_audio, sample_rate_of
from shared.errors import ObjectError, SongError
from shared.schema.job import Job
from shared.storage.keys import recording_key
from shared.storage.objects import ObjectStore

_FULL_SCALE = 32768  # of 16-bit samples
_SAMPLE = 4  # bytes of one in the file that is mapped
_SPARE_SHARE = 0.02  # of the disk, left to the servers whose data may be there too, as uploads leave it


@dataclass(frozen=True, eq=False)
class RecordedAudio:
    """Audio that is mapped from a file."""

    samples: np.ndarray  # float32 [channels, samples]
    sample_rate: int  # Hz


def scratch_bytes(job: Job) -> int:
    """Bytes that `fetch_audio` writes, by the record."""
    assert job.recording is not None
    samples = (job.duration_s or 0.0) * (job.sample_rate or 0) * job.recording.channels
    return (job.audio_bytes or 0) + round(samples) * _SAMPLE


def missing_room(folder: Path, needed: int) -> int:
    """Bytes that a folder's disk lacks for `needed` more, of which a little is always left; 0 where they are there."""
    usage = shutil.disk_usage(folder)
    return max(0, needed - usage.free + round(_SPARE_SHARE * usage.total))


async def fetch_audio(job: Job, store: ObjectStore, folder: Path, check: Callable[[], None]) -> RecordedAudio:
    """Fetch a recording's FLAC, and write its samples into a file in `folder`, which is mapped.

    `check` is called before each block: what it raises ends the transfer, which takes long from a distant store.

    Raises `SongError` for audio that cannot be encoded, `ObjectError` where it is missing or not as long as its record
    says, `Unavailable`, `OSError` for a full disk.
    """
    assert job.recording is not None
    key = recording_key(job.tenant, job.recording.sha256)
    compressed = folder / "audio.flac"
    reader = await store.open(key)
    try:
        with compressed.open("wb") as file:
            async for block in reader:
                check()
                await asyncio.to_thread(file.write, block)
    finally:
        reader.close()
    if job.audio_bytes is not None and compressed.stat().st_size != job.audio_bytes:
        raise ObjectError(f"{key} has {compressed.stat().st_size} bytes, not {job.audio_bytes}")
    return await asyncio.to_thread(_map, compressed, folder / "audio.f32", job.duration_s)


def _map(compressed: Path, path: Path, seconds: float | None) -> RecordedAudio:
    with _damage():
        rate = sample_rate_of(compressed)
        most = None if seconds is None else round((seconds + 1) * rate)
        channels = _unpack(compressed, path, most)
    compressed.unlink()
    mapped = np.memmap(path, np.float32, "r").reshape(-1, channels)
    return RecordedAudio(mapped.T, rate)


def _unpack(compressed: Path, path: Path, most: int | None) -> int:
    """Write the samples, float32 and interleaved; returns the number of channels. `most`: so many a channel."""
    channels = samples = 0
    with path.open("wb") as file:
        for block in read_audio(compressed):
            audio = block / np.float32(_FULL_SCALE) if block.dtype == np.int16 else block
            channels, samples = audio.shape[1], samples + len(audio)
            if not np.isfinite(audio).all():
                raise SongError("the recording's audio holds values that are no numbers: upload it again")
            if most is not None and samples > most:
                raise SongError("the recording's audio is longer than its record says: upload it again")
            file.write(audio.astype("<f4", copy=False).tobytes())
    if channels not in (1, 2):
        raise SongError(f"the recording's audio has {channels} channels, it must have one or two: upload it again")
    return channels


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except ObjectError as error:
        raise SongError(f"the recording is damaged, upload it again: {error}") from None
