"""The lease on a device: only its holder may use the device.

Each candidate owns one key ``<gpu>.<group>.<instance>`` in GPU_LOCK and keeps it alive with a per-message TTL. The
sequence of its first write is its ticket; the lowest live ticket is the head of the queue, confirms with one
compare-and-set write, and that write's sequence is the fencing token. Hand-over is first come, first served, and a dead
holder is gone when its key expires. A key that is written again moves to the end of the stream, so a candidate takes
itself for the first only when the server has nothing more to send.

The holder's deadline is counted from *before* each acknowledged renewal, less a second, on a clock that goes on while
the machine sleeps: it knows of its loss before another candidate can take over. A renewal without an answer proves
nothing either way. A candidate that saw a holder's key vanish without a delete marker waits until that deadline is
over.

No candidate writes another's key, but in one case. The server may fail to expire a key, or bring it back after a crash,
so each candidate times every key ahead of it, from when it began to follow and through reconnects. One whose sequence
has not moved for two TTLs (its own or the key's, whichever is longer) gets a delete marker, by compare-and-set on the
sequence that was timed: its owner, should it wake, meets the marker and knows that it has lost. Time in which a
candidate could not have seen the key move, because it was stopped or cut off, does not count. A key that cannot be read
is a candidate like any other: a newer version may hold the device.

`Lease` runs all this in a thread of its own, so that neither a busy event loop nor a long step costs the lease. The
protocol is in `lease_candidate`, the renewal of keys in `lease_renewal`, the file lock in `file_lock`.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from nats.js import JetStreamContext

from shared.clock import elapsed
from shared.device.lease_candidate import LeaseCandidate
from shared.device.lease_queue import PREFIX, STREAM, LeaseView, is_gone, read_view
from shared.errors import LeaseLost, NotFound, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.subjects import lock_group
from shared.settings import Settings

__all__ = ["HeldLease", "Lease", "LeaseView", "read_leases"]

_T = TypeVar("_T")


async def read_leases(js: JetStreamContext) -> list[LeaseView]:
    """Every live candidate of every device, from the leader. Raises `Unavailable` when NATS does not answer."""
    failure = "leases cannot be read"
    try:
        with nats_errors(failure):
            info = await js.stream_info(STREAM, subjects_filter=f"{PREFIX}*.*.*")
    except NotFound as error:
        raise Unavailable("nats", str(error)) from error
    views = []
    for subject in info.state.subjects or {}:
        with contextlib.suppress(NotFound), nats_errors(failure):
            message = await js.get_msg(STREAM, subject=subject)
            if message.data and not is_gone(message.data, message.headers):
                views.append(read_view(subject, message.data, message.seq or 0, message.headers))
    return sorted(views, key=lambda view: view.ticket)


class HeldLease:
    """A lease that was acquired. `check` costs nothing and may be called from any thread, before every step."""

    def __init__(self, candidate: LeaseCandidate, lease: "Lease", fencing_token: int) -> None:
        self.fencing_token = fencing_token
        self._candidate = candidate
        self._lease = lease

    @property
    def alive(self) -> bool:
        """Whether the lease is still held."""
        return self._candidate.fencing_token == self.fencing_token and elapsed() < self._candidate.deadline

    def check(self) -> None:
        """Raise `LeaseLost` unless the lease is still held."""
        if not self.alive:
            raise LeaseLost("the lease on the device is gone")

    def waiting(self) -> list[LeaseView]:
        """The candidates that wait for the device, in the order in which they will get it."""
        return self._candidate.others()

    async def enter(self, phase: int) -> None:
        """Write the phase into the lease record, in a moment. Raises `LeaseLost`."""
        await self._lease._call(self._candidate.enter(self.fencing_token, phase))

    async def release(self) -> None:
        """Give the device to the next candidate. A lease that was lost is released quietly."""
        await self._lease._call(self._candidate.release())


class Lease:
    """A candidate for one device, with a thread, an event loop and a connection of its own."""

    def __init__(self, settings: Settings, *, gpu: str, role: str, instance: str, exclusive: bool = True) -> None:
        """With `exclusive` false only candidates of one `lock_group` exclude each other on the device."""
        self._settings = settings
        group = lock_group(role)
        scope = f"{gpu}.*.*" if exclusive else f"{gpu}.{group}.*"
        name = gpu if exclusive else f"{gpu}.{group}"
        self._candidate = LeaseCandidate(
            settings, gpu, role, instance, scope, settings.data_dir / "device" / f"{name}.lock"
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lease", daemon=True)

    async def start(self) -> None:
        """Connect and begin to follow the other candidates. Raises `Unavailable`."""
        self._thread.start()
        await self._call(self._candidate.start())

    async def acquire(self) -> HeldLease:
        """Wait for the lease. Cancelling leaves the queue."""
        try:
            fencing_token = await self._call(self._candidate.acquire())
        except asyncio.CancelledError:
            await self._call(self._candidate.withdraw())
            raise
        return HeldLease(self._candidate, self, fencing_token)

    async def close(self, *, release: bool = True) -> None:
        """Release what is held and end the thread.

        Without `release` the device stays taken until this process has ended and the key has expired.
        """
        if self._thread.is_alive():
            with contextlib.suppress(Unavailable, LeaseLost):
                await self._call(self._candidate.close(release))
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
            self._loop.close()

    async def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
