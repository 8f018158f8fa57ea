"""Listening to a song while it is made, over HTTP against a gateway process on real servers."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import numpy as np
import pytest
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.audio.reading import read_audio
from shared.nats.subjects import DEC, decode_subject
from shared.schema.job import DecodeJob
from shared.schema.listening import Listening
from shared.schema.request import AudioFormat
from shared.storage.keys import tokens_key
from tests.integration.flow import PATIENCE
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, running_gateway
from tests.integration.growing_song import GrowingSong

RATE = 8000
HEADER = 42  # bytes that differ between stream and file: the mark and STREAMINFO
ENDLESS = 2**40 - 1


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-stream")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def growing(gateway: RunningGateway, **values: object) -> GrowingSong:
    """Submit a song whose work the test does."""
    return GrowingSong(gateway.js, gateway.store, await gateway.submit(**values), RATE)


class Hearing:
    """What a listener has heard so far."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer, self.heard, self._blocks = answer, b"", answer.aiter_raw()

    async def up_to(self, size: int) -> bytes:
        """Read until there are so many bytes."""
        async with asyncio.timeout(PATIENCE):
            while len(self.heard) < size:
                self.heard += await anext(self._blocks)
        return self.heard

    async def rest(self) -> bytes:
        """Read to the end."""
        async with asyncio.timeout(PATIENCE):
            async for block in self._blocks:
                self.heard += block
        return self.heard


@asynccontextmanager
async def listening(
    gateway: RunningGateway, song: GrowingSong, asked: str = "", **headers: str
) -> AsyncIterator[Hearing]:
    """Listen to a song, from a range if one is given."""
    more = {name.replace("_", "-"): value for name, value in headers.items()} | ({"Range": asked} if asked else {})
    async with gateway.http.stream("GET", f"/generate/{song.job_id}/stream", headers=more) as answer:
        yield Hearing(answer)


def problem(answer: httpx.Response, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]


# --- from the beginning


async def test_a_song_is_heard_while_it_is_made(gateway: RunningGateway) -> None:
    song = await growing(gateway, title="Lied")
    await song.window(10)
    async with listening(gateway, song) as hearing:
        answer = hearing.answer
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "audio/flac"
        assert 'filename="Lied.flac"' in answer.headers["content-disposition"]
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["accept-ranges"] == "bytes"
        assert "content-length" not in answer.headers
        assert await hearing.up_to(len(song.stream)) == song.stream
        await song.window(10)
        assert await hearing.up_to(len(song.stream)) == song.stream
        file = await song.finish(5000)
        heard = await hearing.rest()
    assert heard == song.stream
    assert heard[HEADER:] == file[HEADER:]
    assert np.array_equal(np.concatenate(list(read_audio(io.BytesIO(heard)))), song.pcm)
    finished = await gateway.http.get(f"/generate/{song.job_id}/stream")
    assert (finished.content, finished.headers["content-length"]) == (file, str(len(file)))


async def test_a_listener_who_comes_before_the_audio_waits_for_it(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    asking = asyncio.create_task(gateway.http.get(f"/generate/{song.job_id}/stream"))
    await reported(gateway, song)
    await song.window(4)
    file = await song.finish(100)
    answer = await asking
    assert answer.status_code == 200
    assert answer.content[HEADER:] == file[HEADER:]


@pytest.mark.parametrize("made", ["flac", "wav"])
async def test_the_stream_of_a_song_below_one_window_begins_when_the_song_ends(
    gateway: RunningGateway, made: AudioFormat
) -> None:
    song = await growing(gateway, format=made)
    asking = asyncio.create_task(gateway.http.get(f"/generate/{song.job_id}/stream"))
    await reported(gateway, song)
    await song.finish_whole(3000)
    answer = await asking
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/flac")
    assert np.array_equal(np.concatenate(list(read_audio(io.BytesIO(answer.content)))), song.pcm)
    assert answer.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("made", ["mp3", "flac"])
async def test_parts_that_go_before_a_listener_read_them_are_read_from_the_file(
    gateway: RunningGateway, made: str
) -> None:
    song = await growing(gateway, format=made)
    await song.window(400)
    async with listening(gateway, song) as hearing:
        await hearing.up_to(1)
        await song.window(400)
        file = await song.finish(100, publish=False)  # and nothing tells the gateway
        assert len(file) > 8_000_000  # more than the sockets hold between here and there
        assert (await hearing.rest())[HEADER:] == file[HEADER:]


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_song_that_will_not_be_finished_ends_its_stream_cleanly(gateway: RunningGateway, end: str) -> None:
    song, silent = await growing(gateway), await growing(gateway)
    await song.window(4)
    asking = asyncio.create_task(gateway.http.get(f"/generate/{silent.job_id}/stream"))
    await reported(gateway, silent)
    async with listening(gateway, song) as hearing:
        await hearing.up_to(len(song.stream))
        for each in (song, silent):
            if end == "failed":
                await each.move("failed", error="the codec said no")
            else:
                await gateway.http.delete(f"/generate/{each.job_id}")
        assert await hearing.rest() == song.stream
    words = "the codec said no" if end == "failed" else "cancelled"
    problem(await asking, 410, words)
    problem(await gateway.http.get(f"/generate/{song.job_id}/stream"), 410, words)
    assert (await gateway.http.head(f"/generate/{song.job_id}/stream")).status_code == 410


async def test_audio_that_is_made_anew_is_not_joined_to_the_old(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    async with listening(gateway, song) as hearing:
        tag = hearing.answer.headers["etag"]
        await hearing.up_to(len(song.stream))
        anew = GrowingSong(gateway.js, gateway.store, song.job_id, RATE, fence=9, seed=1)
        await gateway.jobs.update(song.job_id, "local", lambda job: msgspec.structs.replace(job, decode=None))
        await anew.window(8)
        with pytest.raises(httpx.RemoteProtocolError):
            await hearing.rest()
    for asked in ("bytes=100-", "bytes=1000000-", "bytes=100-1000000"):  # also where the new audio has not got to yet
        async with listening(gateway, song, asked, If_Range=tag) as again:
            assert (again.answer.status_code, again.answer.headers["etag"] == tag) == (200, False)
            assert await again.up_to(len(anew.stream)) == anew.stream
    file = await anew.finish(100)
    answer = await gateway.http.get(f"/generate/{song.job_id}/stream", headers={"Range": "bytes=100-", "If-Range": tag})
    assert (answer.status_code, answer.content) == (200, file)


async def test_a_song_that_does_not_exist_is_404(gateway: RunningGateway) -> None:
    problem(await gateway.http.get("/generate/00000000-0000-4000-8000-000000000000/stream"), 404, "no song")


async def test_head_is_answered_without_waiting(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    answer = await gateway.http.head(f"/generate/{song.job_id}/stream", params={"format": "ogg"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/ogg")
    assert "content-length" not in answer.headers
    await song.window(4)
    file = await song.finish(100)
    answer = await gateway.http.head(f"/generate/{song.job_id}/stream")
    assert answer.headers["content-length"] == str(len(file))


# --- ranges


async def test_a_range_without_an_end_goes_on_to_the_end_of_the_song(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    async with listening(gateway, song, "bytes=100-") as hearing:
        assert hearing.answer.status_code == 206
        assert hearing.answer.headers["content-range"] == f"bytes 100-{ENDLESS}/*"
        assert "content-length" not in hearing.answer.headers
        await hearing.up_to(1)
        await song.window(4)
        file = await song.finish(100)
        assert await hearing.rest() == file[100:]


async def test_whoever_heard_all_that_there_is_goes_on_there(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    size = len(song.stream)
    async with listening(gateway, song, f"bytes={size}-") as hearing:  # answered before there is more
        assert hearing.answer.headers["content-range"] == f"bytes {size}-{ENDLESS}/*"
        await song.window(4)
        assert await hearing.up_to(len(song.stream) - size) == song.stream[size:]
    tag = hearing.answer.headers["etag"]
    file = await song.finish(100)
    for headers in ({}, {"If-Range": tag}):  # the stream's own tag
        asked = {"Range": f"bytes={size}-"} | headers
        answer = await gateway.http.get(f"/generate/{song.job_id}/stream", headers=asked)
        assert (answer.status_code, answer.content) == (206, file[size:])
        assert answer.headers["content-range"] == f"bytes {size}-{len(file) - 1}/{len(file)}"


@pytest.mark.parametrize(
    ("asked", "first", "last"), [("bytes=0-1", 0, 1), ("bytes=50-149", 50, 149), ("bytes=0-0", 0, 0)]
)
async def test_a_range_within_the_audio_is_exact(gateway: RunningGateway, asked: str, first: int, last: int) -> None:
    song = await growing(gateway)
    await song.window(4)
    answer = await gateway.http.get(f"/generate/{song.job_id}/stream", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, song.stream[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/*"
    assert answer.headers["content-length"] == str(last - first + 1)


async def test_a_range_that_is_not_there_yet_is_waited_for(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    size = len(song.stream)
    url = f"/generate/{song.job_id}/stream"
    ranges = (f"bytes={size - 10}-{size + 9}", f"bytes={size + 100}-", f"bytes={10**9}-")
    asking = [asyncio.create_task(gateway.http.get(url, headers={"Range": asked})) for asked in ranges]
    await reported(gateway, song, 3)
    await song.window(4)
    file = await song.finish(100)
    bounded, later, never = await asyncio.gather(*asking)
    assert (bounded.status_code, bounded.content) == (206, file[size - 10 : size + 10])
    assert (later.status_code, later.content) == (206, file[size + 100 :])
    problem(never, 416, f"{len(file)} bytes")
    assert never.headers["content-range"] == f"bytes */{len(file)}"


@pytest.mark.parametrize("asked", ["bytes=-100", "bytes=0-1,5-6", "bytes=9-5", "items=0-1", "bytes=0-"])
async def test_a_range_that_makes_no_sense_while_a_song_grows_is_ignored(gateway: RunningGateway, asked: str) -> None:
    song = await growing(gateway)
    await song.window(4)
    async with listening(gateway, song, asked) as hearing:
        assert hearing.answer.status_code == 200
        assert await hearing.up_to(len(song.stream)) == song.stream
        await song.finish(0)
        await hearing.rest()


async def test_a_range_of_another_version_is_answered_with_the_whole(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    async with listening(gateway, song) as hearing:
        tag = hearing.answer.headers["etag"]
    for known, status in ((tag, 206), ('"x"', 200), ("Sat, 29 Oct 2022 19:43:31 GMT", 200)):
        async with listening(gateway, song, "bytes=5-", If_Range=known) as hearing:
            assert hearing.answer.status_code == status


async def test_a_listener_goes_on_at_another_gateway_where_the_first_one_was_stopped(
    gateway: RunningGateway,
) -> None:
    song = await growing(gateway)
    async with running_gateway(gateway.settings, gateway.log.parent) as other:
        await song.window(4)
        async with listening(other, song) as hearing:
            await hearing.up_to(len(song.stream))
            stopped = asyncio.create_task(other.stop())
            with pytest.raises(httpx.RemoteProtocolError):  # no end of the last chunk
                await hearing.rest()
        assert await stopped == 0
    async with listening(gateway, song, f"bytes={len(hearing.heard)}-") as again:
        file = await song.finish(4096)
        assert (hearing.heard + await again.rest())[HEADER:] == file[HEADER:]


# --- what the workers are told


async def reports(gateway: RunningGateway, song: GrowingSong) -> AsyncIterator[Listening]:
    subscription = await gateway.nc.subscribe(f"ctl.listen.{song.job_id}")
    await gateway.nc.flush()
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                yield msgspec.json.decode((await subscription.next_msg(PATIENCE)).data, type=Listening)
    finally:
        await subscription.unsubscribe()


async def reported(gateway: RunningGateway, song: GrowingSong, listeners: int = 1) -> Listening:
    """Wait until a gateway says that so many listen."""
    async for report in reports(gateway, song):
        if report.listeners == listeners:
            return report
    raise AssertionError("unreachable")


async def test_workers_hear_who_listens_and_how_far_ahead_the_audio_is(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    asking = asyncio.create_task(gateway.http.get(f"/generate/{song.job_id}/stream"))
    first = await reported(gateway, song)
    assert (first.job_id, first.buffered) == (song.job_id, 0)
    await song.window(60)  # 30.72 s
    async with listening(gateway, song, f"bytes={len(song.stream) // 2}-") as hearing:
        await hearing.up_to(1)
        ahead = [report async for report in _take(reports(gateway, song), 3)]
    assert [report.listeners for report in ahead] == [2, 2, 2]
    # The one in the middle is furthest along, and nobody is asked to hurry for the other.
    assert 16 > ahead[0].buffered > ahead[1].buffered > ahead[2].buffered > 0
    await song.finish(0)
    await asking
    assert {report.gateway for report in ahead} == {first.gateway}


async def _take(source: AsyncIterator[Listening], count: int) -> AsyncIterator[Listening]:
    async for item in source:
        yield item
        if not (count := count - 1):
            return


async def test_several_gateways_report_their_listeners(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(4)
    async with (
        running_gateway(gateway.settings, gateway.log.parent) as other,
        listening(gateway, song),
        listening(other, song),
    ):
        names = set()
        async for report in reports(gateway, song):
            names.add(report.gateway)
            if len(names) == 2:
                break


async def test_windows_that_a_listener_needs_are_put_into_the_lane_that_goes_first(gateway: RunningGateway) -> None:
    song = await growing(gateway)

    async def queued() -> DecodeJob | None:
        try:
            message = await gateway.js.get_msg(DEC, subject=decode_subject(song.job_id, "high"))
        except NotFoundError:
            return None
        return msgspec.json.decode(message.data or b"", type=DecodeJob)

    key = tokens_key(song.job_id, 1)
    await song.move("generating", tokens_key=key, saved_frames=371)  # a frame short of a window
    async with listening_soon(gateway, song):
        await reported(gateway, song)
        assert await queued() is None
        await song.move("generating", saved_frames=372)
        found: DecodeJob = await eventually(queued, "nothing is queued")
        assert (found.tokens_key, found.frames, found.last) == (key, 372, False)


@asynccontextmanager
async def listening_soon(gateway: RunningGateway, song: GrowingSong) -> AsyncIterator[None]:
    """Wait for the first audio of a song."""
    asking = asyncio.create_task(gateway.http.get(f"/generate/{song.job_id}/stream"))
    try:
        yield
    finally:
        await song.finish(10)
        await asking
