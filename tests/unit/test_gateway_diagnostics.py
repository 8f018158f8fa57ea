"""The sentences about workers that an operator reads."""

import msgspec
import pytest

from services.gateway.monitoring.diagnostics import diagnose
from shared.schema.worker import GpuFigures, Role, WorkerStatus


def worker(place: str) -> WorkerStatus:
    """Create a worker from ``role@device``."""
    role, _, device = place.partition("@")
    return WorkerStatus(
        role=role,  # type: ignore[arg-type]
        instance=f"i-{place}",
        host="h",
        pid=1,
        engine="native",
        model="m",
        gpu=GpuFigures(id=device, name=device, kind="cuda", memory_total=1, memory_used=0),
        state="idle",
        since=0,
        sent=0,
    )


@pytest.mark.parametrize(
    ("places", "sentences"),
    [
        ("tokenizer@A codec@A", []),
        ("tokenizer@A codec@A tokenizer@B codec@B", []),
        ("tokenizer@A", ["no codec worker on A: songs wait after their tokens"]),
        ("codec@A codec@B", ["no tokenizer worker on A: songs wait", "no tokenizer worker on B: songs wait"]),
        ("tokenizer@A-host codec@A", []),  # hybrid mode
        ("tokenizer@A-host codec@A encoder@A", []),  # the same, with recordings
        ("tokenizer@A codec@A tokenizer@B", ["no codec worker on B: its songs need another device"]),
        ("tokenizer@A codec@A codec@B", ["no tokenizer worker on B: its songs need another device"]),
    ],
)
def test_missing_roles_are_reported(places: str, sentences: list[str]) -> None:
    assert diagnose([worker(place) for place in places.split()]) == sentences


def test_problems_of_workers_are_reported_beside_missing_roles() -> None:
    ill = msgspec.structs.replace(worker("tokenizer@A"), problem="the weights do not fit")
    assert diagnose([ill]) == [
        "no codec worker on A: songs wait after their tokens",
        "tokenizer worker i-tokenizer@A on A: the weights do not fit",
    ]


def test_without_workers_both_roles_are_missing() -> None:
    roles: tuple[Role, ...] = ("tokenizer", "codec")
    assert [sentence.split(":")[0] for sentence in diagnose([])] == [f"no {role} worker is running" for role in roles]
