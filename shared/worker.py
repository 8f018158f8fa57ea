"""What both workers do alike: wait for work, take turns on the device, claim songs, settle messages.

A `Stage` is what differs. The event loop here does all the I/O; the engine runs in one thread of its own.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared.delivery import Delivery, Drained, JobStopped
from shared.device import DeviceLedger
from shared.errors import ConfigError, DeviceFull, JobConflict, LeaseLost, ObjectError, SongError, Unavailable
from shared.events import EventPublisher, progress_at_start
from shared.gpu import Device, figures
from shared.jobs import JobStore, change
from shared.lease import Held, Lease
from shared.messages import ENDED, SCHEMA, DecodeJob, Failed, Job, Role, Status, TokenJob, WorkerStatus
from shared.messages import Stage as StageEvent
from shared.objects import ObjectStore
from shared.phases import PLANS, Turn
from shared.settings import Settings, host_name
from shared.topology import (
    WORKER_TTL,
    WORKERS,
    ack_wait,
    bootstrap,
    connect,
    dead_subject,
)

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
HEARTBEAT = WORKER_TTL / 5
POLL = 1.0  # seconds between looks at the queue when nothing announces work
START_PATIENCE = 60.0  # seconds that the servers may take to come up

_T = TypeVar("_T")


class Stage(Protocol):
    """One worker's part in a song."""

    role: Role
    status: Status  # of a song that is in this stage
    stream: str
    consumers: tuple[str, ...]  # in the order of their priority
    wake_subject: str  # a message here means work
    order: type[TokenJob] | type[DecodeJob]
    model: str  # for people
    label: str  # of the weights on the device

    @property
    def weight_bytes(self) -> int: ...

    def load(self) -> None:
        """Read the weights into host memory."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Move the weights back and free everything else."""

    def accepts(self, job: Job) -> bool:
        """Whether a song in this state still needs this stage."""

    async def work(self, delivery: Delivery, worker: "Worker") -> None:
        """Do the stage for one song and hand it on: when this returns the message is acknowledged."""


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
        self.events: EventPublisher
        self._nc: Client
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._draining = threading.Event()
        self._wake = asyncio.Event()
        self._state: str = "idle"
        self._since = time.time()
        self._turn: Turn | None = None
        self._current: Delivery | None = None
        self._resident = False
        self._last_probe = 0.0
        self._pulls: dict[str, JetStreamContext.PullSubscription] = {}

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
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
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
        self.jobs, self.events = JobStore(self.js), EventPublisher(self.js)
        await self._nc.subscribe("ctl.cancel.*", cb=self._on_cancel)
        await self._nc.subscribe(self.stage.wake_subject, cb=self._on_work)

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

    async def _on_work(self, message: Msg) -> None:
        self._wake.set()

    async def _heartbeat(self) -> None:
        while True:
            with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
                await self.js.publish(self._worker_subject(), msgspec.json.encode(self._status()), timeout=2)
            await asyncio.sleep(HEARTBEAT)

    def _worker_subject(self) -> str:
        return f"$KV.{WORKERS}.{self.stage.role}.{self.instance}"

    def _status(self) -> WorkerStatus:
        turn, current = self._turn, self._current
        own = f"{self.stage.role}.{self.instance}"
        return WorkerStatus(
            role=self.stage.role,
            instance=self.instance,
            host=host_name(),
            pid=os.getpid(),
            engine=self.settings.engine,
            model=self.stage.model,
            gpu=figures(self.device, self.ledger),
            state="working" if turn else "waiting" if self._state == "waiting" else "idle",
            phase=turn.phase if turn else None,
            resident=[r.label for r in self.ledger.residents() if r.owner == own],
            job_id=current.job.job_id if current else None,
            since=self._since,
        )

    # --- turns

    async def _serve(self) -> None:
        while not self._draining.is_set():
            try:
                message = await self._wait_for_work()
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

    async def _wait_for_work(self) -> Msg | None:
        """Return when a song waits; with its message where it had been given to a worker before."""
        while not self._draining.is_set():
            self._wake.clear()
            busy = False
            for name in self.stage.consumers:
                info = await self.js.consumer_info(self.stage.stream, name)
                if info.num_pending:
                    return None
                busy = busy or bool(info.num_ack_pending)
            # A message that a dead worker held does not count as pending; only asking for it shows it.
            if busy and time.monotonic() - self._last_probe > ack_wait(self.settings) / 6:
                self._last_probe = time.monotonic()
                for name in self.stage.consumers:
                    if message := await self._fetch_from(name, 0.2):
                        return message
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL)
        return None

    async def _take_turn(self, message: Msg | None) -> None:
        plan = PLANS[self.stage.role]
        held = await self._acquire(message)
        if held is None:
            return
        turn = self._turn = Turn(held, self.stage.role, self.ledger)
        self._since = time.time()
        try:
            await turn.enter(plan.load)
            delivery = await self._next(turn, message)
            if delivery is None:  # somebody else was quicker
                return
            self._current = delivery
            try:
                await self._tell_loading(delivery)
                await self._load(turn)
                await turn.enter(plan.work)
            except BaseException:
                await self._give_back(delivery)
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
                self._current = delivery = await self._next(turn, None)
            await turn.enter(plan.leave)
        finally:
            self._current = None
            await self._leave(held)

    async def _acquire(self, message: Msg | None) -> Held | None:
        """Wait for the device, keeping alive a message that is in hand already. None when draining."""
        self._state = "waiting"
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
            self._state = "idle"
            if not wanted.done():
                wanted.cancel()
                await asyncio.gather(wanted, return_exceptions=True)

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
            await self.in_engine(self.stage.to_device)
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
            await held.release()

    # --- messages

    async def _fetch(self) -> Msg | None:
        for name in self.stage.consumers:
            info = await self.js.consumer_info(self.stage.stream, name)
            if info.num_pending and (message := await self._fetch_from(name, 1.0)):
                return message
        return None

    async def _fetch_from(self, consumer: str, timeout: float) -> Msg | None:
        # One message and a short wait: larger or longer fetches stall across a reconnect.
        if consumer not in self._pulls:
            self._pulls[consumer] = await self.js.pull_subscribe_bind(consumer, self.stage.stream)
        try:
            return (await self._pulls[consumer].fetch(1, timeout=timeout))[0]
        except TimeoutError:
            return None

    async def _next(self, turn: Turn, message: Msg | None) -> Delivery | None:
        """The next song that needs this stage, claimed under the turn's fencing token."""
        while (message := message or await self._fetch()) is not None:
            delivery = await self._claim(turn, message)
            if delivery is not None:
                return delivery
            message = None
        return None

    async def _claim(self, turn: Turn, message: Msg) -> Delivery | None:
        try:
            order = msgspec.json.decode(message.data, type=self.stage.order)
        except msgspec.DecodeError as error:
            await self._bury(message, message.subject.rpartition(".")[2], f"not a job message: {error}")
            return None
        if order.schema > SCHEMA:
            log.warning("left for a newer worker: %s has schema %d", order.job_id, order.schema)
            await message.nak(delay=60)
            return None

        def claim(job: Job) -> Job:
            if not self.stage.accepts(job):
                raise JobStopped(f"the song is {job.status} already")
            attempts = job.attempts + 1 if job.status == self.stage.status else 1
            if attempts > MAX_ATTEMPTS:
                raise SongError(job.error or f"its worker died {MAX_ATTEMPTS} times while working on it")
            return change(
                job,
                status=self.stage.status,
                fence=turn.fence,
                attempts=attempts,
                started_at=job.started_at or time.time(),
            )

        try:
            job = await self.jobs.update(order.job_id, order.tenant, claim)
        except (JobStopped, JobConflict) as reason:  # ended, handed on, or its record expired
            log.info("%s: nothing to do, %s", order.job_id, reason)
            await message.ack_sync()
            return None
        except SongError as error:
            await self._fail(message, order.job_id, order.tenant, str(error))
            return None
        delivery = Delivery(
            message,
            order,
            job,
            turn,
            jobs=self.jobs,
            events=self.events,
            draining=self._draining,
            alive_every=ack_wait(self.settings) / 3,
        )
        return delivery

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
            await self._give_back(delivery)
        except (LeaseLost, Unavailable, nats.errors.Error, APIError, TimeoutError):
            await self._give_back(delivery)
            raise
        except (SongError, DeviceFull) as error:
            await self._fail(delivery.message, job_id, delivery.job.tenant, str(error))
        except Exception as error:
            await self._retry_or_fail(delivery, error)
        finally:
            await delivery.close()

    async def _give_back(self, delivery: Delivery) -> None:
        """Into the queue again, through no fault of the song: the attempt does not count."""

        def uncount(job: Job) -> Job:
            if job.fence != delivery.job.fence or job.status in ENDED:
                return job
            return change(job, attempts=max(0, job.attempts - 1))

        with contextlib.suppress(JobConflict, Unavailable, nats.errors.Error, APIError, TimeoutError):
            await self.jobs.update(delivery.job.job_id, delivery.job.tenant, uncount)
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
            await delivery.message.nak()
            await self._nc.flush(1)
        log.info("%s: given back", delivery.job.job_id)

    async def _retry_or_fail(self, delivery: Delivery, error: Exception) -> None:
        reason = str(error) if isinstance(error, ObjectError) else f"{type(error).__name__}: {error}"
        job = delivery.job
        log.exception("%s: attempt %d failed", job.job_id, job.attempts)
        if job.attempts >= MAX_ATTEMPTS:
            await self._fail(delivery.message, job.job_id, job.tenant, reason)
            return

        def remember(record: Job) -> Job:
            return record if record.status in ENDED else change(record, error=reason)

        await self.jobs.update(job.job_id, job.tenant, remember)
        await delivery.message.nak(delay=2.0**job.attempts)

    async def _fail(self, message: Msg, job_id: str, tenant: str, reason: str) -> None:
        """The song ends here, with a reason in its record."""

        def fail(job: Job) -> Job:
            return job if job.status in ENDED else change(job, status="failed", error=reason)

        log.error("%s: failed, %s", job_id, reason)
        with contextlib.suppress(JobConflict):
            job = await self.jobs.update(job_id, tenant, fail)
            if job.status == "failed":
                await self.events.publish(tenant, Failed(job_id=job_id, status="failed", progress=0, error=reason))
        await self._bury(message, job_id, reason)
        with contextlib.suppress(Unavailable, ObjectError):
            await self.store.delete(f"tokens/{job_id}/")

    async def _bury(self, message: Msg, job_id: str, reason: str) -> None:
        """Keep a message that nobody can use where an operator finds it, and take it out of the queue."""
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in job_id) or "unknown"
        await self.js.publish(
            dead_subject(self.stage.role, name), message.data, headers={"Reason": reason.replace("\n", " ")[:500]}
        )
        await message.term()


def main(build: Callable[[Settings], Coroutine[Any, Any, Worker]]) -> int:
    """Run a worker process to its end; returns its exit code."""
    try:
        settings = Settings.load()
        settings.require_servers()
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        )
        asyncio.run(_main(settings, build))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _main(settings: Settings, build: Callable[[Settings], Coroutine[Any, Any, Worker]]) -> None:
    worker = await build(settings)
    await worker.run()
