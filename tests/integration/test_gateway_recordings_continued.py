"""Songs that go on from recordings: what is stored of them, what is refused in which words, and their trees."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.nats.subjects import TENANT, submit_subject
from shared.schema.base import CONTINUED_SCHEMA
from shared.schema.job import Job, Parent
from shared.storage.keys import recording_prefix
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway
from tests.integration.ready_recording import put_recording
from tests.integration.test_gateway_continuing import WORDS, kept, problem, stored

CODES = np.random.default_rng(3).integers(0, 8192, (8, 450), np.int16)  # longer than a window
FIELD = "continue_from.recording_id"


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway-recordings-continued")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def recorded(gateway: RunningGateway, codes: np.ndarray = CODES, **changes: Any) -> Job:
    return await put_recording(gateway.jobs, gateway.store, codes, **changes)


async def asked(gateway: RunningGateway, path: str = "/generate", values: Any = None, **origin: Any) -> Any:
    return await gateway.http.post(path, json=WORDS | (values or {}) | {"continue_from": origin})


async def test_every_variant_begins_with_the_frames_of_the_recording(gateway: RunningGateway) -> None:
    recording = await recorded(gateway)
    values = {"variants": 2, "seed": 7}
    answer = await asked(gateway, recording_id=recording.job_id, at_ms=32_079, values=values)
    assert answer.status_code == 202, answer.text
    for number, each in enumerate(answer.json()["variants"]):
        job = await gateway.job(each["job_id"])
        assert (job.schema, job.request.seed) == (CONTINUED_SCHEMA, 7 + number)
        # The window that the recording fills has the seed 0 in every song that goes on from it.
        assert job.parent == Parent(recording_id=recording.job_id, frames=400, least_frames=525, seeds=(0,))
        codes, meta = await kept(gateway, job.job_id)
        assert np.array_equal(codes, CODES[:, :400])
        assert (meta.model, meta.seed, [(one.window, one.seed) for one in meta.earlier]) == ("an encoder", 0, [(1, 0)])


async def test_all_of_it_is_kept_unless_a_moment_is_given_and_its_room_is_measured(gateway: RunningGateway) -> None:
    recording = await recorded(gateway, CODES[:, :100])
    fit = (await asked(gateway, "/api/fit", recording_id=recording.job_id)).json()
    assert (fit["kept_ms"], fit["latest_at_ms"]) == (8_000, 8_000)
    data = json.dumps(WORDS | {"continue_from": {"recording_id": recording.job_id}}).encode()
    answer = json.loads((await gateway.nc.request(submit_subject(TENANT), data, timeout=10)).data)
    assert np.array_equal((await kept(gateway, answer["job_id"]))[0], CODES[:, :100])


async def test_a_recording_whose_audio_ends_within_a_frame_can_be_kept_to_its_last_sample(
    gateway: RunningGateway,
) -> None:
    recording = await recorded(gateway, CODES[:, :100])
    longer = msgspec.structs.replace(recording, job_id="longer", duration_s=8.1)
    await gateway.jobs.create(longer)
    assert (await asked(gateway, "/api/fit", recording_id="longer", at_ms=8_100)).json()["kept_ms"] == 8_000
    late = await asked(gateway, "/api/fit", recording_id="longer", at_ms=8_180)
    assert problem(late) == (422, "invalid-request", "continue_from.at_ms")


async def test_what_cannot_be_gone_on_from_is_refused_in_words_and_leaves_nothing(gateway: RunningGateway) -> None:
    waiting = await recorded(gateway, status="queued", tokens_key=None, frames=None)
    encoding = await recorded(gateway, status="generating", tokens_key=None, frames=None)
    failed = await recorded(gateway, status="failed", tokens_key=None, frames=None, error="the disk is full")
    foreign = await recorded(gateway, tenant="alice")
    gone = await recorded(gateway)
    await gateway.store.delete_one(str(gone.tokens_key))
    song, _ = await gateway.made(100)
    ready = await recorded(gateway)
    before = await stored(gateway)
    moment = "continue_from.at_ms"
    for origin, expected, words in (
        ({"recording_id": "none"}, (404, "unknown-recording", FIELD), "no recording has this id"),
        ({"recording_id": "*"}, (404, "unknown-recording", FIELD), "no recording has this id"),
        ({"recording_id": foreign.job_id}, (404, "unknown-recording", FIELD), "no recording has this id"),
        ({"recording_id": song}, (404, "unknown-recording", FIELD), "give it as job_id"),
        ({"job_id": ready.job_id}, (404, "unknown-job", "continue_from.job_id"), "give it as recording_id"),
        ({"recording_id": waiting.job_id}, (409, "not-ready", FIELD), "is still being encoded"),
        ({"recording_id": encoding.job_id}, (409, "not-ready", FIELD), "is still being encoded"),
        ({"recording_id": failed.job_id}, (409, "conflict", FIELD), "could not be encoded: the disk is full"),
        ({"recording_id": gone.job_id}, (410, "no-tokens", FIELD), f"of the recording {gone.job_id} are no longer"),
        ({"recording_id": ready.job_id, "at_ms": 36_080}, (422, "invalid-request", moment), "is 36000 ms long"),
        ({"job_id": song, "at_ms": 8_080}, (422, "invalid-request", moment), f"the song {song} is 8000 ms long"),
    ):
        for path in ("/generate", "/api/fit"):
            answer = await asked(gateway, path, **origin)
            assert problem(answer) == expected, answer.text
            assert words in answer.json()["detail"]
    assert await stored(gateway) == before


async def test_nats_clients_are_told_that_a_recording_is_still_being_encoded(gateway: RunningGateway) -> None:
    waiting = await recorded(gateway, status="queued", tokens_key=None, frames=None)
    data = json.dumps(WORDS | {"continue_from": {"recording_id": waiting.job_id}}).encode()
    answer = json.loads((await gateway.nc.request(submit_subject(TENANT), data, timeout=10)).data)
    assert (answer["error"]["code"], answer["error"]["err_code"]) == (409, 20013)


async def test_a_recording_is_the_root_of_a_tree_and_leaves_its_songs_whole(gateway: RunningGateway) -> None:
    recording = await recorded(gateway)
    origin = {"recording_id": recording.job_id, "at_ms": 4_000}
    ids = [(await gateway.made(100, continue_from=origin, max_duration_ms=None))[0] for _ in range(2)]
    leaf = await gateway.submit(continue_from={"job_id": ids[0], "at_ms": 800}, max_duration_ms=None)
    tree = (await gateway.http.get(f"/generate/{leaf}/tree")).json()
    assert tree["root"] == recording.job_id
    assert (tree["recording"]["recording_id"], tree["recording"]["title"]) == (recording.job_id, "Humming")
    assert tree["recording"]["duration"] == 36.0
    shape = [(song["job_id"], song["parent"], song["at_ms"]) for song in tree["songs"]]
    assert shape == [*((name, recording.job_id, 4_000) for name in ids), (leaf, ids[0], 800)]
    shown = (await gateway.http.get(f"/generate/{ids[0]}")).json()
    assert shown["parent"] == origin | {"exists": True}
    assert shown["request"]["continue_from"] == origin
    listed = (await gateway.http.get("/generate", params={"parent": recording.job_id})).json()["songs"]
    assert [song["job_id"] for song in listed] == ids[::-1]

    await gateway.jobs.delete(recording)
    await gateway.store.delete(recording_prefix(TENANT, recording.recording.sha256))  # type: ignore[union-attr]
    tree = (await gateway.http.get(f"/generate/{leaf}/tree")).json()
    assert (tree["root"], "recording" in tree, len(tree["songs"])) == (recording.job_id, False, 3)
    assert (await gateway.http.get(f"/generate/{ids[0]}")).json()["parent"]["exists"] is False
    assert np.array_equal((await kept(gateway, ids[0]))[0], CODES[:, :50])
