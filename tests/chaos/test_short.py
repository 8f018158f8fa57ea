"""A short run of chaos: every kind of fault once, on the trivial engine, and listeners who come back after each cut."""

from pathlib import Path

from shared.settings import Settings
from tests.chaos.faults import SYSTEM_FAULTS
from tests.chaos.run import Plan, run
from tests.chaos.songs import SONG_FAULTS

SEED = 1
SETTINGS = Settings(
    engine="trivial",
    trivial_step_ms=10,
    trivial_window=(25, 15),
    batch=4,
    lease_ttl=2,
    turn_seconds=1,
    checkpoint_seconds=0.4,
    sweep_seconds=2,
    queue_limit=12,
    sequential_offload=True,
    cpu_device_mb=60,  # room for either model, not for both
)
PLAN = Plan(
    name="short",
    seconds=26,
    songs=45,
    length=(0.5, 8),
    gap=1.4,
    burst=16,
    poison=1,
    recordings=4,
    recorded=(2, 35),
    cards=("card-a", "card-b"),
    settings=SETTINGS,
    patience=90,
)


async def test_no_song_is_lost_made_twice_by_two_models_at_once_or_heard_in_part(tmp_path: Path) -> None:
    result = await run(PLAN, SEED, tmp_path)
    broken = "\n".join(result.verdict.broken)
    assert broken == ""
    assert not result.crashes
    assert result.songs == PLAN.songs
    kinds = {kind for kind, _ in SYSTEM_FAULTS} | set(SONG_FAULTS) | {"poison", "queue-full", "ack-lost"}
    assert set(result.faults) - {"upload-cut"} == kinds
    assert result.listening["compared"] > 0
    assert result.listening["returns"] > 0
    assert result.continued > 0
    assert result.verdict.later > 0
    assert result.verdict.left.total() > 0
    assert result.verdict.refused == PLAN.invalid
    assert result.recordings == PLAN.recordings
