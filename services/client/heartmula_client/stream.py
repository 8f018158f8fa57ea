"""A song's audio while it grows: one sequence of bytes, over as many connections as it takes."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing

import httpx

from heartmula_client.download import file_name
from heartmula_client.errors import (
    ClientError,
    ServiceFault,
    SongIncomplete,
    UnexpectedAnswer,
    Unreachable,
    cause,
    error_from,
)
from heartmula_client.responses import Song
from heartmula_client.retries import AWAY, INTERVAL, RETRY_WAITS, TEMPORARY, wait_for

log = logging.getLogger(__name__)

_TIMEOUT = httpx.Timeout(30, connect=5, read=90)  # read: longer than the service holds a request for a waiting song
_OVERLAP = 16  # bytes that are asked for again, to see that what follows is the same audio
_HEADER = 1024  # bytes in which the finished file may differ from the stream: it knows its length
_UNSATISFIED = (409, 410, 416)  # no audio yet; none any more; less than was received


class AudioStream:
    """The audio at an address from its beginning to the song's end, each byte once and in order. Iterate over it once.

    The end of a connection is not the end of the song: one that was cut, or that a proxy ended early, is resumed where
    it was, until the song has ended and its last byte has come.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: str, params: Mapping[str, str], status: Callable[[], Awaitable[Song]]
    ) -> None:
        """`status` asks for the state of the song."""
        self._http, self._url, self._params, self._status = http, url, params, status
        self._waits = list(RETRY_WAITS)  # before the attempts that are left until the service has answered once
        self._answered: float | None = None  # when it last did, monotonic seconds
        self._quiet = False  # whether a failure needs no word, because one like it was logged already
        self._position = 0  # bytes received
        self._tail = b""  # the last of them, at most _OVERLAP
        self._size: int | None = None  # bytes of the whole stream, where the latest answer has them
        self._refusal: ClientError | None = None  # of the latest attempt, where the song's state says what it means
        self._completed = False  # whether the song was completed before the latest attempt
        self.file_name: str | None = None  # the service's name for the file, once audio comes

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Yield the audio as it comes.

        Raises `SongIncomplete` after the last byte of a song that failed or was cancelled, `UnexpectedAnswer` where
        what comes does not continue what came, and other `ClientError`s as every method of the client.
        """
        while True:
            begun = self._position
            try:
                async with aclosing(self._receive()) as blocks:
                    async for block in blocks:
                        yield block
                progressed = self._position > begun
                if await self._ended(progressed):
                    return
                wait = 0.0 if progressed else wait_for(INTERVAL, self._refusal.retry_after if self._refusal else None)
            except httpx.TransportError as error:
                wait = self._endure(Unreachable(f"the connection was lost: {cause(error)}"))
            except (Unreachable, ServiceFault) as error:
                wait = self._endure(error)
            await asyncio.sleep(wait)

    async def _receive(self) -> AsyncGenerator[bytes, None]:
        """Yield what one connection brings. Returns where it ends cleanly or is refused."""
        self._refusal = None
        first = self._position - len(self._tail)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
        asking = self._http.stream("GET", self._url, params=self._params, headers=headers, timeout=_TIMEOUT)
        async with asking as answer:
            if answer.status_code >= 400:
                await answer.aread()
                self._refusal = error_from(answer)
                if answer.status_code not in _UNSATISFIED:
                    raise self._refusal
                return
            known = self._position - self._begin(answer, first)
            try:
                async for block in self._beyond(known, answer):
                    self._position += len(block)
                    self._tail = (self._tail + block)[-_OVERLAP:]
                    yield block
                    self._answered = time.monotonic()  # the caller may have taken its time
            except httpx.ReadTimeout:
                if self._size is None:  # the song is paused, or the connection is dead: a new one costs nothing
                    self._answered, self._quiet = time.monotonic(), True
                raise

    def _begin(self, answer: httpx.Response, first: int) -> int:
        """Return the position of the answer's first byte, and note what its headers say. Raises `UnexpectedAnswer`."""
        if answer.status_code == 200:  # also to a range, from a proxy that does not pass it on
            begin, size = 0, answer.headers.get("content-length", "")
        else:
            given = answer.headers.get("content-range", "")
            found = re.fullmatch(r"bytes (\d+)-\d*/(\d+|\*)", given)
            begin, size = (int(found[1]), found[2]) if found else (-1, "")
            if answer.status_code != 206 or begin != first:
                raise _unexpected(answer, f"asked for the audio from byte {first} on", given or "without a range")
        if not (kind := answer.headers.get("content-type", "")).startswith("audio/"):
            raise _unexpected(answer, "asked for audio", kind or "of no type")
        self._size = int(size) if size.isdecimal() else None
        self._quiet = False
        if self._size is None:  # while it grows, an answer alone is a sign of life; of a whole file only its bytes are
            self._answered = time.monotonic()
        self.file_name = self.file_name or file_name(answer)
        return begin

    async def _beyond(self, known: int, answer: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Yield an answer's bytes behind the first `known`, which were received already.

        Raises `UnexpectedAnswer` where these are other ones.
        """
        seen = b""
        async for block in answer.aiter_bytes():
            repeated, fresh = block[:known], block[known:]
            known -= len(repeated)
            seen = (seen + repeated)[-_OVERLAP:]
            if repeated and not known and self._position >= _HEADER and seen != self._tail:
                raise UnexpectedAnswer("the audio was made anew meanwhile, and is another; play it from the beginning")
            if fresh:
                yield fresh

    async def _ended(self, progressed: bool) -> bool:
        """Return whether the song is completed and all of it received. `progressed`: the latest attempt brought some.

        Raises `SongIncomplete`, or a `ClientError` where the rest cannot be had.
        """
        before, song = self._completed, await self._status()
        self._answered, self._completed = time.monotonic(), song.status == "completed"
        if song.ended and not self._completed:
            raise SongIncomplete(song)
        refused = self._refusal.status if self._refusal else None
        if self._refusal and refused == 410:
            raise self._refusal
        settled = before and not progressed  # it was completed before the latest attempt, which brought nothing more
        if refused is None and self._completed and (self._size == self._position or (settled and self._size is None)):
            return True
        if settled and refused != 409:
            raise UnexpectedAnswer(f"the song is completed, but what follows byte {self._position} cannot be had")
        return False

    def _endure(self, failure: ClientError) -> float:
        """Return the seconds to wait before the next attempt. Raises the failure if there is to be none."""
        if failure.status is not None and failure.status not in TEMPORARY:
            raise failure
        if self._answered is None:
            if not self._waits:
                raise failure
            wait = self._waits.pop(0)
        elif time.monotonic() - self._answered > AWAY:
            raise failure
        else:
            wait = INTERVAL if self._quiet else RETRY_WAITS[0]
        wait = wait_for(wait, failure.retry_after)
        log.log(logging.DEBUG if self._quiet else logging.WARNING, "%s; going on in %g s", failure, wait)
        self._quiet = True
        return wait


def _unexpected(answer: httpx.Response, asked: str, given: str) -> UnexpectedAnswer:
    words = f"{asked}, {answer.request.url.host} answered {answer.status_code}, {given}"
    return UnexpectedAnswer(words, status=answer.status_code)
