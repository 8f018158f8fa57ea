"""Faults of the system: processes killed or stopped, servers restarted, leases lost, junk in the queues."""

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import nats
from nats.js.errors import APIError

from deploy.local.servers.embedded import Server
from deploy.local.servers.watchdog import StoreProbe, nats_problem
from shared.device.lease import read_leases
from shared.errors import Unavailable
from shared.nats.subjects import GPU_LOCK, decode_subject, encode_subject, lock_key, token_subject
from tests.chaos.observer import Observer
from tests.chaos.stack import Part, Stack

ROLES = ("tokenizer", "codec", "gateway")
SYSTEM_FAULTS = (
    *((kind, role) for kind in ("kill9", "sigterm", "sigstop-short", "sigstop-long") for role in ROLES),
    ("nats-kill", ""),
    ("store-kill", ""),
    ("lost-lease", "tokenizer"),
    ("lost-lease", "codec"),
    ("junk", ""),
)
DISK_FAULTS = (("full-disk", ""), *(("kill9", role) for role in ROLES))  # where the servers have a volume of their own
_HOLDER_SECONDS = 5.0  # how long a fault waits until a worker holds the lease


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: when it happens, what it is, which part it hits and how long it lasts."""

    at: float  # seconds after the begin
    kind: str
    role: str  # of the part that it hits, or empty
    which: int  # among the parts of that role
    seconds: float  # that it lasts


def plan_faults(
    random: Random, seconds: float, gap: float, ttl: int, kinds: Sequence[tuple[str, str]] = SYSTEM_FAULTS
) -> list[Fault]:
    """Plan faults for `seconds`, one every `gap` seconds on average; each kind once before any kind twice."""
    found: list[Fault] = []
    deck: list[tuple[str, str]] = []
    at = gap
    while at < seconds:
        if not deck:
            deck = random.sample(kinds, len(kinds))
        kind, role = deck.pop()
        lasts = {
            "sigstop-short": (0.1, 0.7 * ttl),
            "sigstop-long": (1.2 * ttl, 2.5 * ttl),
            "full-disk": (2.0, 10.0),
        }.get(kind, (0.1, 2.5))
        found.append(
            Fault(at=at, kind=kind, role=role, which=random.randrange(100), seconds=round(random.uniform(*lasts), 2))
        )
        at += random.uniform(0.4, 1.6) * gap
    return found


class Injector:
    """Injects faults, each at its time; they overlap if they last long enough."""

    def __init__(self, stack: Stack, observer: Observer) -> None:
        self.done: Counter[str] = Counter()
        self.junk: list[str] = []  # names of what was put into the queues
        self._stack, self._observer = stack, observer
        self._busy = {"nats-kill": asyncio.Lock(), "store-kill": asyncio.Lock()}

    async def run(self, faults: Sequence[Fault]) -> None:
        """Inject the faults; returns when the last one is over and every part runs again."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for fault in faults:
                await asyncio.sleep(began + fault.at - loop.time())
                tasks.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        match fault.kind:
            case "kill9" | "sigterm":
                await self._terminate(fault, self._part(fault))
            case "sigstop-short" | "sigstop-long":
                await self._suspend(fault, self._part(fault))
            case "nats-kill":
                await self._restart_server(fault, self._stack.nats)
            case "store-kill":
                await self._restart_server(fault, self._stack.store)
            case "full-disk":
                await self._fill_disk(fault)
            case "lost-lease":
                await self._purge_lease(fault)
            case "junk":
                await self._publish_junk(fault)

    def _part(self, fault: Fault) -> Part:
        stack = self._stack
        parts = {"tokenizer": stack.tokenizers, "codec": stack.codecs, "gateway": stack.gateways}[fault.role]
        return parts[fault.which % len(parts)]

    def _record_fault(self, fault: Fault, what: str) -> None:
        self.done[fault.kind] += 1
        self._stack.log(f"{fault.kind}: {what}")

    async def _terminate(self, fault: Fault, part: Part) -> None:
        async with part.busy:
            pid = part.pid
            self._record_fault(fault, f"{part.name} ({pid})")
            part.send(signal.SIGKILL if fault.kind == "kill9" else signal.SIGTERM)
            await part.wait_for_restart(pid)

    async def _suspend(self, fault: Fault, part: Part) -> None:
        async with part.busy:
            self._record_fault(fault, f"{part.name} ({part.pid}) for {fault.seconds:g} s")
            part.send(signal.SIGSTOP)
            await asyncio.sleep(fault.seconds)
            part.send(signal.SIGCONT)
            self._stack.log(f"{part.name} ({part.pid}) continues")

    async def _restart_server(self, fault: Fault, server: Server) -> None:
        async with self._busy[fault.kind]:
            self._record_fault(fault, f"for {fault.seconds:g} s")
            server.kill()
            await asyncio.sleep(fault.seconds)
            await server.start()
            self._stack.log(f"{server.name} is back")

    async def _fill_disk(self, fault: Fault) -> None:
        """Fill the disk of both servers; the watchdog restarts them when it has room again."""
        volume, probe = self._stack.volume, StoreProbe(self._stack.store, self._stack.settings.s3_bucket)
        assert volume is not None
        async with self._busy["nats-kill"], self._busy["store-kill"]:
            self._record_fault(fault, f"for {fault.seconds:g} s")
            volume.fill()
            await asyncio.sleep(fault.seconds)
            volume.make_room()
            self._stack.log("the disk has room")
            while await nats_problem(self._stack.nats) or await probe.problem():
                await asyncio.sleep(0.5)
            self._stack.log("both servers accept writes")

    async def _purge_lease(self, fault: Fault) -> None:
        """Purge the key of the device's holder, as an operator might by mistake."""
        js = self._observer.js
        holders = ("codec", "encoder") if fault.role == "codec" else (fault.role,)  # which are one process
        for _ in range(round(_HOLDER_SECONDS / 0.05)):
            try:
                for view in await read_leases(js):
                    if view.state == "held" and view.role in holders:
                        subject = f"$KV.{GPU_LOCK}.{lock_key(view.gpu, view.role, view.owner)}"
                        await js.publish(subject, b"", headers={"KV-Operation": "PURGE", "Nats-Rollup": "sub"})
                        self._record_fault(fault, f"of {view.role} {view.owner} on {view.gpu}")
                        return
            except (Unavailable, nats.errors.Error, APIError, TimeoutError):
                pass
            await asyncio.sleep(0.05)
        self._stack.log(f"lost-lease: no {fault.role} held one")

    async def _publish_junk(self, fault: Fault) -> None:
        name = f"junk-{len(self.junk)}"
        self.junk.append(name)
        for subject, data in (
            (token_subject("normal", name), b"{not json"),
            (decode_subject(name), b'{"job_id": 3}'),
            (encode_subject(name), b"[]"),
        ):
            while True:
                try:
                    await self._observer.js.publish(subject, data)
                    break
                except APIError as error:  # queue full, or it is there already
                    if "per subject" in (error.description or ""):
                        break
                except (nats.errors.Error, TimeoutError):
                    pass
                await asyncio.sleep(0.2)
        self._record_fault(fault, name)
