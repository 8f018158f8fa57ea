"""Listeners as gateways report them: who runs dry first, and when a report counts no more."""

import pytest

from shared.schema.listening import Listening
from shared.worker.listeners import FORGET_SECONDS, Listeners


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def listeners(clock: Clock) -> Listeners:
    return Listeners(clock)


def report(song: str, gateway: str, buffered: float) -> Listening:
    return Listening(job_id=song, gateway=gateway, listeners=1, buffered=buffered)


def test_nobody_listens_to_a_song_of_which_nothing_was_said(listeners: Listeners) -> None:
    listeners.add(report("other", "a", 5))
    assert listeners.dry_in("song") is None


def test_a_listener_plays_on_between_two_reports_and_never_has_less_than_nothing(
    listeners: Listeners, clock: Clock
) -> None:
    listeners.add(report("song", "a", 5))
    found = []
    for _ in range(4):
        found.append(listeners.dry_in("song"))
        clock.now += 2
    assert found == [5, 3, 1, 0]
    listeners.add(report("song", "a", 7.5))
    assert listeners.dry_in("song") == 7.5


def test_of_several_gateways_the_listener_counts_who_runs_dry_first(listeners: Listeners, clock: Clock) -> None:
    listeners.add(report("song", "a", 20))
    clock.now += 1
    listeners.add(report("song", "b", 4))
    listeners.add(report("other", "b", 1))
    assert listeners.dry_in("song") == 4
    listeners.add(report("song", "b", 30))
    assert listeners.dry_in("song") == 19


def test_a_report_that_is_not_repeated_is_forgotten_and_other_gateways_are_not(
    listeners: Listeners, clock: Clock
) -> None:
    listeners.add(report("song", "a", 2))
    clock.now += FORGET_SECONDS / 2
    listeners.add(report("song", "b", 50))  # five seconds later
    clock.now += FORGET_SECONDS / 2
    assert listeners.dry_in("song") == 0
    clock.now += 1
    assert listeners.dry_in("song") == 44
    clock.now += FORGET_SECONDS / 2
    assert listeners.dry_in("song") is None


def test_what_is_forgotten_takes_no_memory(listeners: Listeners, clock: Clock) -> None:
    for number in range(10_000):
        listeners.add(report(f"song {number}", "a", 5))
        clock.now += 0.1
    assert len(listeners._dry_at) <= 2 * FORGET_SECONDS / 0.1 + 2
