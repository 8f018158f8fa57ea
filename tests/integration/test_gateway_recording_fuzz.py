"""Damaged and hostile files over the route: each is taken or refused in words, and of those refused nothing is left.

The suite uploads a sample; ``-m slow`` uploads two thousand.
"""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from shared.nats.subjects import DEC, JOBS
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually, in_process
from tests.unit.recordings import children, file_of, flac_bomb, id3, music
from tests.unit.test_recording_fuzz import MOST_GROWTH, damaged_files, resident, whole_files

AT_ONCE = 2
SECONDS, MEGABYTES = 5.0, 1
REASONS = ("damaged-audio", "unknown-audio-format", "unsupported-audio", "audio-too-long", "too-large")


def hostile_files() -> Iterator[bytes]:
    """Files that are made to cost much, or to reach what they should not."""
    yield flac_bomb(60)
    yield id3(2**28 - 1) + b"fLaC"
    yield id3(10) * 500
    yield b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\2\0\x44\xac\0\0\x10\xb1\2\0\4\0\x10\0data\xff\xff\xff\xff"
    yield b"OggS" * 50_000
    yield b"\xff\xfb\x90\x64" * 20_000
    yield b"#!/bin/sh\nrm -rf /\n"
    yield b"ftypM4A " + bytes(5000)
    yield bytes(MEGABYTES * 1_000_000 + 1)
    yield file_of("wav", music(SECONDS + 1, 8000), 8000)
    yield file_of("wav", music(1.5, 8000, 6), 8000)


def files(count: int, damaged: list[bytes]) -> Iterator[bytes]:
    """Files that do not differ from run to run; each damaged one differs from round to round."""
    yield from hostile_files()
    random = np.random.default_rng(3)
    for number in range(count - len(list(hostile_files()))):
        data = bytearray(damaged[(number * 7) % len(damaged)])
        if number >= len(damaged) and data:
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        yield bytes(data)


def held() -> tuple[int, int, int]:
    """Tasks, open files and children of this process, which is the gateway's too."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), len(children())


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
async def test_every_file_is_taken_or_refused_and_what_is_refused_leaves_nothing(
    settings: Settings, count: int
) -> None:
    limits = replace(settings, recording_seconds=SECONDS, recording_mb=MEGABYTES, queue_limit=10_000)
    async with in_process(limits) as (gateway, server, base):
        statuses: set[int] = set()
        kinds: Counter[str] = Counter()
        taken: set[str] = set()
        halfway: list[int] = []  # bytes of memory, when the heap has its size

        async def upload(waiting: Iterator[bytes]) -> None:
            async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=60) as http:
                for number, data in enumerate(waiting):
                    sent: dict[str, Any] = {"files": {"file": data}} if number % 2 else {"content": data}
                    answer = await http.post("/recordings", **sent)
                    statuses.add(answer.status_code)
                    body = answer.json()
                    kinds[body.get("type", "taken")] += 1
                    if kinds.total() == count // 2:
                        halfway.append(resident())
                    if "recording_id" in body:
                        taken.add(body["recording_id"])

        waiting = files(count, list(damaged_files(120)))
        await upload(iter([*itertools.islice(waiting, 2), *whole_files()]))  # after which everything is loaded
        before = held()
        await asyncio.gather(*(upload(waiting) for _ in range(AT_ONCE)))

        async def released() -> bool:
            return all(now <= then for now, then in zip(held(), before, strict=True)) and not server.server_state.tasks

        await eventually(released, "tasks, files or processes are left")
        growth = resident() - halfway[0]
        print(count, dict(kinds), f"{growth / 2**20:.1f} MiB")
        assert growth < MOST_GROWTH
        assert statuses == {202, 413, 415, 422}
        assert kinds.keys() >= {"taken", *(f"/problems/{kind}" for kind in REASONS)}
        objects = await gateway.store.list("recordings/")
        records = (await gateway.js.stream_info(f"KV_{JOBS}", subjects_filter=f"$KV.{JOBS}.local.>")).state.subjects
        assert {subject.rpartition(".")[2] for subject in records or ()} == taken
        assert (await gateway.js.stream_info(DEC)).state.messages == len(objects) == len(taken)
        assert list((gateway.settings.data_dir / "tmp").glob("*")) == []
        assert gateway.uploads._room._reservations == set()
