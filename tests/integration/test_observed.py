"""The metrics and logs of workers and gateway."""

import asyncio
import contextlib
import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import websockets
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.servers.embedded import free_port
from shared.device.ledger import DeviceLedger
from shared.settings import Settings
from tests.chaos.poisoned import POISON_SEED
from tests.integration.flow import PATIENCE, environment, open_flow
from tests.integration.gateway_fixtures import SONG, eventually, running_gateway

WORD = "zanzibarometer"  # in the lyrics, and in nothing else


async def figures(port: int, role: str | None = None) -> dict[str, float]:
    """A process's metrics; of a codec worker's either the codec's or, by `role`, the encoder's."""
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    return {
        " ".join([sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "role")]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("role") == role or (role is None and sample.labels.get("role") != "encoder")
    }


async def test_workers_count_what_they_do(settings: Settings) -> None:
    ports = {"tokenizer": free_port(), "codec": free_port()}
    async with open_flow(settings) as flow:
        for role, port in ports.items():
            flow.settings = replace(settings, metrics_port=port)
            await flow.worker(role)  # type: ignore[arg-type]
        job_id = await flow.submit(seconds=4)
        await flow.ended(job_id)

        async def done() -> bool:
            found = [await figures(port) for port in ports.values()]
            return all(item["heartmula_worker_attempts_total outcome=done"] >= 1 for item in found)

        await eventually(done, "no worker counts the song")
        for port in ports.values():
            found = await figures(port)
            assert found["heartmula_worker_frames"] >= 50
            assert found["heartmula_worker_work_seconds"] > 0
            assert found["heartmula_worker_lease_wait_seconds_count"] >= 1
            assert found["heartmula_worker_load_seconds_count"] >= 1
            assert found["heartmula_worker_redeliveries_total"] == 0
            assert found["process_resident_memory_bytes"] > 0
            assert not any(job_id in name for name in found)


async def test_a_song_that_is_only_given_back_is_not_counted_as_failed(settings: Settings) -> None:
    """For a while another program holds the memory that the song's cache needs."""
    settings = replace(settings, cpu_device_mb=60, gpu_id="card", metrics_port=free_port())
    other = DeviceLedger(settings.data_dir / "device" / "card", "game.1", 60 * 2**20)
    other.place("textures", 15 * 2**20)
    async with open_flow(settings, "tokenizer") as flow:
        await flow.submit(655)  # 8 MB beside weights of 40

        async def given_back() -> bool:
            with contextlib.suppress(httpx.TransportError):
                found = await figures(settings.metrics_port)
                assert found["heartmula_worker_attempts_total outcome=failed"] == 0
                return found["heartmula_worker_attempts_total outcome=handed_back"] >= 1
            return False

        await eventually(given_back, "the song is not given back")
        other.close()


async def test_a_song_that_fails_is_counted_once_and_its_other_attempts_as_tried_again(settings: Settings) -> None:
    async with open_flow(replace(settings, metrics_port=free_port())) as flow:
        env = environment(flow.settings, "tokenizer")
        flow.processes.append(
            await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.chaos.poisoned", env=env)
        )
        job = await flow.ended(await flow.submit(1, seed=POISON_SEED))
        assert (job.status, job.error) == ("failed", "the tokenizer worker failed: poison")

        async def counted() -> bool:
            found = await figures(flow.settings.metrics_port)
            return found["heartmula_worker_attempts_total outcome=failed"] == 1

        await eventually(counted, "the song is not counted as failed")
        found = await figures(flow.settings.metrics_port)
        assert found["heartmula_worker_attempts_total outcome=tried_again"] == 2
        assert found["heartmula_worker_attempts_total outcome=handed_back"] == 0


async def test_requests_sockets_and_waiting_songs_are_counted(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        assert (await gateway.http.get("/unheard/of")).status_code == 404
        assert (await gateway.http.request("BREW", "/generate")).status_code >= 400
        url = f"{gateway.base.replace('http', 'ws', 1)}/generate/{job_id}/events"
        text, found = "", dict[tuple[object, ...], float]()

        async def counted() -> bool:  # the gateway may have looked at its queues just before the song came
            nonlocal text
            text = (await gateway.http.get("/metrics")).text
            for family in text_string_to_metric_families(text):
                found.update({(sample.name, *sorted(sample.labels.items())): sample.value for sample in family.samples})
            return found[("heartmula_queue_songs", ("queue", "tokens"))] == 1

        async with websockets.connect(url, proxy=None):
            await eventually(counted, "the song that waits is not counted")
        posted = (("method", "POST"), ("route", "/generate"), ("status", "202"))
        assert found[("heartmula_http_request_seconds_count", *posted)] == 1
        assert found[("heartmula_websockets",)] == 1
        assert 0 < found[("heartmula_queue_oldest_seconds", ("queue", "tokens"))] < PATIENCE
        assert found[("heartmula_queue_oldest_seconds", ("queue", "decode"))] == 0
        assert "unheard" not in text
        assert "BREW" not in text


@pytest.mark.parametrize("form", ["text", "json"])
async def test_logs_name_songs_and_never_hold_their_text(settings: Settings, tmp_path: Path, form: str) -> None:
    settings = replace(settings, log_format=form, log_level="debug", output_path=None)
    logs = {role: tmp_path / f"{role}.log" for role in ("tokenizer", "codec")}
    async with running_gateway(settings, tmp_path) as gateway:
        workers = []
        for role, log in logs.items():
            with log.open("wb") as out:
                workers.append(
                    await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", f"services.{role}_worker"),
                        env=environment(settings, role),  # type: ignore[arg-type]
                        stderr=out,
                    )
                )
        song = SONG | {"lyrics": f"[Verse]\n{WORD}", "tags": f"pop,{WORD}", "title": WORD}
        job_id = (await gateway.http.post("/generate", json=song)).json()["job_id"]

        async def completed() -> bool:
            return bool((await gateway.http.get(f"/generate/{job_id}/status")).json()["status"] == "completed")

        await eventually(completed, "the song is not made")
        for process in workers:
            process.terminate()
            await process.wait()
    for log in (gateway.log, *logs.values()):
        text = log.read_text()
        assert job_id in text
        assert WORD not in text
        if form == "json":
            lines = [json.loads(line) for line in text.splitlines()]
            assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)
            of_song = [line for line in lines if line.get("job_id") == job_id]
            assert any(line["level"] == "info" for line in of_song)
            if log != gateway.log:
                (role,) = (role for role, path in logs.items() if path == log)
                assert all(line["role"] == role for line in of_song)
                phases = {line["phase"] for line in of_song if "phase" in line}
                assert {"tokenizer": 1, "codec": 3}[role] in phases
