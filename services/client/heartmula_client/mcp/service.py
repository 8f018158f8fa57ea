"""What the tools need of the service: the client has it over HTTP, the gateway in its own process."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from heartmula_client.responses import Accepted, Event, Recording, Song, Songs


class SongService(Protocol):
    """Songs and recordings of one caller. Every method raises a `ClientError` whose message says what to change."""

    @property
    def url(self) -> str:
        """The address of the service, as the caller reaches it, without a slash at its end."""

    async def write(self, request: Mapping[str, object], key: str | None) -> Accepted:
        """Request songs; `request` has the fields of ``POST /generate``, `key` is the Idempotency-Key."""

    async def song(self, job_id: str) -> Song:
        """The state of a song with its request."""

    async def songs(self, limit: int, cursor: str | None, status: str | None, parent: str | None) -> Songs:
        """A page of songs, newest first."""

    async def cancel(self, job_id: str) -> str:
        """Cancel a waiting or running song; returns its status."""

    async def follow(self, job_id: str, on_event: Callable[[Event], Awaitable[None]]) -> None:
        """Await `on_event` for the state of a song, then for its events, until it has ended or events are lost."""

    async def upload(self, source: str, title: str | None) -> Recording:
        """Take the recording at an address or, where the service may read it, in a local file."""

    async def recording(self, recording_id: str) -> Recording:
        """The state of a recording."""
