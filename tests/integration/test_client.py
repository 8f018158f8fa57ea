"""Python client and command line against a real gateway and workers with the trivial engine."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import soundfile

from deploy.local.servers.embedded import NatsServer, S3Server, free_port
from heartmula_client import AsyncClient, Event, Refused, UnknownSong, Unreachable
from shared.nats.subjects import TOK
from shared.settings import Settings
from tests.integration.flow import PATIENCE, open_flow
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, running_gateway

UNKNOWN = "00000000-0000-4000-8000-000000000000"
Output = tuple[int, str, str]  # exit code, standard output, standard error


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("client")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def begin(url: str, *words: str, folder: Path | None = None) -> asyncio.subprocess.Process:
    """Start the command line."""
    env = os.environ | {"HEARTMULA_URL": url, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "heartmula_client", *words, env=env, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe
    )


async def finish(process: asyncio.subprocess.Process, stdin: str = "") -> Output:
    """Wait for the end of the command line."""
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate(stdin.encode())
    assert "Traceback" not in err.decode()
    return process.returncode or 0, out.decode(), err.decode()


async def heartmula(url: str, *words: str, folder: Path | None = None, stdin: str = "") -> Output:
    """Run the command line until it ends."""
    return await finish(await begin(url, *words, folder=folder), stdin)


class Relay:
    """A proxy before the gateway that loses answers and cuts connections."""

    def __init__(self, port: int) -> None:
        self.url, self._port, self._listen = "", port, free_port()
        self.lose_answers = 0  # connections whose first answer is dropped
        self.cut_after: list[int] = []  # bytes of the answer after which each next connection is cut
        self.requests: list[bytes] = []
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Abort every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above_reader, above = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, above}

        async def up() -> None:
            while block := await reader.read(65536):
                self.requests.append(block)
                above.write(block)

        async def down() -> None:
            left = self.cut_after.pop(0) if self.cut_after else None
            while block := await above_reader.read(65536):
                if self.lose_answers:
                    self.lose_answers -= 1
                    break
                writer.write(block[:left])
                await writer.drain()
                if left is not None and (left := left - len(block)) <= 0:
                    break
            writer.close()

        tasks = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in (writer, above):
                end.close()
            self._open -= {writer, above}

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Relay"]:
        """Listen for connections."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", self._listen)
        self.url = f"http://127.0.0.1:{self._listen}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await server.wait_closed()


async def test_a_song_from_the_request_to_the_file(settings: Settings, tmp_path: Path) -> None:
    async with running_gateway(settings, tmp_path) as gateway, open_flow(gateway.settings, "tokenizer", "codec"):
        async with AsyncClient(gateway.base) as client:
            accepted = await client.generate("[Verse]\nla", "pop", max_duration_ms=2000, title="Mädchen / 1")
            events = [event async for event in client.watch(accepted.job_id)]
            assert [events[0].kind, events[-1].kind] == ["snapshot", "completed"]
            progress = [event.progress for event in events]
            assert progress == sorted(progress)
            path = await client.download(accepted.job_id, tmp_path)
            assert (path.name, list(tmp_path.glob("*.part"))) == ("Mädchen 1.flac", [])
            again = await client.download(accepted.job_id, tmp_path)
            assert again.name == "Mädchen 1-2.flac"
            assert again.read_bytes() == path.read_bytes()
            assert soundfile.info(path).duration == pytest.approx(2, abs=0.1)

            async def healthy() -> bool:  # the reported workers may be from before the start
                return (await client.health()).status == "ok"

            await eventually(healthy, "there are problems")
            devices = await client.gpus()
            assert {(worker.role, worker.engine) for worker in devices.gpus[0].workers} >= {
                ("tokenizer", "trivial"),
                ("codec", "trivial"),
            }

        text = ["generate", "--tags", "pop", "--lyrics-file", "-", "--seconds", "2"]
        code, out, err = await heartmula(gateway.base, *text, "-o", "one.wav", folder=tmp_path, stdin="[Verse]\nla la")
        assert (code, out) == (0, "one.wav\n")
        assert "completed" in err
        assert soundfile.info(tmp_path / "one.wav").format == "WAV"

        code, out, _ = await heartmula(gateway.base, *text, "--json", "-o", "two", folder=tmp_path, stdin="la")
        song = json.loads(out)
        assert (code, song["status"], song["path"]) == (0, "completed", "two.flac")
        code, out, _ = await heartmula(gateway.base, "watch", song["job_id"], "--json")
        assert (code, [json.loads(line)["status"] for line in out.splitlines()]) == (0, ["completed"])
        code, out, _ = await heartmula(gateway.base, "status", song["job_id"], "--json")
        assert json.loads(out)["duration"] == pytest.approx(2, abs=0.1)
        code, out, _ = await heartmula(gateway.base, "models", "--json")
        assert {model["role"] for model in json.loads(out)["models"]} >= {"tokenizer", "codec"}
        for command in ("gpu", "models"):
            code, out, err = await heartmula(gateway.base, command)
            assert (code, "tokenizer" in out, err) == (0, True, "")


async def test_a_song_without_words_for_later(gateway: RunningGateway) -> None:
    later = datetime.now().astimezone().replace(microsecond=0) + timedelta(days=1)
    local = later.replace(tzinfo=None).isoformat(timespec="minutes")
    words = ("--tags", "jazz", "--instrumental", "--not-before", local, "--no-wait")
    code, out, err = await heartmula(gateway.base, "generate", *words)
    assert (code, err) == (0, "")
    async with AsyncClient(gateway.base) as client:
        song = await client.song(out.strip())
        assert song.not_before is not None
        assert datetime.fromisoformat(song.not_before) == later.replace(second=0)
        assert (song.request["instrumental"], song.request["tags"]) == (True, "jazz,instrumental")
        accepted = await client.generate("[Intro]", instrumental=True, not_before=later)
        assert datetime.fromisoformat(accepted.not_before or "") == later
        with pytest.raises(Refused, match="line 1 has"):
            await client.generate("la la", instrumental=True)
        for job_id in (song.job_id, accepted.job_id):
            await client.cancel(job_id)
    shown = (await heartmula(gateway.base, "status", song.job_id))[1]
    assert re.search(rf"not before +{local.replace('T', ' ')}:00", shown)


async def test_a_song_is_heard_while_it_is_made_whatever_is_cut(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, trivial_step_ms=15, trivial_window=(50, 25))
    async with running_gateway(settings, tmp_path) as gateway, open_flow(gateway.settings, "tokenizer", "codec"):
        async with Relay(gateway.settings.port).serve() as relay, AsyncClient(relay.url) as client:
            job_id = (await client.generate("la", max_duration_ms=14_000)).job_id
            events = asyncio.create_task(_events(client.watch(job_id)))
            words = ["play", job_id, "--output", "song.mp3", "--player", "true"]  # which ends at once
            saving = await begin(gateway.base, *words, folder=tmp_path)
            audio, growths = bytearray(), 0
            async for block in client.stream(job_id):
                audio += block
                growths += 1
                if growths in (1, 3):
                    relay.cut()
                elif growths == 2:
                    await gateway.stop(signal.SIGKILL)
                    await gateway.start()
            file = (await client.download(job_id, tmp_path / "file.flac")).read_bytes()
            converted = (await client.download(job_id, tmp_path / "file.mp3", format="mp3")).read_bytes()
            heard = [event.playable_seconds for event in await events if event.kind == "audio"]
        code, out, _ = await finish(saving)
        assert (code, out, (tmp_path / "song.mp3").read_bytes() == converted) == (0, "song.mp3\n", True)
    assert len(audio) == len(file)
    assert growths > 1
    assert audio[42:] == file[42:]  # the header does not know how long the song is
    assert heard


async def test_a_request_whose_answer_was_lost_makes_one_song(gateway: RunningGateway) -> None:
    before = (await gateway.js.stream_info(TOK)).state.messages
    async with Relay(gateway.settings.port).serve() as relay:
        relay.lose_answers = 2
        async with AsyncClient(relay.url) as client:
            accepted = await client.generate("[Verse]\nla la", max_duration_ms=4000)
        assert sum(request.startswith(b"POST") for request in relay.requests) == 3
    assert (await gateway.js.stream_info(TOK)).state.messages == before + 1
    assert (await gateway.job(accepted.job_id)).status == "queued"


async def test_watching_is_resumed_after_a_lost_connection(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    async with Relay(gateway.settings.port).serve() as relay, AsyncClient(relay.url) as client:
        events = client.watch(job_id)
        assert (await anext(events)).kind == "snapshot"
        await gateway.move_to(job_id, "generating")
        await gateway.progress(job_id, 10)
        assert (await anext(events)).progress == 10
        relay.cut()
        for percent in (20, 30):
            await gateway.progress(job_id, percent)
        await gateway.complete(job_id)
        rest = [event async for event in events]
    assert [(event.kind, event.done) for event in rest] == [("progress", 20), ("progress", 30), ("completed", None)]


async def test_an_end_without_an_event_is_found_from_the_state(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    async with Relay(gateway.settings.port).serve() as relay, AsyncClient(relay.url) as client:
        events = client.watch(job_id)
        await anext(events)
        relay.cut()
        await gateway.move_to(job_id, "failed", error="no")
        rest = [event async for event in events]
    assert [(event.kind, event.status, event.error) for event in rest] == [("snapshot", "failed", "no")]


async def test_a_download_is_resumed_where_it_was_cut(gateway: RunningGateway, tmp_path: Path) -> None:
    audio = os.urandom(3_000_000)
    job_id = await gateway.submit(title="Long")
    await gateway.complete(job_id, audio)
    async with Relay(gateway.settings.port).serve() as relay, AsyncClient(relay.url) as client:
        relay.cut_after = [1_000_000, 1_000_000]
        path = await client.download(job_id, tmp_path / "long")
    assert path == tmp_path / "long.flac"
    assert path.read_bytes() == audio
    ranges = [
        line for request in relay.requests for line in request.split(b"\r\n") if line.lower().startswith(b"range")
    ]
    begins = [int(line.partition(b"=")[2].rstrip(b"-")) for line in ranges]
    assert begins == sorted(begins)
    assert 0 < begins[0] < begins[1] < len(audio)


async def test_a_download_resumes_the_partial_file_of_an_earlier_one(gateway: RunningGateway, tmp_path: Path) -> None:
    audio = os.urandom(3_000_000)
    job_id = await gateway.submit(title="Long")
    await gateway.complete(job_id, audio)
    async with Relay(gateway.settings.port).serve() as relay:
        relay.cut_after = [1_000_000] + [0] * 10
        async with AsyncClient(relay.url) as client:
            with pytest.raises(Unreachable):
                await client.download(job_id, tmp_path)
    (part,) = tmp_path.iterdir()
    begun = part.stat().st_size
    assert part.read_bytes() == audio[:begun]
    received: list[int] = []
    async with AsyncClient(gateway.base) as client:
        path = await client.download(job_id, tmp_path, on_progress=lambda done, _: received.append(done))
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (audio, [path])
    assert 0 < begun < received[0]


async def test_errors_are_explained_and_have_their_exit_codes(gateway: RunningGateway, tmp_path: Path) -> None:
    job_id = await gateway.submit()
    async with AsyncClient(gateway.base) as client:
        with pytest.raises(UnknownSong) as unknown:
            await client.status(UNKNOWN)
        with pytest.raises(UnknownSong):
            [event async for event in client.watch(UNKNOWN)]
        with pytest.raises(Refused) as early:
            await client.download(job_id, tmp_path)
        with pytest.raises(Refused) as wrong:
            await client.generate("la", topk=0)
    assert (unknown.value.status, unknown.value.type) == (404, "/problems/unknown-job")
    assert (early.value.status, early.value.type, list(tmp_path.iterdir())) == (409, "/problems/not-ready", [])
    assert (wrong.value.status, wrong.value.field) == (422, "topk")

    code, out, err = await heartmula(gateway.base, "status", UNKNOWN)
    assert (code, out) == (4, "")
    assert "no song or recording has this id" in err
    code, out, err = await heartmula(gateway.base, "generate", "--lyrics", "la", "--topk", "0", "--json")
    assert (code, json.loads(out)["error"]["field"]) == (4, "topk")
    assert "topk: must be at least 1" in err
    code, out, err = await heartmula(f"http://127.0.0.1:{free_port()}", "gpu")
    assert (code, out) == (3, "")
    assert "no answer from http://127.0.0.1" in err
    for words in (["generate"], ["status"], ["--url", "ftp://x", "gpu"], ["generate", "--lyrics", "a", "-o", "no/x"]):
        assert (await heartmula(gateway.base, *words, folder=tmp_path))[0] == 2


async def test_a_song_is_cancelled_and_its_watcher_ends(gateway: RunningGateway) -> None:
    code, out, _ = await heartmula(gateway.base, "generate", "--lyrics", "la", "--seconds", "4", "--no-wait", "--json")
    job_id = json.loads(out)["job_id"]
    assert code == 0
    watching = await begin(gateway.base, "watch", job_id, "--json")
    assert watching.stdout
    assert json.loads(await watching.stdout.readline())["kind"] == "snapshot"
    assert (await heartmula(gateway.base, "cancel", job_id))[0] == 0
    code, out, err = await finish(watching)
    assert (code, json.loads(out)["status"]) == (1, "cancelled")
    assert "cancelled" in err
    code, out, err = await heartmula(gateway.base, "download", job_id)
    assert (code, "the song was cancelled" in err) == (4, True)
    assert (await heartmula(gateway.base, "status", job_id))[0] == 1


async def test_an_interrupted_command_says_how_to_watch_again(gateway: RunningGateway) -> None:
    watching = await begin(gateway.base, "generate", "--lyrics", "la", "--seconds", "4")
    assert watching.stderr
    first = (await watching.stderr.readline()).decode()
    job_id = first.removeprefix("song ").strip()
    await watching.stderr.readline()  # it watches
    watching.send_signal(signal.SIGINT)
    code, _, err = await finish(watching)
    assert (code, f"heartmula watch {job_id}" in err) == (130, True)
    assert (await gateway.job(job_id)).status == "queued"


async def _events(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def _statuses(events: AsyncIterator[Event]) -> list[str]:
    return [event.status async for event in events]


async def test_watching_is_resumed_when_the_gateway_comes_back(settings: Settings, tmp_path: Path) -> None:
    async with running_gateway(settings, tmp_path) as gateway, AsyncClient(gateway.base) as client:
        job_id = await gateway.submit()
        events = client.watch(job_id)
        await anext(events)
        rest = asyncio.create_task(_statuses(events))
        await gateway.stop()
        await gateway.start()
        await gateway.complete(job_id)
        async with asyncio.timeout(PATIENCE):  # by an event, or by the snapshot after reconnecting
            assert (await rest)[-1] == "completed"


async def test_songs_are_listed_page_by_page(gateway: RunningGateway) -> None:
    wanted = {await gateway.submit() for _ in range(3)}

    async def listed() -> bool:
        found, cursor = set(), None
        async with AsyncClient(gateway.base) as client:
            while True:
                page = await client.songs(limit=2, cursor=cursor)
                assert len(page.songs) <= 2
                found |= {song.job_id for song in page.songs}
                cursor = page.next
                if cursor is None:
                    return wanted <= found

    await eventually(listed, "a song is missing from the list")
    code, out, _ = await heartmula(gateway.base, "list", "--limit", "2", "--json")
    assert (code, len(json.loads(out)["songs"])) == (0, 2)
    assert (await heartmula(gateway.base, "list"))[0] == 0
