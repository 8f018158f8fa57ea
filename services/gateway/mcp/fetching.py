"""Fetching a recording from an address that a user gave: from public addresses alone, as webhooks go."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx

from services.gateway.background.webhooks.addresses import parse_url
from services.gateway.background.webhooks.checked_client import CheckedClient, PrivateAddress
from shared.errors import InvalidRequest, RecordingRefused
from shared.settings import Settings

FIELD = "source"  # of the request, which holds the address
CONNECT_SECONDS = 10.0  # for the answer to one request to begin
_READ_SECONDS = 10.0
_REDIRECTS = 3


class Fetcher:
    """Fetches files for one gateway. No more than a block of one is in memory."""

    def __init__(self, settings: Settings) -> None:
        self._private, self._most_bytes = settings.webhook_private, settings.recording_mb * 1_000_000
        timeout = httpx.Timeout(_READ_SECONDS, connect=CONNECT_SECONDS)
        self._http = CheckedClient(timeout, private=self._private)

    async def close(self) -> None:
        """Close the HTTP client."""
        await self._http.close()

    def check(self, url: str) -> None:
        """Raise `InvalidRequest` for an address that may not be asked. Names are not looked up."""
        parse_url(url, private=self._private, field=FIELD)

    async def fetch(self, url: str) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file. Nothing is asked for before the first is wanted.

        Raises `InvalidRequest` where the address may not be asked or answers with something else, `RecordingRefused`
        for a file that is too large.
        """
        try:
            async with self._open(url) as answer:
                size = answer.headers.get("content-length", "")
                if size.isascii() and size.isdigit() and int(size) > self._most_bytes:
                    raise RecordingRefused("too-large", f"the file may have at most {self._most_bytes / 1e6:g} MB")
                if (coding := answer.headers.get("content-encoding", "identity")) != "identity":
                    raise InvalidRequest(FIELD, f"is sent compressed ({coding[:40]}), although that was not asked for")
                async for block in answer.aiter_raw():
                    yield block
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise InvalidRequest(FIELD, f"cannot be fetched: {str(error)[:200] or 'it takes too long'}") from error

    @asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[httpx.Response]:
        """The answer of an address, or of the one that it redirects to; each is checked."""
        target = parse_url(url, private=self._private, field=FIELD)
        for _ in range(_REDIRECTS + 1):
            answer = await self._get(target)
            try:
                if answer.is_success:
                    yield answer
                    return
                place = answer.headers.get("location")
                if not (answer.is_redirect and place):
                    raise InvalidRequest(FIELD, f"cannot be fetched: its server answered {answer.status_code}")
                target = parse_url(str(target.join(place)), private=self._private, field=FIELD)
            finally:
                await answer.aclose()
        raise InvalidRequest(FIELD, f"redirects more than {_REDIRECTS} times")

    async def _get(self, target: httpx.URL) -> httpx.Response:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await self._http.send("GET", target, {"Accept-Encoding": "identity"})
        except PrivateAddress:
            raise InvalidRequest(FIELD, "leads to a private address, which this service does not call") from None
