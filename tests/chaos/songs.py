"""The songs of a run, and the client that submits them until they are accepted."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, get_args

import httpx
import msgspec
import nats
from nats.aio.client import Client as NatsClient

from shared.nats.subjects import TENANT, intake_subject, submit_subject
from shared.schema.job import Status
from shared.schema.request import AudioFormat, GenerateRequest
from tests.chaos.poisoned import POISON_SEED

SONG_FAULTS = ("cancel", "tokens-deleted", "tokens-corrupted", "duplicate-submission", "duplicate-job")
_LISTENED: dict[AudioFormat, int] = {"flac": 7, "wav": 1, "mp3": 1, "ogg": 1}  # how often listeners ask for what
_TROUBLED = 0.35  # of the songs have a fault of their own
_BY_NATS = 0.2
_AGAIN_SECONDS = 0.3  # before what was not answered is tried again
_STAGES: tuple[Status, ...] = ("queued", "generating", "decoding")


@dataclass(frozen=True, kw_only=True)
class PlannedListener:
    """Somebody who will listen to a song."""

    format: AudioFormat
    delay: float  # seconds after the song was accepted
    hangs_up: int  # bytes after which it hangs up, each time, and comes back; 0: never


@dataclass(frozen=True, kw_only=True)
class PlannedOrigin:
    """What a song will go on from."""

    kind: Literal["song", "recording"]
    number: int  # of the song or recording
    share: float  # of it that is kept


@dataclass(frozen=True, kw_only=True)
class PlannedSong:
    """A song that will be submitted, and the fault that will happen to it."""

    number: int
    at: float  # seconds after the begin
    request: GenerateRequest
    via: Literal["http", "nats", "intake", "speech"]
    fault: str | None = None
    stage: Status = "queued"  # in which the fault hits it
    delay: float = 0  # seconds after it was seen in that stage
    key: str = ""  # its idempotency key
    wait: float = 0  # seconds after its request before which it is not to be begun
    listeners: tuple[PlannedListener, ...] = ()
    origin: PlannedOrigin | None = None

    @property
    def name(self) -> str:
        """The name of the song in messages."""
        return f"song {self.number}"


@dataclass(frozen=True, kw_only=True)
class AcceptedSong:
    """A song that the gateway has accepted."""

    planned: PlannedSong
    job_id: str


def plan_songs(
    random: Random, count: int, seconds: float, length: tuple[float, float], burst: int, poison: int
) -> list[PlannedSong]:
    """Plan `count` songs in `seconds`, `burst` of them at once, `poison` of them impossible."""
    moments = sorted(random.uniform(0, seconds * 0.95) for _ in range(count))
    first = random.randrange(count // 4, max(count // 4 + 1, count // 2))
    moments[first : first + burst] = [moments[first]] * len(moments[first : first + burst])
    poisoned = set(random.sample(range(count), poison))
    # Each kind once before any kind twice.
    faults = [*SONG_FAULTS, *random.choices(SONG_FAULTS, k=max(0, round(_TROUBLED * count) - len(SONG_FAULTS)))]
    troubled = dict(zip(random.sample(sorted(set(range(count)) - poisoned), len(faults)), faults, strict=True))
    planned_songs = []
    for number, at in enumerate(sorted(moments)):
        request = GenerateRequest(
            lyrics=f"[Verse]\nla la la {number}",
            tags="pop,piano",
            max_duration_ms=round(random.uniform(*length) * 1000),
            seed=POISON_SEED if number in poisoned else 1000 + number,
            format=random.choice(get_args(AudioFormat)),
            priority="high" if random.random() < 0.25 else "normal",
            title=f"song {number}",
        )
        planned_songs.append(
            PlannedSong(
                number=number,
                at=at,
                request=request,
                via="nats" if random.random() < _BY_NATS else "http",
                fault="poison" if number in poisoned else troubled.get(number),
                stage=random.choice(_STAGES),
                delay=random.choice((0, random.uniform(0, 1))),
                key=f"key-{number}-{random.getrandbits(64):x}",
            )
        )
    return planned_songs


def plan_listeners(random: Random, songs: Sequence[PlannedSong], share: float) -> list[PlannedSong]:
    """Give a share of the songs listeners: one, or two at once, from the beginning or later."""

    def listener() -> PlannedListener:
        (wanted,) = random.choices(list(_LISTENED), list(_LISTENED.values()))
        return PlannedListener(
            format=wanted,
            delay=random.choice((0, random.uniform(0, 6))),
            hangs_up=random.choice((0, random.randint(1_000, 20_000))),
        )

    found = []
    for song in songs:
        count = random.choice((1, 1, 1, 2)) if random.random() < share else 0
        found.append(replace(song, listeners=tuple(listener() for _ in range(count))))
    return found


class Client:
    """Submits songs to gateways. A request without an answer is repeated with its key, over HTTP at another gateway."""

    def __init__(self, urls: Sequence[str], nc: NatsClient, log: Callable[[str], None]) -> None:
        self.faults: Counter[str] = Counter()
        self._urls, self._nc, self._log = list(urls), nc, log
        self._refused: set[int] = set()  # songs that found the queue full
        self._unheard: set[int] = set()  # songs of which an acknowledgement was lost on its way
        # Connections are not kept: a gateway that is killed must not be remembered.
        self._http = httpx.AsyncClient(timeout=8, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, planned: PlannedSong) -> str:
        """Submit a song until it is accepted; returns its id."""
        attempt = planned.number
        while True:
            attempt += 1
            pause, job_id = await (
                self._over_http(planned, attempt) if planned.via == "http" else self._over_nats(planned)
            )
            if job_id:
                return job_id
            await asyncio.sleep(pause)

    async def request(self, method: str, path: str, attempt: int = 0) -> httpx.Response:
        """Send a request to one gateway after the other until one answers."""
        while True:
            attempt += 1
            try:
                answer = await self._http.request(method, self._url(attempt) + path)
                if answer.status_code != 503:
                    return answer
            except httpx.TransportError:
                pass
            await asyncio.sleep(_AGAIN_SECONDS)

    def _url(self, attempt: int) -> str:
        return self._urls[attempt % len(self._urls)]

    async def _over_http(self, planned: PlannedSong, attempt: int) -> tuple[float, str]:
        """Submit a song once; returns the seconds to wait before the next attempt, and the id, or "" without one."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": planned.key}
        try:
            body = msgspec.json.encode(planned.request)
            answer = await self._http.post(f"{self._url(attempt)}/generate", content=body, headers=headers)
        except httpx.TransportError:
            return _AGAIN_SECONDS, ""
        if answer.status_code in (200, 202):
            return 0, str(answer.json()["job_id"])
        if answer.status_code == 429:
            return self._full(planned, float(answer.headers["Retry-After"])), ""
        if answer.status_code != 503:
            raise RuntimeError(f"{planned.name} was refused: {answer.status_code} {answer.text}")
        return _AGAIN_SECONDS, ""

    async def _over_nats(self, planned: PlannedSong) -> tuple[float, str]:
        headers, intake = {"Nats-Msg-Id": planned.key}, planned.via == "intake"
        subject, body = (intake_subject if intake else submit_subject)(TENANT), msgspec.json.encode(planned.request)
        try:
            if intake and planned.number % 2 and planned.number not in self._unheard:
                await self._nc.publish(subject, body, self._nc.new_inbox(), headers)
                self._unheard.add(planned.number)
                self.faults["ack-lost"] += 1
            message = await self._nc.request(subject, body, timeout=5, headers=headers)
        except (nats.errors.Error, TimeoutError, OSError):
            return _AGAIN_SECONDS, ""
        answer: dict[str, Any] = json.loads(message.data)
        code = answer["error"]["code"] if "error" in answer else 202
        if code == 429:
            return self._full(planned, 5), ""
        if code not in (202, 503):
            raise RuntimeError(f"{planned.name} was refused: {answer}")
        return _AGAIN_SECONDS, str(answer.get("job_id", ""))

    def _full(self, planned: PlannedSong, pause: float) -> float:
        self.faults["queue-full"] += 1
        if planned.number not in self._refused:
            self._log(f"queue-full: {planned.name} waits {pause:g} s")
            self._refused.add(planned.number)
        return pause
