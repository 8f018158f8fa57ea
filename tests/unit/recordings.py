"""Audio files as they are uploaded, and what is left after one was decoded."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shared.audio.decoding.child_process import decode_recording
from shared.audio.decoding.messages import Decoded, DecodingLimits
from shared.audio.flac import encode_blocks, stream_header
from shared.audio.tags import SongTags
from shared.errors import RecordingRefused

RATE = 44_100
TAGS = SongTags(title="Demo", tags="pop", lyrics="[Verse]\nla", seed=7)
FORMATS = ("flac", "wav", "mp3", "ogg")


def music(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """Float32 `[samples, channels]`, different in each channel, with noise, so that no frame is like another."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(5).standard_normal((len(time), channels))
    tones = np.stack([np.sin(2 * np.pi * 220 * (channel + 1) * time) for channel in range(channels)], axis=1)
    return (0.4 * tones + 0.05 * noise).astype(np.float32)


def file_of(audio_format: str, audio: np.ndarray, rate: int = RATE, subtype: str | None = None) -> bytes:
    """A whole file of float32 or whole numbers `[samples, channels]`."""
    file = BytesIO()
    soundfile.write(file, audio, rate, subtype, format=audio_format.upper())
    return file.getvalue()


def flac_bomb(seconds: int) -> bytes:
    """Silence at 48 kHz, a stream of unknown length: 12 bytes for every 85 ms."""
    frames = encode_blocks(np.zeros((4096 * 12, 2), np.int16), 0, 48_000)
    return stream_header(48_000, TAGS) + frames * seconds


def id3(size: int) -> bytes:
    """The head of an ID3v2 tag that says how many bytes follow."""
    return b"ID3\4\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))


def children() -> set[str]:
    """Ids of this process' children that live, or were not waited for."""
    return {child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()}


async def decoded(folder: Path, data: bytes, limits: DecodingLimits | None = None) -> tuple[Decoded, np.ndarray]:
    """Decode an upload: what was found, and the audio as int32 of 24 bits, `[samples, channels]`."""
    source, target = folder / "upload", folder / "audio.flac"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    found = await decode_recording(source, target, limits or DecodingLimits())
    audio, rate = soundfile.read(target, dtype="int32", always_2d=True)
    info = soundfile.info(target)
    assert (info.format, info.subtype, rate) == ("FLAC", f"PCM_{found.bits}", found.sample_rate)
    assert audio.shape == (found.frames, found.channels)
    return found, audio >> 8


async def refused(folder: Path, data: bytes, limits: DecodingLimits | None = None) -> RecordingRefused:
    """The error for an upload that is refused; nothing of it is left but itself."""
    before = children()
    with pytest.raises(RecordingRefused) as raised:
        await decoded(folder, data, limits)
    assert children() == before
    assert [path.name for path in folder.iterdir()] == ["upload"]
    return raised.value
