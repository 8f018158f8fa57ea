"""Estimates of when songs will be ready."""

import pytest

from services.gateway.songs.eta import Pace, moved, pace
from shared.jobs.events import end_event
from shared.schema.event import Progress
from shared.schema.job import Job, Status
from shared.schema.request import GenerateRequest
from shared.schema.worker import GpuFigures, Role, WorkerStatus

PACE = Pace(tokens=10, audio=100, song_frames=200)


def worker(role: Role, rate: float | None, song_frames: float | None = None) -> WorkerStatus:
    return WorkerStatus(
        role=role,
        instance="i",
        host="h",
        pid=1,
        engine="native",
        model="m",
        gpu=GpuFigures(id="g", name="g", kind="cpu", memory_total=1, memory_used=0),
        state="idle",
        rate=rate,
        song_frames=song_frames,
        since=0,
        sent=0,
    )


def progress(done: int, total: int, rate: float | None = None) -> Progress:
    return Progress(job_id="j", status="generating", progress=0, done=done, total=total, rate=rate)


def test_workers_of_a_role_add_up() -> None:
    tokenizers = [worker("tokenizer", 10, 100), worker("tokenizer", 5, 300), worker("tokenizer", None)]
    assert pace([*tokenizers, worker("codec", 80)]) == Pace(tokens=15, audio=80, song_frames=200)


@pytest.mark.parametrize("rate", [None, 0, -1])
def test_a_rate_that_was_not_measured_is_none(rate: float | None) -> None:
    assert pace([worker("tokenizer", rate, rate), worker("codec", rate)]) == Pace(None, None, None)
    assert pace([]) == Pace(None, None, None)


def test_a_waiting_song_needs_those_before_it_and_itself() -> None:
    assert PACE.waiting(0, 50) == pytest.approx(50 / 10 + 50 / 100)
    assert PACE.waiting(3, 50) == pytest.approx(650 / 10 + 650 / 100)


def test_tokens_that_a_song_takes_over_need_not_be_made() -> None:
    assert PACE.waiting(0, 50, kept=40) == pytest.approx(10 / 10 + 50 / 100)
    assert PACE.waiting(3, 50, kept=40) == pytest.approx(610 / 10 + 650 / 100)
    others_keep_150 = pace([worker("tokenizer", 10, 50), worker("codec", 100, 200)])
    assert others_keep_150.waiting(3, 50) == pytest.approx(200 / 10 + 650 / 100)


def test_a_waiting_song_has_no_estimate_without_rates() -> None:
    assert Pace(None, 100, 200).waiting(0, 50) is None
    assert Pace(10, None, 200).waiting(0, 50) is None
    assert Pace(10, 100, None).waiting(1, 50) is None
    assert Pace(10, 100, None).waiting(0, 50) is not None  # no song is before it


def test_a_song_that_is_written_needs_the_rest_at_its_own_rate_then_its_audio() -> None:
    assert PACE.generating(progress(40, 100, rate=5)) == pytest.approx(60 / 5 + 100 / 100)
    assert PACE.generating(progress(100, 100, rate=5)) == pytest.approx(1)
    assert PACE.generating(progress(40, 100)) is None
    assert PACE.generating(progress(0, 100, rate=0)) is None
    assert Pace(10, None, 200).generating(progress(40, 100, rate=5)) is None


def test_a_song_that_is_decoded_needs_what_is_left_of_it() -> None:
    assert PACE.decoding(progress(3, 4), 200) == pytest.approx(0.5)
    assert PACE.decoding(progress(0, 0), 200) == pytest.approx(2)
    assert PACE.decoding(progress(5, 4), 200) == 0
    assert PACE.decoding(None, 200) == pytest.approx(2)
    assert Pace(10, None, 200).decoding(None, 200) is None


def test_what_was_decoded_before_the_last_token_needs_no_further_time() -> None:
    assert PACE.generating(progress(40, 100, rate=5), 80) == pytest.approx(60 / 5 + 20 / 100)
    assert PACE.generating(progress(40, 100, rate=5), 120) == pytest.approx(60 / 5)
    assert PACE.decoding(None, 200, 150) == pytest.approx(0.5)
    assert PACE.decoding(progress(1, 4), 200, 150) == pytest.approx(0.5)
    assert PACE.decoding(progress(7, 8), 200, 150) == pytest.approx(0.25)
    assert PACE.decoding(None, 200, 250) == 0


def test_only_a_time_that_moved_noticeably_is_sent_again() -> None:
    assert not moved(None, None, 0)
    assert moved(None, 10, 0)
    assert moved(10, None, 0)
    assert not moved(100, 109, 0)
    assert moved(100, 111, 0)
    assert moved(100, 89, 0)
    assert not moved(10, 14, 0)  # a few seconds are no news
    assert moved(10, 16, 0)
    assert moved(10, 16, 20)  # it should have been ready


@pytest.mark.parametrize(("status", "progress"), [("completed", 100), ("failed", 30), ("cancelled", 30)])
def test_the_event_of_an_end_is_made_from_the_record(status: Status, progress: float) -> None:
    request = GenerateRequest(lyrics="la", seed=3, format="mp3")
    job = Job(job_id="j", tenant="local", request=request, created_at=0, status=status, duration_s=4, error="no")
    event = end_event(job, 30)
    assert (event.job_id, event.status, event.progress) == ("j", status, progress)
    if event.status == "completed":
        assert (event.result_url, event.duration_s, event.format, event.seed) == ("/generate/j/result", 4, "mp3", 3)  # type: ignore[union-attr]
    if event.status == "failed":
        assert event.error == "no"  # type: ignore[union-attr]
