"""Short outages: a server that is restarted in order costs no song that is submitted meanwhile."""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import nats.errors
import pytest
import stamina.instrumentation
from nats.aio.client import Client

from deploy.local.servers.embedded import NatsServer, S3Server
from services.gateway.container import Container
from services.gateway.submission import outage, rollback
from services.gateway.submission import service as submission
from services.gateway.submission.idempotency import songs_of
from shared.errors import Unavailable
from shared.jobs.queues import queue_tokens
from shared.jobs.store import JobStore
from shared.nats.connection import connect
from shared.nats.subjects import JOBS, TOK, submit_subject
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from tests.integration.flow import PATIENCE, as_role
from tests.integration.gateway_fixtures import SONG, eventually, fresh_settings, in_process

DOWN_SECONDS = 1.0  # how long a server is away, beside what it takes to stop and start


class ConcurrentClients:
    """Clients that submit songs in every way at the same time and record the answers."""

    def __init__(self, http: httpx.AsyncClient, nc: Client) -> None:
        self._http, self._nc = http, nc
        self.accepted: list[str] = []  # ids of songs that were answered with 202
        self.others: list[str] = []  # other answers
        self.asked = 0
        self._keys = (f"key-{number}" for number in itertools.count())
        self._over = asyncio.Event()

    async def run(self, *ways: Callable[[], Awaitable[None]], event: Callable[[], Awaitable[None]]) -> None:
        """Submit in all these ways, by four clients each, until `event` is over and each has submitted once more."""
        loops = [asyncio.create_task(self._loop(way)) for way in ways for _ in range(4)]
        await event()
        await self.until(self.asked + len(loops))
        self._over.set()
        await asyncio.gather(*loops)

    async def until(self, asked: int) -> None:
        """Wait until `asked` requests have been answered."""
        while self.asked < asked:
            await asyncio.sleep(0.01)

    async def _loop(self, way: Callable[[], Awaitable[None]]) -> None:
        while not self._over.is_set():
            await way()
            self.asked += 1
            await asyncio.sleep(0.05)

    async def plain(self) -> None:
        await self._post({})

    async def variants(self) -> None:
        await self._post({}, variants=3)

    async def keyed(self) -> None:
        key = next(self._keys)
        await self._post({"Idempotency-Key": key}, ids=songs_of(key, 1))

    async def keyed_variants(self) -> None:
        key = next(self._keys)
        await self._post({"Idempotency-Key": key}, ids=songs_of(key, 2), variants=2)

    async def post(self, headers: dict[str, str] | None = None, **values: Any) -> httpx.Response:
        """Submit one song over HTTP."""
        return await self._http.post("/generate", json=SONG | values, headers=headers)

    async def health_reports(self, part: str, words: str) -> bool:
        """Whether ``/health`` reports this error of a server."""
        return bool((await self._http.get("/health")).json()[part].get("error") == words)

    async def _post(self, headers: dict[str, str], ids: list[str] | None = None, **values: Any) -> None:
        answer = await self.post(headers, **values)
        if answer.status_code == 202:
            self._note(answer.json(), ids)
        else:
            self.others.append(f"{answer.status_code} {answer.text} {answer.headers.get('retry-after')}")

    async def over_nats(self) -> None:
        """Submit over NATS, whose connection is lost too: repeat the request with its id until it is answered."""
        key = next(self._keys)
        while True:
            try:
                answer = await self._nc.request(
                    submit_subject("local"), json.dumps(SONG).encode(), timeout=2, headers={"Nats-Msg-Id": key}
                )
                break
            except nats.errors.Error:
                await asyncio.sleep(0.1)
        body = json.loads(answer.data)
        if "error" in body:
            self.others.append(str(body))
        else:
            self._note(body, songs_of(key, 1))

    def _note(self, body: dict[str, Any], ids: list[str] | None) -> None:
        found = [song["job_id"] for song in body.get("variants") or [body]]
        assert ids is None or found == ids
        self.accepted += found


async def require_each_once(clients: ConcurrentClients, gateway: Container) -> None:
    """Require that no request was refused and every song has exactly one record and one message."""
    assert clients.others == []
    for stream, wanted in ((f"KV_{JOBS}", f"$KV.{JOBS}.*.*"), (TOK, ">")):
        found = (await gateway.js.stream_info(stream, subjects_filter=wanted)).state.subjects or {}
        ids = [subject.rpartition(".")[2] for subject, count in found.items() for _ in range(count)]
        assert sorted(ids) == sorted(clients.accepted)


@pytest.fixture
def large_queue(settings: Settings) -> Settings:
    """Settings whose queue has room for all songs of a test."""
    return replace(settings, queue_limit=50_000)


@asynccontextmanager
async def gateway_and_clients(settings: Settings) -> AsyncIterator[tuple[Container, ConcurrentClients]]:
    """A gateway, and clients with an HTTP client and a NATS connection of their own."""
    async with (
        in_process(settings) as (gateway, _, base),
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=PATIENCE) as http,
    ):
        nc = await connect(as_role(settings, "client"), "crowd", pending_size=0)
        yield gateway, ConcurrentClients(http, nc)
        await nc.close()


async def test_no_song_is_refused_lost_or_doubled_while_the_broker_restarts(
    large_queue: Settings, nats_server: NatsServer
) -> None:
    async with gateway_and_clients(large_queue) as (gateway, clients):

        async def restart() -> None:
            await clients.until(20)
            await nats_server.stop()
            await asyncio.sleep(DOWN_SECONDS)
            await nats_server.start()

        await clients.run(
            *(clients.plain, clients.variants, clients.keyed, clients.keyed_variants, clients.over_nats), event=restart
        )
        await require_each_once(clients, gateway)


async def test_no_song_is_refused_while_the_store_restarts(
    large_queue: Settings, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"the object store at {s3_server.url} (HEARTMULA_S3_ENDPOINT)"
    words = f"no connection to {where}: connection refused, nothing listens there"
    async with gateway_and_clients(large_queue) as (gateway, clients):
        await s3_server.stop()
        try:
            await eventually(lambda: clients.health_reports("object_store", words), "health does not say why")
            monkeypatch.setattr(outage, "PATIENCE", 0.0)
            answer = await clients.post()
            assert (answer.status_code, answer.json()["service"], answer.json()["detail"]) == (503, "s3", words)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        except BaseException:
            await s3_server.start()
            raise
        monkeypatch.setattr(outage, "PATIENCE", PATIENCE)  # this server takes its time, not always the same
        await clients.run(clients.plain, clients.keyed_variants, event=s3_server.start)
        await require_each_once(clients, gateway)


async def test_requests_that_wait_too_long_or_are_too_many_are_refused_with_retry_after(
    settings: Settings, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "MAX_WAITING", 2)
    at = f"NATS at nats://127.0.0.1:{nats_server.port} (HEARTMULA_NATS_URL)"
    words = f"no connection to {at}: connection refused, nothing listens there"
    async with gateway_and_clients(settings) as (_, clients):
        await nats_server.stop()
        try:
            await eventually(lambda: clients.health_reports("nats", words), "health does not say why")
            monkeypatch.setattr(outage, "PATIENCE", 0.5)
            refused = [await clients.post()]
            monkeypatch.setattr(outage, "PATIENCE", PATIENCE)
            asked = [asyncio.create_task(clients.post()) for _ in range(5)]

            async def too_many() -> bool:
                return sum(one.done() for one in asked) == 3

            await eventually(too_many, "not three of five were refused")
            refused += [one.result() for one in asked if one.done()]
        finally:
            await nats_server.start()
        for answer in refused:
            assert answer.status_code == 503
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["service"] == "nats"
            assert answer.json()["detail"] == "job records cannot be written: no connection"
        assert sorted(answer.status_code for answer in await asyncio.gather(*asked)) == [202, 202, 503, 503, 503]


async def test_a_refused_song_is_rolled_back_when_nats_is_back(
    settings: Settings, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = asyncio.Event()
    async with gateway_and_clients(settings) as (gateway, _):
        request = GenerateRequest(lyrics="la", seed=1, max_duration_ms=80)
        job = Job(job_id=str(uuid.uuid4()), tenant="local", request=request, created_at=time.time())
        await gateway.jobs.create(job)
        await queue_tokens(gateway.nc, job)
        await nats_server.stop()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(rollback, "_PATIENCE", 0.01)
                await rollback.roll_back_eventually(gateway.js, gateway.store, job)
            assert f"{job.job_id}: may be made although it was refused" in caplog.text
            stamina.instrumentation.set_on_retry_hooks([lambda _: failed.set()])
            rolling_back = asyncio.create_task(rollback.roll_back_eventually(gateway.js, gateway.store, job))
            waiting = asyncio.create_task(failed.wait())
            done, _ = await asyncio.wait({rolling_back, waiting}, return_when=asyncio.FIRST_COMPLETED)
            assert done == {waiting}, "the rollback ended without a second attempt"
        finally:
            stamina.instrumentation.set_on_retry_hooks(())
            await nats_server.start()
        await rolling_back
        assert await gateway.jobs.get(job.job_id) is None
        assert (await gateway.js.stream_info(TOK)).state.messages == 0


async def test_a_song_without_room_in_the_queue_is_rolled_back_later_when_the_first_try_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise Unavailable("nats", "no answer yet")

    async with gateway_and_clients(replace(settings, queue_limit=1)) as (gateway, clients):
        assert (await clients.post()).status_code == 202
        monkeypatch.setattr(submission, "roll_back", fail)
        assert (await clients.post()).status_code == 429

        async def one_record() -> bool:
            return len((await gateway.song_index.page("local", 10, None, None))[0]) == 1

        await eventually(one_record, "the record of the refused song is still there")


class LostAnswers:
    """Lets the first call of a function succeed and then fail as if its answer had been lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.times = 0

    def _once(self) -> None:
        self.times += 1
        if self.times == 1:
            raise Unavailable("nats", "the answer got lost")

    def record(self) -> None:
        """Lose the answer of the first write of a record."""
        put = JobStore._put

        async def put_without_answer(store: JobStore, job: Job, revision: int) -> None:
            await put(store, job, revision)
            self._once()

        self._patch.setattr(JobStore, "_put", put_without_answer)

    def queue(self) -> None:
        """Lose the answer of the first message, or batch of messages, that is queued."""
        for name in ("queue_tokens", "queue_group"):
            self._patch.setattr(submission, name, self._losing_answer(getattr(submission, name)))

    def _losing_answer(self, put: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call_without_answer(*args: Any) -> Any:
            found = await put(*args)
            self._once()
            return found

        return call_without_answer


@pytest.fixture(scope="module")
async def undisturbed_gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Container, ConcurrentClients]]:
    """A gateway whose servers stay up."""
    folder = tmp_path_factory.mktemp("gateway-outage")
    async with gateway_and_clients(await fresh_settings(nats_server, s3_server, folder)) as both:
        yield both


@pytest.mark.parametrize("what", ["record", "queue"])
@pytest.mark.parametrize("way", ["plain", "keyed", "variants", "keyed_variants", "over_nats"])
async def test_what_was_written_losing_answer_is_found_again(
    undisturbed_gateway: tuple[Container, ConcurrentClients], monkeypatch: pytest.MonkeyPatch, what: str, way: str
) -> None:
    gateway, clients = undisturbed_gateway
    before, accepted = len(clients.accepted), gateway.metrics.accepted._value.get()
    lost_answers = LostAnswers(monkeypatch)
    getattr(lost_answers, what)()
    await getattr(clients, way)()
    assert lost_answers.times
    await require_each_once(clients, gateway)
    assert gateway.metrics.accepted._value.get() - accepted == len(clients.accepted) - before > 0
