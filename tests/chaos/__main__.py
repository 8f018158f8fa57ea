"""``make chaos``: songs on a real stack under faults: killed and stopped processes, lost data, junk.

Nothing accepted may be lost, made twice, begun before its time or made by two models at once, and each listener to a
song hears all of it, byte for byte. First the trivial engine on two cards, then the demo checkpoint on one, then the
whole stack killed seven times, with orderly restarts between, then servers whose disk fills up (as root alone, since a
volume is mounted). The schedule follows from the seed alone. The last line is JSON; exit 1 when anything broke.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import randrange

from shared.settings import Settings
from tests.chaos.run import Plan, Result, run
from tests.chaos.verdict import BROKEN

BOTH = 60  # MB: room for either model of the trivial engine, not for both
DEMO_BOTH = 116  # the same for the demo checkpoint, whose encoder takes 112
TRIVIAL_SHARE, DEMO_SHARE, DISK_SHARE = 0.5, 0.3, 0.2  # of the time
WINDOW = (25, 15)  # frames of the trivial codec's windows, so that songs have up to six
CRASHES = 7  # of the whole stack; they take two or three minutes beside the time
DISK = 400  # MB


def plans(minutes: float) -> list[Plan]:
    """Plan all runs for `minutes` in total."""
    seconds = 60 * minutes
    trivial = Settings(
        engine="trivial",
        trivial_step_ms=20,
        trivial_window=WINDOW,
        batch=4,
        lease_ttl=3,
        turn_seconds=2,
        checkpoint_seconds=0.4,
        sweep_seconds=5,
        queue_limit=24,
        cpu_device_mb=BOTH,
        sequential_offload=True,
    )
    demo = Settings(
        batch=4,
        lease_ttl=3,
        turn_seconds=2,
        checkpoint_seconds=0.5,
        sweep_seconds=5,
        queue_limit=12,
        cpu_device_mb=DEMO_BOTH,
        sequential_offload=True,
    )
    return [
        Plan(
            name="trivial",
            seconds=TRIVIAL_SHARE * seconds,
            songs=max(200, round(50 * minutes)),
            length=(0.5, 8),
            gap=3,
            burst=60,
            poison=5,
            recordings=max(20, round(5 * minutes)),
            invalid=10,
            speeches=8,
            spoken=(1, 60),
            gateways=2,
            cards=("card-a", "card-b"),
            settings=trivial,
        ),
        Plan(
            name="demo",
            seconds=DEMO_SHARE * seconds,
            songs=max(40, round(8 * minutes)),
            length=(2, 4),
            gap=4,
            burst=8,
            recordings=2,
            recorded=(2, 6),
            settings=demo,
        ),
        Plan(
            name="crashes",
            seconds=90,
            songs=60,
            length=(0.5, 8),
            gap=1,
            burst=8,
            recordings=8,
            crashes=CRASHES,
            cards=("card-a", "card-b"),
            settings=replace(trivial, lease_ttl=2),
        ),
        Plan(
            name="disks",
            seconds=DISK_SHARE * seconds,
            songs=max(40, round(8 * minutes)),
            length=(0.5, 8),
            gap=6,
            burst=12,
            recordings=8,
            gateways=2,
            cards=("card-a", "card-b"),
            settings=trivial,
            disk_mb=DISK,
        ),
    ]


def summary(seed: int, results: list[Result]) -> dict[str, object]:
    """Summary of all runs together."""
    verdicts = [result.verdict for result in results]
    ends = sum((verdict.ends for verdict in verdicts), Counter[str]())
    broken = [line for verdict in verdicts for line in verdict.broken]
    found: dict[str, object] = {"songs": sum(result.songs for result in results)}
    found |= {status: ends[status] for status in ("completed", "failed", "cancelled")}
    for name in BROKEN:
        found[name] = sum(len(getattr(verdict, name)) for verdict in verdicts)
    found["faults"] = dict(sorted(sum((result.faults for result in results), Counter[str]()).items()))
    found["later"] = sum(verdict.later for verdict in verdicts)
    found["refused"] = sum(verdict.refused for verdict in verdicts)
    found["left"] = sum((verdict.left for verdict in verdicts), Counter[str]())
    found["continued"] = sum(result.continued for result in results)
    found["recordings"] = sum(result.recordings for result in results)
    found["resumed"] = sum(verdict.resumed for verdict in verdicts)
    found["wasted_frames"] = sum(verdict.wasted_frames for verdict in verdicts)
    found["listening"] = dict(sorted(sum((result.listening for result in results), Counter[str]()).items()))
    found["seed"] = seed
    if crashes := [line for result in results for line in result.crashes]:
        found["crashes"] = crashes
    return found | ({"broken": broken} if broken else {})


async def main(seed: int, minutes: float, only: str) -> int:
    """Run everything; returns the exit code."""
    print(f"seed {seed}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    chosen = [plan for plan in plans(minutes) if only in ("", plan.name)]
    if os.geteuid() != 0 and any(plan.disk_mb for plan in chosen):
        print("full disks are left out: a volume can be mounted by root alone", file=sys.stderr)
        chosen = [plan for plan in chosen if not plan.disk_mb]
    found = summary(seed, [await run(plan, seed, folder / plan.name) for plan in chosen])
    if "broken" in found:
        print(*found["broken"], f"logs: {folder}", sep="\n", file=sys.stderr)  # type: ignore[misc]
    else:
        shutil.rmtree(folder)
    print(json.dumps(found))
    return 1 if "broken" in found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Songs while parts are killed.")
    parser.add_argument("--seed", type=int, default=randrange(1_000_000), help="the schedule follows from it")
    parser.add_argument("--minutes", type=float, default=5, help="of faults")
    parser.add_argument("--only", choices=("", *(plan.name for plan in plans(1))), default="", help="one of the runs")
    chosen = parser.parse_args()
    sys.exit(asyncio.run(main(chosen.seed, chosen.minutes, chosen.only)))
