"""Streams of songs where something goes wrong: with an encoding, with the song that is followed, with its audio."""

import asyncio
import contextlib
import logging
import shutil
import threading
from pathlib import Path

import httpx
import msgspec
import pytest

from services.gateway.auth.api_keys import Caller
from services.gateway.media import encodings
from services.gateway.media.song_encoder import SongEncoder
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually
from tests.integration.growing_song import GrowingSong
from tests.integration.test_gateway_stream import HEADER, Hearing, problem
from tests.integration.test_gateway_stream_listeners import RATE, Service, service


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(trust_env=False, timeout=30)


def refused(answer: httpx.Response, words: str) -> None:
    problem(answer, 503, words)
    assert int(answer.headers["retry-after"]) > 0


async def test_a_gateway_that_cannot_make_files_says_so(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async with service(settings) as here, client() as http:
        await here.song.window(10)
        await here.song.finish(100)
        scratch = settings.data_dir / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.write_bytes(b"")
        refused(await http.get(f"{here.url}?format=mp3&from=2"), "cannot write files; its log says why")
        assert any(str(scratch) in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
        scratch.unlink()
        assert (await http.get(f"{here.url}?format=mp3&from=2")).status_code == 200


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space left"), "cannot write files"), (RuntimeError("as the test says"), "cannot be encoded")],
)
async def test_an_encoding_that_fails_is_logged_and_serves_nobody_else(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    words: str,
) -> None:
    closed = threading.Event()

    def fail(*_: object) -> None:
        raise error

    async with service(settings) as here, client() as http:
        await here.song.window(10)
        with monkeypatch.context() as faulty:
            faulty.setattr(SongEncoder, "begin", fail)
            faulty.setattr(SongEncoder, "abandon", lambda _: closed.wait())
            try:
                refused(await http.get(f"{here.url}?format=mp3"), words)
                faulty.undo()
                async with http.stream("GET", f"{here.url}?format=mp3") as answer:  # while the other file is closed
                    assert answer.status_code == 200
            finally:
                closed.set()
        faults = [record for record in caplog.records if record.levelno > logging.INFO]
        found = [record for record in faults if here.song.job_id in record.getMessage()]
        assert [record.levelno for record in found] == [logging.ERROR]
        if isinstance(error, RuntimeError):
            assert found[0].exc_info  # where in the code
            assert found[0].exc_info[1] is error


async def test_a_paused_listener_of_a_song_that_was_cut_keeps_nobody_from_coming_back(settings: Settings) -> None:
    async with service(settings) as here, client() as http:
        await here.song.window(10)
        songs, paused = here.gateway.growing_songs, contextlib.AsyncExitStack()
        old = await paused.enter_async_context(songs.follow(await here.song.job()))  # until it is sent something
        old.cut("a server was away")

        async def followed(count: int) -> bool:
            return len(songs) == count

        async with http.stream("GET", here.url) as answer:
            assert (answer.status_code, len(songs)) == (200, 2)
            hearing = Hearing(answer)
            await hearing.up_to(len(here.song.stream))
            await paused.aclose()
            async with http.stream("GET", here.url) as other:
                assert (other.status_code, len(songs)) == (200, 1)
            file = await here.song.finish(100)
            assert (await hearing.rest())[HEADER:] == file[HEADER:]
        await eventually(lambda: followed(0), "a song is followed for nobody")


async def test_who_waits_for_the_first_audio_takes_no_encoding_from_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "MOST", 1)
    async with service(settings) as here, client() as http:
        queries = ("format=ogg", "format=wav", "from=1")
        waiting = [asyncio.create_task(http.get(f"{here.url}?{query}")) for query in queries]
        await here.listeners(len(queries))
        async with http.stream("GET", f"{await _another(here)}?format=mp3") as answer:
            assert answer.status_code == 200
        await here.song.finish(10 * RATE)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200, 200]


async def _another(here: Service) -> str:
    """The address of another song's stream, of which some can be heard."""
    job = (await here.gateway.submission.submit(Caller("local"), b'{"lyrics": "lo"}')).job
    await GrowingSong(here.gateway.js, here.gateway.store, job.job_id, RATE).window(10)
    return f"{here.base}/generate/{job.job_id}/stream"


async def test_the_tag_of_new_audio_never_comes_with_the_old(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun, go_on = SongEncoder.begin, threading.Event(), threading.Event()
    pieces: dict[SongEncoder, int] = {}

    def slow(encoder: SongEncoder, piece: Path) -> None:
        pieces[encoder] = pieces.get(encoder, 0) + 1
        if len(pieces) == 1 and pieces[encoder] == 2:
            begun.set()
            go_on.wait()
        begin(encoder, piece)

    monkeypatch.setattr(SongEncoder, "begin", slow)
    async with service(settings) as here, client() as http:
        url = f"{here.url}?format=wav"
        try:
            await here.song.window(10)
            async with http.stream("GET", url) as old:
                await Hearing(old).up_to(len(here.song.pcm) * 4)
                await here.song.window(10)
                await asyncio.to_thread(begun.wait)
                anew = GrowingSong(here.gateway.js, here.gateway.store, here.song.job_id, RATE, fence=9, seed=1)
                await here.gateway.jobs.update(
                    here.song.job_id, "local", lambda job: msgspec.structs.replace(job, decode=None)
                )
                await anew.window(10)
                async with http.stream("GET", url) as new:
                    assert new.headers["etag"] != old.headers["etag"]
                    hearing = Hearing(new)
                    heard = await hearing.up_to(len(anew.pcm) * 4)
                    assert anew.pcm.tobytes() in heard
                    go_on.set()
                    await anew.finish(100)
                    assert anew.pcm.tobytes() in await hearing.rest()
        finally:
            go_on.set()
