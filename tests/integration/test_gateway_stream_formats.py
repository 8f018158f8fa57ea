"""Listening to a song while it is made, in other formats and from any of its seconds on."""

import asyncio
import io
from collections.abc import AsyncIterator

import httpx
import msgspec
import numpy as np
import pytest
import soundfile

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.api.routes import audio
from services.gateway.auth.api_keys import Caller
from services.gateway.media import encodings
from shared.audio.flac import BLOCK
from shared.audio.forms import Form
from shared.audio.reading import read_audio
from shared.schema.request import AudioFormat
from shared.settings import Settings
from tests.integration.flow import PATIENCE
from tests.integration.gateway_fixtures import RunningGateway, eventually, fresh_settings, in_process, running_gateway
from tests.integration.growing_song import GrowingSong
from tests.integration.test_gateway_stream import ENDLESS, Hearing, growing, problem, reported

RATE = 8000
HEADERS = {"mp3": 1000, "ogg": 0, "wav": 1000, "flac": 42}  # bytes within which stream and file may differ


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-stream-formats")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


def samples_of(audio: bytes) -> np.ndarray:
    return np.concatenate(list(read_audio(io.BytesIO(audio))))


@pytest.mark.parametrize(
    ("made", "form"),
    [
        ("flac", "mp3"),
        ("flac", "ogg"),
        ("flac", "wav"),
        ("mp3", "flac"),
        ("mp3", "wav"),
        ("mp3", "ogg"),
        ("mp3", "mp3"),
        ("ogg", "mp3"),
    ],
)
async def test_a_growing_song_comes_in_every_format_as_the_finished_one_does(
    gateway: RunningGateway, made: AudioFormat, form: AudioFormat
) -> None:
    song = await growing(gateway, format=made)
    await song.window(10)  # 5.12 s
    url = f"/generate/{song.job_id}/stream?format={form}"
    async with gateway.http.stream("GET", url) as first:
        hearing = Hearing(first)
        assert (first.status_code, first.headers["cache-control"]) == (200, "no-store")
        assert f'filename="{song.job_id}.{form}"' in first.headers["content-disposition"]
        await hearing.up_to(5000)  # some of it, before the song is finished
        await song.window(10)
        async with gateway.http.stream("GET", url, headers={"Range": "bytes=2000-"}) as second:
            later = Hearing(second)
            assert second.headers["content-range"] == f"bytes 2000-{ENDLESS}/*"
            await later.up_to(1)
            await song.finish(5000)
            heard, rest = await hearing.rest(), await later.rest()
    file = (await gateway.http.get(f"/generate/{song.job_id}/result?format={form}")).content
    begin = HEADERS[form]
    assert (heard[begin:], rest) == (file[begin:], file[2000:])
    if form == "wav":
        assert np.array_equal(samples_of(heard), song.pcm)
    resumed = await gateway.http.get(url, headers={"Range": "bytes=3000-"})
    assert (resumed.status_code, resumed.content) == (206, file[3000:])


@pytest.mark.parametrize("finished", [False, True])
async def test_a_song_is_heard_from_a_second_on(gateway: RunningGateway, finished: bool) -> None:
    song = await growing(gateway, max_duration_ms=60_000)
    for _ in range(3):
        await song.window(10)
    if finished:
        await song.finish(1000)
    asking = asyncio.create_task(gateway.http.get(f"/generate/{song.job_id}/stream", params={"from": "7.9"}))
    if not finished:
        await reported(gateway, song)
        await song.finish(1000)
    answer = await asking
    assert answer.status_code == 200
    block = int(7.9 * RATE) // BLOCK
    assert np.array_equal(samples_of(answer.content), song.pcm[block * BLOCK :])
    frame = answer.content.index(b"\xff\xf8")
    assert answer.content[frame + 4] == block  # its number, from which players know the time


async def test_a_second_that_is_not_there_yet_is_waited_for(gateway: RunningGateway) -> None:
    song = await growing(gateway, max_duration_ms=60_000)
    await song.window(10)
    url = f"/generate/{song.job_id}/stream"
    asking = [asyncio.create_task(gateway.http.get(url, params={"from": second})) for second in ("9", "30")]
    assert (await reported(gateway, song, 2)).buffered == 0
    await song.window(10)
    await song.finish(1000)
    there, beyond = await asyncio.gather(*asking)
    assert np.array_equal(samples_of(there.content), song.pcm[9 * RATE // BLOCK * BLOCK :])
    problem(beyond, 422, "the song has")
    problem(await gateway.http.get(url, params={"from": "30"}), 422, "the song has")
    assert (await gateway.http.get(url, params={"from": "30"})).json()["field"] == "from"


async def test_a_finished_song_from_a_second_on_is_served_with_ranges(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(10)
    await song.finish(1000)
    url = f"/generate/{song.job_id}/stream?from=1&format=wav"
    whole = (await gateway.http.get(url)).content
    end = await gateway.http.get(url, headers={"Range": f"bytes={len(whole) - 16}-"})
    assert (end.status_code, end.content) == (206, whole[-16:])
    assert end.headers["content-range"] == f"bytes {len(whole) - 16}-{len(whole) - 1}/{len(whole)}"
    beyond = await gateway.http.get(url, headers={"Range": f"bytes={len(whole)}-"})
    problem(beyond, 416, f"{len(whole)} bytes")


async def test_a_song_that_was_never_flac_is_heard_from_a_second_on(gateway: RunningGateway) -> None:
    song = await growing(gateway, format="ogg")
    await song.finish_whole(10 * RATE)
    answer = await gateway.http.get(f"/generate/{song.job_id}/stream?from=3")
    assert len(samples_of(answer.content)) == 10 * RATE - 3 * RATE // BLOCK * BLOCK


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_an_encoding_ends_with_a_song_that_will_not_be_finished(gateway: RunningGateway, end: str) -> None:
    song = await growing(gateway)
    await song.window(10)
    async with gateway.http.stream("GET", f"/generate/{song.job_id}/stream?format=wav") as answer:
        hearing = Hearing(answer)
        await hearing.up_to(5 * RATE * 4)
        await song.move("failed", error="x") if end == "failed" else await song.move("cancelled")
        assert np.array_equal(samples_of(await hearing.rest()), song.pcm)


async def test_an_encoding_of_audio_that_is_made_anew_is_cut(gateway: RunningGateway) -> None:
    song = await growing(gateway)
    await song.window(10)
    url = f"/generate/{song.job_id}/stream?format=mp3"
    async with gateway.http.stream("GET", url) as answer:
        hearing = Hearing(answer)
        await hearing.up_to(1000)
        anew = GrowingSong(gateway.js, gateway.store, song.job_id, RATE, fence=9, seed=1)
        await gateway.jobs.update(song.job_id, "local", lambda job: msgspec.structs.replace(job, decode=None))
        await anew.window(10)
        with pytest.raises(httpx.RemoteProtocolError):
            await hearing.rest()
    async with gateway.http.stream("GET", url) as answer:  # begins with the new audio
        await anew.finish(1000)
        heard = await Hearing(answer).rest()
    file = (await gateway.http.get(f"/generate/{song.job_id}/result?format=mp3")).content
    assert heard[HEADERS["mp3"] :] == file[HEADERS["mp3"] :]


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        ("format=aac", "format", "flac, wav, mp3, ogg"),
        ("format=", "format", "flac, wav, mp3, ogg"),
        ("from=-1", "from", "a number of seconds"),
        ("from=1e1", "from", "a number of seconds"),
        ("from=", "from", "a number of seconds"),
        ("from=4", "from", "may have 4 seconds"),
        ("from=99999", "from", "may have 4 seconds"),
    ],
)
async def test_a_wrong_parameter_is_refused_in_words(
    gateway: RunningGateway, query: str, field: str, words: str
) -> None:
    song = await growing(gateway)
    answer = await gateway.http.get(f"/generate/{song.job_id}/stream?{query}")
    problem(answer, 422, words)
    assert answer.json()["field"] == field
    await song.finish(10)


async def test_all_who_hear_the_same_share_one_encoding_which_goes_after_the_last(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encodings, "MOST", 2)
    monkeypatch.setattr(encodings, "LINGER_SECONDS", 0.5)
    scratch = settings.data_dir / "tmp"
    async with in_process(settings) as (gateway, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as http:
        job = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job
        song = GrowingSong(gateway.js, gateway.store, job.job_id, RATE)
        await song.window(10)
        url = f"/generate/{job.job_id}/stream"
        async with http.stream("GET", f"{url}?format=mp3") as one, http.stream("GET", f"{url}?format=mp3") as two:
            assert (one.status_code, two.status_code, len(gateway.encodings)) == (200, 200, 1)
            async with http.stream("GET", f"{url}?from=1"):
                problem(await http.get(f"{url}?format=ogg"), 503, "as many as may be")
                assert len(list(scratch.iterdir())) == len(gateway.encodings) == 2
            async with http.stream("GET", f"{url}?format=ogg") as other:  # in place of one that nobody hears
                assert (other.status_code, len(gateway.encodings)) == (200, 2)

        async def gone() -> bool:
            return not gateway.encodings and not list(scratch.iterdir())

        await eventually(gone, "encodings are left that nobody hears")
        assert len(gateway.growing_songs) == 0


FORMS = (
    Form("mp3", 44_100, 128),
    Form("opus", 48_000, 96),
    Form("pcm", 16_000, channels=1),
    Form("ulaw", 8000, channels=1),
)


async def test_a_song_comes_in_forms_that_other_apis_name(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is made and afterwards. Our own route names formats alone: it is given the form here."""
    monkeypatch.setattr(encodings, "LINGER_SECONDS", 0.0)  # a finished song is encoded anew
    async with in_process(settings) as (gateway, _, base), httpx.AsyncClient(base_url=base, trust_env=False) as http:

        async def submitted(body: bytes) -> tuple[GrowingSong, str]:
            job_id = (await gateway.submission.submit(Caller("local"), body)).job.job_id
            return GrowingSong(gateway.js, gateway.store, job_id, RATE), f"/generate/{job_id}/stream"

        async def none_left() -> bool:
            return not gateway.encodings and not gateway.growing_songs

        async def one_listens() -> bool:
            return len(gateway.growing_songs) == 1

        for form in FORMS:
            monkeypatch.setattr(audio, "plain", lambda _, form=form: form)
            song, url = await submitted(b'{"lyrics": "la"}')
            await song.window(20)  # 10.24 s
            async with http.stream("GET", url) as growing:
                hearing = Hearing(growing)
                await hearing.up_to(20_000)  # before the song is finished
                await song.finish(5000)
                heard = await hearing.rest()
            await eventually(none_left, "the encoding is left")
            finished = await http.get(url)
            for answer in (growing, finished):
                assert (answer.status_code, answer.headers["content-type"]) == (200, form.content_type)
                assert f'filename="{song.job_id}.{form.suffix}"' in answer.headers["content-disposition"]
            begin = HEADERS.get(form.codec, 0)
            assert heard[begin:] == finished.content[begin:]
            length = int(len(song.pcm) * (form.sample_rate or 0) / RATE + 0.5)
            frames = 3 * 1152 if form.codec == "mp3" else 0  # a stream does not tell how much of the last ones counts
            assert length <= length_in(form, finished.content) <= length + frames
            tag = finished.headers["etag"]
            assert growing.headers["etag"] == tag
            resumed = await http.get(url, headers={"Range": "bytes=10000-", "If-Range": tag})
            assert (resumed.status_code, resumed.content) == (206, finished.content[10_000:])
            monkeypatch.setattr(audio, "plain", lambda _: Form("pcm", 8000))
            other = await http.get(url, headers={"Range": "bytes=10000-", "If-Range": tag})
            assert (other.status_code, len(other.content)) == (200, 4 * len(song.pcm)), "a tag of another form"

        await eventually(none_left, "encodings are left")
        waited, url = await submitted(b'{"lyrics": "la", "format": "ogg"}')
        asking = asyncio.create_task(http.get(url))
        await eventually(one_listens, "the listener does not come")
        await waited.finish_whole(3 * RATE)  # has no FLAC, and could not be heard before
        assert len((await asking).content) == len((await http.get(url)).content) == 4 * 3 * RATE


async def test_a_long_song_holds_up_no_other_one(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a finished song is encoded from one file, and there are few threads."""
    monkeypatch.setattr(encodings, "_THREADS", 1)
    async with in_process(settings) as (gateway, _, _):
        songs = []
        for seconds in (120, 2):
            job_id = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job.job_id
            songs.append(GrowingSong(gateway.js, gateway.store, job_id, RATE))
            await songs[-1].finish(seconds * RATE)
        long, short = [await song.job() for song in songs]
        with gateway.encodings.listen(long, FORMS[0], 0.0) as encoded_long:
            async with asyncio.timeout(PATIENCE):
                await encoded_long.reach(20_000)
                with gateway.encodings.listen(short, FORMS[0], 0.0) as encoded_short:
                    await encoded_short.reach(20_000)
            assert encoded_long.size is None


def length_in(form: Form, file: bytes) -> int:
    """Samples a channel."""
    if form.codec in ("pcm", "ulaw"):
        return len(file) // form.channels // {"pcm": 2, "ulaw": 1}[form.codec]
    heard, rate = soundfile.read(io.BytesIO(file))
    assert rate == form.sample_rate
    return len(heard)
