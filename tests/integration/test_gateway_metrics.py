"""The gateway's metrics for Prometheus."""

from collections.abc import Mapping

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.servers.embedded import S3Server
from shared.nats.subjects import WORKERS
from shared.schema.event import Failed
from shared.schema.worker import GpuFigures, PhaseMemory
from shared.settings import Settings
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, running_gateway


async def figures(gateway: RunningGateway) -> Mapping[str, float]:
    """Every sample by name and labels, as Prometheus writes them."""
    answer = await gateway.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def eventually_figures(gateway: RunningGateway, wanted: Mapping[str, float | None]) -> None:
    """Wait until metrics have these values; None for those that must not exist. Shown values may be seconds old."""

    async def ask() -> bool:
        found = await figures(gateway)
        return {name: found.get(name) for name in wanted} == wanted

    await eventually(ask, f"the figures were never {wanted}")


async def test_songs_are_counted(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir, queue_limit=3) as gateway:
        first, second, third = [await gateway.submit() for _ in range(3)]
        await gateway.http.post("/generate", json=SONG)
        await gateway.http.post("/generate", json={"lyrics": 1})
        await gateway.http.post("/generate", content=b"{", headers={"Content-Type": "application/json"})
        await gateway.nc.request("submit.local", b"{", timeout=10)
        await gateway.complete(first)
        await gateway.move_to(second, "failed", error="no")
        await gateway.publish(Failed(job_id=second, status="failed", progress=0, error="no"))
        await gateway.http.delete(f"/generate/{third}")
        await eventually_figures(
            gateway,
            {
                "heartmula_songs_accepted_total": 3,
                "heartmula_songs_refused_total reason=queue-full": 1,
                "heartmula_songs_refused_total reason=invalid-request": 1,
                "heartmula_songs_refused_total reason=malformed-json": 2,
                "heartmula_songs_ended_total status=completed": 1,
                "heartmula_songs_ended_total status=failed": 1,
                "heartmula_songs_ended_total status=cancelled": 1,
                "heartmula_queue_songs queue=tokens": 2,
                "heartmula_queue_songs queue=decode": 0,
            },
        )
        headers = {"Idempotency-Key": "k"}
        for _ in range(2):
            assert (await gateway.http.post("/generate", json=SONG, headers=headers)).status_code == 202
        await eventually_figures(gateway, {"heartmula_songs_accepted_total": 4})
        text = (await gateway.http.get("/metrics")).text
        assert not any(job_id in text for job_id in (first, second, third))
        assert "process_resident_memory_bytes" in text


async def test_workers_and_their_devices_are_counted_while_they_live(settings: Settings, s3_server: S3Server) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        memory = [
            PhaseMemory(phase=0, device_before=1, device_after=200, host=3),
            PhaseMemory(phase=1, device_before=200, host=4),
        ]
        await gateway.heartbeat("codec", sent=1.0)
        gpu = GpuFigures(id="gpu-1", name="A device", kind="cuda", memory_total=1000, memory_used=400)
        await gateway.heartbeat("tokenizer", gpu=gpu, jobs=["a", "b"], slots=4, rate=50.5, memory=memory)
        tokenizer = "device=gpu-1 instance=tokenizer-1 role=tokenizer"
        phase = "heartmula_phase_memory_bytes at={} device=gpu-1 instance=tokenizer-1 phase={} role=tokenizer".format
        wanted = {
            "heartmula_server_up server=nats": 1.0,
            "heartmula_server_up server=s3": 1.0,
            "heartmula_workers role=tokenizer": 1.0,
            "heartmula_workers role=codec": 1.0,
            "heartmula_device_memory_used_bytes device=gpu-1": 400.0,  # by the later heartbeat
            "heartmula_device_memory_total_bytes device=gpu-1": 1000.0,
            f"heartmula_worker_songs {tokenizer}": 2.0,
            f"heartmula_worker_slots {tokenizer}": 4.0,
            f"heartmula_worker_frames_per_second {tokenizer}": 50.5,
            "heartmula_worker_frames_per_second device=gpu-1 instance=codec-1 role=codec": None,
            phase("before", 0): 1.0,
            phase("after", 0): 200.0,
            phase("host", 0): 3.0,
            phase("before", 1): 200.0,
            phase("after", 1): None,
        }
        await eventually_figures(gateway, wanted)
        await gateway.js.publish(f"$KV.{WORKERS}.tokenizer.tokenizer-1", b"", headers={"KV-Operation": "DEL"})
        gone = {name: None for name in wanted if "tokenizer-1" in name}
        await eventually_figures(gateway, gone | {"heartmula_workers role=tokenizer": 0.0})
        s3_server.kill()
        try:
            await eventually_figures(gateway, {"heartmula_server_up server=s3": 0.0})
        finally:
            await s3_server.start()


async def test_the_reconciler_is_counted(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir, sweep_seconds=1.0) as gateway:
        await gateway.store.put("tokens/unknown/1.safetensors", b"x")
        job = await gateway.job(await gateway.submit())
        lost = msgspec.structs.replace(job, job_id="lost")
        await gateway.jobs.create(lost)
        await eventually_figures(
            gateway, {"heartmula_sweeper_objects_deleted_total": 1, "heartmula_sweeper_songs_queued_total": 1}
        )
        found = await figures(gateway)
        assert found["heartmula_sweeper_rounds_total"] > 0
        assert (found["heartmula_sweeper_failures_total"], found["heartmula_sweeper_records_renewed_total"]) == (0, 0)
