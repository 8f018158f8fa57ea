"""Memory that others use of a device, told from a worker's own, and counted while nothing changes."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from services.tokenizer_worker.stage import SPEC
from shared.device.info import Device
from shared.device.ledger import DeviceLedger
from shared.device.memory_plan import CONTEXT, Placement, plan_memory, share
from shared.model.sizes import TrivialSizes
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.worker import model_residency
from shared.worker.model_residency import ModelResidency
from shared.worker.state import WorkerState

MB = 2**20
CAPACITY = 2**34
JOB = Job(job_id="a", tenant="local", request=GenerateRequest(lyrics="la"), created_at=time.time())


class Card:
    """A CUDA device with a worker on it: what the driver and torch's allocator report can be set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, stays: bool) -> None:
        self.used = self.reserved = 0
        device = Device("cuda", "cuda:0", "card", "card", CAPACITY, True, None, lambda: self.reserved)
        plan = plan_memory(Settings(sequential_offload=not stays), device, TrivialSizes())
        self.placement = Placement(device, "bfloat16", 8, stays, share(plan, "tokenizer"), plan)
        self.way = self.placement.way
        self.ledger = DeviceLedger(folder, "tokenizer.me", CAPACITY, way=self.way)
        self.other = DeviceLedger(folder, "codec.other", CAPACITY, way=self.way)
        stage = SimpleNamespace(spec=SPEC, weight_bytes=40 * MB, song_bytes=lambda job: MB)
        self.state = WorkerState()
        nothing: Any = None
        self.residency = ModelResidency(
            stage,
            self.placement,
            self.ledger,
            in_engine=nothing,
            memory=nothing,
            state=self.state,
            metrics=nothing,
        )
        monkeypatch.setattr(model_residency, "figures", lambda *_: SimpleNamespace(memory_used=self.used))

    def taken(self) -> int:
        """Bytes that others use, as a song that does not fit is told."""
        return self.residency.memory_for(JOB).taken


@pytest.mark.parametrize("stays", [False, True])
def test_contexts_and_what_the_allocator_holds_are_not_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    card = Card(tmp_path, monkeypatch, stays=stays)
    card.ledger.place("heartmula", 40 * MB)
    card.reserved = 90 * MB
    assert card.placement.overhead == 2 * CONTEXT + CAPACITY // 20
    card.used = card.placement.overhead + card.reserved
    assert card.taken() == 0
    card.used += 300 * MB
    assert card.taken() == 300 * MB


def test_a_model_that_stays_is_not_waited_for_and_one_that_takes_turns_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stays, taken in ((True, 0), (False, 30 * MB)):
        card = Card(tmp_path / str(stays), monkeypatch, stays=stays)
        card.other.place("heartcodec", 30 * MB)
        card.used = 30 * MB
        assert card.taken() == taken
        game = DeviceLedger(tmp_path / str(stays), "game.1", CAPACITY)
        game.place("textures", 50 * MB)
        card.used += 50 * MB
        assert card.taken() == taken + 50 * MB


def test_a_model_that_stays_is_waited_for_where_it_takes_more_than_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(tmp_path, monkeypatch, stays=True)
    assert card.placement.plan is not None
    its_share = share(card.placement.plan, "codec")
    card.other.place("heartcodec", its_share)
    assert card.taken() == 0
    card.other.place("songs", 70 * MB)
    assert card.taken() == 70 * MB
    DeviceLedger(tmp_path, "tokenizer.second", CAPACITY).place("heartmula", 40 * MB)
    assert card.taken() == 110 * MB


@pytest.mark.parametrize("stays", [False, True])
def test_workers_share_a_device_only_in_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    card = Card(tmp_path, monkeypatch, stays=stays)
    DeviceLedger(tmp_path, "game.1", CAPACITY)
    assert card.residency.obstacle() is None
    other = DeviceLedger(tmp_path, "codec.unlike", CAPACITY, way=replace(card.placement, stays=not stays).way)
    said = card.residency.obstacle() or ""
    assert said.startswith(f"this worker cannot share the device (for it {card.way}) with codec.unlike (for that one ")
    for name in ("ENGINE", "HYBRID_MODE", "MODEL_VERSION", "CPU_DEVICE_MB", "INT8"):
        assert f"HEARTMULA_{name}" in said
    other.close()
    assert card.residency.obstacle() is None


def test_a_model_does_not_stay_beside_a_worker_with_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(tmp_path, monkeypatch, stays=True)
    assert card.placement.plan is not None
    plan = msgspec.structs.replace(card.placement.plan, codec_work=1)
    DeviceLedger(tmp_path, "codec.unlike", CAPACITY, way=replace(card.placement, plan=plan).way)
    assert "codec.unlike" in (card.residency.obstacle() or "")


@pytest.mark.parametrize("stays", [False, True])
def test_a_worker_of_an_older_version_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    """It has an account, and says nothing of its way."""
    card = Card(tmp_path, monkeypatch, stays=stays)
    DeviceLedger(tmp_path, "codec.older", CAPACITY)
    assert (card.residency.obstacle() is not None) is stays


def test_a_worker_whose_account_was_deleted_has_to_be_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(tmp_path / "card", monkeypatch, stays=True)
    shutil.rmtree(tmp_path / "card")
    assert "restart all workers" in (card.residency.obstacle() or "")


def test_attempts_are_counted_while_as_much_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(tmp_path, monkeypatch, stays=False)
    foreign = CAPACITY // 4

    def waits(used: int, song: str = "a") -> int:
        card.used = card.placement.overhead + used
        found = card.residency.memory_for(Job(job_id=song, tenant="local", request=JOB.request, created_at=1.0))
        assert (found.needed, found.share, found.taken) == (41 * MB, card.placement.share, used)
        return found.waits

    assert [waits(foreign + n * MB) for n in range(3)] == [0, 1, 2]
    assert waits(foreign, "b") == 0
    assert waits(foreign // 2) == 0, "less is taken: it is worth to wait again"
    assert waits(foreign // 2) == 1
    card.residency.forget("a")
    assert waits(foreign // 2) == 0


def test_what_may_be_a_miscount_is_a_part_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stays in (False, True):
        found = Card(tmp_path / str(stays), monkeypatch, stays=stays).residency.memory_for(JOB)
        assert (found.miscount, found.stays) == (CAPACITY // 10, stays)


def test_a_problem_is_published_until_the_song_that_met_it_was_made_or_another_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(tmp_path, monkeypatch, stays=False)
    residency, state = card.residency, card.state

    def problem() -> str | None:
        return state.problem

    state.report("no codec worker")
    residency.begin(JOB)
    assert problem() is None
    for ends in ("made", "another begins"):
        residency.memory_for(JOB)
        state.report("waiting for memory")
        residency.begin(JOB)
        assert problem() == "waiting for memory", "it was tried again, and may fail again"
        if ends == "made":
            residency.forget(JOB.job_id)
        else:
            residency.begin(msgspec.structs.replace(JOB, job_id="b"))
        assert problem() is None
