"""The connection to the service: requests, which are repeated where their answer was lost, and their answers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

import httpx
import msgspec

from heartmula_client.address import authorization, host_of, is_loopback
from heartmula_client.errors import UnexpectedAnswer, Unreachable, cause, error_from
from heartmula_client.retries import RETRY_WAITS, TEMPORARY, wait_for

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8000"

T = TypeVar("T")


class Connection:
    """A connection to the service at `url`, used in ``async with`` or closed with `aclose`."""

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None) -> None:
        """`key` is the API key, where the service needs one. Raises `ValueError` for an invalid URL or key."""
        self._headers = authorization(key)
        self.url = url.rstrip("/")
        # A proxy that the environment names cannot reach the loopback address of this machine.
        self._use_proxy = not is_loopback(host_of(url))
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=httpx.Timeout(30, connect=5), trust_env=self._use_proxy
        )

    async def __aenter__(self) -> Self:
        """Return the client. Nothing is sent yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        accept: int | None = None,
        body: Callable[[], AsyncIterator[bytes]] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Send a request, and repeat it where its answer was lost: each of the service's requests may be repeated.

        `accept` is a status above 400 that is an answer, too; `body` begins a long body, once for each attempt.
        """
        for wait in (*RETRY_WAITS, None):
            try:
                if body is not None:
                    options["content"] = body()
                answer = await self._http.request(method, path, **options)
                if answer.status_code < 400 or answer.status_code == accept:
                    return answer
                failure = error_from(answer)
                if wait is None or answer.status_code not in TEMPORARY:
                    raise failure
            except httpx.TransportError as error:
                failure = Unreachable(f"no answer from {self.url}: {cause(error)}")
                if wait is None:
                    raise failure from error
            wait = wait_for(wait, failure.retry_after)
            log.log(logging.WARNING if wait >= 1 else logging.DEBUG, "%s; trying again in %g s", failure, wait)
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def read(answer: httpx.Response, kind: type[T]) -> T:
    """Decode the answer to a request. Raises `UnexpectedAnswer`."""
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(
            f"{answer.request.url} answered {answer.status_code}, and not as this service does: {error}",
            status=answer.status_code,
        ) from None
