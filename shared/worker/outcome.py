"""Outcomes of errors: the consequences for the song that met one, for its turn, and for the worker."""

from dataclasses import dataclass, replace
from enum import Enum, auto

from shared.errors import (
    DeviceBroken,
    DeviceFull,
    JobConflict,
    LeaseLost,
    NotFound,
    ObjectError,
    SongError,
    TokensLost,
    Unavailable,
    WrongSequence,
)
from shared.schema.worker import Role
from shared.worker.metrics import AttemptResult
from shared.worker.signals import JobStopped, Paused

MAX_FAILURES = 3  # errors that a song may raise before it fails

MOST_WAITS = 30  # attempts at which a song misses the same few bytes; then it has waited for half an hour
_DELAYS = (2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before the next of them; the last one again and again

_ADVICE: dict[Role, str] = {
    "tokenizer": (
        "a shorter song (max_duration_ms), cfg_scale 1, HEARTMULA_INT8=all or a smaller HEARTMULA_MODEL_DTYPE "
        "needs less"
    ),
    "codec": "a smaller HEARTMULA_MODEL_DTYPE needs less",  # whatever the song: it is decoded window by window
    "encoder": "it is float32 whatever the settings say, a device with more memory holds it",
}
_ADVICE_WHERE_MODELS_STAY = ", HEARTMULA_SEQUENTIAL_OFFLOAD=true leaves more"


def advice(role: Role, *, stays: bool) -> str:
    """What to change where a song does not fit a device. `stays`: models stay on it."""
    return f"{_ADVICE[role]}{_ADVICE_WHERE_MODELS_STAY if stays else ''}"


class Settlement(Enum):
    """What happens to a song's message and record."""

    CLEAR_AWAY = auto()  # nothing is left to do: a cancelled song's objects are deleted, the message acknowledged
    GIVE_BACK = auto()  # back into the queue
    REMAKE_TOKENS = auto()  # back into the queue for tokens
    RETRY = auto()  # the error is counted in the record, the message comes again
    FAIL = auto()  # the record says why, the message becomes a dead letter


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The consequences of an error that ended the work on a song."""

    settlement: Settlement
    result: AttemptResult  # as counted for Prometheus once the settlement succeeded
    reason: str  # why, for the record and the log
    delay: float = 0.0  # seconds before the message comes again
    failures: int | None = None  # the song's errors, this one included; None where it is not counted
    attempt_counts: bool = False  # a song that is given back keeps the attempt in its record
    ends_turn: bool = False  # no further song is begun, and the turn ends with this error
    breaks_device: bool = False  # this process can use the device no longer and has to end
    doubts_store: bool = False  # the object store has to prove that it takes writes before the next turn
    problem: str | None = None  # published with the heartbeat


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of the device when a song did not fit, in bytes."""

    needed: int  # by the weights and the song
    share: int  # what this worker may ever use: without contexts, work memory, and the model of a worker that stays
    taken: int  # of that, what others use now, and may stop to use
    miscount: int  # less than this may be ours, miscounted
    waits: int  # attempts at the song before this one that found as much taken
    stays: bool  # this worker's model stays on the device, and the other one's


_GIVEN_BACK = Outcome(settlement=Settlement.GIVE_BACK, result="handed_back", reason="")


def classify(error: Exception, *, role: Role, failures: int, memory: DeviceMemory | None = None) -> Outcome:
    """Decide what an error means. `failures` is the number of errors that the song's record counts so far.

    `memory` is the device's memory, needed for a `DeviceFull`. An error of an unknown kind is counted against the song.
    """
    reason = str(error)
    match error:
        case JobStopped() | JobConflict():
            return Outcome(settlement=Settlement.CLEAR_AWAY, result="stopped", reason=reason)
        case Paused() | LeaseLost():
            return replace(_GIVEN_BACK, reason=reason)
        case DeviceBroken():
            return replace(_GIVEN_BACK, reason=reason, attempt_counts=True, breaks_device=True)
        # A server that does not answer, or that refused with an error that no caller expected.
        case Unavailable() | NotFound() | WrongSequence() | TimeoutError():
            away = isinstance(error, Unavailable) and error.service == "s3"
            return replace(_GIVEN_BACK, reason=reason, delay=2, ends_turn=True, doubts_store=away)
        case DeviceFull():
            assert memory is not None
            return _does_not_fit(reason, role, failures, memory)
        case OSError():  # a full disk, for which the song is not to blame
            return replace(
                _GIVEN_BACK, reason=reason, delay=5, ends_turn=True, problem=f"this worker cannot write: {reason}"
            )
        case TokensLost():
            return Outcome(settlement=Settlement.REMAKE_TOKENS, result="handed_back", reason=reason)
        case SongError():
            return Outcome(settlement=Settlement.FAIL, result="failed", reason=reason)
        case ObjectError():
            return _counted(reason, failures)
        case _:
            return _counted(f"the {role} worker failed: {reason or 'its log says how'}", failures)


def _does_not_fit(reason: str, role: Role, failures: int, memory: DeviceMemory) -> Outcome:
    """Outcome for a song that does not fit: memory that others use becomes free again, missing memory never does.

    A little of what others use may be ours, miscounted; so a song does not wait for ever while that does not change.
    """
    advised = f"{reason}; {advice(role, stays=memory.stays)}"
    if memory.needed > memory.share:
        return Outcome(settlement=Settlement.FAIL, result="failed", reason=advised)
    if memory.needed <= memory.share - memory.taken:
        return _counted(advised, failures)
    if memory.waits >= MOST_WAITS and memory.taken < memory.miscount:
        held = f"others have held {memory.taken / 2**20:.0f} MB of the device through {MOST_WAITS} attempts"
        return Outcome(settlement=Settlement.FAIL, result="failed", reason=f"{advised}; {held}: end them")
    return replace(
        _GIVEN_BACK,
        reason=reason,
        delay=_DELAYS[min(memory.waits, len(_DELAYS) - 1)],
        ends_turn=True,
        problem=f"waiting for memory on the device: {reason}",
    )


def _counted(reason: str, failures: int) -> Outcome:
    failures += 1
    if failures >= MAX_FAILURES:
        return Outcome(settlement=Settlement.FAIL, result="failed", reason=reason, failures=failures)
    return Outcome(
        settlement=Settlement.RETRY,
        result="tried_again",
        reason=reason,
        failures=failures,
        delay=2.0 ** (failures - 1),
    )
