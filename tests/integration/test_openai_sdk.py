"""OpenAI's own SDK as a client: speech in every form, models, errors, time-outs, and clients that leave."""

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
import numpy as np
import openai
import pytest
import soundfile
from openai import AsyncOpenAI, OpenAI

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.compatible import requested_songs, song_answer
from services.gateway.container import Container
from services.gateway.media import encodings
from shared.audio.flac import BLOCK
from shared.jobs.events import end_event
from shared.nats.subjects import TENANT
from shared.settings import Settings
from tests.integration.flow import PATIENCE, open_flow
from tests.integration.gateway_fixtures import eventually, fresh_settings, in_process
from tests.integration.growing_song import GrowingSong
from tests.integration.test_gateway_keys import entry

PAGE = Path(__file__).parents[2] / "docs" / "openai.md"
RATE = 8000
SPEECH: dict[str, Any] = {"model": "gpt-4o-mini-tts", "voice": "alloy", "instructions": "pop, piano"}


@dataclass
class Stack:
    """A gateway on real servers; the work of workers is the tests'."""

    settings: Settings
    gateway: Container
    base: str
    http: httpx.AsyncClient

    def client(self, key: str = "none", **options: Any) -> AsyncOpenAI:
        """A client, which sends nothing again unless the options say so."""
        return AsyncOpenAI(base_url=f"{self.base}/v1", api_key=key, **{"max_retries": 0, "timeout": PATIENCE} | options)

    async def songs(self, lyrics: str) -> list[dict[str, Any]]:
        """The songs with these lyrics."""
        found = (await self.http.get("/generate", params={"limit": 100})).json()["songs"]
        return [song for song in found if song["request"]["lyrics"] == lyrics]

    async def song(self, lyrics: str) -> GrowingSong:
        """Wait for the only song with these lyrics."""

        async def asked() -> list[dict[str, Any]]:
            return await self.songs(lyrics)

        (found,) = await eventually(asked, "no song was asked for")
        return GrowingSong(self.gateway.js, self.gateway.store, found["job_id"], RATE)

    async def listeners(self, count: int) -> None:
        """Wait until so many requests wait for their song."""

        async def waiting() -> bool:
            songs = self.gateway.growing_songs._songs.values()
            return sum(len(song.listeners) for song in songs) == count

        await eventually(waiting, f"there are not {count} requests")

    async def until(self, lyrics: str, status: str) -> None:
        """Wait until the only song with these lyrics is in a state."""

        async def there() -> bool:
            (song,) = await self.songs(lyrics)
            return bool(song["status"] == status)

        await eventually(there, f"the song is not {status}")


@pytest.fixture(scope="module")
async def stack(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("openai")
    settings = replace(await fresh_settings(nats_server, s3_server, folder), engine="trivial", batch=1)
    settings = replace(settings, cors_origins="https://songs.example")
    async with (
        in_process(settings) as (gateway, _, base),
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as http,
    ):
        yield Stack(settings, gateway, base, http)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have songs cancelled soon after their last client has left."""
    monkeypatch.setattr(requested_songs, "ABANDONED_SECONDS", 0.1)


def samples(audio: bytes) -> tuple[np.ndarray, int]:
    found: tuple[np.ndarray, int] = soundfile.read(io.BytesIO(audio), dtype="int16")
    return found


FORMS = {
    "mp3": ("audio/mpeg", b""),
    "opus": ("audio/ogg; codecs=opus", b"OggS"),
    "flac": ("audio/flac", b"fLaC"),
    "wav": ("audio/wav", b"RIFF"),
    "pcm": ("audio/pcm; rate=24000; channels=1", b""),
}


def run_examples(base: str) -> None:
    """Run the examples of the documentation, in the current folder."""
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {"json": json}
    for example in examples:
        exec(compile(example.replace("http://127.0.0.1:8000", base), PAGE.name, "exec"), names)
    assert names["event"]["type"] == "speech.audio.done"


async def test_workers_make_songs_and_they_come_in_every_form(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(response_format: Any) -> tuple[bytes, httpx.Headers]:
        with OpenAI(base_url=f"{stack.base}/v1", api_key="none", max_retries=0) as client:
            answer = client.audio.speech.create(
                input=f"[Verse]\nla {response_format}",
                response_format=response_format,
                extra_body={"seed": 7, "max_duration_ms": 2000},
                **SPEECH,
            )
            return answer.content, httpx.Headers(dict(answer.response.headers))

    async with open_flow(stack.settings, "tokenizer", "codec"):
        answers = await asyncio.gather(*(asyncio.to_thread(ask, form) for form in FORMS))
        monkeypatch.chdir(tmp_path)
        await asyncio.to_thread(run_examples, stack.base)
    assert samples((tmp_path / "song.mp3").read_bytes())[1] == RATE
    for (form, (kind, magic)), (audio, headers) in zip(FORMS.items(), answers, strict=True):
        (song,) = await stack.songs(f"[Verse]\nla {form}")
        assert (song["status"], song["request"]["tags"], song["seed"]) == ("completed", "pop,piano", 7)
        assert headers["content-type"] == kind
        assert (headers["x-request-id"], headers["openai-model"]) == (song["job_id"], "HeartMuLa-oss-demo")
        assert audio.startswith(magic)
        pcm, rate = (np.frombuffer(audio, "<i2"), 24_000) if form == "pcm" else samples(audio)
        if form != "mp3":  # libsndfile does not know how long a stream of it is
            assert len(pcm) / rate == pytest.approx(2, abs=0.1), form
        assert np.abs(pcm.astype(int)).max() > 1000


async def test_without_a_form_it_is_mp3(stack: Stack) -> None:
    async with stack.client() as client:
        asking = asyncio.create_task(client.audio.speech.create(input="the usual form", **SPEECH))
        song = await stack.song("the usual form")
        await song.window(10)
        await song.finish(100)
        answer = await asking
    assert answer.response.headers["content-type"] == "audio/mpeg"
    assert samples(answer.content)[1] == RATE


async def begun(stack: Stack, lyrics: str) -> GrowingSong:
    """Make the first seconds of a song, once it is asked for."""
    song = await stack.song(lyrics)
    await song.window(10)
    return song


async def test_audio_is_sent_while_the_song_is_made(stack: Stack) -> None:
    async with stack.client() as client:
        making = asyncio.create_task(begun(stack, "streamed"))
        create = client.audio.speech.with_streaming_response.create
        async with create(input="streamed", response_format="flac", **SPEECH) as answer:
            song, blocks = await making, answer.iter_bytes()
            heard = await anext(blocks)
            assert (await song.job()).status == "generating"
            await song.window(10)
            file = await song.finish(100)
            heard += b"".join([block async for block in blocks])
    assert heard[42:] == file[42:]


async def test_events_carry_the_audio_and_end_with_what_it_took(stack: Stack) -> None:
    async with stack.client() as client:
        making = asyncio.create_task(begun(stack, "events"))
        create = client.audio.speech.with_streaming_response.create
        async with create(input="events", response_format="wav", stream_format="sse", **SPEECH) as answer:
            song = await making
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = answer.iter_lines()
            first = json.loads((await anext(lines)).removeprefix("data: "))
            assert (await song.job()).status == "generating"
            await song.move("generating", frames=20)
            await song.finish(100)
            rest = [json.loads(line.removeprefix("data: ")) async for line in lines if line]
    *deltas, done = [first, *rest]
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    audio = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert np.array_equal(samples(audio)[0], song.pcm)
    usage = done["usage"]
    assert (done["type"], usage["output_tokens"]) == ("speech.audio.done", 20)
    assert 0 < usage["input_tokens"] == usage["total_tokens"] - 20


async def test_our_own_fields_go_through_the_extra_body(stack: Stack) -> None:
    own = {"seed": 5, "max_duration_ms": 4000, "title": "Mine", "instrumental": True, "topk": 3}
    async with stack.client() as client:
        asking = asyncio.create_task(client.audio.speech.create(input="[Intro]", extra_body=own, **SPEECH))
        song = await stack.song("[Intro]")
        await song.finish(100)
        await asking
    request = (await stack.songs("[Intro]"))[0]["request"]
    assert {name: request.get(name) for name in own} == own


async def test_models_are_listed_for_each_kind_of_client(stack: Stack) -> None:
    async with stack.client() as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.object, model.owned_by) == ("HeartMuLa-oss-demo", "model", "heartmula")
        assert model.created > 1_600_000_000
        assert await client.models.retrieve(model.id) == model
        with pytest.raises(openai.NotFoundError) as refused:
            await client.models.retrieve("whisper-1")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert "HeartMuLa-oss-demo" in refused.value.message
    (other,) = (await stack.http.get("/v1/models", headers={"xi-api-key": "x"})).json()
    assert other["model_id"] == model.id


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"response_format": "aac"}, "response_format", "aac is not made here; take mp3, opus, flac, wav or pcm"),
        ({"response_format": "midi"}, "response_format", "has to be one of mp3, opus, flac, wav, pcm"),
        ({"speed": 1.5}, "speed", "has to be 1"),
        ({"stream_format": "text"}, "stream_format", "audio or sse"),
        ({"input": "la " * 30_000}, "input", "input: must have at most 60000 characters"),
        ({"input": 7}, "input", "input: must be text"),
        ({"input": " ", "instructions": ""}, "input", "input: give lyrics or tags"),
        ({"instructions": "la\0la"}, "instructions", "instructions: holds the control character U+0000"),
        ({"model": ""}, "model", "any name will do"),
        ({"extra_body": {"seed": -1}}, "seed", "at least 0"),
        ({"extra_body": {"lyrics": "la"}}, "input", "input: is the name for lyrics here"),
        ({"extra_body": {"variants": 2}}, "variants", "is not a field; there are model, input"),
        ({"extra_body": {"max_duration_ms": 3_600_000}}, "max_duration_ms", "fit beside"),
    ],
)
async def test_what_cannot_be_met_is_refused_once_with_what_to_change(
    stack: Stack, changes: dict[str, Any], param: str, words: str
) -> None:
    async with stack.client(max_retries=2) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.audio.speech.create(**SPEECH | {"input": "refused"} | changes)
    error = refused.value
    assert (error.param, error.type, error.code) == (param, "invalid_request_error", "invalid_request")
    assert words in error.message
    assert (error.response.headers["x-should-retry"], _retries(error)) == ("false", "0")
    assert not await stack.songs("refused")


def _retries(error: openai.APIStatusError) -> str:
    """How often a request had been sent before the one that was answered."""
    return error.request.headers["x-stainless-retry-count"]


async def test_a_body_that_is_no_json_is_refused_in_openais_shape(stack: Stack) -> None:
    for body, status, code in ((b"{", 400, "malformed_json"), (b"[]", 400, "malformed_json")):
        answer = await stack.http.post(
            "/v1/audio/speech", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    answer = await stack.http.post("/v1/audio/speech", data={"input": "la"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_addresses_that_are_not_here_are_refused_in_the_shape_of_the_client(stack: Stack) -> None:
    async with stack.client(max_retries=2) as client:
        with pytest.raises(openai.NotFoundError) as refused:
            await client.embeddings.create(model="any", input="la")
    assert (refused.value.code, _retries(refused.value)) == ("not_found", "0")
    answer = await stack.http.get("/v1/audio/speech")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "OPTIONS, POST"
    for path, headers in (("/v1/voices", {"xi-api-key": "x"}), ("/v1/music/none", {})):
        answer = await stack.http.get(path, headers=headers)
        assert (answer.status_code, answer.json()["detail"]["status"]) == (404, "not-found")
    assert (await stack.http.get("/v2/none")).json()["type"] == "/problems/not-found"


async def fail(song: GrowingSong) -> None:
    await song.move("failed", error="the device is broken")
    await song.events.publish(TENANT, end_event(await song.job()))


async def test_a_song_that_fails_before_its_first_byte_is_an_error(stack: Stack) -> None:
    async with stack.client(max_retries=2) as client:
        asking = asyncio.create_task(client.audio.speech.create(input="failing at once", **SPEECH))
        song = await stack.song("failing at once")
        await song.move("generating")
        await fail(song)
        with pytest.raises(openai.InternalServerError) as refused:
            await asking
    assert "the device is broken" in refused.value.message
    assert (refused.value.type, refused.value.code, _retries(refused.value)) == ("server_error", "no_audio", "0")
    assert len(await stack.songs("failing at once")) == 1


async def test_a_song_that_fails_after_its_first_byte_is_cut_and_not_made_again_for_a_repeated_request(
    stack: Stack,
) -> None:
    asked: dict[str, Any] = SPEECH | {"input": "failing later", "response_format": "flac"}
    async with stack.client(max_retries=2) as client:
        making = asyncio.create_task(begun(stack, "failing later"))
        async with client.audio.speech.with_streaming_response.create(**asked) as answer:
            song, blocks = await making, answer.iter_bytes()
            await anext(blocks)
            await fail(song)
            with pytest.raises(httpx2.RemoteProtocolError):
                _ = [block async for block in blocks]
        with pytest.raises(openai.InternalServerError) as refused:
            await client.audio.speech.create(**asked)
    assert "the device is broken" in refused.value.message
    assert len(await stack.songs("failing later")) == 1


async def test_a_request_that_is_sent_again_after_a_time_out_makes_one_song(stack: Stack) -> None:
    again = asyncio.Event()

    async def sent(request: Any) -> None:
        if request.headers["x-stainless-retry-count"] == "1":
            again.set()

    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [sent]})
    async with stack.client(max_retries=50, http_client=http) as client:
        asking = asyncio.create_task(
            client.audio.speech.create(input="a long wait", response_format="flac", timeout=1, **SPEECH)
        )
        song = await stack.song("a long wait")
        async with asyncio.timeout(PATIENCE):
            await again.wait()
            await song.window(10)
            file = await song.finish(100)
            audio = (await asking).content
    assert audio[42:] == file[42:]
    assert len(await stack.songs("a long wait")) == 1


async def test_equal_requests_share_a_song_while_it_is_made_and_not_afterwards(stack: Stack) -> None:
    async with stack.client() as client:

        def ask() -> "asyncio.Task[Any]":
            return asyncio.create_task(client.audio.speech.create(input="twice", response_format="flac", **SPEECH))

        first = ask()
        song = await stack.song("twice")
        second = ask()
        await stack.listeners(2)
        file = await song.finish(5 * BLOCK)
        assert [(await asking).content[42:] for asking in (first, second)] == [file[42:]] * 2
        third = ask()

        async def two() -> bool:
            return len(await stack.songs("twice")) == 2

        await eventually(two, "the third request makes no song of its own")
        third.cancel()


async def test_a_song_is_cancelled_when_its_last_client_has_left(stack: Stack, impatient: None) -> None:
    async with stack.client() as client:
        clients = [asyncio.create_task(client.audio.speech.create(input="abandoned", **SPEECH)) for _ in range(2)]
        song = await stack.song("abandoned")
        await stack.listeners(2)
        clients[0].cancel()
        await stack.listeners(1)
        await song.window(10)
        assert (await song.job()).status == "generating"
        clients[1].cancel()
        await stack.until("abandoned", "cancelled")


async def test_a_client_that_leaves_in_mid_song_has_it_cancelled(stack: Stack, impatient: None) -> None:
    async with stack.client() as client:
        making = asyncio.create_task(begun(stack, "left"))
        create = client.audio.speech.with_streaming_response.create
        async with create(input="left", response_format="wav", **SPEECH) as answer:
            await making
            await anext(answer.iter_bytes())
        await stack.until("left", "cancelled")


async def test_a_client_that_comes_back_after_the_end_of_its_song_is_sent_that_one(stack: Stack) -> None:
    asked: dict[str, Any] = SPEECH | {"input": "back again", "response_format": "flac"}
    async with stack.client() as client:
        making = asyncio.create_task(begun(stack, "back again"))
        async with client.audio.speech.with_streaming_response.create(**asked) as answer:
            song = await making
            await anext(answer.iter_bytes())
        await stack.listeners(0)
        file = await song.finish(100)
        assert (await client.audio.speech.create(**asked)).content == file
    assert len(await stack.songs("back again")) == 1


async def test_a_song_waits_until_it_can_be_encoded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "MOST", 1)
    monkeypatch.setattr(song_answer, "_BUSY_SECONDS", 0.05)
    async with stack.client() as client:
        making = asyncio.create_task(begun(stack, "encoded first"))
        create = client.audio.speech.with_streaming_response.create
        async with create(input="encoded first", response_format="opus", **SPEECH):
            await making
            second = asyncio.create_task(client.audio.speech.create(input="encoded next", **SPEECH))
            song = await begun(stack, "encoded next")
            await song.finish(100)
            await stack.listeners(2)
        assert samples((await second).content)[1] == RATE


async def test_a_gateway_that_ends_cancels_the_songs_that_requests_wait_for(stack: Stack) -> None:
    async with in_process(stack.settings) as (_, _, base):
        client = replace(stack, base=base).client()
        asking = asyncio.create_task(client.audio.speech.create(input="ending", **SPEECH))
        await stack.song("ending")
    with pytest.raises(openai.APIConnectionError):
        await asking
    await client.close()
    await stack.until("ending", "cancelled")


async def test_keys_are_tenants(stack: Stack, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("alice", "songs_per_minute = 1") + entry("bob"))
    async with in_process(replace(stack.settings, api_keys=keys)) as (gateway, _, base):
        closed = replace(stack, gateway=gateway, base=base)
        for key in ("none", "key-of-eve"):
            async with closed.client(key, max_retries=2) as client:
                for asking in (client.audio.speech.create(input="la", **SPEECH), client.models.list()):
                    with pytest.raises(openai.AuthenticationError) as unknown:
                        await asking
                    assert (unknown.value.code, _retries(unknown.value)) == ("invalid_api_key", "0")
        answer = await stack.http.post(f"{base}/v1/audio/speech", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        answer = await stack.http.get(f"{base}/v1/models", headers={"xi-api-key": "key-of-eve"})
        assert (answer.status_code, answer.json()["detail"]["status"]) == (401, "unauthorized")
        async with closed.client("key-of-alice") as alice, closed.client("key-of-bob") as bob:
            waiting = [asyncio.create_task(who.audio.speech.create(input="ours", **SPEECH)) for who in (alice, bob)]

            async def tenants() -> bool:
                headers = [{"xi-api-key": f"key-of-{who}"} for who in ("alice", "bob")]
                async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
                    lists = [(await http.get("/generate", headers=header)).json()["songs"] for header in headers]
                return [len(songs) for songs in lists] == [1, 1]

            await eventually(tenants, "not each tenant has a song")
            with pytest.raises(openai.RateLimitError) as refused:
                await alice.audio.speech.create(input="another", **SPEECH)
            assert refused.value.code == "rate_limit_exceeded"
            assert "x-should-retry" not in refused.value.response.headers
            named = {"Authorization": "Bearer key-of-alice", "Host": "a.name:123456"}  # any one will do with a key
            asked = {"model": "any", "input": "another"}
            assert (await stack.http.post(f"{base}/v1/audio/speech", json=asked, headers=named)).status_code == 429
            for task in waiting:
                task.cancel()


async def test_pages_of_listed_origins_alone_may_ask(stack: Stack) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    names = {"authorization", "content-type", "user-agent", "x-stainless-lang", "x-stainless-retry-count"}
    asked["Access-Control-Request-Headers"] = ",".join(sorted(names))
    origin = {"Origin": "https://songs.example"}
    allowed = await stack.http.options("/v1/audio/speech", headers=asked | origin)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, "https://songs.example")
    assert names <= set(allowed.headers["access-control-allow-headers"].lower().replace(" ", "").split(","))
    refused = await stack.http.post("/v1/audio/speech", json={}, headers={"Origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
