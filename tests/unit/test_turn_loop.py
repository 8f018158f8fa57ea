"""The turn loop's measure of how long the device was away, in a time that passes only where a test lets it."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import DeviceFull
from shared.worker import turn_loop as module
from shared.worker.state import WorkerState
from shared.worker.turn_loop import TurnLoop
from shared.worker.turn_policy import Decision, TurnPolicy

WAITING, LOADING, UNLOADING, WORKING = 5.0, 2.0, 3.0, 1000.0


class Clock:
    """A clock that stands still otherwise."""

    now = 50.0

    def taking(self, seconds: float, answer: Any = None) -> Callable[..., Coroutine[Any, Any, Any]]:
        """A call that takes so long."""

        async def call(*_: object) -> Any:
            self.now += seconds
            return answer

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    return clock


def loop_of(clock: Clock, state: WorkerState, policy: TurnPolicy) -> TurnLoop:
    """A loop that gets one song, which is done after `WORKING` seconds."""
    held = SimpleNamespace(alive=True, waiting=list, release=clock.taking(0))
    song = SimpleNamespace(job=SimpleNamespace(job_id="a", status="generating"), publish=lambda _: None)
    residency = SimpleNamespace(
        turn=lambda _: SimpleNamespace(),
        enter=clock.taking(0),
        load=clock.taking(LOADING),
        unload=clock.taking(UNLOADING),
        begin=lambda _: None,
        end_turn=lambda: None,
        memory_used=0,
    )

    class Runner:
        """One song, which is done as soon as it is begun."""

        turn_error = None

        def __len__(self) -> int:
            return 0

        def start(self, _: object) -> None:
            clock.now += WORKING

        def on_device(self) -> list[object]:
            return []

        async def clear_device(self) -> None:
            """Nothing is left."""

    figure = SimpleNamespace(observe=lambda _: None)
    parts: dict[str, Any] = {
        "consumer": SimpleNamespace(next=in_turn([song, None])),
        "runner": Runner(),
        "settlement": None,
        "residency": residency,
        "store": SimpleNamespace(trouble=None),
        "gate": None,
        "policy": policy,
        "state": state,
        "metrics": SimpleNamespace(wait=figure, turn=figure),
        "draining": SimpleNamespace(active=False, device_broken=None),
        "wake": asyncio.Event(),
    }
    stage: Any = SimpleNamespace(spec=SimpleNamespace(role="tokenizer", status="generating"), slots=1)
    lease: Any = SimpleNamespace(acquire=clock.taking(WAITING, held))
    worker: Any = None
    js: Any = None
    return TurnLoop(stage, js, lease, worker, **parts)


def in_turn(answers: list[Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A call that gives one answer after the other, again and again."""
    coming = itertools.cycle(answers)

    async def call(*_: object) -> Any:
        return next(coming)

    return call


@pytest.mark.parametrize(("slice_seconds", "second"), [(60.0, UNLOADING + WAITING + LOADING), (8.0, 2.0)])
async def test_the_device_is_away_from_leaving_it_until_the_model_is_there_again(
    clock: Clock, slice_seconds: float, second: float
) -> None:
    """Time in which there was no work does not count, nor more than a quarter of a slice."""
    state, policy = WorkerState(), TurnPolicy(slice_seconds)
    loop = loop_of(clock, state, policy)
    assert state.away == 0
    await loop._take_turn()
    assert state.away == min(WAITING + LOADING, slice_seconds / 4)
    clock.now += 10_000
    await loop._take_turn()
    assert state.away == second


@pytest.mark.parametrize(("role", "decision"), [("codec", Decision.YIELD), ("encoder", Decision.GO_ON)])
async def test_a_turn_ends_early_for_those_alone_who_can_help_a_listener(
    clock: Clock, role: str, decision: Decision
) -> None:
    loop: Any = loop_of(clock, WorkerState(), TurnPolicy(60.0))
    loop._stage.dry_in = clock.taking(0, 0.0)
    loop._runner.on_device = lambda: [object()]
    held = SimpleNamespace(alive=True, waiting=lambda: [SimpleNamespace(role=role, since=clock.now)])
    assert await loop._decide(held, clock.now, False) is decision


@pytest.mark.parametrize(("may_stay", "pause"), [(True, 2.0), (False, 30.0)])
async def test_a_model_that_does_not_stay_seldom_tries_a_full_device(
    clock: Clock, may_stay: bool, pause: float
) -> None:
    """Each time the model that stays there has to leave for it."""

    async def full(_: object) -> None:
        tries.append(clock.now)
        loop._draining.active = len(tries) == 2
        raise DeviceFull("there is no room")

    async def nothing(*_: object, **more: object) -> None:
        """Nothing is in the way, and nothing happens."""

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    state, tries = WorkerState(), list[float]()
    loop: Any = loop_of(clock, state, TurnPolicy(60.0))
    loop._stage.spec.may_stay, loop._stage.obstacle = may_stay, nothing
    loop._gate = SimpleNamespace(obstacle=nothing)
    loop._residency.obstacle, loop._residency.load = lambda: None, full
    loop._settlement = SimpleNamespace(give_back=nothing)
    loop._consumer = SimpleNamespace(
        wait=nothing,
        next=in_turn(
            [SimpleNamespace(job=SimpleNamespace(job_id="a", status="queued"), close=nothing)],
        ),
    )
    loop._draining.sleep, loop._runner.wait_settled = sleep, nothing
    await loop.run()
    assert tries[1] - tries[0] == WAITING + UNLOADING + pause
    assert state.problem == "waiting for memory on the device: there is no room"
