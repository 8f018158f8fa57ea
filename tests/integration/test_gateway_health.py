"""Health while servers are away, devices, the page, and a gateway that cannot start."""

import asyncio
import sys
import time
from dataclasses import replace

import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server, free_port
from services.gateway.monitoring.health import PROBE_SECONDS
from services.gateway.monitoring.worker_registry import WorkerRegistry
from shared.nats.subjects import GPU_LOCK, WORKERS, decode_subject, lock_key
from shared.schema.worker import LeaseRecord, PhaseMemory
from shared.settings import Settings
from tests.compatibility.stored import WORKING
from tests.integration.flow import environment
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, running_gateway


async def eventually_status(gateway: RunningGateway, status: str) -> dict[str, object]:
    """Wait until ``/health`` has this status; an answer may be a second old."""

    async def ask() -> dict[str, object] | None:
        answer = await gateway.http.get("/health")
        body: dict[str, object] = answer.json()
        assert answer.status_code == (503 if body["status"] == "unavailable" else 200)
        return body if body["status"] == status else None

    found: dict[str, object] = await eventually(ask, f"health never became {status}")
    return found


async def test_health_counts_live_workers_and_waiting_songs(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        body = await eventually_status(gateway, "degraded")
        assert body == {
            "status": "degraded",
            "nats": {"ok": True},
            "object_store": {"ok": True},
            "workers": {"tokenizer": 0, "codec": 0},
            "queue": {"tokens": 0, "decode": 0, "encode": 0, "intake": 0},
            "problems": [
                "no tokenizer worker is running: songs wait",
                "no codec worker is running: songs wait after their tokens",
            ],
        }
        await gateway.submit()
        await gateway.heartbeat("tokenizer")
        await gateway.heartbeat("codec")
        body = await eventually_status(gateway, "ok")
        assert body["workers"] == {"tokenizer": 1, "codec": 1}
        assert body["queue"] == {"tokens": 1, "decode": 0, "encode": 0, "intake": 0}
        assert body["problems"] == []
        await gateway.js.publish(f"$KV.{WORKERS}.codec.codec-1", b"", headers={"KV-Operation": "DEL"})
        body = await eventually_status(gateway, "degraded")
        assert body["workers"] == {"tokenizer": 1, "codec": 0}
        assert body["problems"] == ["no codec worker on gpu-1: songs wait after their tokens"]
        await gateway.heartbeat("codec", problem="HeartCodec needs 6 GB and the device has 4")

        async def reported() -> bool:
            body = (await gateway.http.get("/health")).json()
            found: list[list[str]] = [body["problems"], (await gateway.http.get("/api/gpu")).json()["problems"]]
            sentence = "codec worker codec-1 on gpu-1: HeartCodec needs 6 GB and the device has 4"
            return body["status"] == "degraded" and found == [[sentence], [sentence]]

        await eventually(reported, "the codec's problem is not reported")


async def test_a_full_queue_for_audio_is_a_problem(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir, queue_limit=1) as gateway:
        await gateway.heartbeat("tokenizer")
        await gateway.heartbeat("codec")
        await eventually_status(gateway, "ok")
        for number in range(4):
            await gateway.js.publish(decode_subject(str(number)), b"{}")
        body = await eventually_status(gateway, "degraded")
        assert body["problems"] == ["the queue for audio is full: songs wait for their tokens"]
        assert (await gateway.http.post("/generate", json=SONG)).status_code == 202


async def test_a_song_with_listeners_waits_for_its_audio_once(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        for subject in (
            decode_subject("a"),
            decode_subject("b"),
            decode_subject("b", "high"),
            decode_subject("c", "high"),
        ):
            await gateway.js.publish(subject, b"{}")

        async def counted() -> bool:
            depths = [(await gateway.http.get(path)).json()["queue"] for path in ("/health", "/api/gpu")]
            metrics = (await gateway.http.get("/metrics")).text
            return (
                all(depth == {"tokens": 0, "decode": 3, "encode": 0, "intake": 0} for depth in depths)
                and 'heartmula_queue_songs{queue="decode"} 3.0' in metrics
            )

        await eventually(counted, "songs in both lanes were not counted once")


async def test_what_dead_workers_leave_behind_is_named_or_dropped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        await gateway.heartbeat("tokenizer")
        await gateway.heartbeat("codec")
        await eventually_status(gateway, "ok")
        stale, fresh = (f"$KV.{GPU_LOCK}.{lock_key('gpu-1', 'codec', name)}" for name in ("dead", "alive"))
        await gateway.js.publish(stale, b"not a record")

        async def named() -> bool:
            await gateway.js.publish(fresh, b"not a record either")
            await gateway.heartbeat("tokenizer")
            await gateway.heartbeat("codec")
            assert (await gateway.http.get("/api/gpu")).status_code == 200
            problems: list[str] = (await gateway.http.get("/health")).json()["problems"]
            return problems == [
                "the lease of the codec worker dead on gpu-1 is no longer renewed: "
                "the next worker that waits for the device deletes it"
            ]

        await eventually(named, "the stale lease was not named")
        await gateway.js.publish(stale, b"", headers={"KV-Operation": "DEL"})
        await eventually_status(gateway, "ok")

        workers = WorkerRegistry(gateway.js, PROBE_SECONDS)
        assert {worker.role for worker in await workers.live()} == {"tokenizer", "codec"}
        monkeypatch.setattr("services.gateway.monitoring.worker_registry.WORKER_TTL", 0.5)

        async def dropped() -> bool:
            return await workers.live() == []

        await eventually(dropped, "a heartbeat outlived its time")
        assert (await gateway.js.get_msg(f"KV_{WORKERS}", subject=f"$KV.{WORKERS}.codec.codec-1")).data


async def test_devices_are_listed_with_the_worker_that_holds_them_and_those_that_wait(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        assert (await gateway.http.get("/api/gpu")).json() == {
            "available": False,
            "gpus": [],
            "queue": {"tokens": 0, "decode": 0, "encode": 0, "intake": 0},
            "problems": [
                "no tokenizer worker is running: songs wait",
                "no codec worker is running: songs wait after their tokens",
            ],
        }
        for role, state in (("tokenizer", "held"), ("codec", "waiting")):
            record = LeaseRecord(ticket=0, state=state, role=role, owner=f"{role}-1", phase=1, since=2.0)  # type: ignore[arg-type]
            await gateway.js.publish(f"$KV.{GPU_LOCK}.{lock_key('gpu-1', role, role)}", msgspec.json.encode(record))
        await gateway.heartbeat("codec", "cuda", resident=["what lay there before"])
        memory = [
            PhaseMemory(phase=0, device_before=1, device_after=200, host=3),
            PhaseMemory(phase=1, device_before=200, host=4),
        ]
        await gateway.heartbeat(
            "tokenizer",
            "cuda",
            state="working",
            resident=["language model"],
            phase=1,
            jobs=["a", "b"],
            slots=4,
            rate=50.5,
            memory=memory,
            plan=WORKING.plan,
            notes=["no C compiler was found"],
        )

        async def both() -> dict[str, object] | None:
            body: dict[str, object] = (await gateway.http.get("/api/gpu")).json()
            gpus = body["gpus"]
            assert isinstance(gpus, list)
            return body if gpus and len(gpus[0]["workers"]) == 2 else None

        body = await eventually(both, "the workers were not seen")
        assert body["available"] is True
        (gpu,) = body["gpus"]
        since = "1970-01-01T00:00:02.000Z"
        assert (gpu["id"], gpu["kind"], gpu["memory_free"], gpu["resident"]) == (
            "gpu-1",
            "cuda",
            700,
            ["language model"],
        )
        lease = gpu["lease"]
        assert lease.pop("fence") > 0
        assert lease == {"role": "tokenizer", "owner": "tokenizer-1", "phase": 1, "since": since}
        assert gpu["waiting"] == [{"role": "codec", "owner": "codec-1", "since": since}]
        worker = next(worker for worker in gpu["workers"] if worker["role"] == "tokenizer")
        assert (worker["jobs"], worker["slots"], worker["rate"], worker["problem"]) == (["a", "b"], 4, 50.5, None)
        assert worker["notes"] == ["no C compiler was found"]
        assert gpu["plan"] == msgspec.to_builtins(WORKING.plan)
        assert worker["memory"] == [
            {"phase": 0, "device_before": 1, "device_after": 200, "host": 3},
            {"phase": 1, "device_before": 200, "device_after": None, "host": 4},
        ]
        await gateway.heartbeat("codec")
        await gateway.heartbeat("tokenizer")

        async def cpu() -> bool:
            body = (await gateway.http.get("/api/gpu")).json()
            return body["available"] is False and [gpu["kind"] for gpu in body["gpus"]] == ["cpu"]

        await eventually(cpu, "the CPU was taken for a GPU")


async def test_without_nats_health_knows_nothing_until_it_is_back(settings: Settings, nats_server: NatsServer) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        nats_server.kill()
        try:
            answer = await gateway.http.get(f"/generate/{job_id}")
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.json()["type"], answer.json()["service"]) == ("/problems/unavailable", "nats")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            for method, path in (("GET", "status"), ("GET", "result"), ("DELETE", "")):
                url = f"/generate/{job_id}/{path}".rstrip("/")
                assert (await gateway.http.request(method, url)).status_code == 503
            assert (await gateway.http.get("/api/gpu")).status_code == 503
            body = await eventually_status(gateway, "unavailable")
            assert (body["nats"]["ok"], body["object_store"]["ok"]) == (False, True)  # type: ignore[index]
            assert (await gateway.http.get("/livez")).status_code == 200
            assert (await gateway.http.get("/readyz")).status_code == 503
            async with gateway.watch(job_id) as watcher:
                assert await watcher.closed() == 1012
        finally:
            await nats_server.start()
        await eventually_status(gateway, "degraded")
        assert (await gateway.http.get("/readyz")).status_code == 200
        assert (await gateway.http.get(f"/generate/{job_id}/status")).json()["status"] == "queued"
        await gateway.submit()


async def test_without_the_store_no_song_can_be_fetched_until_it_is_back(
    settings: Settings, s3_server: S3Server
) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        job_id = await gateway.submit()
        await gateway.complete(job_id)
        s3_server.kill()
        try:
            body = await eventually_status(gateway, "unavailable")
            assert (body["nats"]["ok"], body["object_store"]["ok"]) == (True, False)  # type: ignore[index]
            answer = await gateway.http.get(f"/generate/{job_id}/result")
            assert (answer.status_code, answer.json()["service"]) == (503, "s3")
            assert (await gateway.http.get("/readyz")).status_code == 200
        finally:
            await s3_server.start()
        await eventually_status(gateway, "degraded")
        await gateway.submit()

        async def fetched() -> bool:  # the store finds its files a little later than it answers
            answer = await gateway.http.get(f"/generate/{job_id}/result")
            assert answer.status_code in (200, 503), answer.text
            return answer.status_code == 200

        await eventually(fetched, "the song cannot be fetched")


async def test_the_page_and_its_files(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        for path, kind in (
            ("/", "text/html"),
            ("/static/app.js", "text/javascript"),
            ("/static/style.css", "text/css"),
        ):
            answer = await gateway.http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"]
            etag = answer.headers["etag"]
            assert (await gateway.http.get(path, headers={"If-None-Match": etag})).status_code == 304
            plain = {"Accept-Encoding": "identity"}
            assert (await gateway.http.head(path, headers=plain)).headers["content-length"] == str(len(answer.content))
        for path in ("/static/", "/static/none.js", "/static/%2e%2e/app.py", "/static//etc/passwd"):
            assert (await gateway.http.get(path)).status_code == 404


async def test_text_that_is_the_same_for_everybody_is_compressed(settings: Settings) -> None:
    """No other text is: the length of a compressed answer reveals whether it contains what an attacker put there."""
    async with running_gateway(settings, settings.data_dir) as gateway:
        page = ("/", "/static/app.js", "/static/style.css", "/docs", "/docs/swagger-ui-bundle.js")
        for path in (*page, "/schema", "/schema/openapi.json", "/asyncapi.json"):
            plain = await gateway.http.get(path, headers={"Accept-Encoding": "identity"})
            small = await gateway.http.get(path, headers={"Accept-Encoding": "br, gzip;q=0.5"})
            assert "content-encoding" not in plain.headers
            assert small.headers["content-encoding"] == "gzip"
            assert small.content == plain.content
            assert int(small.headers["content-length"]) < 0.7 * int(plain.headers["content-length"])
            assert plain.headers["etag"] != small.headers["etag"]
            for answer, accepted in ((plain, "identity"), (small, "gzip")):
                assert "accept-encoding" in answer.headers["vary"].lower()
                known = {"If-None-Match": answer.headers["etag"], "Accept-Encoding": accepted}
                again = await gateway.http.get(path, headers=known)
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
                assert "accept-encoding" in again.headers["vary"].lower()
            head = await gateway.http.head(path, headers={"Accept-Encoding": "gzip"})
            assert head.headers["content-length"] == small.headers["content-length"]
        job_id = await gateway.submit()
        await gateway.complete(job_id)
        song = f"/generate/{job_id}"
        for path in (song, f"{song}/status", f"{song}/result", f"{song}/events", "/generate", "/health", "/metrics"):
            assert "content-encoding" not in (await gateway.http.get(path, headers={"Accept-Encoding": "gzip"})).headers


async def test_the_schema_documents_the_request(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        schema = (await gateway.http.get("/schema/openapi.json")).json()
        body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/GenerateRequest"}
        body = schema["components"]["schemas"]["GenerateRequest"]
        assert body["required"] == ["lyrics"]
        assert body["additionalProperties"] is False
        assert body["properties"]["lyrics"]["maxLength"] == 60_000
        assert {"202", "422", "429", "503"} <= set(schema["paths"]["/generate"]["post"]["responses"])
        beside = await gateway.http.get("/schema/none")
        assert (beside.status_code, beside.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"HEARTMULA_NATS_URL": ""}, 2, "HEARTMULA_NATS_URL"),
        ({"HEARTMULA_PORT": "0"}, 2, "HEARTMULA_PORT"),
        ({"HEARTMULA_MODEL_PATH": "nowhere"}, 2, "HEARTMULA_MODEL_PATH"),
    ],
)
async def test_a_wrong_setting_is_named_in_one_line(
    settings: Settings, changes: dict[str, str], code: int, words: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        env=environment(settings, "gateway") | changes,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == code
    assert said.count(b"\n") == 1
    assert words in said.decode()


async def test_a_port_that_is_in_use_is_named(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.gateway"),
            env=environment(gateway.settings, "gateway"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert "HEARTMULA_PORT" in said.decode().splitlines()[-1]


async def test_a_gateway_waits_for_a_nats_server_that_starts_late(
    settings: Settings, nats_server: NatsServer, s3_server: S3Server
) -> None:
    await nats_server.stop()
    restarted = asyncio.create_task(_later(nats_server))
    async with running_gateway(replace(settings, port=free_port()), settings.data_dir) as gateway:
        await gateway.submit()
    await restarted


async def _later(server: NatsServer) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 1:
        await asyncio.sleep(0.1)
    await server.start()
