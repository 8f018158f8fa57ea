"""Devices that workers report: figures, the worker that holds the lease, and those that wait for it."""

from collections.abc import Callable

import msgspec
from nats.js import JetStreamContext

from services.gateway.monitoring.health import Health, QueueDepth, Snapshot
from shared.device.lease import LeaseView, read_leases
from shared.schema.base import timestamp
from shared.schema.worker import GpuFigures, MemoryPlan, PhaseMemory, WorkerStatus


class LeaseBody(msgspec.Struct, frozen=True, kw_only=True):
    """The worker that holds the lease of a device."""

    role: str
    owner: str
    phase: int | None
    since: str
    fence: int


class WaitingBody(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that waits for the lease of a device; the list is in the order in which they get it."""

    role: str
    owner: str
    since: str


class WorkerBody(msgspec.Struct, frozen=True, kw_only=True):
    """A worker on a device."""

    role: str
    instance: str
    host: str
    engine: str
    model: str
    state: str
    phase: int | None
    jobs: list[str]  # songs that it works on
    slots: int  # songs that it can work on at once
    rate: float | None  # frames a second at present, of all its songs together
    memory: list[PhaseMemory]  # of the phases of its latest turn
    notes: list[str]  # what its engine does without
    problem: str | None  # why it cannot work
    since: str


class GpuBody(msgspec.Struct, frozen=True, kw_only=True):
    """A device. Memory in bytes; utilisation in per cent; temperature in °C; None where it is not known."""

    id: str
    name: str
    kind: str
    memory_total: int
    memory_used: int
    memory_free: int
    utilization: int | None
    temperature: int | None
    lease: LeaseBody | None
    waiting: list[WaitingBody]
    resident: list[str]
    plan: MemoryPlan | None  # the use that its workers make of its memory
    workers: list[WorkerBody]


class GpusBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/api/gpu``. `available` is false where no worker has a CUDA device; the CPU is listed then."""

    available: bool
    gpus: list[GpuBody]
    queue: QueueDepth
    problems: list[str]  # as in ``/health``


class Devices:
    """Reads devices, and the workers on them, from heartbeats and leases."""

    def __init__(self, js: JetStreamContext, health: Health) -> None:
        self._js, self._health = js, health

    async def body(self, is_visible: Callable[[str], bool]) -> GpusBody:
        """Every device, with the ids of those songs only for which `is_visible` holds. Raises `Unavailable`."""
        leases = await read_leases(self._js)
        found = arrange(await self._health.snapshot(), leases)
        for device in found.gpus:
            for worker in device.workers:
                worker.jobs[:] = filter(is_visible, worker.jobs)
        return found


def arrange(snapshot: Snapshot, leases: list[LeaseView]) -> GpusBody:
    """Combine heartbeats and leases by device."""
    devices: dict[str, list[WorkerStatus]] = {}
    for worker in snapshot.workers:
        devices.setdefault(worker.gpu.id, []).append(worker)
    found = [_device(workers, [v for v in leases if v.gpu == name]) for name, workers in sorted(devices.items())]
    return GpusBody(
        available=any(gpu.kind == "cuda" for gpu in found),
        gpus=found,
        queue=snapshot.queue,
        problems=snapshot.problems,
    )


def _device(workers: list[WorkerStatus], leases: list[LeaseView]) -> GpuBody:
    # Each heartbeat names everything that lies on the device; two of them together could mix two moments.
    latest = max(workers, key=lambda worker: worker.sent)
    figures: GpuFigures = latest.gpu
    held = next((view for view in leases if view.state == "held"), None)
    return GpuBody(
        id=figures.id,
        name=figures.name,
        kind=figures.kind,
        memory_total=figures.memory_total,
        memory_used=figures.memory_used,
        memory_free=max(0, figures.memory_total - figures.memory_used),
        utilization=figures.utilization,
        temperature=figures.temperature,
        lease=_lease(held) if held else None,
        waiting=[
            WaitingBody(role=view.role, owner=view.owner, since=timestamp(view.since))
            for view in leases
            if view.state == "waiting"
        ],
        resident=sorted(latest.resident),
        plan=latest.plan,
        workers=[
            WorkerBody(
                role=worker.role,
                instance=worker.instance,
                host=worker.host,
                engine=worker.engine,
                model=worker.model,
                state=worker.state,
                phase=worker.phase,
                jobs=list(worker.jobs),
                slots=worker.slots,
                rate=worker.rate,
                memory=worker.memory,
                notes=worker.notes,
                problem=worker.problem,
                since=timestamp(worker.since),
            )
            for worker in workers
        ],
    )


def _lease(view: LeaseView) -> LeaseBody:
    return LeaseBody(
        role=view.role, owner=view.owner, phase=view.phase, since=timestamp(view.since), fence=view.sequence
    )
