"""What becomes of a song's token files when it is complete."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from services.codec_worker.finishing import _keep_tokens
from services.codec_worker.token_fetch import Tokens
from shared.errors import Unavailable
from shared.schema.job import DecodeJob, Job, Parent
from shared.schema.request import GenerateRequest
from shared.storage.token_file import TokenMeta, pack, unpack

OWN, SECOND, KEPT = (f"tokens/a/{name}.safetensors" for name in ("5", "9", "kept"))
META = TokenMeta(job_id="a", model="m", seed=1, lyrics="la")
CODES = np.arange(8 * 20, dtype=np.int16).reshape(8, 20)
JOB = Job(
    job_id="a",
    tenant="local",
    request=GenerateRequest(lyrics="la"),
    created_at=1.0,
    status="completed",
    tokens_key=OWN,
    audio_key="audio/a/7.flac",
)


class Store:
    """Replacement of the object store: objects in memory."""

    def __init__(self) -> None:
        self.objects = {OWN: pack(CODES, META), SECOND: pack(CODES + 1, META), KEPT: b"kept"}
        self.away = False

    async def put(self, key: str, data: bytes) -> None:
        if self.away:
            raise Unavailable("s3", "away")
        self.objects[key] = data

    async def delete_one(self, key: str) -> None:
        self.objects.pop(key, None)


async def left_of(claimed: Job, done: Job, *, away: bool = False) -> dict[str, bytes]:
    """The objects that are left of a song that was decoded from the tokens OWN."""
    store = Store()
    store.away = away
    order = DecodeJob(job_id="a", tenant="local", tokens_key=OWN, first_frame=0, frames=20, last=True)
    song: Any = SimpleNamespace(
        job_id="a",
        context=SimpleNamespace(job=claimed, order=order),
        worker=SimpleNamespace(store=store),
        tokens=Tokens(OWN, CODES, META),
    )
    await _keep_tokens(song, done)
    return store.objects


async def test_the_tokens_stay_and_what_the_song_began_with_goes() -> None:
    assert (await left_of(JOB, JOB)).keys() == {OWN, SECOND, KEPT}, "the reconciler finds those that no message names"
    continued = msgspec.structs.replace(JOB, parent=Parent(job_id="b", frames=9, least_frames=10))
    assert (await left_of(continued, continued)).keys() == {OWN, SECOND}
    before = msgspec.structs.replace(JOB, tokens_key=SECOND)  # a checkpoint, which the record named at the claim
    assert (await left_of(before, JOB)).keys() == {OWN, KEPT}


async def test_what_is_kept_is_what_the_audio_was_made_of_whichever_file_the_record_names() -> None:
    """A second tokenizer changed the record while the codec decoded the tokens of the first."""
    left = await left_of(JOB, msgspec.structs.replace(JOB, tokens_key=SECOND))
    assert left.keys() == {SECOND, KEPT}
    codes, meta = unpack(left[SECOND], "a")
    assert np.array_equal(codes, CODES)
    assert meta == META


async def test_a_store_that_is_away_does_not_undo_a_completed_song(caplog: pytest.LogCaptureFixture) -> None:
    left = await left_of(JOB, msgspec.structs.replace(JOB, tokens_key=SECOND), away=True)
    assert SECOND in left
    assert "were not stored again" in caplog.text
