"""The client without asyncio against a real gateway: in threads, in a running event loop, interrupted and closed."""

import asyncio
import inspect
import signal
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import soundfile

from deploy.local.servers.embedded import NatsServer, S3Server
from heartmula_client import Client, Event, Refused, SongIncomplete, UnknownSong
from tests.integration.flow import PATIENCE
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.integration.growing_song import GrowingSong
from tests.integration.recorded import RATE, noise
from tests.integration.test_client import UNKNOWN


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("sync")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Client]:
    with Client(gateway.base) as client:
        yield client


async def growing(gateway: RunningGateway) -> GrowingSong:
    """A song of which a first part can be heard."""
    song = GrowingSong(gateway.js, gateway.store, await gateway.submit())
    await song.window(10)
    return song


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_song_that_grows_is_watched_and_heard_in_threads_of_one_client(
    gateway: RunningGateway, client: Client, tmp_path: Path
) -> None:
    accepted = client.generate("[Verse]\nla", "pop", max_duration_ms=4000, title="Sync", seed=7)  # blocks this loop
    song = GrowingSong(gateway.js, gateway.store, accepted.job_id)
    heard, events, saved = bytearray(), list[Event](), tmp_path / "heard.flac"

    def listen() -> None:
        for block in client.stream(accepted.job_id):
            heard.extend(block)

    def watch() -> None:
        events.extend(client.watch(accepted.job_id))

    threads = [asyncio.create_task(asyncio.to_thread(each)) for each in (listen, watch)]
    await song.window(10)
    await until(lambda: len(heard) == len(song.stream))  # while it is made
    file = await song.finish(1000)
    await asyncio.gather(*threads)
    assert [events[0].kind, events[-1].kind, events[-1].format] == ["snapshot", "completed", "flac"]
    saved.write_bytes(heard)
    assert client.finish_file(accepted.job_id, saved)
    assert saved.read_bytes() == file
    assert client.download(accepted.job_id, tmp_path).read_bytes() == file
    assert client.download(accepted.job_id, tmp_path / "song.wav", format="wav").stat().st_size > len(song.pcm)
    assert client.song(accepted.job_id).request["seed"] == 7
    assert [each.job_id for each in client.tree(accepted.job_id).songs] == [accepted.job_id]
    assert client.songs(limit=1).songs[0].name == "Sync"
    client.forget(accepted.job_id)
    with pytest.raises(UnknownSong):
        client.status(accepted.job_id)


def test_a_recording_is_uploaded_from_an_open_file(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "tape.wav"
    soundfile.write(path, noise(12), RATE)
    sent: list[int] = []
    with path.open("rb") as file:
        recording = client.upload(file, title="Tape", on_progress=lambda done, _: sent.append(done))
    assert sent[-1] == path.stat().st_size
    with closing(client.watch_recording(recording.recording_id)) as states:
        assert next(states).title == "Tape"
    assert [each.recording_id for each in client.recordings().recordings] == [recording.recording_id]
    saved = client.download_recording(recording.recording_id, tmp_path)
    assert soundfile.info(saved).duration == 12
    client.delete_recording(recording.recording_id)
    assert client.recordings().recordings == []
    assert client.health().nats.ok
    assert client.gpus().gpus == []


async def test_a_callback_that_uses_the_client_is_an_error_and_no_standstill(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "tape.wav"
    soundfile.write(path, noise(12), RATE)

    def report(_done: int, _total: int) -> None:
        client.health()

    with pytest.raises(RuntimeError, match="a callback of the client cannot use the client"):
        client.upload(path, on_progress=report)
    assert client.health().nats.ok


async def test_an_iteration_that_ends_early_releases_its_connection(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    with Client(gateway.base) as client:
        for _ in range(120):  # more than a client may have connections
            for block in client.stream(song.job_id):
                assert block.startswith(b"fLaC")
                break
        assert client.cancel(song.job_id) == "cancelled"
        with pytest.raises(SongIncomplete):
            list(client.stream(song.job_id))


async def test_closing_the_client_ends_what_other_threads_wait_for(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    client = Client(gateway.base)
    events = client.watch(song.job_id)
    assert next(events).playable_seconds
    left = client.stream(song.job_id)
    next(left)
    heard = client.stream(song.job_id, start=0.1)
    waiting = [asyncio.create_task(asyncio.to_thread(list, each)) for each in (events, heard)]
    await until(lambda: all(inspect.getgeneratorstate(each) == inspect.GEN_RUNNING for each in (events, heard)))
    client.close()
    for each in waiting:
        with pytest.raises(RuntimeError, match="the client is closed"):
            await each
    left.close()
    client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.health()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartmula-client"]


INTERRUPTED = """
import sys
from heartmula_client import Client

client = Client(sys.argv[1])
stream = client.stream(sys.argv[2])
received = 0
try:
    for block in stream:
        received += len(block)
        print(received, flush=True)
except KeyboardInterrupt:
    stream.close()
    print(client.status(sys.argv[2]).status)
left = [client.stream(sys.argv[2]) for _ in range(5)]  # the end of the program is no reason to wait for them
for each in left:
    next(each)
"""


async def test_ctrl_c_interrupts_a_wait_and_a_program_ends_without_closing_the_client(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTED, gateway.base, song.job_id, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout
    async with asyncio.timeout(PATIENCE):
        while int(await process.stdout.readline()) < len(song.stream):
            pass
        process.send_signal(signal.SIGINT)
        assert await process.communicate() == (b"generating\n", b"")
    assert process.returncode == 0


FORKED = """
import os, sys
from heartmula_client import Client

client = Client(sys.argv[1])
client.health()
if os.fork() == 0:
    try:
        client.health()
    except RuntimeError as error:
        print(error, flush=True)
    with Client(sys.argv[1]) as own:
        print(own.health().nats.ok, flush=True)
    sys.exit()
os.wait()
print(client.health().nats.ok)
"""


async def test_a_forked_process_is_refused_and_needs_a_client_of_its_own(gateway: RunningGateway) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", FORKED, gateway.base, stdout=PIPE)
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    assert out.splitlines() == [b"the client is closed", b"True", b"True"]


CROWDED = """
import resource
from heartmula_client.background_loop import BackgroundLoop

resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    BackgroundLoop(None)
except OSError as error:
    print(error.strerror)
"""


async def test_where_no_more_files_can_be_opened_a_client_is_an_error_and_no_standstill() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CROWDED, stdout=PIPE)
    try:
        async with asyncio.timeout(PATIENCE):
            out, _ = await process.communicate()
        assert out == b"Too many open files\n"
    finally:
        if process.returncode is None:
            process.kill()


def test_bad_input_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="no http:// or https:// address"):
        Client("ftp://127.0.0.1")
    with pytest.raises(Refused) as refused:
        client.generate("la", topk=0)
    assert refused.value.field == "topk"
    with pytest.raises(UnknownSong):
        next(client.watch(UNKNOWN))
