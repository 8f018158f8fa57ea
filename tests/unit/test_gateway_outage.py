"""The time after which a refused client is asked to try again."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.submission.outage import Outage
from shared.errors import NoRoom, QueueFull, Rejected, Unavailable


@pytest.mark.parametrize(
    ("service", "away", "seconds"), [("nats", None, 1), ("nats", 4.5, 5), ("s3", 20.5, 21), ("s3", 4000, 60)]
)
def test_a_server_is_expected_to_stay_away_for_as_long_as_it_was(
    service: str, away: float | None, seconds: int
) -> None:
    lost_at = None if away is None else time.monotonic() - away
    nc: Any = SimpleNamespace(lost_at=lost_at if service == "nats" else None)
    health: Any = SimpleNamespace(store_lost_at=lost_at if service == "s3" else None)
    assert Outage(nc, health).retry_after(Unavailable(service, "…")) == seconds


async def test_a_request_does_not_wait_where_waiting_does_not_help() -> None:
    outage = Outage(Any, Any)  # type: ignore[arg-type]
    for error in (NoRoom("nats", "full"), Rejected("s3", "wrong password")):
        with pytest.raises(type(error)):
            await outage.begin_request().until_back(error)
    assert outage.retry_after(NoRoom("nats", "full")) == 60


@pytest.mark.parametrize(
    ("rates", "frames", "seconds"), [([], None, 15), ([50.0, 50.0], 1000.0, 10), ([1.0], 1e9, 60), ([1e9], 1.0, 1)]
)
def test_a_full_queue_has_room_again_when_a_song_leaves_it(
    rates: list[float], frames: float | None, seconds: int
) -> None:
    workers = [SimpleNamespace(role="tokenizer", rate=rate, song_frames=frames) for rate in rates]
    health: Any = SimpleNamespace(workers=workers)
    assert Outage(Any, health).retry_after(QueueFull("full")) == seconds  # type: ignore[arg-type]
