"""Offload phases, five of songs and three of recordings, and the turn that guards them.

Weights move and steps run in their phase alone.
"""

from dataclasses import dataclass
from enum import IntEnum

from shared.device.lease import HeldLease
from shared.device.ledger import DeviceLedger
from shared.errors import PhaseError
from shared.schema.worker import Role


class Phase(IntEnum):
    """Offload phases, numbered as in the system that this one replaces."""

    LOAD_MODEL = 0  # language model to the device
    GENERATE = 1  # token generation
    SWAP = 2  # language model to host memory; then HeartCodec to the device
    DECODE = 3  # audio decoding
    CLEAN = 4  # HeartCodec to host memory
    LOAD_ENCODER = 5  # HeartCodec's encoder to the device
    ENCODE = 6  # recordings to tokens
    CLEAN_ENCODER = 7  # encoder off the device


@dataclass(frozen=True)
class PhasePlan:
    """The phases of one role: a turn goes through them in order and never back."""

    load: Phase
    work: Phase
    leave: Phase


PLANS: dict[Role, PhasePlan] = {
    "tokenizer": PhasePlan(Phase.LOAD_MODEL, Phase.GENERATE, Phase.SWAP),
    "codec": PhasePlan(Phase.SWAP, Phase.DECODE, Phase.CLEAN),
    "encoder": PhasePlan(Phase.LOAD_ENCODER, Phase.ENCODE, Phase.CLEAN_ENCODER),
}


class Turn:
    """One turn of one role on the device, from taking the lease to giving it back."""

    def __init__(self, held: HeldLease, role: Role, ledger: DeviceLedger) -> None:
        self.fencing_token = held.fencing_token
        self.phase: Phase | None = None
        self._held, self._ledger, self._plan = held, ledger, PLANS[role]

    async def enter(self, phase: Phase) -> None:
        """Go on to a phase and say so in the lease record.

        Raises `PhaseError` for a phase that is not this role's or not ahead, `LeaseLost` when the lease is gone.
        """
        if phase not in (self._plan.load, self._plan.work, self._plan.leave):
            raise PhaseError(f"phase {phase.value} is not for this worker")
        if self.phase is not None and phase <= self.phase:
            raise PhaseError(f"a turn in phase {self.phase.value} cannot go to phase {phase.value}")
        await self._held.enter(phase)
        self.phase = phase

    def check(self, phase: Phase) -> None:
        """Raise `LeaseLost` or `PhaseError` unless the lease is alive and the turn is in this phase."""
        self._held.check()
        if self.phase is not phase:
            now = "none" if self.phase is None else str(self.phase.value)
            raise PhaseError(f"this needs phase {phase.value}, the turn is in {now}")

    def check_work(self) -> None:
        """`check` for the phase in which this role computes; to be called before every step."""
        self.check(self._plan.work)

    def place_weights(self, label: str, nbytes: int) -> None:
        """Book weights on the device, in the loading phase only. Raises `PhaseError` or `DeviceFull`."""
        self.check(self._plan.load)
        self._ledger.place(label, nbytes)

    def place_work(self, label: str, nbytes: int) -> None:
        """Book caches or work space on the device, in the working phase only. Raises `PhaseError` or `DeviceFull`."""
        self.check_work()
        self._ledger.place(label, nbytes)

    def remove(self, label: str) -> None:
        """Book weights or work space out; always allowed."""
        self._ledger.remove(label)
