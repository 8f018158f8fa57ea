"""The verdict on a run: a run that broke an invariant does not pass."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from services.gateway.errors import Problem
from services.gateway.submission.refused import Refused, RefusedEvent
from shared.schema.event import Cancelled, Completed, Progress, SongEvent, Stage
from shared.schema.job import Job, Status
from shared.schema.request import GenerateRequest
from tests.chaos.listeners import difference
from tests.chaos.songs import AcceptedSong, PlannedSong
from tests.chaos.verdict import (
    Verdict,
    judge_devices,
    judge_events,
    judge_objects,
    judge_queues,
    judge_records,
    judge_refusals,
    judge_times,
)

REQUEST = GenerateRequest(lyrics="la", title="song 0", seed=1, max_duration_ms=1000)


def song(fault: str | None = None) -> AcceptedSong:
    return AcceptedSong(planned=PlannedSong(number=0, at=0, request=REQUEST, via="http", fault=fault), job_id="a")


def job(status: Status, job_id: str = "a", **more: Any) -> Job:
    return Job(job_id=job_id, tenant="local", request=REQUEST, status=status, created_at=0, **more)


def test_only_songs_that_end_once_and_without_an_error_pass() -> None:
    def judged(*states: Status, fault: str | None = None) -> Verdict:
        verdict = Verdict()
        history = [job(status, error="why") for status in states]
        judge_records(verdict, [song(fault)], {"a": history} if history else {})
        return verdict

    assert not judged("queued", "generating", "decoding", "completed").broken
    assert not judged("queued", "cancelled", fault="cancel").broken
    assert not judged("queued", "failed", fault="poison").broken
    assert judged().lost
    assert judged("queued", "decoding").lost
    assert judged("queued", "failed").lost
    assert judged("queued", "completed", "cancelled", fault="cancel").duplicated
    assert judged("queued", "completed", "completed").duplicated
    assert judged("queued", "completed", fault="poison").others
    assert judged("queued", "cancelled").others


def test_a_song_may_end_unmade_where_its_client_left_and_not_otherwise() -> None:
    verdict = Verdict()
    judge_records(verdict, [song("leave")], {"a": [job("queued"), job("cancelled")]})
    assert not verdict.broken
    assert verdict.left == {"cancelled": 1}
    judge_records(verdict, [song("leave")], {"a": [job("queued")]})
    assert verdict.lost


def test_a_song_that_is_begun_before_its_time_is_found() -> None:
    asked = msgspec.structs.replace(REQUEST, not_before=datetime.fromtimestamp(100, UTC))
    later = AcceptedSong(planned=replace(song().planned, request=asked), job_id="a")

    def judged(*states: Job) -> Verdict:
        verdict = Verdict()
        judge_times(verdict, [later], {"a": states})
        return verdict

    waiting, made = job("queued", not_before=100.0), job("completed", not_before=100.0, started_at=100.5)
    assert not judged(waiting, made).broken
    assert judged(waiting, made).later == 1
    assert not judged(waiting, job("cancelled", not_before=100.0)).broken
    assert judged(waiting, job("generating", started_at=99.5), made).early
    assert judged(job("completed", started_at=99.5)).early


def test_an_invalid_request_is_refused_and_no_other_one() -> None:
    def refused(event_id: str = "1", job_id: str = "a", field: str = "topk") -> RefusedEvent:
        problem = Problem(type="", title="", status=422, detail="why", field=field)
        data = Refused(job_id=job_id, key="k", problem=problem)
        return RefusedEvent(id=event_id, type="", subject=job_id, time="", data=data)

    def judged(*events: RefusedEvent, invalid: bool = True) -> Verdict:
        verdict = Verdict()
        judge_refusals(verdict, [song("invalid")] if invalid else [], {"a": events} if events else {})
        return verdict

    assert not judged(refused()).broken
    assert judged(refused(), refused("2")).refused == 1
    assert not judged(refused(), refused("2")).broken
    assert judged().lost
    assert judged(refused(), refused()).duplicated
    assert judged(refused(field="lyrics")).others
    assert judged(refused(), invalid=False).lost


def test_a_second_song_made_for_one_request_is_found() -> None:
    verdict = Verdict()
    judge_records(verdict, [song()], {"a": [job("completed")], "b": [job("completed", "b")]})
    assert verdict.broken == ["song 0: b was never answered beside the one that was, it is completed"]


def test_events_show_what_was_resumed_and_what_was_made_again() -> None:
    def stage(frames: int) -> SongEvent:
        return Stage(job_id="a", status="generating", progress=0, stage="generating", frames=frames)

    def progress(done: int) -> SongEvent:
        return Progress(job_id="a", status="generating", progress=0, done=done, total=50)

    def judged(*events: Any) -> Verdict:
        verdict = Verdict()
        judge_events(verdict, [song()], {"a": events})
        return verdict

    completed = Completed(
        job_id="a", status="completed", progress=100, result_url="", duration_s=4, format="wav", seed=1
    )
    verdict = judged(stage(0), progress(20), stage(15), progress(30), stage(0), progress(50), completed)
    assert (verdict.resumed, verdict.wasted_frames, verdict.without_event) == (1, 5 + 30, 0)
    assert not verdict.broken
    assert judged(stage(0)).without_event == 1
    assert judged(completed, Cancelled(job_id="a", status="cancelled", progress=0)).duplicated


def test_the_store_holds_the_audio_and_the_tokens_of_a_song_and_nothing_else() -> None:
    tokens = "tokens/a/5.safetensors"

    def judged(*keys: str, status: Status = "completed", fault: str | None = None) -> Verdict:
        verdict = Verdict()
        made = job(status, audio_key="audio/a/7.wav", tokens_key=tokens)
        judge_objects(verdict, [song(fault)], {"a": [made]}, keys)
        return verdict

    assert not judged("audio/a/7.wav", tokens).broken
    assert not judged("audio/a/7.wav", tokens, "audio/a/7.peaks.json").broken
    assert judged("audio/a/7.peaks.json", tokens).lost
    assert judged("audio/a/7.wav", tokens, "audio/a/8.peaks.json").duplicated
    assert judged(tokens).lost
    assert judged("audio/a/8.wav", tokens).lost
    assert judged("audio/a/7.wav", tokens, "audio/a/8.wav").duplicated
    assert not judged("audio/a/7.wav", tokens, "audio/a/7.flac").broken
    assert judged("audio/a/7.wav", tokens, "audio/a/8.flac").duplicated
    assert judged("audio/a/7.wav").lost
    assert not judged("audio/a/7.wav", fault="tokens-deleted").broken
    assert judged("audio/a/7.wav", tokens, "tokens/a/6.safetensors").duplicated
    assert judged("audio/a/7.wav", tokens, "tokens/b/6.safetensors").others
    for left in ("part", "state", "peaks.json"):
        assert judged("audio/a/7.wav", tokens, f"audio/a/7.2.{left}").others
    assert judged("audio/a/7.wav", tokens, "audio/b/7.wav").others
    assert judged("audio/a/7.wav", status="cancelled").others
    assert judged(tokens, status="cancelled").others


def test_what_was_heard_is_the_file_but_for_what_tells_its_length() -> None:
    audio = bytes(range(256)) * 20

    def changed(file: bytes, *places: int) -> bytes:
        return bytes(byte ^ (at in places) for at, byte in enumerate(file))

    assert difference("flac", audio, audio) == ""
    assert difference("flac", changed(audio, 0, 41), audio) == ""
    assert difference("flac", changed(audio, 42), audio) == "heard 1 other bytes of 5120, the last at 42"
    assert difference("flac", audio[:-1], audio) == "heard 5119 bytes of 5120"
    assert difference("flac", audio + b"x", audio) == "heard 5121 bytes of 5120"
    assert difference("ogg", changed(audio, 5), audio)
    mp3 = b"ID3\4\0\0\0\0\2\0" + audio  # tags of 256 bytes
    assert difference("mp3", changed(mp3, 266 + 1440), mp3) == ""
    assert difference("mp3", changed(mp3, 266 + 1441), mp3)
    wav = b"RIFF----WAVEfmt tagsdata----" + audio
    assert difference("wav", changed(wav, 4, 24, 27), wav) == ""
    assert difference("wav", changed(wav, 28), wav)


def test_the_queues_are_empty_and_only_what_no_worker_could_use_was_dead_lettered() -> None:
    verdict = Verdict()
    judge_queues(
        verdict,
        [song("poison")],
        {},
        {f"dead.{name}": 1 for name in ("tokenizer.a", "tokenizer.j", "codec.j", "encoder.j")},
        ["j"],
    )
    assert not verdict.broken
    judge_queues(verdict, [song()], {"jobs.dec.a": 1}, {"dead.codec.a": 1}, ["j"])
    assert len(verdict.broken) == 5


def test_models_on_a_device_together_are_found_and_dead_processes_hold_nothing() -> None:
    def move(time: float, pid: int, label: str, move: str = "place") -> dict[str, Any]:
        return {"time": time, "pid": pid, "label": label, "move": move}

    def overlaps(*moves: dict[str, Any], deaths: dict[int, float] | None = None) -> int:
        verdict = Verdict()
        judge_devices(verdict, {"card": moves}, deaths or {})
        return len(verdict.overlaps)

    first, second = move(1, 10, "heartmula"), move(3, 20, "heartcodec")
    assert overlaps(first, second) == 1
    assert overlaps(second, move(4, 20, "encoder")) == 1
    assert overlaps(first, move(2, 10, "heartmula", "remove"), second) == 0
    assert overlaps(first, second, deaths={10: 2.5}) == 0
    assert overlaps(first, second, deaths={10: 3.5}) == 1
    assert overlaps(first, move(2, 30, "decode"), second, move(4, 20, "heartcodec", "remove"), second) == 2
