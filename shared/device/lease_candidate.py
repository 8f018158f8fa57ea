"""A contender for a device: the protocol behind `shared.device.lease`, whose docstring tells how it works.

Everything here runs on the lease's own event loop; only what says so may be read from other threads.
"""

import asyncio
import contextlib
import logging
import time
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError, NotFoundError

from shared.aio import end
from shared.causes import why
from shared.clock import elapsed
from shared.device.file_lock import FileLock
from shared.device.lease_follower import LeaseFollower
from shared.device.lease_queue import PREFIX, STREAM, LeaseQueue, LeaseView, is_gone, read_record
from shared.errors import LeaseLost
from shared.nats.connection import broker, connect
from shared.nats.streams import LOCK_MARKER_TTL
from shared.nats.subjects import lock_key
from shared.schema.worker import LeaseRecord
from shared.settings import Settings
from shared.waiting import until_there

log = logging.getLogger(__name__)

_WRONG_LAST_SEQUENCE = 10071
_START_PATIENCE = 60.0  # seconds that NATS may be away when a worker begins
_PHASE_DELAY = 0.05  # seconds; phases that are over sooner are not written down, each write costs a disk's sync


class LeaseCandidate:
    """The protocol. Lives on the lease thread; `token`, `deadline` and `others` may be read from any."""

    def __init__(self, settings: Settings, gpu: str, role: str, instance: str, scope: str, lock: Path) -> None:
        self._settings = settings
        self._ttl = settings.lease_ttl
        self._role, self._instance = role, instance
        self._subject = PREFIX + lock_key(gpu, role, instance)
        self._lock = FileLock(lock)
        self.token = 0  # fencing token while held, else 0
        self.deadline = 0.0  # on `shared.clock`; nothing may run on the device after it
        self._ticket = 0  # 0: not in the queue
        self._sequence = 0  # of our latest write
        self._phase: int | None = None
        self._since = 0.0
        self._queue = LeaseQueue(self._subject, self._ttl)
        self._follower = LeaseFollower(self._queue, scope, self._observe, self._on_snapshot)
        self._changed = asyncio.Event()
        self._snapshot = asyncio.Event()  # set once the others have been seen for the first time
        self._writing = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None  # writes the phase down
        self._acquiring: asyncio.Task[object] | None = None
        self._watching: asyncio.Task[None] | None = None  # times the others' keys, for as long as we live
        self._following: asyncio.Task[None] | None = None  # the others' keys, for as long as we live
        self._nc: Client | None = None
        self._js: JetStreamContext

    # --- following the others

    async def start(self) -> None:
        # pending_size 0: a renewal must not be sent later than it was timed.
        name = f"lease-{self._role}-{self._instance}"
        self._nc = await until_there(
            broker(self._settings),
            lambda: connect(self._settings, name, on_reconnect=self._on_reconnect, pending_size=0),
            _START_PATIENCE,
        )
        self._js = self._nc.jetstream(timeout=max(1.0, self._ttl / 4))
        self._watching = asyncio.create_task(self._watch())
        self._following = asyncio.create_task(self._follower.run(self._nc, self._js))
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
            if gone and message.subject == self._subject and sequence > self._sequence:
                self._lose("its key is gone")
            self._changed.set()

    def others(self) -> list[LeaseView]:
        """Everybody else in the queue, the next one first."""
        mine = self._subject
        found = [view for subject, view in self._queue.views.items() if subject != mine]
        return sorted(found, key=lambda view: view.ticket)

    # --- what the others leave behind

    async def _watch(self) -> None:
        """Time everybody's key; while we wait, look after those ahead of us that stand still."""
        while True:
            self._queue.tick(elapsed(), self._nc is not None and self._nc.is_connected)
            if self._ticket and not self.token:
                await asyncio.gather(
                    *(
                        self._delete_stale(subject, view) if stale else self._look_at(subject, view)
                        for subject, view, stale in self._queue.doubtful(self._ticket)
                    )
                )
            await asyncio.sleep(self._ttl / 8)

    async def _look_at(self, subject: str, view: LeaseView) -> None:
        """Ask the leader about a key: what follows can miss a change across a restart of the server."""
        try:
            message = await self._js.get_msg(STREAM, subject=subject)
        except NotFoundError:
            self._queue.vanish(subject, view.fence, elapsed())
        except (nats.errors.Error, APIError, TimeoutError, OSError):
            return
        else:
            self._queue.observe(subject, message.seq or 0, message.data or b"", message.headers, elapsed())
        self._changed.set()

    async def _delete_stale(self, subject: str, view: LeaseView) -> None:
        """Take a key away whose owner is gone.

        To pass it over would not be safe: an owner that was stopped between looking at its deadline and writing renews
        when it wakes. It must meet the marker. So must the sequence be the one that was timed, and none read since.
        """
        try:
            await self._delete(subject, view.fence)
        except APIError as error:
            if error.err_code != _WRONG_LAST_SEQUENCE:
                log.warning("lease: the stale lease of %s on %s cannot be deleted: %s", view.owner, view.gpu, error)
                return
            self._queue.restart(subject, view.fence)  # somebody moved it
            await self._look_at(subject, view)
        except (nats.errors.Error, TimeoutError, OSError):
            return
        else:
            log.warning("lease: deleted the stale lease of %s on %s, which no longer moved", view.owner, view.gpu)
            self._queue.clear(subject, view.fence)
            self._changed.set()

    # --- our own key

    async def _write(self, state: str, ticket: int, timeout: float) -> int:
        """One compare-and-set write of our key; moves the deadline. `ticket` 0 enters the queue.

        Raises what `publish` raises, and `LeaseLost` once the deadline is past: somebody else may have taken the device
        since, and a server that brings keys back may have brought ours back too, with the sequence that we know.
        """
        record = LeaseRecord(
            ticket=ticket,
            state="held" if state == "held" else "waiting",
            role=self._role,
            owner=self._instance,
            phase=self._phase,
            since=self._since,
        )
        headers = {
            "Nats-TTL": f"{self._ttl}s",
            "Nats-Expected-Last-Subject-Sequence": str(self._sequence),
        }
        sent = elapsed()
        if ticket and sent >= self.deadline:
            self._lose("it could not be renewed in time")
            raise LeaseLost("the lease on the device is gone")
        ack = await self._js.publish(self._subject, msgspec.json.encode(record), timeout=timeout, headers=headers)
        self._sequence = ack.seq
        self.deadline = sent + self._ttl - 1
        return ack.seq

    async def _last(self) -> tuple[int, LeaseRecord | None]:
        """Sequence and record of our key as the leader has it; (0, None) when there is nothing at all."""
        try:
            message = await self._js.get_msg(STREAM, subject=self._subject)
        except NotFoundError:
            return 0, None
        return message.seq or 0, read_record(message.data) if message.data else None

    async def _update(self) -> bool:
        """Write our key with its present state. False when there was no answer; raises `LeaseLost` when it is gone."""
        async with self._writing:
            if not self._ticket:
                raise LeaseLost("the lease on the device is gone")
            try:
                await self._write("held" if self.token else "waiting", self._ticket, self._ttl / 4)
                return True
            except APIError as error:
                if error.err_code != _WRONG_LAST_SEQUENCE:
                    log.warning("lease: renewal refused: %s", why(error))
                    return False
            except (nats.errors.Error, TimeoutError, OSError):
                return False
            # Either an earlier write got through without an answer, or the key is gone.
            try:
                sequence, record = await self._last()
            except (nats.errors.Error, APIError, TimeoutError, OSError):
                return False
            if record is None or (record.ticket or sequence) != self._ticket:
                self._lose("its key was replaced")
                raise LeaseLost("the lease on the device is gone")
            self._sequence = sequence
        return await self._update()

    async def _renew(self) -> None:
        pause = self._ttl / 4
        while self._ticket:
            await asyncio.sleep(pause)
            if not self._ticket:
                return
            if elapsed() >= self.deadline:
                self._lose("it could not be renewed in time")
                return
            try:
                pause = self._ttl / 4 if await self._update() else 0.25
            except LeaseLost:
                return

    def _lose(self, why: str) -> None:
        if self.token:
            log.error("lease lost: %s", why)
        self.token = 0
        self._ticket = 0
        self._changed.set()

    # --- taking, changing, giving back

    async def acquire(self) -> int:
        if self.token:
            raise RuntimeError("the lease is held already")
        self._acquiring = asyncio.current_task()
        try:
            while True:
                await self._enter_queue()
                if await self._wait_for_turn():
                    return self.token
        except BaseException:
            await self.release()
            raise

    async def withdraw(self) -> None:
        """Whoever waited waits no more; what `acquire` got meanwhile is given back."""
        if self._acquiring is not None:
            await end(self._acquiring)
        await self.release()

    async def _enter_queue(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        while True:
            async with self._writing:
                try:
                    self._sequence, _ = await self._last()
                    self._phase, self._since = None, time.time()
                    self._ticket = await self._write("waiting", 0, self._ttl / 4)
                    break
                except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
                    log.debug("lease: cannot enter the queue yet: %r", error)
            await asyncio.sleep(0.25)
        self._renewing = asyncio.create_task(self._renew())

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
                    token = await self._write("held", self._ticket, self._ttl / 4)
                    if self._ticket:  # else the place was given up while the answer was under way
                        self.token = token
                    break
                except LeaseLost:
                    return False
                except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
                    log.debug("lease: not confirmed yet: %r", error)
            await asyncio.sleep(0.05)
            with contextlib.suppress(LeaseLost):
                await self._update()
        began, told = elapsed(), False
        while self.token:
            # A holder that was stopped, not killed, may still have work queued on the device: wait for the process.
            if self._lock.take():
                return True
            if not told and elapsed() - began > self._ttl:
                told = True
                log.warning("lease: the process that held it before still holds the device: %s", self._lock.path)
            await asyncio.sleep(0.02)
        return False

    async def enter(self, token: int, phase: int) -> None:
        if self.token != token or elapsed() >= self.deadline:
            raise LeaseLost("the lease on the device is gone")
        self._phase = phase
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_phase(token))

    async def _tell_phase(self, token: int) -> None:
        await asyncio.sleep(_PHASE_DELAY)
        with contextlib.suppress(LeaseLost):
            if self.token == token:
                await self._update()

    async def release(self) -> None:
        """Leave the queue or give the device back: a delete marker, by compare-and-set."""
        ticket, self._ticket, self.token = self._ticket, 0, 0
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        self._lock.release()
        if not ticket:
            return
        async with self._writing:
            # Where there is no answer the key expires by itself.
            with contextlib.suppress(nats.errors.Error, APIError, TimeoutError, OSError):
                try:
                    await self._delete(self._subject, self._sequence)
                except APIError as error:
                    if error.err_code != _WRONG_LAST_SEQUENCE:
                        raise
                    # A renewal that was cancelled before it was answered?
                    self._sequence, record = await self._last()
                    if record is not None and (record.ticket or self._sequence) == ticket:
                        await self._delete(self._subject, self._sequence)

    async def _delete(self, subject: str, sequence: int) -> None:
        headers = {
            "KV-Operation": "DEL",
            "Nats-TTL": f"{LOCK_MARKER_TTL}s",
            "Nats-Expected-Last-Subject-Sequence": str(sequence),
        }
        await self._js.publish(subject, b"", timeout=self._ttl / 4, headers=headers)

    async def close(self, release: bool) -> None:
        if release:
            await self.release()
        if self._nc is not None:
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                await self._nc.close()
        mine = asyncio.current_task()
        await end(*(task for task in asyncio.all_tasks() if task is not mine))  # nats-py leaves some behind
