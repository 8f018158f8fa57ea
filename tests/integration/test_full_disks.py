"""Servers whose disk is full: what is reported, what waits, and what recovers when there is room again."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.settings import Settings
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, running_gateway
from tests.integration.volumes import Volume, break_store, nats_on, store_on, volume


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Volume]:
    """A small volume."""
    with volume(tmp_path / "disk", 200) as found:
        yield found


async def problems(gateway: RunningGateway, words: str) -> dict[str, Any]:
    """Wait until one of the problems of ``/health`` matches `words`; returns its answer."""

    async def ask() -> dict[str, Any] | None:
        body: dict[str, Any] = (await gateway.http.get("/health")).json()
        return body if any(re.search(words, problem) for problem in body["problems"]) else None

    found: dict[str, Any] = await eventually(ask, f"health never has {words}")
    return found


async def test_a_full_disk_of_nats_is_named_and_ends_with_a_new_start(disk: Volume, settings: Settings) -> None:
    async with nats_on(disk, settings) as (server, changed), running_gateway(changed, settings.data_dir) as gateway:
        await gateway.heartbeat("tokenizer")
        await gateway.heartbeat("codec")
        disk.fill()
        assert (await gateway.http.post("/generate", json=SONG)).status_code == 503
        body = await problems(gateway, "NATS answers but stores nothing: its disk is full, or was. Free some room")
        assert (body["status"], body["nats"]["ok"], body["object_store"]["ok"]) == ("unavailable", False, True)
        assert not [problem for problem in body["problems"] if "worker" in problem]
        answer = await gateway.http.post("/generate", json=SONG)
        assert (answer.status_code, answer.json()["service"]) == (503, "nats")
        assert "its disk is full" in answer.json()["detail"]
        figures = (await gateway.http.get("/metrics")).text
        assert 'heartmula_server_up{server="nats"} 0.0' in figures
        assert not re.search(r'heartmula_failed_writes_total\{server="nats"\} 0\.0', figures)
        disk.make_room()
        assert (await gateway.http.post("/generate", json=SONG)).status_code == 503
        await server.stop()
        await server.start()
        await gateway.accepted()


async def test_a_full_disk_of_the_store_is_named_and_burns_no_song(disk: Volume, settings: Settings) -> None:
    async with store_on(disk, settings) as (server, changed):
        changed = replace(changed, trivial_step_ms=5, checkpoint_seconds=3600)
        async with (
            running_gateway(changed, settings.data_dir) as gateway,
            open_flow(changed, "tokenizer", "codec") as flow,
        ):
            first = await gateway.submit()
            await flow.ended(first)
            await break_store(gateway.store, disk)
            waiting = await flow.submit()
            body = await problems(gateway, "the object store takes no results: its disk is full, or was")
            assert (body["status"], body["nats"]["ok"], body["object_store"]["ok"]) == ("unavailable", True, False)
            answer = await gateway.http.post("/generate", json=SONG)
            assert (answer.status_code, answer.json()["service"]) == (503, "s3")
            await problems(gateway, "worker .*because the object store takes no results")
            disk.make_room()
            server.kill()
            await server.start()
            await flow.ended(waiting)
            events = [event.data for event in await flow.events(waiting)]
            begun = [event for event in events if getattr(event, "stage", "") == "generating"]
            assert len(begun) == 1, "its tokens were made more than once"
            await gateway.accepted()
