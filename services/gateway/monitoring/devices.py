"""Every device that workers report: its figures, who holds it, who waits for it."""

import msgspec

from services.gateway.container import Gateway
from services.gateway.monitoring.health import QueueDepth, Snapshot
from shared.device.lease import LeaseView, read_leases
from shared.schema.base import timestamp
from shared.schema.worker import GpuFigures, PhaseMemory, WorkerStatus


class LeaseBody(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a device."""

    role: str
    owner: str
    phase: int | None
    since: str
    fence: int


class WaitingBody(msgspec.Struct, frozen=True, kw_only=True):
    """Who waits for a device, in the order in which they get it."""

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
    rate: float | None  # frames a second of late, of all its songs together
    memory: list[PhaseMemory]  # of the phases of its latest turn
    problem: str | None  # why it cannot work
    since: str


class GpuBody(msgspec.Struct, frozen=True, kw_only=True):
    """A device. Memory in bytes; utilisation in per cent; temperature in °C; None where nothing tells."""

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
    workers: list[WorkerBody]


class GpusBody(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/api/gpu``. `available` is false where no worker has a CUDA device; the CPU is listed then."""

    available: bool
    gpus: list[GpuBody]
    queue: QueueDepth
    problems: list[str]  # as in ``/health``


async def gpus(gateway: Gateway, tenant: str) -> GpusBody:
    """Every device, with the ids of a tenant's own songs only. Raises `Unavailable`."""
    leases = await read_leases(gateway.js)
    snapshot = await gateway.health.snapshot()
    found = arrange(snapshot, leases)
    for device in found.gpus if gateway.authenticator.keys_required else ():
        for worker in device.workers:
            worker.jobs[:] = [job_id for job_id in worker.jobs if gateway.song_index.belongs(job_id, tenant)]
    return found


def arrange(snapshot: Snapshot, leases: list[LeaseView]) -> GpusBody:
    """Put heartbeats and leases together by device."""
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
    # Each heartbeat tells all that lies on the device. Put together, two of them could tell of two moments.
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
                problem=worker.problem,
                since=timestamp(worker.since),
            )
            for worker in workers
        ],
    )


def _lease(view: LeaseView) -> LeaseBody:
    return LeaseBody(role=view.role, owner=view.owner, phase=view.phase, since=timestamp(view.since), fence=view.fence)
