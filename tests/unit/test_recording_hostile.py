"""Hostile and broken uploads end as an error of our own, and leave neither a file nor a process."""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared.audio.decoding import child_process, decoder
from shared.audio.decoding.child_process import decode_recording
from shared.audio.decoding.decoder import decode
from shared.audio.decoding.messages import DecodingLimits, DiskFull, Refusal
from shared.audio.flac import stream_header
from shared.errors import HeartMulaError, NoRoom, RecordingRefused, Unavailable
from tests.unit.recordings import FORMATS, RATE, TAGS, children, decoded, file_of, flac_bomb, id3, music, refused


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


# --- files that end early, or are broken


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_a_file_that_ends_early_is_a_shorter_recording(tmp_path: Path, audio_format: str) -> None:
    data = file_of(audio_format, music(6))
    _, whole = await decoded(tmp_path, data)
    lengths = []
    for tenth in range(1, 10):
        found, audio = await decoded(tmp_path, data[: len(data) * tenth // 10])
        lengths.append(found.frames)
        if audio_format in ("flac", "wav"):
            assert np.array_equal(audio, whole[: len(audio)])
        assert len(audio) > len(whole) * (tenth - 1) // 10 - RATE / 2
    assert lengths == sorted(set(lengths))
    assert lengths[-1] < len(whole)


@pytest.mark.parametrize("audio_format", FORMATS)
async def test_a_file_of_nothing_but_its_beginning_is_refused(tmp_path: Path, audio_format: str) -> None:
    data = file_of(audio_format, music(1))
    for size in (0, 1, 4, 12, 30):
        error = await refused(tmp_path, data[:size])
        assert error.reason in ("unknown-format", "damaged", "empty")


@pytest.mark.parametrize("data", [file_of("wav", music(0)), stream_header(RATE, TAGS)])
async def test_a_file_without_a_sample_is_refused(tmp_path: Path, data: bytes) -> None:
    error = await refused(tmp_path, data)
    assert error.reason == "empty"
    assert str(error) == "there is no audio in this file"


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
async def test_a_flac_with_a_gap_or_wrong_bytes_before_its_end_is_damaged(tmp_path: Path, subtype: str) -> None:
    data = file_of("flac", music(5), subtype=subtype)
    middle = len(data) // 2
    for broken in (
        with_bytes(data, middle, bytes(300)),
        with_bytes(data, middle, bytes([data[middle] ^ 1])),
        data[:middle] + data[middle + 20_000 :],
    ):
        error = await refused(tmp_path, broken)
        assert (error.reason, str(error)) == ("damaged", "the file is damaged: it cannot be decoded to its end")


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF\x10\0\0\0AVI LIST" + bytes(1000),
        b"%PDF-1.7 " + bytes(1000),
        b"\x7fELF" + bytes(1000),
        b"<html>" * 300,
        b"FORM\0\0\1\0AIFFCOMM" + bytes(500),
        b"\xff\xfb\x90\x64" + bytes(5000),  # one sync word makes no MP3
        np.random.default_rng(3).bytes(300_000),
    ],
)
async def test_what_is_no_recording_is_not_decoded(tmp_path: Path, data: bytes) -> None:
    error = await refused(tmp_path, data)
    assert error.reason == "unknown-format"
    assert "FLAC" in str(error)


@pytest.mark.parametrize("head", [b"fLaC", b"RIFF\xff\xff\xff\xffWAVE", b"OggS"])
async def test_a_right_beginning_does_not_help_garbage(tmp_path: Path, head: bytes) -> None:
    error = await refused(tmp_path, head * 4 + np.random.default_rng(3).bytes(200_000))
    assert error.reason in ("damaged", "empty", "unsupported")


# --- headers that lie


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0xFFFFFFFF])
async def test_a_wav_is_as_long_as_it_is(tmp_path: Path, size: int) -> None:
    data = file_of("wav", music(1))
    number = struct.pack("<I", size)
    found, _ = await decoded(tmp_path, with_bytes(with_bytes(data, 4, number), 40, number))
    assert found.seconds == 1


@pytest.mark.parametrize(
    ("channels", "rate"), [(0, RATE), (6, RATE), (65_535, RATE), (2, 0), (2, 1), (2, 0xFFFFFFFF), (2, 0x7FFFFFFF)]
)
async def test_a_wav_with_senseless_channels_or_rate_is_refused(tmp_path: Path, channels: int, rate: int) -> None:
    data = with_bytes(file_of("wav", music(1)), 22, struct.pack("<HI", channels, rate))
    assert (await refused(tmp_path, data)).reason in ("unsupported", "damaged")


@pytest.mark.parametrize("samples", [0, 1, 2**36 - 1])
async def test_a_flac_is_as_long_as_it_is_unless_it_says_that_it_is_shorter(tmp_path: Path, samples: int) -> None:
    data = file_of("flac", music(1))
    form = int.from_bytes(data[18:26]) >> 36 << 36 | samples
    found, audio = await decoded(tmp_path, with_bytes(data, 18, form.to_bytes(8)))
    assert found.frames == (1 if samples == 1 else RATE)
    assert len(audio) == found.frames


async def test_a_flac_with_more_channels_than_its_header_says_is_refused(tmp_path: Path) -> None:
    mono = RATE << 44 | 0 << 41 | 15 << 36
    error = await refused(tmp_path, with_bytes(file_of("flac", music(1)), 18, mono.to_bytes(8)))
    assert error.reason == "damaged"


@pytest.mark.parametrize("size", [90_000_000, 2**28 - 1])
async def test_an_mp3_behind_a_huge_tag_is_found_and_one_that_is_all_tag_is_not(tmp_path: Path, size: int) -> None:
    data = file_of("mp3", music(1))
    source = tmp_path / "upload"
    with source.open("wb") as file:
        file.write(id3(size))
        file.seek(size, os.SEEK_CUR)
        file.write(data)
    found = await decode_recording(source, tmp_path / "audio.flac", DecodingLimits())
    assert found.seconds == pytest.approx(1, abs=0.1)
    (tmp_path / "audio.flac").unlink()
    assert (await refused(tmp_path, id3(size) + data)).reason == "unknown-format"


# --- files that unpack to more than they should


async def test_hours_of_silence_in_a_small_flac_are_decoded_no_further_than_allowed(tmp_path: Path) -> None:
    bomb = flac_bomb(20_000)
    assert len(bomb) < 4_000_000
    error = await refused(tmp_path, bomb)
    assert error.reason == "too-long"
    assert "600 seconds" in str(error)


async def test_decoding_takes_no_more_time_of_the_processor_than_allowed(tmp_path: Path) -> None:
    error = await refused(tmp_path, flac_bomb(20_000), DecodingLimits(seconds=1e9, cpu_seconds=1))
    assert error.reason == "too-costly"
    assert "time" in str(error)


async def test_decoding_makes_no_more_bytes_than_allowed(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).integers(-(2**15), 2**15, (2 * RATE, 2), np.int16)
    data = file_of("wav", noise)
    limits = DecodingLimits(output_bytes=len(data) // 2)
    error = await refused(tmp_path, data, limits)
    assert error.reason == "too-costly"
    assert "room" in str(error)


async def test_a_flac_that_changes_its_channels_midway_is_refused(tmp_path: Path) -> None:
    stereo = file_of("flac", music(1))
    mono = file_of("flac", music(1, channels=1))
    first = mono.index(b"\xff\xf8", 42)
    error = await refused(tmp_path, stereo[:-2000] + mono[first:])
    assert error.reason == "damaged"


# --- the process: what it may do, and what becomes of it


def test_the_process_can_open_nothing_and_grow_no_further() -> None:
    script = """
import json, os, resource
import numpy
from shared.audio.decoding.__main__ import confine
from shared.audio.decoding.messages import DecodingLimits
confine(DecodingLimits(output_bytes=1000))
failed = []
def start():
    if not os.fork():
        os._exit(0)
for attempt in (lambda: open(os.devnull), start, lambda: numpy.ones(100_000_000), os.pipe):
    try:
        attempt()
    except (OSError, MemoryError) as error:
        failed.append(type(error).__name__)
print(json.dumps([failed, resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_CPU)]))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60).stdout
    failed, size, seconds = json.loads(said)
    assert (size, seconds) == ([1000, 1000], [180, 181])
    assert [error for error in failed if error != "BlockingIOError"] == ["OSError", "MemoryError", "OSError"]
    assert os.getuid() == 0 or "BlockingIOError" in failed  # root may always start processes


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Start another program in place of the decoder."""
    monkeypatch.setattr(child_process, "_COMMAND", (sys.executable, "-c", script))


async def outcome(tmp_path: Path, limits: DecodingLimits | None = None) -> HeartMulaError:
    """The error of decoding a sound file."""
    before = children()
    source, target = tmp_path / "upload", tmp_path / "audio.flac"
    source.write_bytes(file_of("wav", music(0.1)))
    with pytest.raises(HeartMulaError) as raised:
        await decode_recording(source, target, limits or DecodingLimits())
    assert not target.exists()
    assert children() == before
    return raised.value


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGSEGV, RecordingRefused, "damaged"),
        (signal.SIGABRT, RecordingRefused, "damaged"),
        (signal.SIGXCPU, RecordingRefused, "more time"),
        (signal.SIGALRM, RecordingRefused, "more time"),
        (signal.SIGKILL, Unavailable, "ended from outside"),
        (signal.SIGTERM, Unavailable, "ended from outside"),
    ],
)
async def test_every_end_of_the_process_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[HeartMulaError], words: str
) -> None:
    stand_in(monkeypatch, f"import os; os.kill(os.getpid(), {number:d})")
    error = await outcome(tmp_path)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.parametrize(
    "script",
    [
        "raise SystemExit('no numpy')",
        "pass",
        "print('[1, 2]', end='')",
        """print('{"type": "decoded", "audio_format": "exe", "sample_rate": 1, "channels": 1, "frames": 1, "bits": 16}',
        end="")""",
        """print('{"type": "decoded", "audio_format": "wav", "sample_rate": 0, "channels": 1, "frames": 1, "bits": 16}',
        end="")""",
        "print('x' * 100_000)",
        "while True: print('x' * 10_000)",
    ],
)
async def test_a_process_that_fails_or_says_nonsense_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    stand_in(monkeypatch, script)
    error = await outcome(tmp_path)
    assert isinstance(error, Unavailable)
    assert error.service == "decoder"
    assert "the decoder failed" in caplog.text
    assert "no numpy" in caplog.text or "SystemExit" not in script


async def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "import time; time.sleep(1000)")
    error = await outcome(tmp_path, DecodingLimits(wall_seconds=0.3))
    assert isinstance(error, RecordingRefused)
    assert error.reason == "too-costly"


def test_the_process_ends_by_itself_where_its_parent_cannot_end_it(tmp_path: Path) -> None:
    """As after the gateway was killed."""
    (tmp_path / "upload").write_bytes(flac_bomb(20_000))
    limits = msgspec.json.encode(DecodingLimits(seconds=1e9, wall_seconds=0.01)).decode()
    with (tmp_path / "upload").open("rb") as source, (tmp_path / "audio.flac").open("wb") as target:
        command = [sys.executable, "-m", "shared.audio.decoding", str(target.fileno()), limits]
        done = subprocess.run(command, stdin=source, pass_fds=[target.fileno()], check=False, timeout=60)
    assert done.returncode == -signal.SIGALRM


async def test_a_caller_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "import time; time.sleep(1000)")
    before = children()
    source, target = tmp_path / "upload", tmp_path / "audio.flac"
    source.write_bytes(b"anything")
    task = asyncio.create_task(decode_recording(source, target, DecodingLimits()))
    while children() == before:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before
    assert not target.exists()


async def test_a_file_that_is_there_already_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "upload", tmp_path / "audio.flac"
    source.write_bytes(file_of("wav", music(0.1)))
    target.write_bytes(b"another one's")
    with pytest.raises(Unavailable, match="File exists"):
        await decode_recording(source, target, DecodingLimits())
    assert target.read_bytes() == b"another one's"


async def test_the_process_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTMULA_S3_SECRET_KEY", "secret")
    stand_in(monkeypatch, "import os; raise SystemExit(str(dict(os.environ)))")
    said: list[str] = []
    monkeypatch.setattr(child_process.log, "error", lambda *message: said.append(str(message)))
    await outcome(tmp_path)
    assert "PYTHONPATH" in said[0]
    assert "secret" not in said[0].lower()


def test_a_full_disk_is_not_the_recordings_fault(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(file_of("wav", music(1)))
    source = os.open(tmp_path / "upload", os.O_RDONLY)
    full = os.open("/dev/full", os.O_RDWR)
    try:
        report = decode(source, full, DecodingLimits())
    finally:
        os.close(source)
        os.close(full)
    assert isinstance(report, DiskFull)
    with pytest.raises(NoRoom, match=r"no room for the recording: .*No space left"):
        child_process._result(0, msgspec.json.encode(report))


UNDER_UVLOOP = """
import asyncio, sys
from pathlib import Path
import uvloop
from shared.audio.decoding import child_process, decoder
from shared.audio.decoding.messages import DecodingLimits

async def main(source, target):
    python = child_process._COMMAND[0]
    for command, seconds in (
        (child_process._COMMAND, 100),
        ((python, "-c", "import os; os.abort()"), 100),
        ((python, "-c", "while True: print('x' * 10_000)"), 100),
        ((python, "-c", "import time; time.sleep(1000)"), 0.3),
    ):
        child_process._COMMAND = command
        try:
            found = await child_process.decode_recording(source, target, DecodingLimits(wall_seconds=seconds))
            print(found.frames, target.exists())
            target.unlink()
        except Exception as error:
            print(type(error).__name__, target.exists())

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_under_uvloop_which_the_gateway_uses_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(file_of("mp3", music(1)))
    command = [sys.executable, "-c", UNDER_UVLOOP, str(tmp_path / "upload"), str(tmp_path / "audio.flac")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert said.stdout.splitlines() == [
        f"{RATE} True",
        "RecordingRefused False",
        "Unavailable False",
        "RecordingRefused False",
    ]
    assert "Exception ignored" not in said.stderr


def test_a_file_that_takes_more_memory_than_there_may_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sniff(file: object) -> None:
        bytearray(2**62)

    monkeypatch.setattr(decoder, "sniff", sniff)
    (tmp_path / "upload").write_bytes(b"")
    with (tmp_path / "upload").open("rb") as source, (tmp_path / "audio.flac").open("wb") as target:
        report = decode(source.fileno(), target.fileno(), DecodingLimits())
    assert isinstance(report, Refusal)
    assert report.reason == "too-costly"
    assert "memory" in report.message


async def test_a_process_that_is_killed_in_the_middle_of_a_flood_is_waited_for() -> None:
    """asyncio stops reading a pipe of which much is unread, and then does not see that it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "while True: print('x' * 10_000)",
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    pipe = process.stdout
    while not pipe._paused:  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
    await asyncio.wait_for(child_process._end(process), 20)
    assert process.returncode == -signal.SIGKILL
