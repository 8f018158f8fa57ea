"""The invariants, checked after a run without a look into the services."""

import fcntl
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.gateway.submission.refused import RefusedEvent
from shared.nats.subjects import DEC, INTAKE, TOK, dead_subject
from shared.schema.event import AnyEvent, Progress, Stage
from shared.schema.job import ENDED, Job, Status
from shared.storage.keys import keys_with_renditions
from tests.chaos.observer import Observer
from tests.chaos.songs import AcceptedSong

_MODELS = {"heartmula", "heartcodec", "encoder"}  # as the ledger names them
BROKEN = ("lost", "duplicated", "early", "overlaps")  # invariants, as fields of a verdict
_END_KINDS = {"completed", "failed", "cancelled"}


@dataclass
class Verdict:
    """The verdict on a run. Every broken invariant is a line in `broken`."""

    ends: Counter[Status] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    resumed: int = 0  # times that a song went on from frames made before
    wasted_frames: int = 0  # that were made again
    without_event: int = 0  # songs that ended without an event
    recordings: int = 0  # that are ready
    later: int = 0  # songs that were accepted before their time
    refused: int = 0  # invalid requests
    left: Counter[Status] = field(default_factory=Counter)  # how songs ended whose clients left

    @property
    def broken(self) -> list[str]:
        """All lines, each of which names a broken invariant."""
        found = []
        for name in BROKEN:
            found += [f"{name}: {line}" for line in getattr(self, name)]
        return found + self.others


def judge_records(verdict: Verdict, songs: Sequence[AcceptedSong], states: Mapping[str, Sequence[Job]]) -> None:
    """Every accepted song ended once, and only poisoned ones failed."""
    for song in songs:
        history, name = states.get(song.job_id, []), f"{song.planned.name} ({song.job_id})"
        if not history:
            verdict.lost.append(f"{name} has no record")
            continue
        job = history[-1]
        if job.status not in ENDED:
            verdict.lost.append(
                f"{name} is still {job.status}: attempts {job.attempts}, failures {job.failures}, "
                f"fencing token {job.fencing_token}, tokens {job.tokens_key}, error {job.error}"
            )
            continue
        verdict.ends[job.status] += 1
        verdict.left[job.status] += song.planned.fault == "leave"
        poisoned = song.planned.fault == "poison"
        if job.status == "failed" and not poisoned:
            verdict.lost.append(f"{name} failed: {job.error}")
        if poisoned and (job.status != "failed" or not job.error):
            verdict.others.append(f"{name} is poison, but {job.status} with error {job.error}")
        if job.status == "cancelled" and song.planned.fault not in ("cancel", "leave"):
            verdict.others.append(f"{name} was cancelled without a request")
        ended = [index for index, state in enumerate(history) if state.status in ENDED]
        if ended[0] != len(history) - 1:
            changes = [state.status for state in history[ended[0] :]]
            verdict.duplicated.append(f"{name} changed after its end: {changes}")
    taken = {song.job_id for song in songs}
    titles = Counter(str(history[-1].request.title) for history in states.values())
    for history in states.values():
        job = history[-1]
        if job.job_id not in taken and job.recording is None:
            beside = " beside the one that was" if titles[str(job.request.title)] > 1 else ""
            verdict.others.append(f"{job.request.title}: {job.job_id} was never answered{beside}, it is {job.status}")


def judge_times(verdict: Verdict, songs: Sequence[AcceptedSong], states: Mapping[str, Sequence[Job]]) -> None:
    """No song was begun before its time."""
    for song in songs:
        moment, history = song.planned.request.not_before, states.get(song.job_id, [])
        if moment is None or not history:
            continue
        verdict.later += history[-1].not_before is not None
        begun = min((state.started_at for state in history if state.started_at is not None), default=math.inf)
        if (ahead := moment.timestamp() - begun) > 0:
            verdict.early.append(f"{song.planned.name} ({song.job_id}) was begun {ahead:.2f} s before its time")


def judge_refusals(
    verdict: Verdict, invalid: Sequence[AcceptedSong], refusals: Mapping[str, Sequence[RefusedEvent]]
) -> None:
    """Every invalid request from the intake was refused, for its fault, and no other one was.

    A request of which NATS has forgotten that it had it may be refused a second time, by an event of another id.
    """
    for song in invalid:
        found, name = refusals.get(song.job_id, []), f"{song.planned.name} ({song.job_id})"
        verdict.refused += bool(found)
        if not found:
            verdict.lost.append(f"{name} is invalid, but was not refused")
        if len(found) > len({event.id for event in found}):
            verdict.duplicated.append(f"{name} was refused by the same event {len(found)} times")
        verdict.others += [
            f"{name} was refused for another reason: {event.data.problem.detail}"
            for event in found
            if event.data.problem.field != "topk"
        ]
    for job_id in set(refusals) - {song.job_id for song in invalid}:
        verdict.lost.append(f"{job_id} was refused: {refusals[job_id][0].data.problem.detail}")


def judge_events(verdict: Verdict, songs: Sequence[AcceptedSong], events: Mapping[str, Sequence[AnyEvent]]) -> None:
    """Every song has one end at most. Also counts the songs that were resumed, and the frames that were made twice."""
    for song in songs:
        published = events.get(song.job_id, [])
        ends = {str(event.__struct_config__.tag) for event in published} & _END_KINDS
        if len(ends) > 1:
            verdict.duplicated.append(
                f"{song.planned.name} ({song.job_id}) was reported as {' and '.join(sorted(ends))}"
            )
        verdict.without_event += not ends
        frames = 0
        for event in published:
            now = frames
            if isinstance(event, Stage) and event.stage in ("generating", "paused"):
                now = event.frames or 0
                verdict.resumed += event.stage == "generating" and now > 0
            elif isinstance(event, Progress) and event.status == "generating":
                now = event.done
            verdict.wasted_frames += max(0, frames - now)
            frames = now


def is_work(key: str) -> bool:
    """Whether an object is needed until its song has ended: what a stream is made of while it grows."""
    return not key.startswith(("audio/", "tokens/")) or key.rpartition("/")[2].split(".")[1].isdigit()


def judge_objects(
    verdict: Verdict, songs: Sequence[AcceptedSong], states: Mapping[str, Sequence[Job]], keys: Sequence[str]
) -> None:
    """The store holds one audio object for each completed song, its renditions, its tokens, and nothing else."""
    kept: dict[str, list[str]] = {}
    for key in keys:
        if is_work(key):
            verdict.others.append(f"left in the store: {key}")
        else:
            kept.setdefault(key.split("/")[1], []).append(key)
    for song in songs:
        history, found = states.get(song.job_id, []), kept.pop(song.job_id, [])
        job = history[-1] if history else None
        if job is None or job.status != "completed" or job.audio_key is None:
            verdict.others += [f"left in the store: {key} of a song that is not completed" for key in found]
            continue
        if job.audio_key not in found:
            verdict.lost.append(
                f"{song.planned.name} ({job.job_id}) is {job.audio_key}, but there is {found or 'nothing'}"
            )
        if job.tokens_key not in found and song.planned.fault != "tokens-deleted":
            verdict.lost.append(f"{song.planned.name} ({job.job_id}) has no tokens any more ({job.tokens_key})")
        if others := sorted(set(found) - keys_with_renditions(job.audio_key) - {job.tokens_key}):
            verdict.duplicated.append(f"{song.planned.name} is {job.audio_key} and has {others}")
    for rest in kept.values():
        verdict.others += [f"left in the store: {key} of no song" for key in rest]


def judge_queues(
    verdict: Verdict,
    songs: Sequence[AcceptedSong],
    left: Mapping[str, int],
    dead_letters: Mapping[str, int],
    junk: Sequence[str],
) -> None:
    """The queues are empty, and every message that no worker could use was dead-lettered."""
    verdict.others += [f"left in a queue: {subject}" for subject in left]
    poisoned = [song.job_id for song in songs if song.planned.fault == "poison"]
    wanted = {dead_subject("tokenizer", name) for name in (*poisoned, *junk)}
    wanted |= {dead_subject(role, name) for name in junk for role in ("codec", "encoder")}
    verdict.others += [f"there is no message {subject}" for subject in sorted(wanted - set(dead_letters))]
    verdict.others += [f"there is a message {subject}" for subject in sorted(set(dead_letters) - wanted)]


def judge_devices(
    verdict: Verdict, journals: Mapping[str, Sequence[Mapping[str, Any]]], deaths: Mapping[int, float]
) -> None:
    """No two models were ever on a device at the same time. What a killed process had placed ends with its death."""
    for card, journal in journals.items():
        resident: dict[int, set[str]] = {}
        for move in journal:
            pid, label = move["pid"], move["label"]
            for dead in [known for known in resident if deaths.get(known, move["time"]) < move["time"]]:
                del resident[dead]
            if move["move"] == "remove":
                resident.get(pid, set()).discard(label)
                continue
            resident.setdefault(pid, set()).add(label)
            rivals = _MODELS - {label} if label in _MODELS else set()
            met = [(other, rival) for other, labels in resident.items() for rival in sorted(rivals & labels)]
            verdict.overlaps += [
                f"{card}: {label} of {pid} was placed beside {rival} of {other}" for other, rival in met
            ]


def judge_accounts(verdict: Verdict, folder: Path) -> None:
    """No process holds an account of the ledger any more."""
    for path in folder.glob("device/*/*.account"):
        fd = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            verdict.others.append(f"still held: {path}")
        finally:
            os.close(fd)


async def queued_messages(observer: Observer) -> Counter[str]:
    """How many messages each subject of both queues and of the intake holds."""
    return await observer.subjects(TOK) + await observer.subjects(DEC) + await observer.subjects(INTAKE)
