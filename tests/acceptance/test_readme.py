"""The README's promises, checked on the whole system: the stack, its first curl, a song, a cancel, a clean end."""

import asyncio
import io
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import websockets

from tests.acceptance.running_stack import ROOT, RunningStack

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    stack = RunningStack(tmp_path_factory.mktemp("stack") / "data", HEARTMULA_BATCH="1")
    try:
        stack.until_ready()
        yield stack
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(60)


@pytest.fixture
async def client(stack: RunningStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as client:
        yield client


def first_curl(stack: RunningStack) -> dict[str, Any]:
    """Run the README's first curl, with another port."""
    found = re.search(r"^curl -X POST .*?(?=\n```)", README, re.MULTILINE | re.DOTALL)
    assert found
    command = found[0].replace("localhost:8000", f"127.0.0.1:{stack.port}").replace("\\\n", " ")
    done = subprocess.run([*shlex.split(command), "-sS"], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def watch(stack: RunningStack, events_url: str) -> list[dict[str, Any]]:
    """All messages of a websocket until the server closes it."""
    async with websockets.connect(f"ws://127.0.0.1:{stack.port}{events_url}") as socket:
        frames = [json.loads(frame) async for frame in socket]
    assert socket.close_code == 1000
    return frames


async def test_the_first_curl_makes_a_song(stack: RunningStack, client: httpx.AsyncClient) -> None:
    health = (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["workers"] == {"tokenizer": 1, "codec": 1}

    # Another song is made first, so that the websocket is open before this one begins.
    await client.post("/generate", json={"lyrics": "la", "max_duration_ms": 10_000})
    accepted = first_curl(stack)
    assert set(accepted) >= {"job_id", "status", "status_url", "result_url"}
    watching = asyncio.create_task(watch(stack, accepted["events_url"]))
    assert (await client.get(accepted["result_url"])).status_code == 409
    frames = await watching
    assert frames[0]["type"] == "snapshot"
    progress = [frame["progress"] if frame["type"] == "snapshot" else frame["data"]["progress"] for frame in frames]
    assert (progress[0], progress[-1]) == (0, 100)
    assert progress == sorted(progress)
    assert len(set(progress)) > 5
    stages = [frame["data"].get("stage") for frame in frames[1:] if frame["data"]["kind"] == "stage"]
    assert stages == ["generating", "waiting", "decoding", "storing"]  # the models were loaded for the song before
    ids = [int(frame["id"]) for frame in frames[1:]]
    assert ids == sorted(set(ids))

    status = (await client.get(accepted["status_url"])).json()
    assert {"job_id", "status", "progress", "created_at", "completed_at"} <= set(status)
    assert (status["status"], status["progress"]) == ("completed", 100)
    result = await client.get(accepted["result_url"])
    assert result.headers["content-type"] == "audio/flac"
    audio, rate = soundfile.read(io.BytesIO(result.content))
    assert rate == status["sample_rate"]
    assert audio.ndim == 2
    assert audio.shape[1] == 2
    # 20 s at most: the model may end a song earlier. Frames are 80 ms.
    assert audio.shape[0] == round(status["duration"] * rate)
    assert 1 < status["duration"] <= 20
    assert audio.shape[0] % (rate * 2 // 25) == 0
    assert np.isfinite(audio).all()
    assert audio.std() > 0.01
    assert (stack.data / "songs" / f"{accepted['job_id']}.flac").read_bytes() == result.content
    part = await client.get(accepted["result_url"], headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, result.content[100:200])


async def test_a_second_song_is_cancelled_while_it_runs(stack: RunningStack, client: httpx.AsyncClient) -> None:
    request = {"lyrics": "[Verse]\nOn and on", "tags": "slow,sad,piano", "max_duration_ms": 70_000}
    accepted = (await client.post("/generate", json=request)).json()
    while (await client.get(accepted["status_url"])).json()["status"] == "queued":
        await asyncio.sleep(0.05)
    watching = asyncio.create_task(watch(stack, accepted["events_url"]))
    answer = await client.delete(f"/generate/{accepted['job_id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    last = (await watching)[-1]
    assert (last.get("status") or last["data"]["status"]) == "cancelled"
    assert (await client.get(accepted["result_url"])).status_code == 410
    # The device is free again; the models stay where they fit.
    while True:
        gpus = (await client.get("/api/gpu")).json()["gpus"]
        resident = sorted(label for gpu in gpus for label in gpu["resident"])
        if not any(gpu["lease"] for gpu in gpus) and resident == ["heartcodec", "heartmula"]:
            break
        await asyncio.sleep(0.1)


async def test_the_same_seed_gives_the_same_song(client: httpx.AsyncClient) -> None:
    request = {"lyrics": "la", "tags": "pop", "max_duration_ms": 2000, "seed": 7, "format": "wav", "title": "Twice"}
    results = []
    for _ in range(2):
        accepted = (await client.post("/generate", json=request)).json()
        while (status := (await client.get(accepted["status_url"])).json())["status"] != "completed":
            assert status["status"] != "failed", status
            await asyncio.sleep(0.1)
        results.append((await client.get(accepted["result_url"])).content)
    assert results[0] == results[1]


async def test_a_song_too_long_for_the_model_is_refused_with_the_longest_that_fits(client: httpx.AsyncClient) -> None:
    request: dict[str, Any] = {"lyrics": "la la", "tags": "pop", "max_duration_ms": 3_600_000}
    refused = await client.post("/generate", json=request)
    assert refused.status_code == 422
    assert refused.headers["content-type"].startswith("application/problem+json")
    longest = re.search(r"(\d+) ms", refused.json()["detail"])
    assert longest
    accepted = await client.post("/generate", json=request | {"max_duration_ms": int(longest[1])})
    assert accepted.status_code == 202
    await client.delete(f"/generate/{accepted.json()['job_id']}")


async def test_the_page_loads_nothing_from_other_hosts(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/")
        assert (await client.get(link)).status_code == 200


def test_ctrl_c_leaves_nothing_running(stack: RunningStack) -> None:
    """The last of the tests that share the stack."""
    processes = stack.processes()
    assert len(processes) >= 6
    credentials = stack.data / "credentials.json"
    assert credentials.stat().st_mode & 0o777 == 0o600
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
    alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert alive == []
    assert {path.name for path in stack.data.parent.iterdir()} == {"data", "stack.log"}


async def test_every_part_may_be_killed_and_the_song_in_work_is_made(tmp_path: Path) -> None:
    stack = RunningStack(
        tmp_path / "data", HEARTMULA_ENGINE="trivial", HEARTMULA_TRIVIAL_STEP_MS="20", HEARTMULA_LEASE_TTL="2"
    )
    log = stack.data / "logs" / "s3.log"
    try:
        stack.until_ready()
        with log.open("a") as file:
            file.write("x" * 10_000_000 + "\n")  # as it is after many thousand songs
        killed = stack.processes() - {stack.process.pid}
        assert len(killed) == 5
        async with httpx.AsyncClient(base_url=stack.url, timeout=30) as client:
            song = {"lyrics": "la", "max_duration_ms": 6000}
            accepted = (await client.post("/generate", json=song)).json()
            status = "queued"
            while status != "completed":
                try:
                    status = (await client.get(accepted["status_url"])).json().get("status", status)
                except httpx.TransportError:
                    assert stack.process.poll() is None, stack.log.read_text()
                if status == "generating" and killed:
                    for pid in killed:
                        os.kill(pid, signal.SIGKILL)
                    killed.clear()
                await asyncio.sleep(0.1)
            assert (await client.get(accepted["result_url"])).status_code == 200
        while len(stack.processes()) < 6:
            await asyncio.sleep(0.1)
        said = stack.log.read_text()
        for part in ("nats", "s3", "gateway", "tokenizer worker", "codec worker"):
            assert f"{part} was ended by SIGKILL; starting it again in 0.5 s\n" in said
        while log.stat().st_size > 10_000_000:
            await asyncio.sleep(0.1)
        assert log.with_suffix(".old").stat().st_size > 10_000_000
    finally:
        stack.process.send_signal(signal.SIGINT)
        assert stack.process.wait(60) == 0
