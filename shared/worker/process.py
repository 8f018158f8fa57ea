"""What both workers do alike: wait for work, take turns on the device, work on several songs at once.

A `Stage` is what differs. The event loop here does all the I/O; the engine runs in one thread of its own. A song that
has left the device is stored and handed on while the next one is on it, or the next worker already holds the device.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import APIError

from shared import tracing
from shared.aio import end
from shared.causes import why
from shared.device.info import Device, figures
from shared.device.lease import Held, Lease
from shared.device.ledger import DeviceLedger
from shared.device.turn import PLANS, Turn
from shared.entrypoint import tell_in_logs
from shared.errors import DeviceBroken, DeviceFull, JobConflict, LeaseLost, SongError, TokensLost, Unavailable
from shared.jobs.events import progress_at_start
from shared.jobs.store import JobStore
from shared.nats.connection import broker, connect
from shared.nats.streams import WORKER_TTL, ack_wait, require
from shared.nats.subjects import WORKERS
from shared.schema.event import Stage as StageEvent
from shared.schema.worker import WorkerStatus
from shared.settings import Settings, host_name
from shared.storage.objects import ObjectStore
from shared.storage.write_gate import WriteGate
from shared.tracing import span, waited
from shared.waiting import until_there
from shared.worker.job_consumer import JobConsumer
from shared.worker.job_context import JobContext, JobStopped, Paused
from shared.worker.metrics import Outcome, WorkerMetrics, timed
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.stage import Stage
from shared.worker.turn_policy import Decision, Situation, TurnPolicy
from shared.write_failures import write_failed, writes_failed

log = logging.getLogger(__name__)

HEARTBEAT = WORKER_TTL / 5
START_PATIENCE = 60.0  # seconds that the servers may take to come up
AWAY_PATIENCE = 120.0  # seconds that NATS may be away before finished work is dropped and its song given back
DRAIN_PATIENCE = 5.0  # the same while draining
_TICK = 0.25  # seconds between two decisions when nothing happens
_STALE = 15.0  # seconds after which a problem that nobody ran into again is none: its songs were cancelled
_PAUSES = (0.5, 5.0)  # seconds between two attempts to do something that failed: at first, and at most
_LOAD_PATIENCE = 600.0  # seconds for which a model that loads or compiles counts as movement
_BACKLOG = 32  # songs off the device that may be unsettled before no further one is begun

_T = TypeVar("_T")


class Worker:
    """A worker process."""

    def __init__(self, settings: Settings, stage: Stage, device: Device) -> None:
        self.settings, self.stage, self.device = settings, stage, device
        self.instance = f"{host_name()[:24]}-{os.getpid()}-{secrets.token_hex(3)}"
        folder = settings.data_dir / "device" / device.gpu_id
        self.ledger = DeviceLedger(folder, f"{stage.role}.{self.instance}", device.capacity)
        self.memory = PhaseMemoryLog(lambda: figures(device, self.ledger).memory_used)
        self.store = ObjectStore(settings)
        self._gate = WriteGate(self.store)
        self.lease = Lease(
            settings,
            gpu=device.gpu_id,
            role=stage.role,
            instance=self.instance,
            exclusive=settings.sequential_offload,
        )
        self.js: JetStreamContext
        self.jobs: JobStore
        self.inbox: JobConsumer
        self.nc: Client
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.metrics = WorkerMetrics(stage.role)
        self.metrics.watch(lambda: stage.rate.all_frames, lambda: stage.rate.all_seconds)
        self._policy = TurnPolicy(settings.turn_seconds)
        self._draining = threading.Event()
        self._drained_at = 0.0
        self._wake = asyncio.Event()  # something may have come, ended or changed
        self._news = asyncio.Event()  # something changed that the next heartbeat tells: sends it now
        self._waiting = False
        self._since = time.time()
        self._turn: Turn | None = None
        self._songs: dict[JobContext, asyncio.Task[None]] = {}  # until settled
        self._trouble: Exception | None = None  # why the turn should end
        self._problem: str | None = None  # why nothing can be done, for people
        self._said_at = 0.0
        self._broken: DeviceBroken | None = None
        self._resident = False
        self._movement = 0  # steps, models and songs that were brought further
        self._loading_since: float | None = None  # monotonic

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises `ConfigError` or `Unavailable` when it cannot begin, `DeviceBroken` when it cannot go on.
        """
        tell_in_logs(role=lambda: self.stage.role, phase=lambda: self._turn.phase if self._turn else None)
        tracing.start(f"heartmula-{self.stage.role}")
        if self.settings.metrics_port:
            self.metrics.serve(self.settings.metrics_host, self.settings.metrics_port)
        await self._connect()  # a signal ends the process until now: there is nothing to give back
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
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
        self._drained_at = time.monotonic()
        self._draining.set()
        self._wake.set()

    @property
    def draining(self) -> bool:
        """Whether the worker is shutting down."""
        return self._draining.is_set()

    async def in_engine(self, call: Callable[[], _T]) -> _T:
        """Run something in the engine's thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, call)

    async def insist(self, call: Callable[[], Awaitable[_T]], result_of: JobContext | None = None) -> _T:
        """Do something that may be done twice, again while NATS or the object store is away, ever more seldom.

        Raises what it raised last once that has lasted for too long. A song's result, however, is kept for as long as
        the object store does not take it and the song is wanted: no other worker could store it either.
        """
        began, pause = time.monotonic(), _PAUSES[0]
        while True:
            try:
                return await call()
            except (Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
                now, draining = time.monotonic(), self._draining.is_set()
                if result_of is not None and isinstance(error, Unavailable) and error.service == "s3":
                    if result_of.stopped:
                        raise JobStopped("the song was cancelled, or is another worker's") from error
                    self._say(f"songs in hand wait, because the object store takes no results: {error}")
                    began = now
                if now - (self._drained_at if draining else began) > (DRAIN_PATIENCE if draining else AWAY_PATIENCE):
                    raise
                log.warning("trying again in %g s: %s", pause, why(error))
                await self._pause(pause)
                pause = min(2 * pause, _PAUSES[1])

    async def _pause(self, seconds: float) -> None:
        """Sleep, at most a moment longer than until the worker drains."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))
            if self._draining.is_set():
                return

    def moved(self) -> None:
        """Something got further. From any thread: a lost count does no harm."""
        self._loading_since = None
        self._movement += 1

    # --- coming and going

    async def _connect(self) -> None:
        server, name = broker(self.settings), f"{self.stage.role}-{self.instance}"
        self.nc = await until_there(server, lambda: connect(self.settings, name), START_PATIENCE)
        self.js = self.nc.jetstream()
        try:
            await until_there(server, lambda: require(self.js), START_PATIENCE)
            await until_there(self.store.where, self.store.ensure_bucket, START_PATIENCE)
        except BaseException:
            await self.nc.close()
            raise
        self.inbox = JobConsumer(
            self.nc,
            self.js,
            self.stage,
            self.store,
            ack_wait=ack_wait(self.settings),
            closing=self._draining,
            wake=self._wake,
            in_hand=lambda job_id: any(delivery.job.job_id == job_id for delivery in self._songs),
            moved=self.moved,
        )
        self.jobs = self.inbox.jobs
        await self.nc.subscribe("ctl.cancel.*", cb=self._on_cancel)
        await self.inbox.open()

    async def _close(self) -> None:
        await self.lease.close(release=self._broken is None)
        with contextlib.suppress(nats.errors.Error, APIError, TimeoutError):
            await self.js.publish(self._worker_subject(), b"", timeout=1, headers={"KV-Operation": "DEL"})
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await self.nc.close()
        self.executor.shutdown()
        self.store.close()
        self.ledger.close()

    async def _on_cancel(self, message: Msg) -> None:
        for delivery in self._songs:
            if message.subject.rpartition(".")[2] == delivery.job.job_id:
                delivery.stop()

    async def _heartbeat(self) -> None:
        while True:
            try:
                await self.js.publish(self._worker_subject(), msgspec.json.encode(self._status()), timeout=2)
            except (nats.errors.Error, APIError, TimeoutError):
                write_failed("nats")
            self._news.clear()
            await asyncio.sleep(_TICK)  # under load turns are short, and nobody reads that fast
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await self._news.wait()

    def _worker_subject(self) -> str:
        return f"$KV.{WORKERS}.{self.stage.role}.{self.instance}"

    def _status(self) -> WorkerStatus:
        turn, rate = self._turn, self.stage.rate
        if self._loading_since is not None and time.monotonic() - self._loading_since < _LOAD_PATIENCE:
            self._movement += 1
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
            jobs=[delivery.job.job_id for delivery in self._on_device()],
            slots=self.stage.slots,
            rate=rate.per_second,
            song_frames=rate.song_frames,
            memory=self.memory.phases,
            problem=self._problem if time.monotonic() - self._said_at < _STALE else None,
            movement=self._movement,
            failed_writes=writes_failed(),
            since=self._since,
            sent=time.time(),
        )

    # --- turns

    async def _serve(self) -> None:
        while not self._draining.is_set():
            try:
                await self.inbox.wait()
                if obstacle := await self.stage.obstacle(self.js):
                    self._say(obstacle)
                    await asyncio.sleep(1)
                elif obstacle := await self._gate.obstacle():
                    self._say(obstacle)
                    await self._pause(self._gate.pause)
                elif len(self._songs) >= _BACKLOG:
                    await asyncio.sleep(_TICK)
                elif not self._draining.is_set():
                    await self._take_turn()
            except LeaseLost as error:
                log.warning("turn ended early: %s", error)
            except (Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
                log.warning("NATS or the object store is away: %s", why(error))
                await asyncio.sleep(1)
            except DeviceFull as error:
                self._say(f"waiting for memory on the device: {error}")
                await asyncio.sleep(2)
            except OSError as error:
                self._say(f"this worker cannot write: {error}")
                await asyncio.sleep(2)
        if self._songs:
            await asyncio.wait(list(self._songs.values()))
        if self._broken is not None:  # whoever watches over this process starts a new one
            raise self._broken

    def _say(self, problem: str | None) -> None:
        """Tell the world why nothing can be done, or that all is well again."""
        self._said_at = time.monotonic()
        if problem != self._problem:
            self._problem = problem
            self._news.set()
            if problem:
                log.warning("%s", problem)

    async def _take_turn(self) -> None:
        plan = PLANS[self.stage.role]
        with timed(self.metrics.wait):
            held = await self._acquire()
        if held is None:
            return
        began = time.monotonic()
        turn = self._turn = Turn(held, self.stage.role, self.ledger)
        self._since = time.time()
        self._trouble = None
        try:
            if self._draining.is_set():
                return
            self.memory.begin()
            await turn.enter(plan.load)
            self.memory.enter(plan.load)
            first = await self.inbox.next(turn)
            if first is None:  # somebody else was quicker
                return
            try:
                self._tell_loading(first)
                await self._load(turn)
                await turn.enter(plan.work)
                self.memory.enter(plan.work)
                self._say(None)
            except BaseException:
                await self.inbox.give_back(first, delay=1)
                await first.close()
                raise
            await self._work_off(turn, held, first)
            await turn.enter(plan.leave)
            self.memory.enter(plan.leave)
        finally:
            await self._leave(held)
            self.metrics.turn.observe(time.monotonic() - began)

    async def _work_off(self, turn: Turn, held: Held, first: JobContext) -> None:
        """Work on songs until the policy says that the turn is over; then nothing of any song is on the device."""
        began = time.monotonic()
        self._begin(first)
        more, looked = True, began
        while True:
            if self._wake.is_set() or time.monotonic() - looked > 1:
                self._wake.clear()
                more, looked = True, time.monotonic()
            decision = self._decide(held, began, more)
            if decision is Decision.ADMIT:
                try:
                    delivery = await self.inbox.next(turn)
                except (Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
                    self._trouble = error
                    continue
                more = delivery is not None
                if delivery is not None:
                    self._begin(delivery)
            elif decision is Decision.YIELD:
                break
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK):
                        await self._wake.wait()
        for delivery in self._on_device():
            delivery.paused.set()
        for delivery in self._on_device():
            await delivery.off_device.wait()
        if self._trouble is not None:
            raise self._trouble

    def _decide(self, held: Held, began: float, more: bool) -> Decision:
        if self._draining.is_set() or self._trouble is not None or not held.alive:
            return Decision.YIELD
        running = len(self._on_device())
        asked = [view.since for view in held.waiting() if view.role != self.stage.role]
        return self._policy.decide(
            Situation(
                running=running,
                slots=self.stage.slots,
                waiting=more and len(self._songs) - running < _BACKLOG and self.store.trouble is None,
                held=time.monotonic() - began,
                wanted=time.time() - min(asked) if asked else None,
            )
        )

    def _on_device(self) -> list[JobContext]:
        return [delivery for delivery in self._songs if not delivery.off_device.is_set()]

    def _begin(self, delivery: JobContext) -> None:
        task = asyncio.create_task(self._work(delivery))
        left = asyncio.create_task(delivery.off_device.wait())
        self._songs[delivery] = task
        self._news.set()

        def settled(task: asyncio.Task[None]) -> None:
            delivery.off_device.set()
            del self._songs[delivery]
            self._news.set()
            if not task.cancelled() and (error := task.exception()):
                log.error("%s: not settled, it comes again: %r", delivery.job.job_id, error)

        task.add_done_callback(settled)
        left.add_done_callback(lambda _: self._wake.set())

    async def _acquire(self) -> Held | None:
        """Wait for the device. None when draining."""
        self._waiting, self._since = True, time.time()
        self._news.set()
        wanted = asyncio.create_task(self.lease.acquire())
        try:
            while not wanted.done():
                await asyncio.wait({wanted}, timeout=_TICK)
                if self._draining.is_set() and not wanted.done():
                    return None
            return wanted.result()
        finally:
            self._waiting = False
            await end(wanted)

    def _tell_loading(self, delivery: JobContext) -> None:
        job = delivery.job
        delivery.tell(
            StageEvent(
                job_id=job.job_id,
                status=job.status,
                progress=progress_at_start(job.status),
                stage="loading",
                phase=PLANS[self.stage.role].load,
                memory_used=self.memory.now,
            )
        )

    async def _load(self, turn: Turn) -> None:
        if not self._resident:
            turn.place_weights(self.stage.label, self.stage.weight_bytes)
            self._loading_since = time.monotonic()
            try:
                with timed(self.metrics.load):
                    await self.in_engine(self.stage.to_device)
            except BaseException:
                self.ledger.clear()
                raise
            finally:
                if not self.settings.compile:  # else the first step takes minutes, until it has made a frame
                    self._loading_since = None
            self._resident = True

    async def _leave(self, held: Held) -> None:
        """End a turn. Freeing is always allowed, with or without a lease; the lease goes last.

        While it cannot be known that the device is free, the lease stays: this process has to end for that.
        """
        try:
            if self._resident and self.settings.sequential_offload and self._broken is None:
                with timed(self.metrics.unload):
                    await self.in_engine(self.stage.to_host)
                self._resident = False
                self.ledger.clear()
        except Exception as error:
            self._broken = DeviceBroken(f"the device could not be freed: {error}")
            self.drain()
        self._turn = None
        self.memory.end()
        self._since = time.time()
        self._news.set()
        if self._broken is None:
            await held.release()

    # --- songs

    async def _work(self, delivery: JobContext) -> None:
        """One song, to whatever end; its message is settled."""
        job_id = delivery.job.job_id
        began = time.monotonic()
        outcome: Outcome = "handed_back"  # also where its end could not be written: its message comes again
        if delivery.message.metadata.num_delivered > 1:
            self.metrics.redeliveries.inc()
        log.info("%s: %s begins", job_id, self.stage.status)
        headers = delivery.message.headers
        waited("wait", headers, delivery.message.metadata.timestamp)
        try:
            with span(self.stage.status, headers, job_id=job_id):
                await self.stage.work(delivery, self)
            await self.insist(delivery.message.ack_sync)
            outcome = "done"
            self.moved()
            log.info("%s: %s done in %.2f s", job_id, self.stage.status, time.monotonic() - began)
        except (JobStopped, JobConflict) as reason:
            outcome = "stopped"
            log.info("%s: stopped, %s", job_id, reason)
            await self._clear_away(delivery)
        except (Paused, LeaseLost):
            await self.inbox.give_back(delivery)
        except DeviceBroken as error:
            self._broken = error
            self.drain()
            await self.inbox.give_back(delivery, blameless=False)
        except (Unavailable, nats.errors.Error, APIError, TimeoutError) as error:
            self._trouble = error
            if isinstance(error, Unavailable) and error.service == "s3":
                self._gate.doubt()
            await self.inbox.give_back(delivery, delay=2)
        except DeviceFull as error:
            outcome = await self._blame_memory(delivery, error)
        except OSError as error:  # a full disk is no fault of the song
            self._say(f"this worker cannot write: {error}")
            self._trouble = error
            await self.inbox.give_back(delivery, delay=5)
        except TokensLost as lost:
            what = str(lost)
            try:
                await self.insist(lambda: self.inbox.send_back(delivery, what))
            except SongError as hopeless:
                await self.inbox.fail(delivery.message, job_id, delivery.job.tenant, str(hopeless))
                outcome = "failed"
        except SongError as error:
            await self.inbox.fail(delivery.message, job_id, delivery.job.tenant, str(error))
            outcome = "failed"
        except Exception as error:
            outcome = "failed" if await self.inbox.retry_or_fail(delivery, error) else "tried_again"
        finally:
            self.metrics.attempts[outcome].inc()
            delivery.off_device.set()
            await delivery.close()

    async def _clear_away(self, delivery: JobContext) -> None:
        """A song that was cancelled leaves no objects; those of one that is now another worker's are that one's."""
        job = await self.insist(lambda: self.jobs.get(delivery.job.job_id, delivery.job.tenant))
        if job is not None and self.stage.accepts(job):  # another worker has it now, and with it the message
            return
        if job is not None and job.status == "cancelled":
            for folder in ("tokens", "audio"):
                await self.insist(lambda folder=folder: self.store.delete(f"{folder}/{job.job_id}/"))  # type: ignore[misc]
        await delivery.message.ack_sync()

    async def _blame_memory(self, delivery: JobContext, error: DeviceFull) -> Outcome:
        """Memory that others hold comes back; what is not there at all does not."""
        needed = self.stage.weight_bytes + self.stage.song_bytes(delivery.job)
        advice = "a shorter song (max_duration_ms), cfg_scale 1 or a smaller HEARTMULA_MODEL_DTYPE needs less"
        residents = self.ledger.residents()
        booked = sum(resident.nbytes for resident in residents)
        ours_alone = all(resident.owner == self.ledger.owner for resident in residents)
        foreign = figures(self.device, self.ledger).memory_used - booked
        if needed <= self.device.capacity and ours_alone and foreign < self.device.capacity / 10:
            over = await self.inbox.retry_or_fail(delivery, SongError(f"{error}; {advice}"))
            return "failed" if over else "tried_again"
        if needed > self.device.capacity:
            await self.inbox.fail(delivery.message, delivery.job.job_id, delivery.job.tenant, f"{error}; {advice}")
            return "failed"
        self._say(f"waiting for memory on the device: {error}")
        self._trouble = error
        await self.inbox.give_back(delivery, delay=2)
        return "handed_back"
