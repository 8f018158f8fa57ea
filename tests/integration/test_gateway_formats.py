"""Renditions of finished audio, made when they are requested: other formats, and peaks."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import mutagen
import numpy as np
import pytest
import soundfile
from litestar.response.base import ASGIResponse

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.api.audio_response import AudioResponse
from services.gateway.api.conditional import Conditions
from services.gateway.errors import ApiError
from shared.audio.files import AudioWriter
from shared.audio.forms import plain
from shared.audio.peaks import peaks_of
from shared.audio.tags import SongTags
from shared.jobs.store import change
from shared.nats.subjects import TENANT
from shared.schema.job import AudioPart, Decode, Job
from shared.schema.request import AudioFormat, GenerateRequest
from shared.settings import Settings
from shared.storage.keys import audio_key, part_key, part_peaks_key, peaks_key
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, in_process, running_gateway

RATE = 8000
TYPES = {"flac": "audio/flac", "wav": "audio/wav", "mp3": "audio/mpeg", "ogg": "audio/ogg"}


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-formats")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


def music(seconds: float = 5.3) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    wave = np.sin(2 * np.pi * 440 * time) * np.sin(time)
    return np.stack([0.9 * wave, 0.4 * wave], axis=1).astype(np.float32)


async def finished(
    gateway: RunningGateway, folder: Path, audio_format: AudioFormat = "flac", seconds: float = 5.3
) -> str:
    """Submit a song and complete it with real audio."""
    job_id = await gateway.submit(format=audio_format, title="Lied", seed=7)
    path = folder / "song"
    tags = SongTags.of((await gateway.job(job_id)).request)
    with AudioWriter(path, plain(audio_format), RATE, tags) as writer:
        writer.write(music(seconds))
    await gateway.complete(job_id, path.read_bytes())
    return job_id


async def objects(gateway: RunningGateway, job_id: str) -> set[str]:
    return {item.key.rpartition("/")[2] for item in await gateway.store.list(f"audio/{job_id}/")}


@pytest.mark.parametrize("made", TYPES)
async def test_audio_comes_in_every_format_whatever_it_was_made_in(
    gateway: RunningGateway, tmp_path: Path, made: AudioFormat
) -> None:
    job_id = await finished(gateway, tmp_path, made)
    url = f"/generate/{job_id}/result"
    original = (await gateway.http.get(url)).content
    samples, _ = soundfile.read(io.BytesIO(original), dtype="int16")
    for name, media_type in TYPES.items():
        answer = await gateway.http.get(url, params={"format": name})
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        assert f'filename="Lied.{name}"' in answer.headers["content-disposition"]
        found, rate = soundfile.read(io.BytesIO(answer.content), dtype="int16")
        assert (rate, found.shape) == (RATE, samples.shape)
        if name == made:
            assert answer.content == original
        elif {made, name} == {"flac", "wav"}:
            assert np.array_equal(found, samples)
        assert np.abs(found.astype(int) - samples)[:-2000].max() < 0.15 * 32768
        tags = mutagen.File(io.BytesIO(answer.content)).tags
        assert "Lied" in str(tags["TIT2"] if name in ("wav", "mp3") else tags["title"])
    assert await objects(gateway, job_id) == {f"7.{name}" for name in TYPES}


async def test_formats_are_made_without_loss_where_the_song_has_its_flac(
    gateway: RunningGateway, tmp_path: Path
) -> None:
    job_id = await finished(gateway, tmp_path, "mp3")
    path = tmp_path / "song.flac"
    with AudioWriter(path, plain("flac"), RATE, SongTags.of((await gateway.job(job_id)).request)) as writer:
        writer.write(music())
    await gateway.store.put_file(audio_key(job_id, 7, "flac"), path, "audio/flac")
    answer = await gateway.http.get(f"/generate/{job_id}/result", params={"format": "wav"})
    found, _ = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert np.array_equal(found, soundfile.read(path, dtype="int16")[0])


async def test_a_converted_song_is_served_like_any_other(gateway: RunningGateway, tmp_path: Path) -> None:
    job_id = await finished(gateway, tmp_path)
    url = f"/generate/{job_id}/result?format=ogg"
    head = await gateway.http.head(url)  # even the first one tells how long it is
    whole = await gateway.http.get(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    etag = whole.headers["etag"]
    assert head.headers["etag"] == etag != (await gateway.http.head(f"/generate/{job_id}/result")).headers["etag"]
    part = await gateway.http.get(url, headers={"Range": "bytes=100-199", "If-Range": etag})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert (await gateway.http.get(url, headers={"If-None-Match": etag})).status_code == 304
    assert gateway.log.read_text().count(f"{job_id}: made") == 1
    await gateway.http.delete(f"/generate/{job_id}", params={"forget": "true"})
    assert await objects(gateway, job_id) == set()
    assert (await gateway.http.get(url)).status_code == 404


async def test_many_who_ask_at_once_wait_for_one_conversion(gateway: RunningGateway, tmp_path: Path) -> None:
    job_id = await finished(gateway, tmp_path, seconds=60)
    url = f"/generate/{job_id}/result"
    answers = await asyncio.gather(*(gateway.http.get(url, params={"format": "mp3"}) for _ in range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({hashlib.sha256(answer.content).digest() for answer in answers}) == 1
    assert gateway.log.read_text().count(f"{job_id}: made") == 1
    assert not list((gateway.settings.data_dir / "tmp").iterdir())


async def test_a_song_that_cannot_be_converted_says_why(gateway: RunningGateway, tmp_path: Path) -> None:
    damaged = await gateway.submit()
    await gateway.complete(damaged)
    waiting = await gateway.submit()
    expired = await finished(gateway, tmp_path)
    await gateway.http.get(f"/generate/{expired}/result?format=mp3")
    key = (await gateway.job(expired)).audio_key
    assert key is not None
    await gateway.store.delete_one(key)
    for job_id, path, status, words in (
        (damaged, "result?format=wav", 410, "cannot be read"),
        (damaged, "peaks", 410, "cannot be read"),
        (waiting, "result?format=wav", 409, "queued"),
        (waiting, "peaks", 409, "queued"),
        (expired, "result?format=mp3", 410, "expired"),
        (expired, "peaks", 410, "expired"),
        (damaged, "result?format=aac", 422, "flac, wav, mp3, ogg"),
        (damaged, "result?format=", 422, "flac, wav, mp3, ogg"),
        ("missing", "result?format=wav", 404, "no song"),
        ("missing", "peaks", 404, "no song"),
    ):
        answer = await gateway.http.get(f"/generate/{job_id}/{path}")
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), (path, answer.text)
    assert "Traceback" not in gateway.log.read_text()


async def test_peaks_are_served_as_the_worker_made_them(gateway: RunningGateway, tmp_path: Path) -> None:
    job_id = await finished(gateway, tmp_path)
    made = peaks_of([music(1)], RATE)
    await gateway.store.put(peaks_key(str((await gateway.job(job_id)).audio_key)), made)
    answer = await gateway.http.get(f"/generate/{job_id}/peaks")
    assert (answer.content, answer.headers["content-type"]) == (made, "application/json")
    etag = answer.headers["etag"]
    assert (await gateway.http.get(f"/generate/{job_id}/peaks", headers={"If-None-Match": etag})).status_code == 304


async def test_a_song_that_is_made_has_the_peaks_of_what_can_be_heard(gateway: RunningGateway) -> None:
    job_id = await gateway.submit()
    url = f"/generate/{job_id}/peaks"
    await gateway.move_to(job_id, "generating")
    assert (await gateway.http.get(url)).status_code == 409
    etags = set()
    for number in range(2):
        part = await gateway.decode_window(job_id)
        made = peaks_of([music(number + 1)], RATE)
        await gateway.store.put(part_peaks_key(part.key), made)
        answer = await gateway.http.get(url)
        assert (answer.content, answer.headers["content-type"]) == (made, "application/json")
        etag = answer.headers["etag"]
        assert "no-cache" in answer.headers["cache-control"]
        assert (await gateway.http.get(url, headers={"If-None-Match": etag})).status_code == 304
        head = await gateway.http.head(url)
        assert (head.content, head.headers["content-length"], head.headers["etag"]) == (b"", str(len(made)), etag)
        etags.add(etag)
    assert len(etags) == 2


async def test_a_song_without_peaks_gets_them_when_they_are_asked_for(gateway: RunningGateway, tmp_path: Path) -> None:
    job_id = await finished(gateway, tmp_path)
    found = (await gateway.http.get(f"/generate/{job_id}/peaks")).json()
    assert (found["version"], found["channels"], found["bits"], found["sample_rate"]) == (2, 1, 8, RATE)
    assert len(found["data"]) == 2 * found["length"]
    assert max(found["data"]) == pytest.approx(np.abs(music().mean(axis=1)).max() * 127, abs=1)
    assert await objects(gateway, job_id) == {"7.flac", "7.peaks.json"}


async def test_peaks_that_are_replaced_while_they_are_asked_for_are_read_anew(settings: Settings) -> None:
    async with in_process(settings) as (gateway, _, _):
        asked = Conditions("GET")
        job = Job(job_id="j", tenant=TENANT, request=GenerateRequest(lyrics="la"), created_at=0, status="decoding")
        first, second = (part_key("j", 5, window) for window in range(2))

        def with_parts(*keys: str) -> Job:
            parts = tuple(AudioPart(key=key, size=1, samples=RATE) for key in keys)
            return msgspec.structs.replace(job, decode=Decode(fencing_token=5, sample_rate=RATE, parts=parts))

        await gateway.jobs.create(with_parts(first, second))
        await gateway.store.put(part_peaks_key(second), b"of both")
        found = await gateway.audio.peaks(with_parts(first), asked)  # the record as it was before
        assert isinstance(found, ASGIResponse)
        assert found.body == b"of both"
        await gateway.store.delete_one(part_peaks_key(second))  # as after a restored backup
        with pytest.raises(ApiError, match="the song is decoding"):
            await gateway.audio.peaks(with_parts(first), asked)
        audio, of_all = audio_key("j", 6, "flac"), peaks_of([music(1)], RATE)
        await gateway.store.put(audio, b"audio")
        await gateway.store.put(peaks_key(audio), of_all)
        await gateway.jobs.update("j", TENANT, lambda job: change(job, status="completed", audio_key=audio))
        found = await gateway.audio.peaks(with_parts(first, second), asked)
        assert isinstance(found, AudioResponse)
        assert (found.status, found.key) == (200, peaks_key(audio))
