"""The state of a worker: a problem is published for as long as it is met."""

import pytest

from shared.worker.state import WorkerState


@pytest.mark.parametrize(("again_in", "lasts"), [(0, 15), (60, 75)])
def test_a_problem_lasts_until_it_is_not_met_again(
    monkeypatch: pytest.MonkeyPatch, again_in: float, lasts: float
) -> None:
    now = 1000.0
    monkeypatch.setattr("shared.worker.state.time.monotonic", lambda: now)
    state = WorkerState()

    def problem() -> str | None:
        return state.problem

    assert problem() is None
    state.report("the disk is full", again_in)
    state.report("the disk is full")
    now += lasts - 0.1
    assert problem() == "the disk is full"
    now += 0.1
    assert problem() is None, "its songs were cancelled"
    state.report("the disk is full", again_in)
    state.report(None)
    assert problem() is None
