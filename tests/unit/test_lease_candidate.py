"""The lease's protocol against a server that errs: never two holders, and in the end each candidate gets the device."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from shared import clock
from shared.clock import elapsed
from shared.device.lease_queue import LeaseQueue
from tests.unit.erratic_server import STEP, TTL, Consumer, Process, World

TROUBLE, PEACE = 120.0, 8.0 * TTL  # seconds, of the world


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Create the world of a seed."""
    world = World(Random(getattr(request, "param", 0)), tmp_path)
    monkeypatch.setattr("shared.device.lease_candidate.connect", world.connect)
    for module in ("lease_candidate", "lease_renewal", "lease_follower", "lease_key", "stale_keys"):
        monkeypatch.setattr(f"shared.device.{module}.elapsed", lambda: world.now)
    yield world
    for process in world.processes:
        process.end()


def pass_time(world: World, seconds: float) -> None:
    """Let time pass, and check that there is one holder at most."""
    until = world.now + seconds
    while world.now < until:
        world.step()
        holders = [process.name for process in world.processes if process.alive]
        assert len(holders) <= 1, f"{holders} at {world.now:.2f}"


def lose_a_key(world: World) -> None:
    """Lose a key whose latest state all others have seen: one that has not cannot know that the device is taken."""
    for subject, stored in world.stored.items():
        others = [process for process in world.processes if not subject.endswith(f".{process.name}")]
        views = [process.candidate._queue.views.get(subject) for process in others]
        if all(view is not None and view.sequence == stored.sequence for view in views):
            world.lose(subject)
            return


def inject_fault(world: World, number: int) -> None:
    """Inject one random fault."""
    random, process = world.random, world.random.choice(world.processes)
    match random.choice(("kill", "stop", "stop", "cut off", "crash", "crash", "lose")):
        case "kill":
            world.processes.remove(process)
            process.end()
            world.start(f"{process.name[0]}{number}")
        case "stop":
            process.stopped_until = world.now + random.choice((1, TTL, 3 * TTL))
        case "cut off":
            process.cut_off_until = world.now + random.choice((1, TTL, 3 * TTL))
        case "crash":
            world.crash()
            pass_time(world, random.choice((0.5, 2, TTL)))
            world.bring_back()
            world.up = True
        case "lose":
            lose_a_key(world)


def stop_faults(world: World) -> None:
    """Let all processes run connected, and none keep the device for long."""
    world.faulty = False
    for process in world.processes:
        process.stopped_until = process.cut_off_until = world.now
        process.keeps = 1.0


@pytest.mark.parametrize("world", range(4), indirect=True)
def test_never_two_hold_the_device_and_each_gets_it_in_the_end(world: World) -> None:
    for name in "abcd":
        world.start(name)
    for number in range(2):
        world.faulty = True
        for process in world.processes:
            process.keeps = None
        until = world.now + TROUBLE
        while world.now < until:
            pass_time(world, world.random.uniform(0.5, 6))
            inject_fault(world, number * 1000 + int(world.now))
        stop_faults(world)
        taken = {process: process.taken for process in world.processes}
        pass_time(world, PEACE)
        assert all(process.taken > taken[process] for process in world.processes), "a candidate waits for ever"
    assert world.returned


def started(world: World, *names: str) -> list[Process]:
    """Start processes in a world without faults; the first holds the device for long."""
    world.faulty = False
    for name in names:
        world.start(name)
        process = world.processes[-1]
        process.keeps = 1000.0
        if process is world.processes[0]:
            until(world, lambda: world.processes[0].alive, 1)
    until(world, lambda: all(process.candidate._ticket for process in world.processes), 1)
    return world.processes


def until(world: World, happened: Callable[[], bool], seconds: float) -> float:
    """Let time pass until a condition holds, which it must within `seconds`. Returns how many it took."""
    began = world.now
    while not happened():
        pass_time(world, STEP)
        assert world.now < began + seconds, "it has not happened"
    return world.now - began


def come_back(world: World, process: Process) -> None:
    """Its key is one that no longer expires."""
    subject = process.candidate._subject
    world.stored[subject] = replace(world.stored[subject], ends=float("inf"))


def test_a_key_that_does_not_move_is_deleted_after_two_ttls_and_its_owner_meets_the_marker(world: World) -> None:
    first, second = started(world, "a", "b")
    first.stopped_until = world.now + 5 * TTL
    come_back(world, first)
    assert until(world, lambda: second.alive, 3 * TTL) > 1.7 * TTL
    until(world, lambda: world.now > first.stopped_until + 1, 5 * TTL)
    assert second.alive
    assert not first.alive


def test_an_owner_that_had_looked_at_its_deadline_before_it_was_stopped_does_not_renew(world: World) -> None:
    first, second = started(world, "a", "b")
    first.candidate.slow = True  # stays where it is about to write
    until(world, lambda: first.candidate.about_to_write, TTL)
    first.stopped_until = world.now + 4 * TTL
    come_back(world, first)
    until(world, lambda: second.alive, 3 * TTL)
    until(world, lambda: world.now > first.stopped_until, 5 * TTL)
    first.candidate.slow = False
    pass_time(world, 2 * TTL)
    assert second.alive


def test_a_waiter_that_slept_past_its_deadline_takes_nothing_with_a_key_that_came_back(world: World) -> None:
    first, second = started(world, "a", "b")
    second.candidate.slow = True
    until(world, lambda: second.candidate.about_to_write, TTL)
    first.keeps = 0.0
    key = world.stored[second.candidate._subject]
    second.stopped_until = world.now + 3 * TTL
    second.disconnect()  # no marker reaches it
    pass_time(world, TTL)
    world.start("c")
    world.processes[-1].keeps = 1000.0
    until(world, lambda: world.processes[-1].alive, 2 * TTL)
    world.stored[key.subject] = replace(key, ends=float("inf"))
    until(world, lambda: second.connected, 3 * TTL)
    pass_time(world, 1)
    second.candidate.slow = False
    pass_time(world, 3 * TTL)


def test_reconnecting_again_and_again_does_not_keep_a_dead_key_alive(world: World) -> None:
    first, second = started(world, "a", "b")
    first.stopped_until = world.now + 1000
    come_back(world, first)
    for _ in range(20):
        pass_time(world, TTL / 2)
        second.cut_off_until = world.now + 0.5
        if second.alive:
            break
    assert second.alive


def test_a_live_key_outlives_a_waiter_that_is_stopped_or_cut_off_for_long(world: World) -> None:
    first, second = started(world, "a", "b")
    for _ in range(3):
        second.stopped_until = world.now + 3 * TTL
        pass_time(world, 4 * TTL)
        second.cut_off_until = world.now + 3 * TTL
        pass_time(world, 4 * TTL)
    assert first.alive
    assert first.taken == 1


def test_a_lease_of_a_later_version_is_waited_for_until_it_stands_still(world: World) -> None:
    subject, written = "$KV.GPU_LOCK.gpu0.codec.later", {"Nats-TTL": "60s"}
    world.faulty = False
    world.write(subject, b"a record of another kind", written)
    world.start("b")
    (process,) = world.processes
    for _ in range(20):
        pass_time(world, TTL / 2)
        assert not process.alive
        world.write(subject, b"a record of another kind", written)
    assert [view.state for view in process.candidate.others()] == ["unreadable"]
    world.write(subject, b"a record of another kind", {"Nats-TTL": f"{TTL}s"})
    come_back_at = world.stored[subject]
    world.stored[subject] = replace(come_back_at, ends=float("inf"))
    assert until(world, lambda: process.alive, 3 * TTL) > 1.9 * TTL


def test_a_key_with_a_longer_ttl_is_given_the_time_that_it_was_written_for(world: World) -> None:
    world.faulty = False
    subject = "$KV.GPU_LOCK.gpu0.codec.patient"
    world.write(subject, b"{}", {"Nats-TTL": f"{3 * TTL}s"})
    world.stored[subject] = replace(world.stored[subject], ends=float("inf"))
    world.start("b")
    assert until(world, lambda: world.processes[0].alive, 7 * TTL) > 5.8 * TTL


def test_a_holder_whose_key_the_server_lost_is_given_until_its_deadline(world: World) -> None:
    first, second = started(world, "a", "b")
    first.cut_off_until = world.now + 1000
    world.lose(first.candidate._subject)
    second.cut_off_until = world.now + 0.1  # sees from a fresh snapshot that the key is gone
    until(world, lambda: second.alive, 2 * TTL)
    assert not first.alive


def consumer_of(world: World, process: Process) -> Consumer:
    """The consumer by which a process follows the others."""
    (consumer,) = [consumer for consumer in world.consumers.values() if consumer.process is process]
    return consumer


def test_a_change_that_was_lost_on_the_way_is_read_in_a_fresh_snapshot_within_two_heartbeats(world: World) -> None:
    first, second = started(world, "a", "b")
    subject, queue = first.candidate._subject, second.candidate._queue
    consumer = consumer_of(world, second)
    consumer.loses = 1
    until(world, lambda: not consumer.loses, TTL)
    lost = world.stored[subject].sequence
    assert queue.views[subject].sequence < lost
    until(world, lambda: queue.views[subject].sequence == lost and queue.complete, 2.5)
    assert consumer_of(world, second) is not consumer


def test_a_key_that_was_written_again_before_it_was_delivered_is_not_overlooked(world: World) -> None:
    world.faulty = False
    for name in "ba":
        world.start(name)
        world.processes[-1].keeps = 1000.0
        world.processes[-1].candidate.slow = True  # about to enter the queue
    second, first = world.processes
    until(world, lambda: first.candidate.about_to_write and second.candidate.about_to_write, 1)
    consumer = consumer_of(world, second)
    consumer.paused = True
    first.candidate.slow = False
    until(world, lambda: bool(first.candidate._ticket), 1)
    first.candidate.slow = True
    second.candidate.slow = False
    until(world, lambda: bool(second.candidate._ticket), 1)
    first.candidate.slow = False
    until(world, lambda: first.alive, 1)
    consumer.send()  # the write of the second: that of the first before it was replaced by one after it
    until(world, lambda: bool(second.candidate._queue.views), 1)
    assert not second.candidate.others()
    pass_time(world, 1)
    consumer.paused = False
    until(world, lambda: len(second.candidate.others()) == 1, 2.5)
    assert first.alive


def test_time_in_which_nothing_could_be_seen_counts_against_no_contender() -> None:
    queue, subject = LeaseQueue("$KV.GPU_LOCK.g.codec.me", TTL), "$KV.GPU_LOCK.g.codec.other"
    queue.begin()
    queue.tick(0, True)
    queue.observe(subject, 1, b"{}", None, 0)
    queue.finish(0)
    queue.tick(100, True)  # stopped meanwhile
    queue.tick(200, False)  # cut off
    assert not any(stale for _, _, stale in queue.doubtful(9))
    for second in range(201, 201 + 2 * TTL - TTL // 4):
        assert not any(stale for _, _, stale in queue.doubtful(9))
        queue.tick(second, True)
    assert [(view.sequence, stale) for _, view, stale in queue.doubtful(9)] == [(1, True)]
    queue.begin()
    queue.observe(subject, 1, b"{}", None, 300)  # in a fresh snapshot, as it was
    queue.finish(300)
    assert [stale for _, _, stale in queue.doubtful(9)] == [True]
    assert queue.doubtful(1) == []  # not ahead of that ticket
    queue.observe(subject, 2, b"{}", None, 300)
    assert queue.doubtful(9) == []


def test_the_clock_goes_on_while_the_machine_sleeps_where_the_system_has_such_a_clock() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= elapsed() <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("unknown", [None, -1], ids=["no such name", "a kernel without it"])
def test_without_such_a_clock_the_monotonic_one_is_taken(unknown: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if unknown is None:
        monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    else:
        monkeypatch.setattr(time, "CLOCK_BOOTTIME", 10_000)
    assert clock._choose() == time.CLOCK_MONOTONIC
