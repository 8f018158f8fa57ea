"""A lowest rate for what clients send, instead of a longest time: large files over slow lines are fine."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator

from shared.errors import RecordingRefused


class Pace:
    """How long a client may take for its next bytes.

    It begins with `grace` seconds; waiting for it uses them up, and bytes win them back at the lowest rate. No more
    than `grace` can be saved: a client that was fast may not stop for longer than one that was slow.
    """

    def __init__(self, lowest_rate: float, grace: float) -> None:
        """`lowest_rate` in bytes a second."""
        self._rate, self._grace = lowest_rate, grace
        self.left = grace  # seconds

    def received(self, size: int, waited: float) -> None:
        """Count bytes for which the client was waited for, in seconds."""
        self.left = min(self._grace, self.left - waited + size / self._rate)


async def paced(body: AsyncIterable[bytes], lowest_rate: float, grace: float) -> AsyncIterator[bytes]:
    """Pass a body on. Only the waiting for the client counts, not what is done with its bytes meanwhile.

    Raises `RecordingRefused` where it is slower than `lowest_rate` bytes a second for `grace` seconds.
    """
    pace, chunks, now = Pace(lowest_rate, grace), aiter(body), asyncio.get_running_loop().time
    while True:
        began = now()
        try:
            async with asyncio.timeout(pace.left):
                chunk = await anext(chunks, None)
        except TimeoutError:
            words = (
                f"the upload is slower than {lowest_rate / 1000:g} kB a second: take a faster line or a smaller file"
            )
            raise RecordingRefused("too-slow", words) from None
        if chunk is None:
            return
        pace.received(len(chunk), now() - began)
        yield chunk
