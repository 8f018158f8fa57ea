"""Health with servers away, devices, the page, and a gateway that cannot begin."""

import asyncio
import sys
import time
from dataclasses import replace

import msgspec
import pytest

from deploy.local.servers.embedded import NatsServer, S3Server, free_port
from services.gateway.monitoring.health import PROBE_SECONDS
from services.gateway.monitoring.worker_registry import Workers
from shared.nats.subjects import GPU_LOCK, WORKERS, decode_subject, lock_key
from shared.schema.worker import LeaseRecord, PhaseMemory
from shared.settings import Settings
from tests.integration.flow import environment
from tests.integration.gateway_fixtures import SONG, House, eventually, open_house


async def eventually_status(house: House, status: str) -> dict[str, object]:
    """Health, once it says so: it may be a second old."""

    async def ask() -> dict[str, object] | None:
        answer = await house.http.get("/health")
        body: dict[str, object] = answer.json()
        assert answer.status_code == (503 if body["status"] == "unavailable" else 200)
        return body if body["status"] == status else None

    found: dict[str, object] = await eventually(ask, f"health never became {status}")
    return found


async def test_health_counts_live_workers_and_waiting_songs(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir) as house:
        body = await eventually_status(house, "degraded")
        assert body == {
            "status": "degraded",
            "nats": {"ok": True},
            "object_store": {"ok": True},
            "workers": {"tokenizer": 0, "codec": 0},
            "queue": {"tokens": 0, "decode": 0},
            "problems": [
                "no tokenizer worker is running: songs wait",
                "no codec worker is running: songs wait after their tokens",
            ],
        }
        await house.submit()
        await house.beat("tokenizer")
        await house.beat("codec")
        body = await eventually_status(house, "ok")
        assert body["workers"] == {"tokenizer": 1, "codec": 1}
        assert body["queue"] == {"tokens": 1, "decode": 0}
        assert body["problems"] == []
        await house.js.publish(f"$KV.{WORKERS}.codec.codec-1", b"", headers={"KV-Operation": "DEL"})
        body = await eventually_status(house, "degraded")
        assert body["workers"] == {"tokenizer": 1, "codec": 0}
        assert body["problems"] == ["no codec worker on gpu-1: songs wait after their tokens"]
        await house.beat("codec", problem="HeartCodec needs 6 GB and the device has 4")

        async def told() -> bool:
            body = (await house.http.get("/health")).json()
            told: list[list[str]] = [body["problems"], (await house.http.get("/api/gpu")).json()["problems"]]
            sentence = "codec worker codec-1 on gpu-1: HeartCodec needs 6 GB and the device has 4"
            return body["status"] == "degraded" and told == [[sentence], [sentence]]

        await eventually(told, "the codec's problem was not told")


async def test_a_full_queue_for_audio_is_a_problem(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir, queue_limit=1) as house:
        await house.beat("tokenizer")
        await house.beat("codec")
        await eventually_status(house, "ok")
        for number in range(4):
            await house.js.publish(decode_subject(str(number)), b"{}")
        body = await eventually_status(house, "degraded")
        assert body["problems"] == ["the queue for audio is full: songs wait for their tokens"]
        assert (await house.http.post("/generate", json=SONG)).status_code == 202


async def test_what_dead_workers_leave_behind_is_named_or_dropped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(settings, settings.data_dir) as house:
        await house.beat("tokenizer")
        await house.beat("codec")
        await eventually_status(house, "ok")
        stale, fresh = (f"$KV.{GPU_LOCK}.{lock_key('gpu-1', 'codec', name)}" for name in ("dead", "alive"))
        await house.js.publish(stale, b"not a record")

        async def named() -> bool:
            await house.js.publish(fresh, b"not a record either")
            await house.beat("tokenizer")
            await house.beat("codec")
            assert (await house.http.get("/api/gpu")).status_code == 200
            problems: list[str] = (await house.http.get("/health")).json()["problems"]
            return problems == [
                "the lease of the codec worker dead on gpu-1 is no longer renewed: "
                "the next worker that waits for the device deletes it"
            ]

        await eventually(named, "the stale lease was not named")
        await house.js.publish(stale, b"", headers={"KV-Operation": "DEL"})
        await eventually_status(house, "ok")

        workers = Workers(house.js, PROBE_SECONDS)
        assert {worker.role for worker in await workers.live()} == {"tokenizer", "codec"}
        monkeypatch.setattr("services.gateway.monitoring.worker_registry.WORKER_TTL", 0.5)

        async def dropped() -> bool:
            return await workers.live() == []

        await eventually(dropped, "a heartbeat outlived its time")
        assert (await house.js.get_msg(f"KV_{WORKERS}", subject=f"$KV.{WORKERS}.codec.codec-1")).data


async def test_devices_are_told_with_who_holds_and_who_waits(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir) as house:
        assert (await house.http.get("/api/gpu")).json() == {
            "available": False,
            "gpus": [],
            "queue": {"tokens": 0, "decode": 0},
            "problems": [
                "no tokenizer worker is running: songs wait",
                "no codec worker is running: songs wait after their tokens",
            ],
        }
        for role, state in (("tokenizer", "held"), ("codec", "waiting")):
            record = LeaseRecord(ticket=0, state=state, role=role, owner=f"{role}-1", phase=1, since=2.0)  # type: ignore[arg-type]
            await house.js.publish(f"$KV.{GPU_LOCK}.{lock_key('gpu-1', role, role)}", msgspec.json.encode(record))
        await house.beat("codec", "cuda", resident=["what lay there before"])
        memory = [
            PhaseMemory(phase=0, device_before=1, device_after=200, host=3),
            PhaseMemory(phase=1, device_before=200, host=4),
        ]
        await house.beat(
            "tokenizer",
            "cuda",
            state="working",
            resident=["language model"],
            phase=1,
            jobs=["a", "b"],
            slots=4,
            rate=50.5,
            memory=memory,
        )

        async def both() -> dict[str, object] | None:
            body: dict[str, object] = (await house.http.get("/api/gpu")).json()
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
        assert worker["memory"] == [
            {"phase": 0, "device_before": 1, "device_after": 200, "host": 3},
            {"phase": 1, "device_before": 200, "device_after": None, "host": 4},
        ]
        await house.beat("codec")
        await house.beat("tokenizer")

        async def cpu() -> bool:
            body = (await house.http.get("/api/gpu")).json()
            return body["available"] is False and [gpu["kind"] for gpu in body["gpus"]] == ["cpu"]

        await eventually(cpu, "the CPU was taken for a GPU")


async def test_without_the_broker_nothing_is_known_until_it_is_back(
    settings: Settings, nats_server: NatsServer
) -> None:
    async with open_house(settings, settings.data_dir) as house:
        job_id = await house.submit()
        nats_server.kill()
        try:
            answer = await house.http.get(f"/generate/{job_id}")
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert (answer.json()["type"], answer.json()["service"]) == ("/problems/unavailable", "nats")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            for method, path in (("GET", "status"), ("GET", "result"), ("DELETE", "")):
                url = f"/generate/{job_id}/{path}".rstrip("/")
                assert (await house.http.request(method, url)).status_code == 503
            assert (await house.http.get("/api/gpu")).status_code == 503
            body = await eventually_status(house, "unavailable")
            assert (body["nats"]["ok"], body["object_store"]["ok"]) == (False, True)  # type: ignore[index]
            assert (await house.http.get("/livez")).status_code == 200
            assert (await house.http.get("/readyz")).status_code == 503
            async with house.watch(job_id) as watcher:
                assert await watcher.closed() == 1012
        finally:
            await nats_server.start()
        await eventually_status(house, "degraded")
        assert (await house.http.get("/readyz")).status_code == 200
        assert (await house.http.get(f"/generate/{job_id}/status")).json()["status"] == "queued"
        await house.submit()


async def test_without_the_store_no_song_is_fetched_until_it_is_back(settings: Settings, s3_server: S3Server) -> None:
    async with open_house(settings, settings.data_dir) as house:
        job_id = await house.submit()
        await house.complete(job_id)
        s3_server.kill()
        try:
            body = await eventually_status(house, "unavailable")
            assert (body["nats"]["ok"], body["object_store"]["ok"]) == (True, False)  # type: ignore[index]
            answer = await house.http.get(f"/generate/{job_id}/result")
            assert (answer.status_code, answer.json()["service"]) == (503, "s3")
            assert (await house.http.get("/readyz")).status_code == 200
        finally:
            await s3_server.start()
        await eventually_status(house, "degraded")
        await house.submit()

        async def fetched() -> bool:  # the store finds its files a little later than it answers
            answer = await house.http.get(f"/generate/{job_id}/result")
            assert answer.status_code in (200, 503), answer.text
            return answer.status_code == 200

        await eventually(fetched, "the song cannot be fetched")


async def test_the_page_and_its_files(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir) as house:
        for path, kind in (
            ("/", "text/html"),
            ("/static/app.js", "text/javascript"),
            ("/static/style.css", "text/css"),
        ):
            answer = await house.http.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"]
            etag = answer.headers["etag"]
            assert (await house.http.get(path, headers={"If-None-Match": etag})).status_code == 304
            plain = {"Accept-Encoding": "identity"}
            assert (await house.http.head(path, headers=plain)).headers["content-length"] == str(len(answer.content))
        for path in ("/static/", "/static/none.js", "/static/%2e%2e/app.py", "/static//etc/passwd"):
            assert (await house.http.get(path)).status_code == 404


async def test_text_that_is_the_same_for_everybody_is_compressed(settings: Settings) -> None:
    """Nothing else is: lengths of compressed answers tell what stands in them beside what an attacker put there."""
    async with open_house(settings, settings.data_dir) as house:
        page = ("/", "/static/app.js", "/static/style.css", "/docs", "/docs/swagger-ui-bundle.js")
        for path in (*page, "/schema", "/schema/openapi.json", "/asyncapi.json"):
            plain = await house.http.get(path, headers={"Accept-Encoding": "identity"})
            small = await house.http.get(path, headers={"Accept-Encoding": "br, gzip;q=0.5"})
            assert "content-encoding" not in plain.headers
            assert small.headers["content-encoding"] == "gzip"
            assert small.content == plain.content
            assert int(small.headers["content-length"]) < 0.7 * int(plain.headers["content-length"])
            assert plain.headers["etag"] != small.headers["etag"]
            for answer, accepted in ((plain, "identity"), (small, "gzip")):
                assert "accept-encoding" in answer.headers["vary"].lower()
                known = {"If-None-Match": answer.headers["etag"], "Accept-Encoding": accepted}
                again = await house.http.get(path, headers=known)
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
                assert "accept-encoding" in again.headers["vary"].lower()
            head = await house.http.head(path, headers={"Accept-Encoding": "gzip"})
            assert head.headers["content-length"] == small.headers["content-length"]
        job_id = await house.submit()
        await house.complete(job_id)
        song = f"/generate/{job_id}"
        for path in (song, f"{song}/status", f"{song}/result", f"{song}/events", "/generate", "/health", "/metrics"):
            assert "content-encoding" not in (await house.http.get(path, headers={"Accept-Encoding": "gzip"})).headers


async def test_the_schema_documents_the_request(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir) as house:
        schema = (await house.http.get("/schema/openapi.json")).json()
        body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/GenerateRequest"}
        body = schema["components"]["schemas"]["GenerateRequest"]
        assert body["required"] == ["lyrics"]
        assert body["additionalProperties"] is False
        assert body["properties"]["lyrics"]["maxLength"] == 60_000
        assert {"202", "422", "429", "503"} <= set(schema["paths"]["/generate"]["post"]["responses"])
        beside = await house.http.get("/schema/none")
        assert (beside.status_code, beside.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"HEARTMULA_NATS_URL": ""}, 2, "HEARTMULA_NATS_URL"),
        ({"HEARTMULA_PORT": "0"}, 2, "HEARTMULA_PORT"),
        ({"HEARTMULA_MODEL_PATH": "nowhere"}, 2, "HEARTMULA_MODEL_PATH"),
    ],
)
async def test_a_wrong_setting_is_told_in_one_line(
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


async def test_a_port_that_is_taken_is_told_in_words(settings: Settings) -> None:
    async with open_house(settings, settings.data_dir) as house:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.gateway"),
            env=environment(house.settings, "gateway"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert "HEARTMULA_PORT" in said.decode().splitlines()[-1]


async def test_a_gateway_waits_for_a_broker_that_comes_late(
    settings: Settings, nats_server: NatsServer, s3_server: S3Server
) -> None:
    await nats_server.stop()
    restarted = asyncio.create_task(_later(nats_server))
    async with open_house(replace(settings, port=free_port()), settings.data_dir) as house:
        await house.submit()
    await restarted


async def _later(server: NatsServer) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 1:
        await asyncio.sleep(0.1)
    await server.start()
