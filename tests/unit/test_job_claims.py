"""The codec's claim on a song: what it changes in the record, and whose message the song was claimed by."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from shared.jobs.claims import Claim, claim_of, with_claim
from shared.nats.subjects import decode_lane, decode_subject
from shared.schema.job import AudioPart, Decode, Job, Status
from shared.schema.request import GenerateRequest
from shared.worker.job_context import JobContext

KEY = "tokens/song/4.safetensors"
SONG = Job(
    job_id="song",
    tenant="local",
    request=GenerateRequest(lyrics="la"),
    created_at=1.0,
    status="generating",
    fencing_token=4,
    saved_frames=400,
    tokens_key=KEY,
)


@pytest.mark.parametrize("status", ["generating", "decoding"])
def test_each_stage_has_a_claim_of_its_own(status: Status) -> None:
    song = msgspec.structs.replace(SONG, status=status, attempts=2, failures=1)
    parts = (AudioPart(key="audio/song/9.0.part", size=9, samples=2),)
    both = with_claim(song, "codec", claim={"fencing_token": 9, "attempts": 3, "parts": parts})
    assert claim_of(both, "tokenizer") == Claim(fencing_token=4, attempts=2, failures=1)
    assert claim_of(both, "codec") == Claim(fencing_token=9, attempts=3, failures=0)
    other = with_claim(both, "tokenizer", claim={"fencing_token": 11, "attempts": 0}, error="once")
    assert claim_of(other, "tokenizer") == Claim(fencing_token=11, attempts=0, failures=1)
    assert (other.decode, other.error) == (both.decode, "once")
    assert claim_of(song, "codec") == Claim(fencing_token=None, attempts=0, failures=0)


def superseded(role: str, subject: str, decode: Decode | None) -> bool:
    context: Any = SimpleNamespace(role=role, message=SimpleNamespace(subject=subject))
    return JobContext.superseded(context, msgspec.structs.replace(SONG, decode=decode))


def test_a_message_in_the_other_lane_supersedes_ours_and_the_same_one_does_not() -> None:
    normal, live = decode_subject("song"), decode_subject("song", "high")
    assert [decode_lane(subject) for subject in (normal, live)] == ["normal", "high"]
    assert superseded("codec", normal, Decode(lane="high"))
    assert superseded("codec", live, Decode(lane="normal"))
    assert not superseded("codec", normal, Decode(lane="normal"))
    assert not superseded("codec", live, Decode(lane="high"))
    assert not superseded("codec", live, Decode(lane=None)), "a version claimed it that does not say by what"
    assert not superseded("codec", live, None)
    assert not superseded("tokenizer", "jobs.tok.normal.song", Decode(lane="high"))
