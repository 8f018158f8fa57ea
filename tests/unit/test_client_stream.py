"""Streams of the client: songs that grow, connections that are cut or end too early, and answers that are not true."""

import asyncio
import logging
from contextlib import aclosing
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Literal

import httpx
import pytest

from heartmula_client import (
    AsyncClient,
    Refused,
    ServiceFault,
    SongIncomplete,
    UnexpectedAnswer,
    UnknownSong,
    Unreachable,
)
from heartmula_client import client as client_module
from heartmula_client import connection as connection_module
from heartmula_client import stream as stream_module
from tests.unit.growing_songs import Connection, Service, Song

AUDIO = Random(1).randbytes(50_000)
OVERLAP = 16


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client does not wait long before it tries again."""
    monkeypatch.setattr(stream_module, "INTERVAL", 0.01)
    monkeypatch.setattr(stream_module, "RETRY_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(connection_module, "RETRY_WAITS", (0.01, 0.01, 0.01))


async def received(client: AsyncClient, into: bytearray | None = None) -> bytes:
    """Everything that the client yields of the song `one`; also where it raises at the end."""
    audio = bytearray() if into is None else into
    async for block in client.stream("one"):
        audio += block
    return bytes(audio)


async def until_received(audio: bytearray, size: int) -> None:
    while len(audio) < size:
        await asyncio.sleep(0.005)


async def test_audio_is_yielded_as_it_grows() -> None:
    song, audio = Song(AUDIO), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        for made in (10, 30_000):
            song.grow(made)
            await until_received(audio, made)
            assert (bytes(audio), listening.done()) == (AUDIO[:made], False)
        song.grow(status="completed")
        assert await listening == AUDIO
    # The end is believed when the service says how long the song is.
    assert song.ranges == ["", f"{len(AUDIO) - OVERLAP}-"]


@pytest.mark.parametrize("cuts", [[0], [1], [15, 1], [1500, 7, 0, 20_000], [49_999]])
async def test_a_cut_connection_is_resumed_where_it_was(cuts: list[int]) -> None:
    connections, begun, asked = [], 0, []
    for cut in cuts:
        first = max(0, begun - OVERLAP)
        asked.append(f"{first}-" if first else "")
        connections.append(Connection(cut=begun - first + cut))
        begun += cut
    song, audio = Song(AUDIO, made=len(AUDIO), connections=connections), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, len(AUDIO))
        song.grow(status="completed")
        assert await listening == AUDIO
    assert song.ranges[: len(cuts)] == asked


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_an_end_that_is_not_the_songs_is_none(framing: Literal["chunked", "close"]) -> None:
    song = Song(AUDIO, made=20_000, connections=[Connection(end=10_000, framing=framing), Connection(end=5000)])
    audio = bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        song.grow(status="completed")
        assert await listening == AUDIO


async def test_a_proxy_that_ends_the_last_connection_early_takes_nothing_away() -> None:
    song, audio = Song(AUDIO, made=20_000, connections=[Connection(end=30_000)]), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        song.grow(status="completed")  # so that it is when the connection ends
        assert await listening == AUDIO


async def test_a_song_that_is_completed_is_read_to_its_end() -> None:
    song = Song(AUDIO, status="completed", connections=[Connection(cut=30_000)])
    async with Service(one=song).client() as client:
        assert await received(client) == AUDIO
    assert song.ranges == ["", f"{30_000 - OVERLAP}-"]


async def test_a_completed_song_whose_size_is_never_said_ends_when_nothing_more_comes() -> None:
    unknown = {"Content-Range": f"bytes {len(AUDIO) - OVERLAP}-{len(AUDIO) - 1}/*"}
    song, audio = Song(AUDIO, made=len(AUDIO)), bytearray()
    song.connections = [Connection(), Connection(headers=unknown)]
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, len(AUDIO))
        song.grow(status="completed")
        assert await listening == AUDIO


@pytest.mark.parametrize(
    "wrong", [Connection(begin=9000), Connection(headers={"Content-Range": "bytes */9"}), Connection(status=204)]
)
async def test_a_range_that_was_not_asked_for_is_refused(wrong: Connection) -> None:
    song, audio = Song(AUDIO, made=len(AUDIO), connections=[Connection(cut=10_000), wrong]), bytearray()
    async with Service(one=song).client() as client:
        with pytest.raises(UnexpectedAnswer, match="asked for the audio from byte 9984 on"):
            await received(client, audio)
    assert audio == AUDIO[:10_000]


async def test_a_proxy_that_knows_no_ranges_is_skipped_through() -> None:
    connections = [Connection(cut=10_000), Connection(ignores_range=True, cut=20_000), Connection(ignores_range=True)]
    song, audio = Song(AUDIO, made=len(AUDIO), connections=connections), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, len(AUDIO))
        song.grow(status="completed")
        assert await listening == AUDIO


async def test_audio_that_was_made_anew_is_never_joined_to_the_old() -> None:
    song, audio = Song(AUDIO, made=10_000), bytearray()
    song.connections = [Connection(cut=10_000)]
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 10_000)
        song.audio = Random(2).randbytes(50_000)
        song.grow()
        with pytest.raises(UnexpectedAnswer, match="made anew"):
            await listening
    assert audio == AUDIO[:10_000]


async def test_the_finished_file_may_begin_in_another_way() -> None:
    song, audio = Song(AUDIO, made=500, finished=bytes(600) + AUDIO[600:]), bytearray()
    song.connections = [Connection(cut=500)]
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 500)
        song.grow(status="completed")
        assert len(await listening) == len(AUDIO)


async def test_a_song_that_cannot_be_heard_yet_is_waited_for() -> None:
    later = Connection(status=409, headers={"Retry-After": "0"})
    song = Song(AUDIO, status="completed", connections=[later] * 20)  # here: to a gateway that does not know it yet
    async with Service(one=song).client() as client:
        assert await received(client) == AUDIO
    assert len(song.ranges) == 21


@pytest.mark.parametrize(("status", "words"), [("failed", "the song failed: a reason"), ("cancelled", "was cancelled")])
async def test_a_song_that_ends_before_its_first_sound_is_waited_for_no_more(status: str, words: str) -> None:
    song = Song(AUDIO, status=status, error="a reason", connections=[Connection(status=410)])
    async with Service(one=song).client() as client:
        with pytest.raises(SongIncomplete, match=words) as ended:
            await received(client)
    assert ended.value.song.status == status


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_what_there_is_of_a_song_that_fails_is_yielded_first(status: str) -> None:
    song, audio = Song(AUDIO, made=20_000, connections=[Connection(cut=1000)]), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        song.grow(30_000, status)
        with pytest.raises(SongIncomplete):
            await listening
    assert audio == AUDIO[:30_000]


async def test_a_cut_followed_by_the_end_of_the_song_is_no_lost_connection() -> None:
    song, audio = Song(AUDIO, made=20_000, connections=[Connection(cut=20_000), Connection(status=410)]), bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        song.grow(20_000, "cancelled")
        with pytest.raises(SongIncomplete):
            await listening


async def test_a_service_that_restarts_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    song, audio = Song(AUDIO, made=20_000), bytearray()
    service = Service(one=song)
    async with service.client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        with caplog.at_level(logging.WARNING):
            await service.stop()
            await asyncio.sleep(0.2)  # for several attempts
            await service.start()
            song.grow(status="completed")
            assert await listening == AUDIO
    assert len([record for record in caplog.records if "the connection was lost" in record.getMessage()]) == 1


async def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "AWAY", -1.0)
    song, audio = Song(AUDIO, made=20_000, connections=[Connection(cut=20_000)]), bytearray()
    async with Service(one=song).client() as client:
        with pytest.raises(Unreachable, match="the connection was lost"):
            await received(client, audio)
    assert audio == AUDIO[:20_000]


async def test_a_service_that_never_answered_is_given_up_after_four_attempts() -> None:
    connections = [Connection(status=503, headers={"Retry-After": "0"})] * 5
    song = Song(AUDIO, connections=connections)
    async with Service(one=song).client() as client:
        with pytest.raises(ServiceFault):
            await received(client)
    assert len(song.ranges) == 4


async def test_a_listener_that_takes_its_time_is_not_blamed_on_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    song, audio = Song(AUDIO, made=len(AUDIO), connections=[Connection(cut=20_000)]), bytearray()
    async with Service(one=song).client() as client:
        async for block in client.stream("one"):
            audio += block
            now[0] += 1000
            if len(audio) == len(AUDIO):
                song.grow(status="completed")
    assert audio == AUDIO


async def test_silence_is_no_failure(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(stream_module, "_TIMEOUT", httpx.Timeout(30, read=0.1))
    song, audio = Song(AUDIO, made=20_000, connections=[Connection(silent=True)] * 3), bytearray()
    # Each connection is silent for longer than a service may be away.
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(monotonic=lambda: 1000.0 * len(song.ranges)))
    async with Service(one=song).client() as client:
        with caplog.at_level(logging.WARNING):
            listening = asyncio.create_task(received(client, audio))
            await until_received(audio, 20_000)
        song.grow(status="completed")
        assert await listening == AUDIO
    assert [record.getMessage() for record in caplog.records if "lost" in record.getMessage()] == []


@pytest.mark.parametrize(
    ("connection", "kind"),
    [
        (Connection(headers={"Content-Type": "text/html"}), UnexpectedAnswer),
        (Connection(status=401), Refused),
        (Connection(status=500), ServiceFault),
        (Connection(status=410), Refused),
    ],
)
async def test_an_answer_that_waiting_does_not_change_is_raised_at_once(connection: Connection, kind: type) -> None:
    song = Song(AUDIO, status="completed", connections=[connection])
    async with Service(one=song).client() as client:
        with pytest.raises(kind):
            await received(client)
    assert len(song.ranges) == 1


async def test_an_unknown_song_is_reported() -> None:
    async with Service().client() as client:
        with pytest.raises(UnknownSong):
            await received(client)


async def test_a_song_that_is_shorter_than_what_came_is_reported() -> None:
    song = Song(AUDIO, made=20_000, connections=[Connection(cut=20_000), *[Connection(status=416)] * 3])
    audio = bytearray()
    async with Service(one=song).client() as client:
        listening = asyncio.create_task(received(client, audio))
        await until_received(audio, 20_000)
        song.grow(status="completed")
        with pytest.raises(UnexpectedAnswer, match="what follows byte 20000"):
            await listening


async def test_format_start_and_name_are_passed_on() -> None:
    song, names = Song(AUDIO, made=20_000, title="A song"), list[str | None]()
    async with Service(one=song).client() as client:
        async for _ in client.stream("one", format="ogg", start=12.5, on_name=names.append):
            song.grow(status="completed")
        await received(client)
    assert [song.queries[0], song.queries[-1]] == [{"format": ["ogg"], "from": ["12.500"]}, {}]
    assert names == ["A song.flac"]


async def test_how_much_can_be_heard_is_an_event_where_the_state_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "INTERVAL", 0.01)
    song = Song(AUDIO)
    async with Service(one=song).client() as client:
        assert (await client.status("one")).playable_seconds == 0
        async with aclosing(client.watch("one")) as events:
            assert (await anext(events)).playable_seconds is None
            song.playable_seconds = 25.6
            assert (await anext(events)).playable_seconds == 25.6


async def test_a_saved_stream_becomes_the_finished_file(tmp_path: Path) -> None:
    finished = b"knows its length" + AUDIO[16:]
    song, path = Song(AUDIO, status="completed", finished=finished), tmp_path / "song.flac"
    async with Service(one=song).client() as client:
        path.write_bytes(AUDIO)
        assert await client.finish_file("one", path)
        assert path.read_bytes() == finished
        path.write_bytes(AUDIO[:-1])
        assert not await client.finish_file("one", path)
        assert path.read_bytes() == AUDIO[:-1]
