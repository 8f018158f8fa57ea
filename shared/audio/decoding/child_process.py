"""Starts the decoder's process and turns whatever becomes of it into a result, or an error of our own.

An uploaded file is parsed by libraries in C. The process that runs them has no memory, time, disk or descriptors
beyond its limits, and neither the secrets of the environment nor a connection to any server; it is not a sandbox, for
it runs as the same user. The report that it gives is checked like any other input.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, assert_never

import msgspec

import shared
from shared.audio.decoding.messages import Decoded, DecodingLimits, DiskFull, Refusal, Report
from shared.errors import NoRoom, RecordingRefused, Unavailable

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-P", "-m", "shared.audio.decoding")
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
_MOST_SAID = 16 * 1024  # bytes
_OUT_OF_TIME = (signal.SIGXCPU, signal.SIGALRM)
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP)


async def decode_recording(source: Path, target: Path, limits: DecodingLimits) -> Decoded:
    """Decode an uploaded file, which may be anything, to a FLAC file at `target`, where no file may be yet.

    The FLAC has the recording's sample rate and channels, 16 or 24 bits; see `shared.audio.decoding.decoder` for what
    is made of which file. It needs room for `limits.output_bytes` at most.

    Raises `RecordingRefused` for what cannot be decoded within the limits, `NoRoom` for a full disk, `Unavailable`
    where the process cannot be started or was ended from outside. After any error, and when the caller is cancelled,
    there is neither a process nor a file at `target`.
    """
    with _files(source, target) as (uploaded, decoded):
        process = await _started(uploaded, decoded, limits)
        try:
            async with asyncio.timeout(limits.wall_seconds):
                said = await _said(_pipe(process))
                status = await process.wait()
        except TimeoutError:
            raise _out_of_time() from None
        finally:
            await _end(process)
        return _result(status, said)


@contextmanager
def _files(source: Path, target: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open both; the target is removed again after an error."""
    try:
        uploaded = source.open("rb")
    except OSError as error:
        raise _not_started(error) from error
    with uploaded:
        try:
            decoded = target.open("xb")
        except OSError as error:
            raise _not_started(error) from error
        with decoded:
            try:
                yield uploaded, decoded
            except BaseException:
                target.unlink(missing_ok=True)
                raise


async def _started(uploaded: IO[bytes], decoded: IO[bytes], limits: DecodingLimits) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *_COMMAND,
            str(decoded.fileno()),
            msgspec.json.encode(limits).decode(),
            stdin=uploaded,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(decoded.fileno(),),
            env=_environment(),
            start_new_session=True,  # Ctrl-C in a terminal is for the gateway
        )
    except OSError as error:
        raise _not_started(error) from error


def _not_started(error: OSError) -> Unavailable:
    log.error("the decoder could not be started: %s", error)
    return Unavailable("decoder", f"the decoder could not be started: {error.strerror}; upload the recording again")


def _environment() -> dict[str, str]:
    """What the process needs and no more: the gateway's environment holds credentials."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    root = str(Path(shared.__file__).parents[1])
    return inherited | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _pipe(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    assert process.stdout is not None
    return process.stdout


async def _said(pipe: asyncio.StreamReader) -> bytes:
    """All that the process says until it ends: complaints, and the report as the last line."""
    said = b""
    while more := await pipe.read(_MOST_SAID):
        said += more
        if len(said) > _MOST_SAID:
            raise _failed("it writes without end")
    return said


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the process where it lives, and wait for its end, even where the caller is cancelled meanwhile."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # of which it is the leader
        await asyncio.shield(_ended(process))


async def _ended(process: asyncio.subprocess.Process) -> None:
    while await _pipe(process).read(_MOST_SAID):  # asyncio does not see the end before all was read
        pass
    await process.wait()


def _result(status: int, said: bytes) -> Decoded:
    if status < 0:
        raise _ended_by(signal.Signals(-status))
    try:
        report = msgspec.json.decode(said.rpartition(b"\n")[2], type=Report)
    except msgspec.DecodeError:
        raise _failed(f"status {status}, {said.decode(errors='replace')}") from None
    match report:
        case Decoded():
            return report
        case Refusal():
            raise RecordingRefused(report.reason, report.message)
        case DiskFull():
            raise NoRoom("disk", f"the data folder has no room for the recording: {report.error}")
    assert_never(report)


def _failed(how: str) -> Unavailable:
    log.error("the decoder failed: %s", how)
    return Unavailable("decoder", "the decoder failed; the gateway's log says more")


def _ended_by(number: signal.Signals) -> RecordingRefused | Unavailable:
    if number in _OUT_OF_TIME:
        return _out_of_time()
    if number in _CRASHES:
        log.warning("the decoder crashed by %s over an upload", number.name)
        return RecordingRefused("damaged", "the file is damaged: the decoder could not cope with it")
    log.warning("the decoder was ended by %s", number.name)
    return Unavailable("decoder", "the decoder was ended from outside; upload the recording again")


def _out_of_time() -> RecordingRefused:
    return RecordingRefused(
        "too-costly", "decoding this file takes more time than a recording may: upload less of it, or WAV"
    )
