"""Songs on behalf of requests that wait for their audio: equal requests share one, and it ends with the last of them.

Clients with a time-out send a request again without a key that would tell so. What is known here is known to this
process: after its end, or through another gateway, an equal request makes another song.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request

from services.gateway.auth.api_keys import Caller
from services.gateway.errors import ApiError
from services.gateway.songs.cancel import Canceller
from services.gateway.submission.service import Submission
from services.gateway.tasks import BackgroundTasks
from shared.errors import HeartMulaError
from shared.schema.job import Job
from shared.waiting import wait_until_available

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 20.0  # without a client, after which a song is cancelled; a repeated request comes within
_CANCEL_PATIENCE = 300.0  # seconds for which the servers may be away


def digest_of_request(request: Request[Any, Any, Any], body: bytes) -> str:
    """A digest of a request as it came: address, query and body. Hexadecimal."""
    query = request.scope["query_string"]
    return hashlib.sha256(b"\n".join((request.scope["path"].encode(), query, body))).hexdigest()


@dataclass(eq=False)
class _Shared:
    """A song, and how many requests wait for it."""

    submitting: asyncio.Task[Job]
    clients: int = 0
    abandonment: asyncio.TimerHandle | None = None  # while it has no client


class RequestedSong:
    """A song as one of its requests sees it."""

    def __init__(self, job: Job, retire: Callable[[], None]) -> None:
        self.job, self._retire = job, retire

    def retire(self) -> None:
        """Say that an equal request that comes from now on wants another song.

        To be called when this one was sent whole, or can never be.
        """
        self._retire()


class RequestedSongs:
    """Submits songs for requests that wait, shares them among equal requests, and cancels those that are abandoned."""

    def __init__(self, submission: Submission, canceller: Canceller, tasks: BackgroundTasks) -> None:
        self._submission, self._canceller, self._tasks = submission, canceller, tasks
        self._songs: dict[tuple[str, str], _Shared] = {}  # by tenant and digest

    @contextlib.asynccontextmanager
    async def request(self, caller: Caller, digest: str, song: Mapping[str, Any]) -> AsyncIterator[RequestedSong]:
        """Submit a song, or find that of an equal request; the caller counts as its client while the context lasts.

        `digest` says which requests are equal, see `digest_of_request`; `song` has the fields of a `GenerateRequest`.
        An equal request finds the song until a client says that it was sent all of it, see `RequestedSong.retire`, or
        until `ABANDONED_SECONDS` after the last client has left. Then the song is cancelled, unless it has ended.
        Raises `ApiError` as `Submission.submit`, to all who share the song. To be left when the client leaves: cancel
        the task that is inside.
        """
        key = caller.tenant, digest
        shared = self._songs.get(key)
        if shared is None:
            submitting = asyncio.create_task(self._submit(caller, msgspec.json.encode(song)), name=f"request-{digest}")
            shared = self._songs[key] = _Shared(submitting)
            submitting.add_done_callback(functools.partial(self._submitted, key, shared))
        if shared.abandonment is not None:
            shared.abandonment.cancel()
            shared.abandonment = None
        shared.clients += 1
        try:
            job = await asyncio.shield(shared.submitting)
            yield RequestedSong(job, functools.partial(self._retire, key, shared))
        finally:
            shared.clients -= 1
            if not shared.clients and self._songs.get(key) is shared:
                loop = asyncio.get_running_loop()
                shared.abandonment = loop.call_later(ABANDONED_SECONDS, self._abandon, key, shared)

    def close(self) -> None:
        """Cancel all songs: nothing will send them any more. Background tasks wait for that."""
        for key, shared in list(self._songs.items()):
            self._abandon(key, shared)

    async def _submit(self, caller: Caller, data: bytes) -> Job:
        return (await self._submission.submit(caller, data)).job

    def _submitted(self, key: tuple[str, str], shared: _Shared, submitting: asyncio.Task[Job]) -> None:
        if submitting.cancelled() or submitting.exception() is not None:  # it is answered by those who wait
            self._retire(key, shared)

    def _retire(self, key: tuple[str, str], shared: _Shared) -> None:
        if self._songs.get(key) is shared:
            del self._songs[key]
        if shared.abandonment is not None:
            shared.abandonment.cancel()

    def _abandon(self, key: tuple[str, str], shared: _Shared) -> None:
        self._retire(key, shared)
        self._tasks.spawn(self._cancel(key[0], shared.submitting))

    async def _cancel(self, tenant: str, submitting: asyncio.Task[Job]) -> None:
        try:
            job = await submitting
            cancel = functools.partial(self._canceller.cancel, tenant, job.job_id)
            await wait_until_available("the servers", cancel, _CANCEL_PATIENCE, log.debug)
            log.info("%s: cancelled, for its clients have left", job.job_id)
        except ApiError:  # it was refused, has ended or was removed
            pass
        except HeartMulaError as error:
            log.warning("a song whose clients have left may be made all the same: %s", error)
