"""The write probe: whether both servers accept writes. Reads cannot show it: a full disk stops only writes.

nats-server 2.15 takes no further write into a stream that once met a full disk, until it is started again, and
SeaweedFS 4.48 none into a folder whose database did. So the probe writes to both every quarter of a minute, and at once
when another write of this process has failed.
"""

import asyncio
import logging
import time

from nats.aio.client import Client
from nats.js.errors import APIError

from shared.aio import end
from shared.errors import HeartMulaError, Unavailable
from shared.nats.errors import nats_errors
from shared.nats.subjects import JOBS, PROBE_SUBJECT
from shared.storage.objects import ObjectStore
from shared.write_failures import write_failed, writes_failed

log = logging.getLogger(__name__)

_EVERY = 15  # seconds between two rounds; one, when something else could not be written or is in trouble already
_MEASURE_EVERY = 5  # seconds between two measurements of how much room is left
_PATIENCE = 3.0  # seconds for a write
# A delete marker, so that no reader takes it for a record. Large, for less might fit into the last block of a file.
_PROBE_HEADERS = {"KV-Operation": "DEL", "Padding": "x" * 4000}
_ROOM = 0.8  # of the bucket, above which no new songs are accepted: the records of accepted ones still grow
_ADVICE = "Free some room, then start it again (`make run` does that by itself)"


class WriteProbe:
    """Tries writes until it is closed, and keeps their results."""

    def __init__(self, nc: Client, store: ObjectStore) -> None:
        self.nats: str | None = None  # a sentence why NATS takes no writes though it answers
        self.store: str | None = None  # the same for the object store
        self.no_room: str | None = None  # why no further records should be made
        self._nc, self._js, self._store = nc, nc.jetstream(timeout=_PATIENCE), store
        self._silent = 0  # writes to NATS in a row without an answer
        self._store_write: asyncio.Task[None] | None = None
        self._store_write_began = 0.0  # monotonic
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="write-probe")

    async def close(self) -> None:
        """Stop."""
        await end(*(task for task in (self._task, self._store_write) if task is not None))

    async def _run(self) -> None:
        while True:
            before = self.nats, self.store, self.no_room
            try:
                await asyncio.gather(self._try_nats(), self._try_store())
            except Exception:
                log.exception("the write probe met an unexpected error")
            after = self.nats, self.store, self.no_room
            for sentence in set(after) - set(before):
                log.warning("%s", sentence or "a server accepts writes again")
            await self._rest()

    async def _rest(self) -> None:
        failed = writes_failed()
        for second in range(_EVERY):
            await asyncio.sleep(1)
            if second % _MEASURE_EVERY == 0:
                await self._measure()
            if writes_failed() != failed:
                self._silent = max(self._silent, 1)  # to either server; the next write shows which
                return
            if self.nats or self.store or self._silent or self._store_write:
                return

    async def _try_nats(self) -> None:
        try:
            with nats_errors("NATS stores nothing"):
                await self._js.publish(PROBE_SUBJECT, b"", headers=_PROBE_HEADERS, timeout=_PATIENCE)
        except HeartMulaError as error:
            cause = error.__cause__
            if isinstance(cause, APIError):  # it answers, and refuses
                write_failed("nats")
                self._silent = 0
                self.nats = f"NATS stores nothing: {cause.description or 'it does not say why'}"
                return
            if not self._nc.is_connected or not isinstance(cause, TimeoutError):
                self._silent, self.nats = 0, None  # it is away, which reads show
                return
            write_failed("nats")
            self._silent += 1
            if self._silent > 1:  # one may be a slow disk
                self.nats = f"NATS answers but stores nothing: its disk is full, or was. {_ADVICE}"
            return
        self._silent, self.nats = 0, None

    async def _try_store(self) -> None:
        # One attempt at a time: each attempt with a store that hangs keeps a thread.
        if self._store_write is None:
            self._store_write_began = time.monotonic()
            self._store_write = asyncio.create_task(self._store.prove_writing())
        done, _ = await asyncio.wait({self._store_write}, timeout=_PATIENCE)
        if not done:
            if time.monotonic() - self._store_write_began > 2 * _PATIENCE:
                self.store = "the object store does not finish a write. Is its disk full, or very slow?"
            return
        write, self._store_write = self._store_write, None
        error = write.exception()
        if error is None:
            self.store = None
        elif isinstance(error, Unavailable):
            self.store = f"the object store takes no results: its disk is full, or was. {_ADVICE}. It says: {error}"
        else:
            raise error

    async def _measure(self) -> None:
        try:
            with nats_errors("the room for records is not known"):
                info = await self._js.stream_info(f"KV_{JOBS}")
        except HeartMulaError:
            return
        limit = info.config.max_bytes or -1
        is_full = limit > 0 and info.state.bytes > _ROOM * limit
        self.no_room = (
            f"the records of songs take {info.state.bytes >> 20} of {limit >> 20} MiB that NATS has for them: no more "
            "are taken until older ones expire. Give JetStream more storage and run `python -m deploy.setup`"
            if is_full
            else None
        )
