"""What both workers do alike: wait for work, take turns on the device, run one song after the other.

A `Stage` is what differs. The event loop here does all the I/O; the engine runs in one thread of its own.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared.delivery import Delivery, Drained, JobStopped
from shared.device import DeviceLedger
from shared.errors import DeviceFull, JobConflict, LeaseLost, SongError, Unavailable
from shared.events import progress_at_start
from shared.gpu import Device, figures
from shared.inbox import Inbox
from shared.jobs import JobStore
from shared.lease import Held, Lease
from shared.messages import Stage as StageEvent
from shared.messages import WorkerStatus
from shared.objects import ObjectStore
from shared.phases import PLANS, Turn
from shared.settings import Settings, host_name
from shared.stage import Stage
from shared.tasks import end
from shared.topology import WORKER_TTL, WORKERS, ack_wait, bootstrap, cancel_subject, connect

log = logging.getLogger(__name__)

HEARTBEAT = WORKER_TTL / 5
START_PATIENCE = 60.0  # seconds that the servers may take to come up

_T = TypeVar("_T")


class Worker:
    """A worker process."""

    def __init__(self, settings: Settings, stage: Stage, device: Device) -> None:
        self.settings, self.stage, self.device = settings, stage, device
        self.instance = f"{host_name()[:24]}-{os.getpid()}-{secrets.token_hex(3)}"
        folder = settings.data_dir / "device" / device.gpu_id
        self.ledger = DeviceLedger(folder, f"{stage.role}.{self.instance}", device.capacity)
        self.store = ObjectStore(settings)
        self.lease = Lease(
            settings,
            gpu=device.gpu_id,
            role=stage.role,
            instance=self.instance,
            exclusive=settings.sequential_offload,
        )
        self.js: JetStreamContext
        self.jobs: JobStore
        self.inbox: Inbox
        self._nc: Client
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._draining = threading.Event()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()  # something changed that the next heartbeat tells: sends it now
        self._waiting = False
        self._since = time.time()
        self._turn: Turn | None = None
        self._current: Delivery | None = None
        self._resident = False

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT. Raises `ConfigError` or `Unavailable` when it cannot begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        await self._connect()
        try:
            began = time.monotonic()
            await self.in_engine(self.stage.load)
            log.info("%s: weights loaded in %.1f s", self.stage.model, time.monotonic() - began)
            await self.lease.start()
            # A side task that dies takes the worker with it: half a worker is worse than none.
            beat, serve = asyncio.create_task(self._heartbeat()), asyncio.create_task(self._serve())
            done, pending = await asyncio.wait({beat, serve}, return_when=asyncio.FIRST_COMPLETED)
            await end(*pending)
            for task in done:
                task.result()
        finally:
            await self._close()

    def drain(self) -> None:
        """Stop at the next step, give back what is unfinished, then end."""
        log.info("draining")
        self._draining.set()
        self._wake.set()

    async def in_engine(self, call: Callable[[], _T]) -> _T:
        """Run something in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._engine, call)

    # --- coming and going

    async def _connect(self) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while True:
            try:
                self._nc = await connect(self.settings, f"{self.stage.role}-{self.instance}")
                self.js = self._nc.jetstream()
                await bootstrap(self.js, self.settings)
                await self.store.ensure_bucket()
                break
            except Unavailable as error:
                if time.monotonic() > deadline or self._draining.is_set():
                    raise
                log.info("waiting for the servers: %s", error)
                await asyncio.sleep(1)
        self.inbox = Inbox(
            self._nc,
            self.js,
            self.stage,
            self.store,
            ack_wait=ack_wait(self.settings),
            closing=self._draining,
            wake=self._wake,
        )
        self.jobs = self.inbox.jobs
        await self._nc.subscribe(cancel_subject("*"), cb=self._on_cancel)
        await self.inbox.open()

    async def _close(self) -> None:
        await self.lease.close()
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
            await self.js.publish(self._worker_subject(), b"", timeout=1, headers={"KV-Operation": "DEL"})
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await self._nc.close()
        self._engine.shutdown()
        self.store.close()
        self.ledger.close()

    async def _on_cancel(self, message: Msg) -> None:
        current = self._current
        if current is not None and message.subject.rpartition(".")[2] == current.job.job_id:
            current.stop()

    async def _heartbeat(self) -> None:
        while True:
            with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
                await self.js.publish(self._worker_subject(), msgspec.json.encode(self._status()), timeout=2)
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await self._news.wait()

    def _worker_subject(self) -> str:
        return f"$KV.{WORKERS}.{self.stage.role}.{self.instance}"

    def _status(self) -> WorkerStatus:
        turn, current = self._turn, self._current
        return WorkerStatus(
            role=self.stage.role,
            instance=self.instance,
            host=host_name(),
            pid=os.getpid(),
            engine=self.settings.engine,
            model=self.stage.model,
            gpu=figures(self.device, self.ledger),
            state="working" if turn else "waiting" if self._waiting else "idle",
            phase=turn.phase if turn else None,
            resident=[resident.label for resident in self.ledger.residents()],
            jobs=[current.job.job_id] if current else [],
            since=self._since,
            sent=time.time(),
        )

    # --- turns

    async def _serve(self) -> None:
        while not self._draining.is_set():
            try:
                message = await self.inbox.wait()
                if not self._draining.is_set():
                    await self._take_turn(message)
                elif message is not None:
                    await message.nak()
            except LeaseLost as error:
                log.warning("turn ended early: %s", error)
            except (Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
                log.warning("NATS or the object store is away: %s", error or type(error).__name__)
                await asyncio.sleep(1)
            except DeviceFull as error:
                log.warning("the device is full, trying again: %s", error)
                await asyncio.sleep(2)

    async def _take_turn(self, message: Msg | None) -> None:
        plan = PLANS[self.stage.role]
        held = await self._acquire(message)
        if held is None:
            return
        turn = self._turn = Turn(held, self.stage.role, self.ledger)
        self._since = time.time()
        try:
            await turn.enter(plan.load)
            delivery = await self.inbox.next(turn, message)
            if delivery is None:  # somebody else was quicker
                return
            self._current = delivery
            try:
                await self._tell_loading(delivery)
                await self._load(turn)
                await turn.enter(plan.work)
                self._news.set()
            except BaseException:
                await self.inbox.give_back(delivery)
                await delivery.close()
                raise
            began = time.monotonic()
            while delivery is not None:
                await self._work(delivery)
                self._current = None
                over = time.monotonic() - began >= self.settings.turn_seconds
                others = [view for view in held.waiting() if view.role != self.stage.role]
                if self._draining.is_set() or (over and others):
                    break
                self._current = delivery = await self.inbox.next(turn, None)
                self._news.set()
            await turn.enter(plan.leave)
        finally:
            self._current = None
            await self._leave(held)

    async def _acquire(self, message: Msg | None) -> Held | None:
        """Wait for the device, keeping alive a message that is in hand already. None when draining."""
        self._waiting = True
        self._news.set()
        wanted = asyncio.create_task(self.lease.acquire())
        try:
            while not wanted.done():
                await asyncio.wait({wanted}, timeout=min(1.0, ack_wait(self.settings) / 6))
                if self._draining.is_set() and not wanted.done():
                    if message is not None:
                        await message.nak()
                    return None
                if message is not None:
                    await message.in_progress()
            return wanted.result()
        finally:
            self._waiting = False
            await end(wanted)

    async def _tell_loading(self, delivery: Delivery) -> None:
        job = delivery.job
        progress = progress_at_start(job.status)
        phase = PLANS[self.stage.role].load
        await delivery.tell(
            StageEvent(job_id=job.job_id, status=job.status, progress=progress, stage="loading", phase=phase)
        )

    async def _load(self, turn: Turn) -> None:
        if not self._resident:
            turn.place_weights(self.stage.label, self.stage.weight_bytes)
            try:
                await self.in_engine(self.stage.to_device)
            except BaseException:
                self.ledger.clear()
                raise
            self._resident = True

    async def _leave(self, held: Held) -> None:
        """End a turn. Freeing is always allowed, with or without a lease; the lease goes last."""
        try:
            if self._resident and self.settings.sequential_offload:
                await self.in_engine(self.stage.to_host)
                self._resident = False
                self.ledger.clear()
        finally:
            self._turn = None
            self._since = time.time()
            self._news.set()
            await held.release()

    async def _work(self, delivery: Delivery) -> None:
        """One song, to whatever end; its message is settled. Raises when the turn cannot go on."""
        job_id = delivery.job.job_id
        began = time.monotonic()
        try:
            await self.stage.work(delivery, self)
            await delivery.message.ack_sync()
            log.info("%s: %s done in %.2f s", job_id, self.stage.status, time.monotonic() - began)
        except (JobStopped, JobConflict) as reason:
            log.info("%s: stopped, %s", job_id, reason)
            await delivery.message.ack_sync()
        except Drained:
            await self.inbox.give_back(delivery)
        except (LeaseLost, Unavailable, nats.errors.Error, APIError, TimeoutError):
            await self.inbox.give_back(delivery)
            raise
        except (SongError, DeviceFull) as error:
            await self.inbox.fail(delivery.message, job_id, delivery.job.tenant, str(error))
        except Exception as error:
            await self.inbox.retry_or_fail(delivery, error)
        finally:
            await delivery.close()
