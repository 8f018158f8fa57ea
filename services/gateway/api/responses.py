"""What the responses of several routes have in common: methods, headers, content types, waiting for a client's end."""

import math
import time

from litestar.enums import HttpMethod
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from shared.schema.job import Job

GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
NO_STORE = {"Cache-Control": "no-store"}
BYTES = "application/octet-stream"
_LONGEST_RETRY = 3600  # seconds


def retry_seconds(job: Job, usual: int) -> int:
    """Retry-After for what is known of a song: `usual`, or of one for later the time until it is queued."""
    if not job.deferred or job.not_before is None:
        return usual
    return min(_LONGEST_RETRY, max(usual, math.ceil(job.not_before - time.time())))


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def named_as_asked(accept: str | None, app: ASGIApp) -> ASGIApp:
    """Audio whose content type is `application/octet-stream` where the Accept header names that, and no audio.

    Clients that are generated from a document know this type alone for what is binary, and some refuse other types.
    """
    kinds = {part.partition(";")[0].strip().lower() for part in (accept or "").split(",")}
    if BYTES not in kinds or any(kind == "*/*" or kind.startswith("audio/") for kind in kinds):
        return app

    async def renamed(scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (name, BYTES.encode() if name == b"content-type" and kind.startswith(b"audio/") else kind)
                    for name, kind in message["headers"]
                ]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, named)

    return renamed
