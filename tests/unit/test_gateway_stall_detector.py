"""When the system is stalled, and when it only rests."""

from services.gateway.monitoring.stall_detector import StallDetector
from shared.schema.worker import WorkerStatus
from tests.unit.test_gateway_diagnostics import worker as worker_on


def workers(**movement: int) -> list[WorkerStatus]:
    """Live workers by name, and what they have moved."""
    found = worker_on("tokenizer@A")
    return [
        WorkerStatus(
            role=found.role,
            instance=name,
            host="h",
            pid=1,
            engine="native",
            model="m",
            gpu=found.gpu,
            state="working",
            movement=count,
            since=0,
            sent=0,
        )
        for name, count in movement.items()
    ]


def test_songs_that_wait_while_no_worker_moves_are_a_problem_after_a_while() -> None:
    still = StallDetector(limit=10)
    still.look(workers(a=5, b=7), 1, 100)
    still.look(workers(a=5, b=7), 1, 105)
    assert (still.seconds(109), still.problem(109)) == (9, None)
    assert "nothing has moved for 10 s" in str(still.problem(110))
    still.look(workers(a=5, b=8), 1, 111)
    assert (still.seconds(111), still.problem(111)) == (0, None)


def test_an_empty_queue_stands_still_rightly() -> None:
    still = StallDetector(limit=10)
    still.look(workers(a=5), 0, 100)
    still.look(workers(a=5), 0, 200)
    assert still.seconds(200) == 0
    still.look(workers(a=5), 1, 201)
    assert still.seconds(202) == 1


def test_without_workers_something_else_is_wrong() -> None:
    still = StallDetector(limit=10)
    still.look([], 1, 100)
    still.look([], 1, 200)
    assert still.problem(200) is None


def test_workers_that_end_again_and_again_move_nothing() -> None:
    still = StallDetector(limit=10)
    for second in range(12):
        still.look(workers(**{f"w{second}": 0}), 1, second)
    assert still.problem(11) is not None
    still.look(workers(new=1), 1, 12)
    assert still.problem(12) is None
