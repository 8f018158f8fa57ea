"""The phase guard: nothing moves and nothing runs without a live lease in the right phase."""

from itertools import product
from pathlib import Path

import pytest

from shared.device.ledger import DeviceLedger
from shared.device.offload_phases import PLANS, Phase, Turn
from shared.errors import LeaseLost, PhaseError
from shared.schema.worker import Role


class FakeHeld:
    """Replacement of a held lease; the real one has integration tests of its own."""

    fencing_token = 7

    def __init__(self) -> None:
        self.lost = False
        self.phases: list[int] = []

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("gone")

    async def enter(self, phase: int) -> None:
        self.check()
        self.phases.append(phase)


def make(tmp_path: Path, role: Role = "tokenizer") -> tuple[Turn, FakeHeld, DeviceLedger]:
    held, ledger = FakeHeld(), DeviceLedger(tmp_path, f"{role}.me", 1000)
    return Turn(held, role, ledger), held, ledger  # type: ignore[arg-type]


async def test_a_turn_goes_forward_through_its_phases_and_everything_else_is_refused(tmp_path: Path) -> None:
    roles: list[Role] = ["tokenizer", "codec"]
    for role in roles:
        plan = PLANS[role]
        mine = [plan.load, plan.work, plan.leave]
        for first, second in product(Phase, Phase):
            turn, held, ledger = make(tmp_path / f"{role}{first}{second}", role)
            if first not in mine:
                with pytest.raises(PhaseError):
                    await turn.enter(first)
            else:
                await turn.enter(first)
                if second in mine and second > first:
                    await turn.enter(second)
                    assert held.phases == [first, second]
                else:
                    with pytest.raises(PhaseError):
                        await turn.enter(second)
                    assert held.phases == [first]
            ledger.close()


async def test_weights_move_in_the_loading_phase_only_and_steps_run_in_the_working_phase_only(tmp_path: Path) -> None:
    turn, _, ledger = make(tmp_path)
    with pytest.raises(PhaseError):
        turn.place_weights("heartmula", 1)
    with pytest.raises(PhaseError):
        turn.place_work("kv", 1)
    with pytest.raises(PhaseError):
        turn.check_work()
    await turn.enter(Phase.LOAD_MODEL)
    turn.place_weights("heartmula", 1)
    with pytest.raises(PhaseError):
        turn.check_work()
    await turn.enter(Phase.GENERATE)
    turn.check_work()
    turn.place_work("kv", 1)
    with pytest.raises(PhaseError):
        turn.place_weights("heartmula", 1)
    await turn.enter(Phase.SWAP)
    with pytest.raises(PhaseError):
        turn.check_work()
    assert {r.label for r in ledger.residents()} == {"heartmula", "kv"}


async def test_a_lost_lease_stops_everything_but_freeing(tmp_path: Path) -> None:
    turn, held, ledger = make(tmp_path)
    await turn.enter(Phase.LOAD_MODEL)
    turn.place_weights("heartmula", 1)
    await turn.enter(Phase.GENERATE)
    held.lost = True
    with pytest.raises(LeaseLost):
        turn.check_work()
    with pytest.raises(LeaseLost):
        turn.place_work("kv", 1)
    with pytest.raises(LeaseLost):
        await turn.enter(Phase.SWAP)
    turn.remove("heartmula")
    assert ledger.residents() == []
