"""ElevenLabs' own SDK as a client of the music API: songs in every form, plans, errors, and clients that leave."""

import asyncio
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from elevenlabs import AsyncElevenLabs, ElevenLabs, MusicPrompt, SongSection
from elevenlabs.core import ApiError
from elevenlabs.errors import UnprocessableEntityError

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.compatible import requested_songs
from services.gateway.compatible.elevenlabs.output_formats import OUTPUT_FORMATS
from services.gateway.submission.instrumental import MARKS
from shared.jobs.events import end_event
from shared.nats.subjects import TENANT
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import eventually, fresh_settings, in_process
from tests.integration.growing_song import GrowingSong
from tests.integration.test_gateway_keys import entry
from tests.integration.test_openai_sdk import Stack

RATE = 24_000
PAGE = Path(__file__).parents[2] / "docs/elevenlabs.md"


@dataclass
class MusicStack(Stack):
    """A gateway on real servers, with ElevenLabs' clients; the work of workers is the tests'."""

    @contextlib.asynccontextmanager
    async def music(self, key: str = "none") -> AsyncIterator[Any]:
        """An asynchronous client's part for music."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            yield AsyncElevenLabs(base_url=self.base, api_key=key, httpx_client=http).music

    @contextlib.contextmanager
    def client(self, key: str = "none") -> Iterator[ElevenLabs]:  # type: ignore[override]
        """A client."""
        with httpx.Client(trust_env=False, timeout=60) as http:
            yield ElevenLabs(base_url=self.base, api_key=key, httpx_client=http)

    async def growing(self, lyrics: str, tags: str | None = None) -> GrowingSong:
        """Wait for the only song with these lyrics, and tags where they are given, and be its workers."""

        async def asked() -> list[dict[str, Any]]:
            return [song for song in await self.songs(lyrics) if tags in (None, song["request"]["tags"])]

        (found,) = await eventually(asked, "no song was asked for")
        return GrowingSong(self.gateway.js, self.gateway.store, found["job_id"], RATE)


@pytest.fixture(scope="module")
async def stack(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[MusicStack]:
    folder = tmp_path_factory.mktemp("elevenlabs")
    settings = replace(await fresh_settings(nats_server, s3_server, folder), engine="trivial", batch=1)
    async with (
        in_process(settings) as (gateway, _, base),
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as http,
    ):
        yield MusicStack(settings, gateway, base, http)


def lyrics_of(words: str) -> str:
    return f"[Verse]\n{words}"


def prompt(words: str) -> str:
    return f"pop, piano\n[Verse 1]\n{words}"


def decoded(audio: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples, float ``[samples]`` or ``[samples, 2]``, and their rate, of audio in an output format."""
    codec, _, rate = name.partition("_")
    raw: dict[str, Any] = {}
    if codec in ("pcm", "ulaw", "alaw"):
        raw = {"format": "RAW", "samplerate": int(rate), "channels": 2 if codec == "pcm" else 1}
        raw["subtype"] = {"pcm": "PCM_16", "ulaw": "ULAW", "alaw": "ALAW"}[codec]
    found: tuple[np.ndarray, int] = soundfile.read(io.BytesIO(audio), **raw)
    return found


async def everything(blocks: AsyncIterator[bytes]) -> bytes:
    return b"".join([block async for block in blocks])


FORMS = ["auto", "mp3_22050_32", "mp3_44100_128", "mp3_48000_320", "pcm_16000", "pcm_44100", "opus_48000_64"]
FORMS += ["ulaw_8000", "alaw_8000"]


async def run_the_page(base: str) -> None:
    """Run the example of the documentation."""
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    code = compile(example.replace("http://127.0.0.1:8000", base), str(PAGE), "exec")
    await asyncio.to_thread(exec, code, {})


async def test_workers_make_a_song_and_it_comes_in_the_output_format(
    stack: MusicStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(music: Any, name: str) -> tuple[bytes, httpx.Headers]:
        compose = music.with_raw_response.compose
        async with compose(prompt=prompt(name), music_length_ms=3000, output_format=name) as answer:
            return await everything(answer.data), httpx.Headers(answer.headers)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with open_flow(stack.settings, "tokenizer", "codec"), stack.music() as music:
        monkeypatch.chdir(tmp_path)  # where the example writes its files
        answers, _ = await asyncio.gather(
            asyncio.gather(*(ask(music, name) for name in FORMS)), run_the_page(stack.base)
        )
    for name, (audio, headers) in zip(FORMS, answers, strict=True):
        (song,) = await stack.songs(lyrics_of(name))
        assert (song["status"], song["request"]["tags"]) == ("completed", "pop,piano")
        assert (headers["content-type"], headers["song-id"]) == (OUTPUT_FORMATS[name].content_type, song["job_id"])
        samples, rate = decoded(audio, name)
        codec, *numbers = name.split("_")
        assert rate == (int(numbers[0]) if numbers else song["sample_rate"]), name
        assert len(samples) / rate == pytest.approx(song["duration"], abs=0.15), name
        assert np.abs(samples).max() > 0.03, name
        if codec == "mp3":
            assert len(audio) * 8 / 1000 / song["duration"] == pytest.approx(int(numbers[1]), rel=0.15), name
    (detailed,) = await stack.songs("[Verse]\nHello world\nhello sun\n[Chorus]")
    for file in ("song.mp3", "live.mp3", f"{detailed['job_id']}.mp3"):
        assert np.abs(decoded((tmp_path / file).read_bytes(), "auto")[0]).max() > 0.03, "the page's example"


async def test_a_bare_prompt_makes_an_instrumental_song_and_the_answer_says_so(stack: MusicStack) -> None:
    async with stack.music() as music:

        async def ask() -> tuple[bytes, dict[str, str]]:
            call = music.with_raw_response.compose(prompt="warm, slow piano", seed=5, music_length_ms=20_000)
            async with call as answer:
                return await everything(answer.data), answer.headers

        asking = asyncio.create_task(ask())
        song = await stack.growing(MARKS, tags="warm,slow piano,instrumental")
        await song.window(5)
        await song.finish(1000)
        audio, headers = await asking
    request = (await song.job()).request
    assert (request.tags, request.seed, request.max_duration_ms) == ("warm,slow piano,instrumental", 5, 20_000)
    notes = dict(note.split(": ", 1) for note in headers["heartmula-notes"].split("; "))
    assert set(notes) == {"prompt", "music_length_ms", "lyrics"}
    assert "instrumental" in notes["lyrics"]
    samples, rate = decoded(audio, "auto")
    assert (len(samples), rate) == (len(song.pcm), RATE), "a whole file says how long it is"


async def test_audio_is_streamed_while_the_song_is_made(stack: MusicStack) -> None:
    async with stack.music() as music:
        stream = music.stream(prompt=prompt("streamed"), output_format="pcm_24000")

        async def begun() -> GrowingSong:
            song = await stack.growing(lyrics_of("streamed"))
            await song.window(10)
            return song

        making = asyncio.create_task(begun())
        heard = await anext(stream)
        song = await making
        assert (await song.job()).status == "generating"
        await song.window(10)
        await song.finish(100)
        heard += await everything(stream)
    assert np.array_equal(np.frombuffer(heard, "<i2").reshape(-1, 2), song.pcm)


async def test_a_plan_is_sung_and_the_detailed_answer_has_it(stack: MusicStack) -> None:
    given = MusicPrompt(
        positive_global_styles=["pop", "piano"],
        negative_global_styles=["metal"],
        sections=[
            SongSection(
                section_name=name,
                positive_local_styles=["calm"],
                negative_local_styles=[],
                duration_ms=10_000,
                lines=[line],
            )
            for name, line in (("Verse 1", "planned words"), ("Chorus", "la la"))
        ],
    )

    def ask() -> Any:
        more: Any = {"additional_body_parameters": {"with_waveform_visual": True}}
        with stack.client() as client:
            return client.music.compose_detailed(
                composition_plan=given, output_format="pcm_24000", store_for_inpainting=True, request_options=more
            )

    asking = asyncio.create_task(asyncio.to_thread(ask))
    song = await stack.growing("[Verse]\nplanned words\n[Chorus]\nla la")
    await song.window(10)

    async def audible() -> bool:
        return stack.gateway.growing_songs._songs[song.job_id].job.playable_seconds > 0

    await eventually(audible, "the gateway does not hear of the first audio, which is not enough for details")
    assert not stack.gateway.growing_songs._songs[song.job_id].listeners, "workers hurry for a file as for a listener"
    await song.finish(3 * RATE - len(song.pcm))
    found = await asking
    request = (await song.job()).request
    assert (request.tags, request.max_duration_ms) == ("pop,piano,calm", 20_000)
    assert (found.song_id, found.filename) == (song.job_id, f"{song.job_id}.pcm")
    assert MusicPrompt.model_validate(found.json["composition_plan"]) == given
    assert found.json["song_metadata"]["is_explicit"] is None
    assert [note.partition(":")[0] for note in found.json["notes"]] == [
        "store_for_inpainting",
        "negative_global_styles",
        "positive_local_styles",
        "duration_ms",
    ]
    audio = np.frombuffer(found.audio, "<i2").reshape(-1, 2)  # the SDK leaves the closing boundary on it
    assert np.array_equal(audio[: len(song.pcm)], song.pcm)
    quarters = np.abs(song.pcm.mean(axis=1)).reshape(12, -1).max(axis=1)
    assert [abs(value) for value in found.json["waveform_visual"]] == pytest.approx(
        list(1000 * quarters / 32768), abs=60
    )


async def test_a_plan_by_rule_can_be_filled_in_and_composed(stack: MusicStack) -> None:
    async with stack.music() as music:
        plan = await music.composition_plan.create(prompt="dream pop, slow", music_length_ms=40_000)
        assert isinstance(plan, MusicPrompt)
        assert plan.positive_global_styles == ["dream pop", "slow"]
        assert sum(section.duration_ms for section in plan.sections) == 40_000
        assert [(section.section_name, section.lines) for section in plan.sections] == [("Verse", []), ("Chorus", [])]
        raw = await music.composition_plan.with_raw_response.create(prompt="rock", model_id="music_v2")
        assert "no lyrics are written here" in raw.headers["heartmula-notes"]
        assert {chunk.text for chunk in raw.data.chunks} >= {"[Intro]", "[Verse]", "[Chorus]"}
        sections = [
            section.model_copy(update={"lines": [f"filled in {number}"]})
            for number, section in enumerate(plan.sections)
        ]
        filled = plan.model_copy(update={"sections": sections})
        asking = asyncio.create_task(music.compose_detailed(composition_plan=filled))
        song = await stack.growing("[Verse]\nfilled in 0\n[Chorus]\nfilled in 1")
        await song.finish(RATE)
        found = await asking
    assert found.filename == f"{song.job_id}.mp3"
    assert decoded(found.audio, "auto")[1] == RATE


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"prompt": 7}, ["body", "prompt"], "must be text"),
        ({"prompt": "a" * 4_050}, ["body", "prompt"], "the styles together: must have at most 4000 characters"),
        ({"music_length_ms": 2_000}, ["body", "music_length_ms"], "must be at least 3000"),
        ({"music_length_ms": 600_000}, ["body", "music_length_ms"], "the length: at most"),
        ({"prompt": None, "composition_plan": {"sections": []}}, ["body", "composition_plan", "sections"], "to last"),
        ({"finetune_id": "f"}, ["body", "finetune_id"], "no finetunes"),
        ({"sign_with_c_2_pa": True}, ["body", "sign_with_c2pa"], "not signed"),
        ({"output_format": "mp3_48000_240"}, ["query", "output_format"], "is to be one of auto, mp3_22050_32"),
        ({"enable_logging": False}, ["query", "enable_logging"], "kept here for a week"),
        ({"request_options": {"additional_body_parameters": {"tempo": 3}}}, ["body", "tempo"], "is not known here"),
    ],
)
async def test_what_cannot_be_met_is_refused_with_its_place(
    stack: MusicStack, changes: dict[str, Any], place: list[str], words: str
) -> None:
    async with stack.music() as music:
        with pytest.raises(UnprocessableEntityError) as refused:
            await everything(music.compose(**{"prompt": prompt("refused")} | changes))
    (detail,) = refused.value.body["detail"]
    assert (detail["loc"], detail["type"]) == (place, "invalid-request")
    assert words in detail["msg"]
    assert not await stack.songs(lyrics_of("refused"))


async def test_other_errors_have_a_status_and_a_message(stack: MusicStack) -> None:
    async with stack.music() as music:
        with pytest.raises(ApiError) as refused:
            await everything(music.compose_detailed_stream(prompt="pop"))
        assert (refused.value.status_code, refused.value.body["detail"]["status"]) == (400, "refused")
        assert "/v1/music/stream" in refused.value.body["detail"]["message"]
        asking = asyncio.create_task(everything(music.compose(prompt=prompt("failing"))))
        song = await stack.growing(lyrics_of("failing"))
        await song.move("generating")
        await song.move("failed", error="the device is broken")
        await song.events.publish(TENANT, end_event(await song.job()))
        with pytest.raises(ApiError) as refused:
            await asking
        assert (refused.value.status_code, refused.value.body["detail"]["status"]) == (500, "no-audio")
        assert "the device is broken" in refused.value.body["detail"]["message"]
    for body, status in ((b"{", 400), (b" " * 300_000, 413)):
        answer = await stack.http.post("/v1/music", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, set(answer.json()["detail"])) == (status, {"status", "message"})


async def test_a_song_is_cancelled_when_its_client_has_left(stack: MusicStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requested_songs, "ABANDONED_SECONDS", 0.1)
    async with stack.music() as music:
        asking = asyncio.create_task(everything(music.compose(prompt=prompt("abandoned"))))
        await stack.song(lyrics_of("abandoned"))
        asking.cancel()
        await stack.until(lyrics_of("abandoned"), "cancelled")


async def test_a_song_is_cancelled_after_the_time_out_of_its_client(
    stack: MusicStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requested_songs, "ABANDONED_SECONDS", 0.1)
    async with stack.music() as music:
        while not await stack.songs(lyrics_of("too slow")):  # on a busy machine a second may pass before there is one
            with pytest.raises(httpx.ReadTimeout):
                await everything(music.compose(prompt=prompt("too slow"), request_options={"timeout_in_seconds": 1}))
        await stack.until(lyrics_of("too slow"), "cancelled")


async def test_keys_are_tenants(stack: MusicStack, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("alice", "songs_per_minute = 1") + entry("bob"))
    async with in_process(replace(stack.settings, api_keys=keys)) as (gateway, _, base):
        closed = replace(stack, gateway=gateway, base=base)
        async with closed.music("key-of-eve") as music:
            for asking in (everything(music.compose(prompt="pop")), music.composition_plan.create(prompt="pop")):
                with pytest.raises(ApiError) as unknown:
                    await asking
                assert (unknown.value.status_code, unknown.value.body["detail"]["status"]) == (401, "unauthorized")
        for key, status in (("key-of-bob", 422), ("key-of-eve", 403)):  # only a page that knows a key may send it
            page = {"Origin": "https://songs.example", "xi-api-key": key}
            assert (await stack.http.post(f"{base}/v1/music", json={}, headers=page)).status_code == status
        async with closed.music("key-of-alice") as music:
            waiting = asyncio.create_task(everything(music.compose(prompt=prompt("ours"))))
            header = {"xi-api-key": "key-of-alice"}

            async def songs_of(header: dict[str, str]) -> list[Any]:
                listed = await stack.http.get(f"{base}/generate", headers=header)
                return list(listed.json()["songs"])

            await eventually(lambda: songs_of(header), "the tenant has no song")
            assert not await songs_of({"xi-api-key": "key-of-bob"})
            with pytest.raises(ApiError) as refused:
                await everything(music.compose(prompt="another"))
            assert (refused.value.status_code, refused.value.body["detail"]["status"]) == (429, "too-many-requests")
            waiting.cancel()


async def test_the_models_are_a_bare_list(stack: MusicStack) -> None:
    def ask() -> Any:
        with stack.client() as client:
            return client.models.list()

    (model,) = await asyncio.to_thread(ask)
    assert (model.model_id, model.can_do_text_to_speech) == ("HeartMuLa-oss-demo", False)


async def test_the_detailed_answer_is_multipart_for_others_too(stack: MusicStack) -> None:
    """The parts end where their boundary says; only the SDK takes the closing one for audio."""
    asking = asyncio.create_task(
        stack.http.post("/v1/music/detailed?output_format=alaw_8000", json={"prompt": prompt("for others")})
    )
    song = await stack.growing(lyrics_of("for others"))
    await song.finish(RATE)
    answer = await asking
    boundary = answer.headers["content-type"].removeprefix("multipart/mixed; boundary=")
    before, about, audio, after = answer.content.split(f"--{boundary}".encode())
    assert (before, after) == (b"", b"--\r\n")
    found = json.loads(about.split(b"\r\n\r\n")[1])
    assert [section["section_name"] for section in found["composition_plan"]["sections"]] == ["Verse"]
    assert sum(section["duration_ms"] for section in found["composition_plan"]["sections"]) == 1000
    assert len(audio.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")) == 8000
