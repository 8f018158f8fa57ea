"""The model on the device: moved there and back within a turn, booked in the ledger, its memory measured."""

from collections.abc import Awaitable, Callable

from shared.device.info import figures
from shared.device.lease import HeldLease
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import TURNS, Placement, share
from shared.device.offload_phases import PLANS, Phase, Turn
from shared.schema.job import Job
from shared.schema.worker import Role
from shared.worker.metrics import WorkerMetrics, timed
from shared.worker.outcome import DeviceMemory
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState

_ALIKE = 64  # two amounts of memory are alike when they differ by less than this part of the device
_MISCOUNT = 10  # less than this part of the device may be ours, miscounted, where it seems to be others'
_MOST_SONGS = 1000  # whose attempts are counted
_WORKERS = tuple(f"{role}." for role in PLANS)
# Whose share is not this role's; the encoder uses the codec's, one after the other.
_OTHER: dict[Role, Role] = {"tokenizer": "codec", "codec": "tokenizer", "encoder": "tokenizer"}
_SETTINGS = ", ".join(  # on which the plan for a device depends
    f"HEARTMULA_{name}"
    for name in (
        "SEQUENTIAL_OFFLOAD",
        "HYBRID_MODE",
        "ENGINE",
        "MODEL_PATH",
        "MODEL_VERSION",
        "MODEL_DTYPE",
        "INT8",
        "CPU_DEVICE_MB",
    )
)


class ModelResidency:
    """A stage's weights on its device, turn by turn."""

    def __init__(
        self,
        stage: JobStage,
        placement: Placement,
        ledger: DeviceLedger,
        *,
        in_engine: Callable[[Callable[[], None]], Awaitable[None]],
        memory: PhaseMemoryLog,
        state: WorkerState,
        metrics: WorkerMetrics,
        models: "list[ModelResidency] | None" = None,
    ) -> None:
        """`models` are those of one process, which this one joins: only one of them is on the device at a time."""
        self._stage, self._placement, self._ledger = stage, placement, ledger
        self._models = [] if models is None else models
        self._models.append(self)
        self._in_engine = in_engine
        self._memory, self._state, self._metrics = memory, state, metrics
        self._resident = False
        self._waits: dict[str, tuple[int, int]] = {}  # by song: what was taken, and how often in a row

    def obstacle(self) -> str | None:
        """Why the device must not be used, for people; None when nothing is in the way."""
        if self._ledger.deleted():
            return "the files of the device in HEARTMULA_DATA_DIR were deleted: restart all workers on the device"
        mine = self._placement.way
        for owner, said in self._ledger.ways().items():
            way = said or TURNS  # as workers did before they said so
            if way != mine and owner.startswith(_WORKERS):
                return (
                    f"this worker cannot share the device (for it {mine}) with {owner} (for that one {way}): start "
                    f"both in the same version and with the same settings ({_SETTINGS})"
                )
        return None

    def turn(self, held: HeldLease) -> Turn:
        """Begin a new turn of the stage's role, under a lease."""
        return Turn(held, self._stage.spec.role, self._ledger)

    async def enter(self, turn: Turn, phase: Phase) -> None:
        """Let a turn go on to a phase, and measure memory. Raises `LeaseLost` or `PhaseError`."""
        if phase is PLANS[self._stage.spec.role].load:
            self._memory.begin()
        await turn.enter(phase)
        self._memory.enter(phase)

    @property
    def memory_used(self) -> int:
        """Bytes in use on the device when last measured."""
        return self._memory.now

    def end_turn(self) -> None:
        """Measure memory at the end of a turn."""
        self._memory.end()

    async def load(self, turn: Turn) -> None:
        """Move the weights to the device, unless they are there. Raises `LeaseLost`, `DeviceFull`, `DeviceBroken`.

        First the other models of this process leave it, also where models stay: they have one share of its memory.
        """
        if self._resident:
            return
        for model in self._models:
            if model is not self:
                turn.check(PLANS[self._stage.spec.role].load)
                await model.leave()
        turn.place_weights(self._stage.spec.weights_label, self._stage.weight_bytes)
        self._state.begin_loading()
        try:
            with timed(self._metrics.load):
                await self._in_engine(self._stage.to_device)
        except BaseException:
            self._ledger.clear()
            raise
        finally:
            self._state.end_loading()
        self._resident = True

    async def unload(self) -> None:
        """Move the weights off the device, if they are there and should leave it. Raises what the engine raises."""
        if not (self._placement.stays and self._stage.spec.may_stay):
            await self.leave()

    async def leave(self) -> None:
        """Move the weights off the device, if they are there, whether or not models stay. Raises as `unload`."""
        if self._resident:
            with timed(self._metrics.unload):
                await self._in_engine(self._stage.to_host)
            self._resident = False
            self._ledger.clear()

    def begin(self, job: Job) -> None:
        """Publish that songs can be worked on: one begins. A song that did not fit has to prove it first."""
        if job.job_id not in self._waits:
            self._state.report(None)

    def memory_for(self, job: Job) -> DeviceMemory:
        """Memory of the device that a song needs, and that others use, when it did not fit."""
        taken = self._taken()
        before, waits = self._waits.pop(job.job_id, (taken, -1))
        alike = abs(taken - before) <= self._placement.device.capacity // _ALIKE
        waits = waits + 1 if alike else 0
        self._waits[job.job_id] = (taken, waits)
        if len(self._waits) > _MOST_SONGS:
            del self._waits[next(iter(self._waits))]
        return DeviceMemory(
            needed=self._stage.weight_bytes + self._stage.song_bytes(job),
            share=self._placement.share,
            taken=taken,
            miscount=self._placement.device.capacity // _MISCOUNT,
            waits=waits,
            stays=self._placement.stays,
        )

    def forget(self, job_id: str) -> None:
        """Count no further how often a song did not fit: it did, or left for another reason."""
        if self._waits.pop(job_id, None) is not None:
            self._state.report(None)

    def _taken(self) -> int:
        """Bytes that others use of this worker's share.

        Where models stay, what the plan gives the other role is not in the share, and never becomes free; nor are
        contexts and work memory. A worker that uses more, or one too many, is waited for.
        """
        placement, residents = self._placement, self._ledger.residents()
        mine = sum(resident.nbytes for resident in residents if resident.owner == self._ledger.owner)
        booked = sum(resident.nbytes for resident in residents)
        others = [resident for resident in residents if resident.owner != self._ledger.owner]
        workers = sum(resident.nbytes for resident in others if resident.owner.startswith(_WORKERS))
        peers = sum(resident.nbytes for resident in others) - min(workers, self._reserved_for_the_other())
        used = figures(placement.device, self._ledger).memory_used
        ours = placement.overhead + max(0, placement.device.reserved() - mine)  # and what our allocator holds
        return peers + max(0, used - booked - ours)

    def _reserved_for_the_other(self) -> int:
        """Bytes of the device that are the other role's where models stay."""
        placement = self._placement
        if not placement.stays:
            return 0
        if placement.plan is None:  # not known: what it uses, it keeps
            return placement.device.capacity
        return share(placement.plan, _OTHER[self._stage.spec.role])
