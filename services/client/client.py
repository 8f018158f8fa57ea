"""The client: one method a route. What was lost on the way is asked for again."""

import asyncio
import ipaddress
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec
import websockets

from services.client.download import fetch
from services.client.errors import ServiceFault, UnexpectedAnswer, Unreachable, cause, problem
from services.client.responses import Accepted, Devices, Event, Health, Song, Songs, read_frame, snapshot_of
from shared.schema.job import Status
from shared.schema.request import AudioFormat, Priority

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8000"

_PAUSES = (0.3, 0.6, 1.2)  # seconds before each further try
_AWAY = (502, 503, 504)  # the service, or what it needs, may be back soon
_LONGEST_PAUSE = 30.0
_WATCH_PAUSE = 1.0
_WATCH_PATIENCE = 60.0  # seconds for which a watched service may be away
_NO_EVENTS = (OSError, TimeoutError, websockets.WebSocketException, msgspec.MsgspecError, UnicodeDecodeError)

T = TypeVar("T")


class Client:
    """A connection to the service at `url`, to be used in ``async with``.

    Every method raises a `ClientError`: `Unreachable`, `UnexpectedAnswer`, `Refused` or `ServiceFault`. Lost
    connections and answers 502, 503 and 504 are tried three times more first, after the time that the service asks for.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None) -> None:
        """`key` is the API key, where the service needs one. Raises `ValueError` for a URL or a key that is none."""
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise ValueError("the API key must be visible ASCII characters")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        self.url = url.rstrip("/")
        # A proxy from the environment cannot reach this machine's own address.
        self._by_proxy = not _is_loopback(parts.hostname)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=httpx.Timeout(30, connect=5), trust_env=self._by_proxy
        )

    async def __aenter__(self) -> Self:
        """Nothing is sent yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self,
        lyrics: str,
        tags: str = "",
        *,
        max_duration_ms: int | None = None,
        temperature: float | None = None,
        cfg_scale: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        format: AudioFormat | None = None,  # noqa: A002, the service's name
        title: str | None = None,
        priority: Priority | None = None,
        variants: int | None = None,
        webhook_url: str | None = None,
        key: str | None = None,
    ) -> Accepted:
        """Ask for a song. What is None is left to the service.

        `key` is the Idempotency-Key: the same request under the same key is the same song. Without one a new key is
        made, so that a request that is sent again because its answer was lost makes no second song.
        """
        wanted = {
            "lyrics": lyrics,
            "tags": tags,
            "max_duration_ms": max_duration_ms,
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "topk": topk,
            "seed": seed,
            "format": format,
            "title": title,
            "priority": priority,
            "variants": variants,
            "webhook_url": webhook_url,
        }
        body = msgspec.json.encode({name: value for name, value in wanted.items() if value is not None})
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or str(uuid.uuid4())}
        return _read(await self._send("POST", "/generate", content=body, headers=headers), Accepted)

    async def status(self, job_id: str) -> Song:
        """How a song is coming along."""
        return _read(await self._send("GET", f"{_path(job_id)}/status"), Song)

    async def songs(self, limit: int | None = None, cursor: str | None = None, status: Status | None = None) -> Songs:
        """A page of the list of songs, all or those in one state; `cursor` is the `next` of the page before."""
        wanted = {"limit": limit, "cursor": cursor, "status": status}
        params = {name: value for name, value in wanted.items() if value is not None}
        return _read(await self._send("GET", "/generate", params=params), Songs)

    async def cancel(self, job_id: str) -> str:
        """Cancel a song, waiting or running; returns its status."""
        answer = _read(await self._send("DELETE", _path(job_id)), dict[str, Any])
        return str(answer.get("status", "cancelled"))

    async def forget(self, job_id: str) -> None:
        """Remove a song that has ended, its audio with it."""
        await self._send("DELETE", _path(job_id), params={"forget": "true"})

    async def gpus(self) -> Devices:
        """Every device and the workers on it."""
        return _read(await self._send("GET", "/api/gpu"), Devices)

    async def health(self) -> Health:
        """Whether songs can be taken and made. A service that cannot says so and raises nothing."""
        return _read(await self._send("GET", "/health", fine=503), Health)

    async def download(
        self,
        job_id: str,
        path: Path | None = None,
        *,
        format: AudioFormat | None = None,  # noqa: A002, the service's name
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Save a finished song, in another `format` if one is given; returns the file.

        See `fetch` for what `path` may be, and for what is resumed.
        """
        url = f"{_path(job_id)}/result" + (f"?format={format}" if format else "")
        return await fetch(self._http, url, job_id, path, on_progress, _PAUSES)

    async def watch(self, job_id: str) -> AsyncGenerator[Event, None]:
        """Everything that happens to a song: its state, then each event once, up to its end.

        After a lost connection it goes on where it was. Where no websocket comes through, the state is asked for once
        a second instead.
        """
        known: Event | None = None  # the latest that was told
        seen: str | None = None  # id of the latest event of the stream
        answered: float | None = None  # when the service last did, monotonic
        while True:
            state: Event | None = None
            try:
                async with websockets.connect(
                    self._socket_url(job_id, seen),
                    additional_headers=self._headers,
                    proxy=True if self._by_proxy else None,
                    max_size=None,
                ) as socket:
                    async for frame in socket:
                        event, answered = read_frame(frame), time.monotonic()
                        if event.kind == "snapshot":
                            state = event
                            if seen is not None:  # what was missed follows
                                continue
                        seen, known = event.id, event
                        yield event
                        if event.ended:
                            return
            except _NO_EVENTS as error:
                log.debug("%s: no live events: %r", job_id, error)
            if state is None:
                try:
                    state = snapshot_of(await self.status(job_id))
                    answered = time.monotonic()
                except (Unreachable, ServiceFault):
                    if answered is None or time.monotonic() - answered > _WATCH_PATIENCE:
                        raise
                else:
                    if not state.ended and not _same(state, known):
                        known = state
                        yield state
            if state is not None and state.ended:  # and no event told it
                yield state
                return
            await asyncio.sleep(_WATCH_PAUSE)

    def _socket_url(self, job_id: str, after: str | None) -> str:
        url = f"ws{self.url.removeprefix('http')}{_path(job_id)}/events"
        return url if after is None else f"{url}?after={quote(after, safe='')}"

    async def _send(self, method: str, path: str, *, fine: int | None = None, **what: Any) -> httpx.Response:
        """Send a request, again where its answer was lost: every one of them may be repeated."""
        for pause in (*_PAUSES, None):
            try:
                answer = await self._http.request(method, path, **what)
                if answer.status_code < 400 or answer.status_code == fine:
                    return answer
                failure = problem(answer)
                if pause is None or answer.status_code not in _AWAY:
                    raise failure
            except httpx.TransportError as error:
                failure = Unreachable(f"no answer from {self.url}: {cause(error)}")
                if pause is None:
                    raise failure from error
            pause = min(max(pause, failure.retry_after or 0), _LONGEST_PAUSE)
            log.log(logging.WARNING if pause >= 1 else logging.DEBUG, "%s; trying again in %g s", failure, pause)
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _path(job_id: str) -> str:
    return f"/generate/{quote(job_id, safe='')}"


def _read(answer: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(
            f"{answer.request.url} answered {answer.status_code}, and not as this service does: {error}",
            status=answer.status_code,
        ) from None


def _same(one: Event, other: Event | None) -> bool:
    """Whether two events tell a listener the same."""
    names = ("status", "progress", "stage", "queue_position", "eta")
    return other is not None and all(getattr(one, name) == getattr(other, name) for name in names)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
