"""Outcomes of errors for a song, its turn and the worker: one case for each error, those of libraries included."""

import errno
import inspect
from dataclasses import replace
from typing import Any

import pytest

from shared import errors
from shared.errors import (
    ConfigError,
    DeviceBroken,
    DeviceFull,
    HeartMulaError,
    InvalidRequest,
    JobConflict,
    LeaseLost,
    NewerRecord,
    NotFound,
    ObjectError,
    PhaseError,
    QueueFull,
    RecordingRefused,
    SongError,
    TokensLost,
    Unavailable,
    Unreadable,
    WrongSequence,
)
from shared.schema.worker import Role
from shared.worker.outcome import MAX_FAILURES, MOST_WAITS, DeviceMemory, Outcome, Settlement, classify
from shared.worker.signals import JobStopped, Paused, Signal

MB = 2**20
MEMORY = DeviceMemory(needed=50 * MB, share=60 * MB, taken=0, miscount=20 * MB, waits=0, stays=False)
ADVICE = "; a smaller HEARTMULA_MODEL_DTYPE needs less"


def stopped(reason: str) -> Outcome:
    return Outcome(settlement=Settlement.CLEAR_AWAY, result="stopped", reason=reason)


def given_back(reason: str, **more: Any) -> Outcome:
    return Outcome(settlement=Settlement.GIVE_BACK, result="handed_back", reason=reason, **more)


def away(reason: str, **more: Any) -> Outcome:
    return given_back(reason, delay=2, ends_turn=True, **more)


def counted(reason: str) -> Outcome:
    return Outcome(settlement=Settlement.RETRY, result="tried_again", reason=reason, failures=1, delay=1)


def our_fault(reason: str) -> Outcome:
    return counted(f"the codec worker failed: {reason}")


def failed(reason: str) -> Outcome:
    return Outcome(settlement=Settlement.FAIL, result="failed", reason=reason)


UNAVAILABLE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Unavailable)]
CASES: list[tuple[Exception, Outcome]] = [
    # Signals
    (JobStopped("cancelled"), stopped("cancelled")),
    (Paused("another worker's turn"), given_back("another worker's turn")),
    # shared.errors
    (HeartMulaError("x"), our_fault("x")),
    (ConfigError("x"), our_fault("x")),
    (InvalidRequest("tags", "x"), our_fault("tags: x")),
    (RecordingRefused("damaged", "x"), our_fault("x")),  # no worker reads uploads
    (QueueFull("x"), our_fault("x")),
    *((kind("nats", "x"), away("x")) for kind in UNAVAILABLE),
    *((kind("s3", "x"), away("x", doubts_store=True)) for kind in UNAVAILABLE),
    (NotFound("x"), away("x")),
    (WrongSequence("x"), away("x")),
    (JobConflict("x"), stopped("x")),
    (NewerRecord("x"), stopped("x")),
    (Unreadable("x"), our_fault("x")),
    (ObjectError("x"), counted("x")),
    (TokensLost("x"), Outcome(settlement=Settlement.REMAKE_TOKENS, result="handed_back", reason="x")),
    (DeviceFull("x"), counted("x" + ADVICE)),
    (DeviceBroken("x"), given_back("x", attempt_counts=True, breaks_device=True)),
    (PhaseError("x"), our_fault("x")),
    (LeaseLost("x"), given_back("x")),
    (SongError("x"), failed("x")),
    # Errors of Python and of other libraries
    (TimeoutError(), away("")),
    (
        OSError(errno.ENOSPC, "No space left on device"),
        given_back(
            "[Errno 28] No space left on device",
            delay=5,
            ends_turn=True,
            problem="this worker cannot write: [Errno 28] No space left on device",
        ),
    ),
    (
        ConnectionResetError("x"),
        given_back("x", delay=5, ends_turn=True, problem="this worker cannot write: x"),
    ),
    (RuntimeError("x"), our_fault("x")),
    (RuntimeError(), our_fault("its log says how")),
    (ValueError("x"), our_fault("x")),
]


@pytest.mark.parametrize(("error", "outcome"), CASES, ids=[repr(error) for error, _ in CASES])
def test_each_error_has_its_outcome(error: Exception, outcome: Outcome) -> None:
    assert classify(error, role="codec", failures=0, memory=MEMORY) == outcome


def test_no_error_and_no_signal_is_left_out() -> None:
    tried = {type(error) for error, _ in CASES}
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    assert kinds | set(Signal.__subclasses__()) <= tried


def test_signals_are_no_errors() -> None:
    signals: list[type[Signal]] = [Signal, *Signal.__subclasses__()]
    assert not any(issubclass(kind, HeartMulaError) for kind in signals)


def test_a_song_fails_with_its_last_failure_and_waits_longer_after_each_before() -> None:
    outcomes = [classify(ValueError("x"), role="tokenizer", failures=before) for before in range(MAX_FAILURES)]
    assert [outcome.failures for outcome in outcomes] == [1, 2, 3]
    assert [outcome.settlement for outcome in outcomes] == [Settlement.RETRY, Settlement.RETRY, Settlement.FAIL]
    assert [outcome.delay for outcome in outcomes[:-1]] == [1, 2]
    assert [outcome.result for outcome in outcomes] == ["tried_again", "tried_again", "failed"]
    assert {outcome.reason for outcome in outcomes} == {"the tokenizer worker failed: x"}


@pytest.mark.parametrize(("taken", "needed"), [(11, 50), (1, 60), (60, 1), (100, 50)])
def test_memory_that_others_use_is_waited_for(taken: int, needed: int) -> None:
    memory = replace(MEMORY, needed=needed * MB, taken=taken * MB)
    assert classify(DeviceFull("x"), role="codec", failures=2, memory=memory) == away(
        "x", problem="waiting for memory on the device: x"
    )


def test_a_song_waits_longer_each_time_and_not_for_ever_while_as_much_is_taken() -> None:
    memory = replace(MEMORY, taken=11 * MB)
    outcomes = [
        classify(DeviceFull("x"), role="codec", failures=0, memory=replace(memory, waits=waits))
        for waits in range(MOST_WAITS + 1)
    ]
    assert [outcome.delay for outcome in outcomes[:7]] == [2, 4, 8, 16, 32, 60, 60]
    assert {outcome.settlement for outcome in outcomes[:-1]} == {Settlement.GIVE_BACK}
    assert outcomes[-1] == failed(
        f"x{ADVICE}; others have held 11 MB of the device through {MOST_WAITS} attempts: end them"
    )


def test_a_song_waits_without_end_for_memory_that_can_only_be_others() -> None:
    memory = replace(MEMORY, taken=20 * MB)
    for waits in (MOST_WAITS, 100_000):
        outcome = classify(DeviceFull("x"), role="codec", failures=0, memory=replace(memory, waits=waits))
        assert (outcome.settlement, outcome.delay) == (Settlement.GIVE_BACK, 60)


@pytest.mark.parametrize("role", ["tokenizer", "codec"])
@pytest.mark.parametrize("stays", [False, True])
def test_what_is_advised_helps(role: Role, stays: bool) -> None:
    memory = replace(MEMORY, needed=MEMORY.share + 1, stays=stays)
    advice = classify(DeviceFull("x"), role=role, failures=0, memory=memory).reason
    assert "HEARTMULA_MODEL_DTYPE" in advice
    assert ("HEARTMULA_SEQUENTIAL_OFFLOAD=true leaves more" in advice) is stays, "they take turns already"
    for change in ("shorter song", "cfg_scale", "HEARTMULA_INT8"):
        assert (change in advice) is (role == "tokenizer"), "the codec needs as much for every song"


@pytest.mark.parametrize("taken", [0, 30 * MB])
def test_memory_that_the_device_does_not_have_is_not_waited_for(taken: int) -> None:
    memory = replace(MEMORY, needed=MEMORY.share + 1, taken=taken)
    assert classify(DeviceFull("x"), role="codec", failures=0, memory=memory) == failed("x" + ADVICE)


@pytest.mark.parametrize("taken", [0, 10 * MB])
def test_a_song_that_finds_no_memory_though_others_leave_enough_is_blamed_at_last(taken: int) -> None:
    outcome = classify(DeviceFull("x"), role="codec", failures=2, memory=replace(MEMORY, taken=taken))
    assert outcome == replace(failed("x" + ADVICE), failures=3)
