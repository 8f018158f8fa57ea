"""Damaged uploads, the same in every run: each is decoded or refused, and nothing of it is left.

The suite tries a sample; ``-m slow`` tries hundreds.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shared.audio.decoding.child_process import decode_recording
from shared.audio.decoding.messages import Decoded, DecodingLimits
from shared.errors import RecordingRefused
from tests.unit.recordings import children, file_of, music

SEED, AT_ONCE = 20, 2
KINDS = 6  # of damage
LIMITS = DecodingLimits(seconds=30, output_bytes=20_000_000, cpu_seconds=10)
MOST_GROWTH = 16 * 2**20  # bytes of memory; the damaged files together are several times that


def whole_files() -> list[bytes]:
    audio = music(1.5, 48_000)
    return [
        *(file_of(each, audio, 48_000) for each in ("flac", "wav", "mp3", "ogg")),
        file_of("ogg", audio, 48_000, "OPUS"),
        file_of("flac", audio, 48_000, "PCM_24"),
        file_of("wav", audio, 48_000, "FLOAT"),
    ]


def damaged_files(count: int) -> Iterator[bytes]:
    """One kind of damage after the other, in one file after the other, half of the time in its first bytes."""
    random, files = np.random.default_rng(SEED), whole_files()
    for number in range(count):
        data = bytearray(files[number % len(files)])
        end = len(data) if random.random() < 0.5 else 120
        at, size = int(random.integers(end)), int(random.integers(1, 3000))
        match number % KINDS:
            case 0:
                for place in random.integers(end, size=20):
                    data[place] ^= 1 << random.integers(8)
            case 1:
                data[at : at + size] = random.bytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at // 2 : at // 2 + size] * int(random.integers(1, 40))
            case 4:
                data[at : at + 4] = b"\xff" * 4
            case 5:
                data[at:] = files[int(random.integers(len(files)))][at:]
        yield bytes(data)


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def outcome(folder: Path, data: bytes) -> Decoded | str:
    """What was found, or the reason of the refusal."""
    folder.mkdir()
    source, target = folder / "upload", folder / "audio.flac"
    source.write_bytes(data)
    found: Decoded | str
    try:
        found = await decode_recording(source, target, LIMITS)
    except RecordingRefused as error:
        assert not target.exists()
        found = error.reason
    else:
        info = soundfile.info(target)
        assert (info.frames, info.samplerate, info.channels) == (found.frames, found.sample_rate, found.channels)
        assert found.seconds <= LIMITS.seconds
        target.unlink()
    source.unlink()
    folder.rmdir()  # which must be empty
    return found


@pytest.mark.parametrize("count", [50, pytest.param(600, marks=pytest.mark.slow)])
async def test_every_damaged_upload_is_decoded_or_refused_and_leaves_nothing(tmp_path: Path, count: int) -> None:
    before, files = children(), enumerate(damaged_files(count))
    outcomes: list[Decoded | str] = []
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    async def work() -> None:
        for number, data in files:
            outcomes.append(await outcome(tmp_path / str(number), data))

    await outcome(tmp_path / "first", whole_files()[0])
    memory = resident()
    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    assert len(outcomes) == count
    assert resident() - memory < MOST_GROWTH
    assert children() == before
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    assert list(tmp_path.iterdir()) == []
    decoded = [each for each in outcomes if isinstance(each, Decoded)]
    reasons = {each for each in outcomes if isinstance(each, str)}
    assert len(decoded) > count / 4  # much damage is in the middle of formats that step over it
    assert reasons >= {"unknown-format", "damaged"}
