"""A simulation without real time: candidates as processes that are stopped and killed, and a server that errs.

The server keeps the last message of each subject, as GPU_LOCK does, and compares sequences correctly: nothing could be
promised otherwise. Everything else goes wrong: keys come back after their end or vanish, messages are delivered late or
twice, answers and questions get lost, connections break.
"""

import asyncio
import heapq
import selectors
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal

import nats
from nats.js.api import ConsumerConfig
from nats.js.errors import BadRequestError, NotFoundError

from shared.device.lease_candidate import LeaseCandidate
from shared.device.lease_queue import is_gone
from shared.settings import Settings

STEP = 0.05  # seconds
TTL = 8


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that takes its time from the world and runs only in the world's steps."""

    def __init__(self, world: "World") -> None:
        self._world = world
        super().__init__(selectors.SelectSelector())

    def time(self) -> float:
        return self._world.now

    def step(self) -> None:
        """Run one iteration: everything that is due, without waiting."""
        self.stop()
        self.run_forever()


class _Candidate(LeaseCandidate):
    """Its process may be stopped between looking at its deadline and writing."""

    slow = False  # until set back
    about_to_write = False

    async def _write(self, state: Literal["waiting", "held"], ticket: int) -> int:
        await asyncio.sleep(0)
        while self.slow:
            self.about_to_write = True
            await asyncio.sleep(0)
        return await super()._write(state, ticket)


@dataclass(frozen=True)
class Stored:
    """A message of the server."""

    subject: str
    sequence: int
    data: bytes
    headers: Mapping[str, str]
    ends: float  # when it expires; infinite after it came back


class Process:
    """A worker that acquires the device, keeps it for a while and releases it, in an endless loop."""

    def __init__(self, world: "World", name: str, folder: Path) -> None:
        self.world, self.name = world, name
        self.loop = _Loop(world)
        # A lock file of its own: on several machines the lease alone has to exclude.
        self.candidate = _Candidate(Settings(lease_ttl=TTL), "gpu0", "codec", name, "gpu0.*.*", folder / f"{name}.lock")
        self.stopped_until = 0.0
        self.cut_off_until = 0.0
        self.connected = True
        self.taken = 0
        self.keeps: float | None = None  # seconds for which it keeps the device
        self.subscriptions: dict[str, _Subscription] = {}  # by inbox; those of a lost connection are gone
        self.on_reconnect: Callable[[], Awaitable[None]]
        self.work = self.loop.create_task(self._work())

    @property
    def alive(self) -> bool:
        """Whether it takes the device for its own; as `HeldLease.alive`."""
        return bool(self.candidate.fencing_token) and self.world.now < self.candidate.deadline

    async def _work(self) -> None:
        await self.candidate.start()
        while True:
            token = await self.candidate.acquire()
            self.taken += 1
            began, keeps = self.world.now, self.world.random.choice((0.2, 1, 2 * TTL))
            while self.alive and self.candidate.fencing_token == token:
                if self.world.now >= began + (keeps if self.keeps is None else self.keeps):
                    break
                await asyncio.sleep(STEP)
            await self.candidate.release()
            await asyncio.sleep(self.world.random.uniform(0, 2))

    def step(self) -> None:
        """Let the process run for a moment."""
        now = self.world.now
        if self.stopped_until > now:
            return
        connected = self.world.up and self.cut_off_until <= now
        if self.connected and not connected:
            self.disconnect()
        elif connected and not self.connected and self.world.random.random() < 0.1:
            self.connected = True
            self.loop.create_task(self.on_reconnect())  # type: ignore[arg-type]  # a coroutine
        for _ in range(self.world.random.randrange(1, 4)):
            self.loop.step()
        if self.work.done():
            self.work.result()

    def disconnect(self) -> None:
        """Its connection breaks, and with it the consumers that it has on the server."""
        self.connected, self.subscriptions = False, {}

    def end(self) -> None:
        """As kill -9: nothing is released but the file lock."""
        self.candidate._ticket = self.candidate.fencing_token = 0  # what cancelling releases must not reach the server
        self.disconnect()
        while tasks := asyncio.all_tasks(self.loop):  # again: `wait_for` may swallow a cancellation
            for task in tasks:
                task.cancel()
            self.loop.step()
        self.loop.close()


class _Subscription:
    """What a process receives on an inbox."""

    def __init__(self, process: Process, inbox: str) -> None:
        self._process, self._inbox = process, inbox
        self._received: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, message: Any) -> None:
        """Take in what the server sent."""
        self._received.put_nowait(message)

    async def next_msg(self, timeout: float) -> Any:
        return await asyncio.wait_for(self._received.get(), timeout)

    async def unsubscribe(self) -> None:
        self._process.subscriptions.pop(self._inbox, None)


class Consumer:
    """A push consumer of the server: in order, but late, and sometimes a message is lost or comes twice."""

    def __init__(self, process: Process, name: str, inbox: str) -> None:
        self.process, self._world, self._inbox = process, process.world, inbox
        self.name = name
        self._backlog = sorted(self._world.stored.values(), key=lambda stored: stored.sequence)
        self.pending = len(self._backlog)
        self.paused = False
        self.loses = 0  # so many of the next messages do not arrive
        self._sent = 0
        self._arrives = 0.0
        self._idle_since = self._world.now

    def add(self, stored: Stored) -> None:
        """Send a message after those that are still to be sent."""
        self._backlog.append(stored)

    def send(self) -> None:
        """Send the next message that was not replaced meanwhile; when there is none for a second, a heartbeat."""
        world = self._world
        if world.fails(0.5):  # it is busy with something else
            return
        latest = {stored.sequence for stored in world.stored.values()}
        self._backlog = [stored for stored in self._backlog if stored.sequence in latest]
        if self._backlog:
            self._sent += 1
            stored = self._backlog.pop(0)
            lost, self.loses = self.loses, max(0, self.loses - 1)
            if not lost:
                self._transmit(_message(stored, self._sent, len(self._backlog)))
        elif world.now >= self._idle_since + 1:
            headers = {"Status": "100", "Nats-Last-Consumer": str(self._sent)}
            self._transmit(SimpleNamespace(reply="", headers=headers))

    def _transmit(self, message: Any) -> None:
        world = self._world
        self._idle_since = world.now
        self._arrives = max(self._arrives, world.now + world.latency())
        if not world.fails(0.02):
            world.at(self._arrives, lambda: self._deliver(message))
        if world.fails(0.05):
            world.at(self._arrives + 5 * world.latency(), lambda: self._deliver(message))

    def _deliver(self, message: Any) -> None:
        if subscription := self.process.subscriptions.get(self._inbox):
            subscription.put(message)


def _message(stored: Stored, number: int, pending: int) -> Any:
    """The `number`th message of a consumer that has so many more to send."""
    return SimpleNamespace(
        subject=stored.subject,
        reply="$JS.ACK.KV_GPU_LOCK",
        data=stored.data,
        headers=dict(stored.headers) or None,
        metadata=SimpleNamespace(
            sequence=SimpleNamespace(stream=stored.sequence, consumer=number), num_pending=pending
        ),
    )


class _Client:
    """What a candidate uses of nats-py's client and of its JetStream."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world

    @property
    def is_connected(self) -> bool:
        return self._process.connected

    def jetstream(self, timeout: float) -> "_Client":
        self._timeout = timeout
        return self

    async def close(self) -> None:
        self._process.connected = False

    async def publish(self, subject: str, data: bytes, timeout: float, headers: Mapping[str, str]) -> Any:
        def apply() -> Any:
            return SimpleNamespace(seq=self._world.write(subject, data, headers))

        return await self._ask(apply, timeout)

    async def get_msg(self, stream: str, subject: str) -> Any:
        def read() -> Any:
            stored = self._world.stored.get(subject)
            if stored is None:
                raise NotFoundError
            return SimpleNamespace(seq=stored.sequence, data=stored.data, headers=dict(stored.headers))

        return await self._ask(read, self._timeout)

    def new_inbox(self) -> str:
        return self._world.name()

    async def subscribe(self, inbox: str) -> _Subscription:
        subscription = _Subscription(self._process, inbox)
        if self._process.connected:
            self._process.subscriptions[inbox] = subscription
        return subscription

    async def add_consumer(self, stream: str, config: ConsumerConfig) -> Any:
        def follow() -> Any:
            consumer = Consumer(self._process, self._world.name(), str(config.deliver_subject))
            self._world.consumers[consumer.name] = consumer
            return SimpleNamespace(name=consumer.name, num_pending=consumer.pending)

        return await self._ask(follow, self._timeout)

    async def delete_consumer(self, stream: str, consumer: str) -> Any:
        return await self._ask(lambda: self._world.consumers.pop(consumer, None), self._timeout)

    async def _ask(self, answer: Callable[[], Any], timeout: float) -> Any:
        """Send a request and wait for its answer. Each may be late or lost; a request may arrive after its timeout."""
        world, loop, process = self._world, self._process.loop, self._process
        if not process.connected:
            raise nats.errors.OutboundBufferLimitError
        future: asyncio.Future[Any] = loop.create_future()

        def resolve(result: Any, error: Exception | None) -> None:
            if not (loop.is_closed() or future.done()):
                future.set_exception(error) if error else future.set_result(result)

        def arrive() -> None:
            if not world.up or world.fails(0.05):
                return
            result, error = None, None
            try:
                result = answer()
            except Exception as raised:
                error = raised
            if not world.fails(0.05):
                world.at(world.now + world.latency(), lambda: resolve(result, error))

        world.at(world.now + world.latency(), arrive)
        return await asyncio.wait_for(future, timeout)


@dataclass
class World:
    """The time, the server and the processes. The seed determines everything."""

    random: Random
    folder: Path
    now: float = 1000.0
    up: bool = True
    faulty: bool = True
    stored: dict[str, Stored] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    consumers: dict[str, Consumer] = field(default_factory=dict)
    returned: int = 0  # keys that came back
    _sequence: int = 0
    _ended: dict[str, Stored] = field(default_factory=dict)  # last of its subject, and expired
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def at(self, moment: float, do: Callable[[], None]) -> None:
        """Schedule a call for a moment."""
        self._count += 1
        heapq.heappush(self._events, (moment, self._count, do))

    def name(self) -> str:
        """A name that nothing else has."""
        self._count += 1
        return f"n{self._count}"

    def latency(self) -> float:
        """Draw how long a message takes, in seconds."""
        return self.random.choice((0.0, 0.01, 0.1, 3.0)) if self.fails(0.2) else 0.01

    def fails(self, chance: float) -> bool:
        """Draw whether something fails."""
        return self.faulty and self.random.random() < chance

    async def connect(self, settings: Settings, name: str, on_reconnect: Any, **options: Any) -> Any:
        """Replacement of `shared.nats.connection.connect`."""
        process = next(process for process in self.processes if name.endswith(process.name))
        process.on_reconnect = on_reconnect
        return _Client(process)

    def start(self, name: str) -> None:
        """Start a process."""
        self.processes.append(Process(self, name, self.folder))

    def write(self, subject: str, data: bytes, headers: Mapping[str, str]) -> int:
        """Store a message on the server, which compares sequences; returns the new sequence."""
        last = self.stored.get(subject)
        expected = headers.get("Nats-Expected-Last-Subject-Sequence")
        if expected is not None and int(expected) != (last.sequence if last else 0):
            raise BadRequestError(code=400, err_code=10071, description="wrong last sequence")
        self._sequence += 1
        ttl = headers.get("Nats-TTL")
        stored = Stored(subject, self._sequence, data, headers, self.now + int(ttl[:-1]) if ttl else float("inf"))
        self.stored[subject] = stored
        self._ended.pop(subject, None)
        for consumer in self.consumers.values():
            consumer.add(stored)
        return stored.sequence

    def step(self) -> None:
        """Let one step of time pass for the server and all processes."""
        self.now += STEP
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        for subject, stored in list(self.stored.items()):
            if self.up and stored.ends <= self.now:
                self.expire(subject)
        for consumer in list(self.consumers.values()):
            if not consumer.paused:
                consumer.send()
        for process in self.random.sample(self.processes, len(self.processes)):
            process.step()

    def expire(self, subject: str) -> None:
        """Remove a key whose TTL is over; sometimes no marker is written."""
        stored = self.stored.pop(subject)
        if not is_gone(stored.data, stored.headers):
            if not self.fails(0.3):
                self.write(subject, b"", {"Nats-Marker-Reason": "MaxAge", "Nats-TTL": "60s"})
            self._ended[subject] = stored

    def crash(self) -> None:
        """The server is gone, and every consumer with it: they are kept in memory."""
        self.up = False
        self.consumers.clear()

    def bring_back(self) -> None:
        """Bring expired keys back without a TTL, as after a crash."""
        for subject, stored in list(self._ended.items()):
            last = self.stored.get(subject)
            if self.random.random() < 0.5 and (last is None or "Nats-Marker-Reason" in last.headers):
                self.stored[subject] = Stored(subject, stored.sequence, stored.data, stored.headers, float("inf"))
                self.returned += 1
                del self._ended[subject]

    def lose(self, subject: str) -> None:
        """Remove a key without a marker."""
        del self.stored[subject]
