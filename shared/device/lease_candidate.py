"""A candidate for a device: the state machine of the protocol that `shared.device.lease` describes.

::

    outside ──enter──▶ waiting ──confirm──▶ held
       ▲                  │                   │
       └──── withdraw, release, or lost ──────┘

Everything here runs on the lease's own event loop; only what says so may be read from other threads.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Literal

from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.aio import end
from shared.clock import elapsed
from shared.device.file_lock import FileLock
from shared.device.lease_follower import LeaseFollower
from shared.device.lease_key import LeaseKey
from shared.device.lease_queue import PREFIX, LeaseQueue, LeaseView, is_gone
from shared.device.lease_renewal import keep_renewed
from shared.device.stale_keys import StaleKeyRemover
from shared.errors import LeaseLost, Refused, Unavailable, WrongSequence
from shared.nats.connection import broker, connect
from shared.nats.errors import nats_errors
from shared.nats.subjects import lock_key
from shared.schema.worker import LeaseRecord
from shared.settings import Settings
from shared.waiting import wait_until_available

log = logging.getLogger(__name__)

_START_PATIENCE = 60.0  # seconds that NATS may be away when a worker begins
_PHASE_DELAY = 0.05  # seconds; phases that are over sooner are not written down, each write costs a disk's sync


class LeaseCandidate:
    """One candidate. Lives on the lease thread; `fencing_token`, `deadline` and `others` may be read from any."""

    def __init__(self, settings: Settings, gpu: str, role: str, instance: str, scope: str, lock: Path) -> None:
        self._settings = settings
        self._ttl = settings.lease_ttl
        self._role, self._instance = role, instance
        self._subject = PREFIX + lock_key(gpu, role, instance)
        self._lock = FileLock(lock)
        self.fencing_token = 0  # while the lease is held, else 0
        self._ticket = 0  # 0: not in the queue
        self._phase: int | None = None
        self._since = 0.0
        self._queue = LeaseQueue(self._subject, self._ttl)
        self._follower = LeaseFollower(self._queue, scope, self._observe, self._on_snapshot)
        self._changed = asyncio.Event()
        self._remover = StaleKeyRemover(
            self._queue, self._ttl, lambda: 0 if self.fencing_token else self._ticket, self._changed.set
        )
        self._snapshot = asyncio.Event()  # set once the others have been seen for the first time
        self._writing = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None  # writes the phase down
        self._acquiring: asyncio.Task[object] | None = None
        self._tasks: list[asyncio.Task[None]] = []  # run until this candidate is closed
        self._nc: Client | None = None
        self._key: LeaseKey  # from `start` on

    @property
    def deadline(self) -> float:
        """When the lease ends unless it is renewed, on `shared.clock`; nothing may run on the device after it."""
        return self._key.deadline

    # --- following the others

    async def start(self) -> None:
        """Connect, and wait until the other candidates have been seen. Raises `Unavailable` or `Rejected`."""
        # pending_size 0: a renewal must not be sent later than it was timed.
        name = f"lease-{self._role}-{self._instance}"
        self._nc = await wait_until_available(
            broker(self._settings),
            lambda: connect(self._settings, name, on_reconnect=self._on_reconnect, pending_size=0),
            _START_PATIENCE,
        )
        js = self._nc.jetstream(timeout=max(1.0, self._ttl / 4))
        self._key = LeaseKey(js, self._subject, self._ttl)
        self._tasks = [
            asyncio.create_task(self._remover.run(self._nc, js)),
            asyncio.create_task(self._follower.run(self._nc, js)),
        ]
        await self._snapshot.wait()

    async def _on_reconnect(self) -> None:
        self._follower.restart()

    def _on_snapshot(self) -> None:
        self._snapshot.set()
        self._changed.set()

    def _observe(self, message: Msg) -> None:
        sequence = message.metadata.sequence.stream
        if self._queue.observe(message.subject, sequence, message.data, message.headers, elapsed()):
            gone = is_gone(message.data, message.headers)
            if gone and message.subject == self._subject and sequence > self._key.sequence:
                self._lose("its key is gone")
            self._changed.set()

    def others(self) -> list[LeaseView]:
        """All other candidates in the queue, the next one first."""
        mine = self._subject
        found = [view for subject, view in self._queue.views.items() if subject != mine]
        return sorted(found, key=lambda view: view.ticket)

    # --- our own key

    async def _write(self, state: Literal["waiting", "held"], ticket: int) -> int:
        """Write our key by compare-and-set; returns the sequence. `ticket` 0 enters the queue.

        Raises `WrongSequence`, `Unavailable`, and `LeaseLost` once the deadline is past.
        """
        record = LeaseRecord(
            ticket=ticket, state=state, role=self._role, owner=self._instance, phase=self._phase, since=self._since
        )
        if not ticket:
            return await self._key.enter(record)
        try:
            return await self._key.renew(record)
        except LeaseLost:
            self._lose("it could not be renewed in time")
            raise

    async def _update(self) -> bool:
        """Write our key with its present state. False when there was no answer; raises `LeaseLost` when it is gone."""
        async with self._writing:
            if not self._ticket:
                raise LeaseLost("the lease on the device is gone")
            try:
                await self._write("held" if self.fencing_token else "waiting", self._ticket)
                return True
            except WrongSequence:
                pass  # either an earlier write got through without an answer, or the key is gone
            except Refused as error:
                log.warning("lease: renewal refused: %s", error)
                return False
            except Unavailable:
                return False
            try:
                record = await self._key.read()
            except Unavailable:
                return False
            if record is None or (record.ticket or self._key.sequence) != self._ticket:
                self._lose("its key was replaced")
                raise LeaseLost("the lease on the device is gone")
        return await self._update()

    def _lose(self, reason: str) -> None:
        if self.fencing_token:
            log.error("lease lost: %s", reason)
        self.fencing_token = 0
        self._ticket = 0
        self._changed.set()

    # --- acquiring, entering a phase, releasing

    async def acquire(self) -> int:
        """Wait for the lease; returns the fencing token. Leaves the queue when it is cancelled."""
        if self.fencing_token:
            raise RuntimeError("the lease is held already")
        self._acquiring = asyncio.current_task()
        try:
            while True:
                await self._enter_queue()
                if await self._wait_for_turn():
                    return self.fencing_token
        except BaseException:
            await self.release()
            raise

    async def withdraw(self) -> None:
        """End `acquire`; a lease that it got meanwhile is given back."""
        if self._acquiring is not None:
            await end(self._acquiring)
        await self.release()

    async def _enter_queue(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        while True:
            async with self._writing:
                try:
                    await self._key.read()
                    self._phase, self._since = None, time.time()
                    self._ticket = await self._write("waiting", 0)
                    break
                except (Unavailable, WrongSequence) as error:
                    log.debug("lease: cannot enter the queue yet: %s", error)
            await asyncio.sleep(0.25)
        self._renewing = asyncio.create_task(
            keep_renewed(self._ttl, lambda: self._ticket, lambda: self.deadline, self._update, self._lose)
        )

    async def _wait_for_turn(self) -> bool:
        """True when the lease is ours; False when our place in the queue is lost."""
        while self._ticket:
            self._changed.clear()
            pause = self._ttl / 4
            if self._follower.caught_up and self._queue.is_first(self._ticket):
                occupied = self._queue.occupied(elapsed())
                if not occupied:
                    return await self._confirm()
                pause = min(pause, occupied)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()
        return False

    async def _confirm(self) -> bool:
        while self._ticket:
            async with self._writing:
                try:
                    fencing_token = await self._write("held", self._ticket)
                    if self._ticket:  # else the place was given up while the answer was under way
                        self.fencing_token = fencing_token
                    break
                except LeaseLost:
                    return False
                except (Unavailable, WrongSequence) as error:
                    log.debug("lease: not confirmed yet: %s", error)
            await asyncio.sleep(0.05)
            with contextlib.suppress(LeaseLost):
                await self._update()
        began, warned = elapsed(), False
        while self.fencing_token:
            # A holder that was stopped, not killed, may still have work queued on the device: wait for the process.
            if self._lock.take():
                return True
            if not warned and elapsed() - began > self._ttl:
                warned = True
                log.warning("lease: the process that held it before still holds the device: %s", self._lock.path)
            await asyncio.sleep(0.02)
        return False

    async def enter(self, fencing_token: int, phase: int) -> None:
        """Have the record carry the phase; it is written in a moment. Raises `LeaseLost`."""
        if self.fencing_token != fencing_token or elapsed() >= self.deadline:
            raise LeaseLost("the lease on the device is gone")
        self._phase = phase
        if self._recording is None or self._recording.done():
            self._recording = asyncio.create_task(self._record_phase(fencing_token))

    async def _record_phase(self, fencing_token: int) -> None:
        await asyncio.sleep(_PHASE_DELAY)
        with contextlib.suppress(LeaseLost):
            if self.fencing_token == fencing_token:
                await self._update()

    async def release(self) -> None:
        """Leave the queue or give the device back."""
        ticket, self._ticket, self.fencing_token = self._ticket, 0, 0
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        self._lock.release()
        if not ticket:
            return
        async with self._writing:
            # Where there is no answer the key expires by itself.
            with contextlib.suppress(Unavailable, WrongSequence):
                try:
                    await self._key.delete()
                except WrongSequence:  # a renewal that was cancelled before it was answered?
                    record = await self._key.read()
                    if record is not None and (record.ticket or self._key.sequence) == ticket:
                        await self._key.delete()

    async def close(self, release: bool) -> None:
        """Disconnect and end every task of the loop. Without `release` the key stays until it expires."""
        if release:
            await self.release()
        if self._nc is not None:
            with contextlib.suppress(Unavailable), nats_errors("the connection cannot be closed"):
                await self._nc.close()
        mine = asyncio.current_task()
        await end(*(task for task in asyncio.all_tasks() if task is not mine))  # nats-py leaves some behind
