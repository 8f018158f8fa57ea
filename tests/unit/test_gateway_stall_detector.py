"""The stall detector: when the system counts as stalled, and when it is only idle."""

from services.gateway.monitoring.stall_detector import StallDetector
from shared.schema.worker import WorkerStatus
from tests.unit.test_gateway_diagnostics import worker as worker_on


def workers(**movement: int) -> list[WorkerStatus]:
    """Create live workers by name, with the work that each reports."""
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
    detector = StallDetector(limit=10)
    detector.observe(workers(a=5, b=7), 1, 100)
    detector.observe(workers(a=5, b=7), 1, 105)
    assert (detector.seconds(109), detector.problem(109)) == (9, None)
    assert "nothing has moved for 10 s" in str(detector.problem(110))
    detector.observe(workers(a=5, b=8), 1, 111)
    assert (detector.seconds(111), detector.problem(111)) == (0, None)


def test_an_empty_queue_is_not_stalled() -> None:
    detector = StallDetector(limit=10)
    detector.observe(workers(a=5), 0, 100)
    detector.observe(workers(a=5), 0, 200)
    assert detector.seconds(200) == 0
    detector.observe(workers(a=5), 1, 201)
    assert detector.seconds(202) == 1


def test_a_queue_without_workers_is_not_reported_as_stalled() -> None:
    detector = StallDetector(limit=10)
    detector.observe([], 1, 100)
    detector.observe([], 1, 200)
    assert detector.problem(200) is None


def test_workers_that_crash_repeatedly_count_as_no_movement() -> None:
    detector = StallDetector(limit=10)
    for second in range(12):
        detector.observe(workers(**{f"w{second}": 0}), 1, second)
    assert detector.problem(11) is not None
    detector.observe(workers(new=1), 1, 12)
    assert detector.problem(12) is None
