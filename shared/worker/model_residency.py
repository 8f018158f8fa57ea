"""The model on the device: moved there and back within a turn, booked in the ledger, its memory measured."""

from collections.abc import Awaitable, Callable

from shared.device.info import Device, figures
from shared.device.lease import HeldLease
from shared.device.ledger import DeviceLedger
from shared.device.offload_phases import PLANS, Phase, Turn
from shared.schema.job import Job
from shared.worker.metrics import WorkerMetrics, timed
from shared.worker.outcome import DeviceMemory
from shared.worker.phase_memory import PhaseMemoryLog
from shared.worker.stage import JobStage
from shared.worker.state import WorkerState


class ModelResidency:
    """A stage's weights on its device, turn by turn."""

    def __init__(
        self,
        stage: JobStage,
        device: Device,
        ledger: DeviceLedger,
        *,
        in_engine: Callable[[Callable[[], None]], Awaitable[None]],
        offload: bool,
        compiled: bool,
        memory: PhaseMemoryLog,
        state: WorkerState,
        metrics: WorkerMetrics,
    ) -> None:
        """With `offload` the weights leave the device at the end of each turn.

        A `compiled` model takes minutes for its first step, during which it still counts as loading.
        """
        self._stage, self._device, self._ledger = stage, device, ledger
        self._in_engine, self._offload, self._compiled = in_engine, offload, compiled
        self._memory, self._state, self._metrics = memory, state, metrics
        self._resident = False

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
        """Move the weights to the device, unless they are there. Raises `LeaseLost`, `DeviceFull`, `DeviceBroken`."""
        if self._resident:
            return
        turn.place_weights(self._stage.spec.weights_label, self._stage.weight_bytes)
        self._state.begin_loading()
        try:
            with timed(self._metrics.load):
                await self._in_engine(self._stage.to_device)
        except BaseException:
            self._ledger.clear()
            raise
        finally:
            if not self._compiled:
                self._state.end_loading()
        self._resident = True

    async def unload(self) -> None:
        """Move the weights off the device, if they are there and should leave it. Raises what the engine raises."""
        if self._resident and self._offload:
            with timed(self._metrics.unload):
                await self._in_engine(self._stage.to_host)
            self._resident = False
            self._ledger.clear()

    def memory_for(self, job: Job) -> DeviceMemory:
        """Memory of the device that a song needs, and that others use."""
        residents = self._ledger.residents()
        booked = sum(resident.nbytes for resident in residents)
        return DeviceMemory(
            needed=self._stage.weight_bytes + self._stage.song_bytes(job),
            capacity=self._device.capacity,
            foreign=figures(self._device, self._ledger).memory_used - booked,
            shared=any(resident.owner != self._ledger.owner for resident in residents),
        )
