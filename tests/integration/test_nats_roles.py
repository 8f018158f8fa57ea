"""Rights that the users of ``deploy/nats/roles.conf`` do not have. All other tests use the rights that they have."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from deploy.local.servers.embedded import ROLES, NatsServer, Role, free_port
from deploy.setup import set_up
from shared.device.lease import Lease
from shared.nats.subjects import TENANT, decode_subject, listen_subject, record_subject
from shared.schema.job import Job
from shared.schema.listening import Listening
from shared.schema.worker import LeaseRecord
from shared.settings import Settings
from shared.worker.listeners import Listeners
from tests.integration.flow import as_role
from tests.integration.gateway_fixtures import SONG, eventually, running_gateway

FORBIDDEN: dict[Role, tuple[str, ...]] = {
    "bootstrap": (
        "intake.local",
        "$JS.API.STREAM.DELETE.TOK",
        "$JS.API.STREAM.PURGE.TOK",
        "$JS.API.STREAM.MSG.GET.KV_JOBS",
        "$JS.API.DIRECT.GET.KV_JOBS.$KV.JOBS.local.j",
        "$JS.API.CONSUMER.MSG.NEXT.TOK.tok-high",
        "jobs.tok.high.j",
        "jobs.live.j",
        "$KV.JOBS.local.j",
        "$KV.GPU_LOCK.g.codec.i",
        "events.local.j.progress",
        "submit.local",
    ),
    "gateway": (
        "$JS.API.STREAM.PURGE.INTAKE",
        "$JS.API.STREAM.MSG.DELETE.INTAKE",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.UPDATE.TOK",
        "$JS.API.STREAM.DELETE.TOK",
        "$JS.API.STREAM.PURGE.TOK",
        "$JS.API.CONSUMER.MSG.NEXT.TOK.tok-high",
        "$JS.API.CONSUMER.MSG.NEXT.DEC.dec",
        "$JS.API.CONSUMER.MSG.NEXT.DEC.dec-live",
        "$JS.ACK.TOK.tok-high.1.1.1.1.0",
        "$JS.API.CONSUMER.DELETE.TOK.tok-high",
        "$KV.GPU_LOCK.g.codec.i",
        "$KV.WORKERS.codec.i",
        "ctl.hooks",
        *(f"_INBOX_{role}.x" for role in ("operator", "bootstrap", "gateway", "tokenizer", "codec")),
    ),
    "tokenizer": (
        "intake.local",
        "jobs.intake.local",
        "$JS.API.CONSUMER.MSG.NEXT.INTAKE.intake",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.DELETE.TOK",
        "$JS.API.STREAM.PURGE.KV_JOBS",
        "$JS.API.CONSUMER.MSG.NEXT.DEC.dec",
        "$JS.API.CONSUMER.MSG.NEXT.DEC.dec-live",
        "$JS.ACK.DEC.dec.1.1.1.1.0",
        "$JS.API.CONSUMER.CREATE.TOK.x.jobs.tok.*.*",
        "$KV.GPU_LOCK.g",
        "$KV.GPU_LOCK.g.codec.i.x",
        "$JS.API.STREAM.MSG.DELETE.KV_GPU_LOCK",
        "$KV.WORKERS.codec.i",
        "submit.local",
        "ctl.cancel.j",
        "ctl.listen.j",
        "dead.codec.j",
    ),
    "codec": (
        "intake.local",
        "jobs.intake.local",
        "$JS.API.CONSUMER.MSG.NEXT.INTAKE.intake",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.DELETE.DEC",
        "$JS.API.STREAM.MSG.DELETE.DEC",
        "$JS.API.CONSUMER.MSG.NEXT.TOK.tok-high",
        "$JS.ACK.TOK.tok-high.1.1.1.1.0",
        "$KV.GPU_LOCK.g",
        "$KV.GPU_LOCK.g.tokenizer.i.x",
        "$JS.API.STREAM.MSG.DELETE.KV_GPU_LOCK",
        "$KV.WORKERS.tokenizer.i",
        "submit.local",
        "ctl.cancel.j",
        "ctl.listen.j",
        "dead.tokenizer.j",
    ),
    "client": (
        "intake.other",
        "jobs.intake.local",
        "$JS.API.CONSUMER.MSG.NEXT.INTAKE.intake",
        "submit.other",
        "events.local.j.completed",
        "jobs.tok.high.j",
        "jobs.live.j",
        "$KV.JOBS.local.j",
        "$KV.JOBS.probe",
        "ctl.cancel.j",
        "ctl.listen.j",
        "record.other.j",
        # An answer of JetStream goes wherever its request says, and no right is asked for: so no requests either.
        "$JS.API.DIRECT.GET.KV_JOBS.$KV.JOBS.local.j",
        "$JS.API.DIRECT.GET.KV_JOBS",
        "$JS.API.STREAM.MSG.GET.KV_JOBS",
        "$JS.API.STREAM.INFO.KV_JOBS",
        "$JS.API.CONSUMER.CREATE.EVENTS",
        "$KV.GPU_LOCK.g.codec.i",
    ),
}
FORBIDDEN_TO_HEAR = {
    "bootstrap": ("events.>", "_INBOX_gateway.>", "_INBOX.>", "$KV.>", "jobs.>"),
    "gateway": (">", "_INBOX_client.>", "jobs.>", "ctl.>"),
    "tokenizer": (">", "submit.*", "events.>", "_INBOX_codec.>", "ctl.work.codec"),
    "codec": (">", "submit.*", "events.>", "_INBOX_tokenizer.>", "ctl.work.tokenizer"),
    "client": (
        ">",
        "events.>",
        "events.other.>",
        "_INBOX_gateway.>",
        "_INBOX.>",
        "submit.*",
        "intake.*",
        "$KV.>",
        "ctl.cancel.*",
        "ctl.listen.*",
    ),
}


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    """A server for this module alone: the session's server must have denied nothing at the end."""
    server = NatsServer(tmp_path_factory.mktemp("roles"), free_port(), {role: f"secret-{role}" for role in ROLES})
    await server.start()
    await set_up(Settings(nats_url=server.url_of("bootstrap")))
    yield server
    await server.stop()


@asynccontextmanager
async def denials(server: NatsServer, role: Role) -> AsyncIterator[tuple[Client, list[str]]]:
    """Connect as a role; yields the client and a list of what the server denied it."""
    denied: list[str] = []

    async def note(error: Exception) -> None:
        denied.append(str(error).lower())

    client = await nats.connect(server.url_of(role), error_cb=note, inbox_prefix=f"_INBOX_{role}".encode())
    yield client, denied
    await client.close()


async def _wait_for_denials(denied: list[str], count: int) -> None:
    async def enough() -> bool:
        return len(denied) >= count

    await eventually(enough, f"only {denied} were denied")


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_what_a_role_may_not_send(server: NatsServer, role: Role) -> None:
    async with denials(server, role) as (client, denied):
        for subject in FORBIDDEN[role]:
            await client.publish(subject, b"{}")
        await _wait_for_denials(denied, len(FORBIDDEN[role]))
        for subject, line in zip(FORBIDDEN[role], denied, strict=True):
            assert f'publish to "{subject.lower()}"' in line


@pytest.mark.parametrize("role", FORBIDDEN_TO_HEAR)
async def test_a_role_cannot_subscribe_to_what_it_may_not_read(server: NatsServer, role: Role) -> None:
    for subject in FORBIDDEN_TO_HEAR[role]:
        async with denials(server, role) as (client, denied):
            await client.subscribe(subject)
            await _wait_for_denials(denied, 1)
            assert any(f'subscription to "{subject.lower()}' in line for line in denied), subject


async def test_jetstream_answers_where_the_asker_may_not_write(server: NatsServer) -> None:
    """Why a client has no right to JetStream's requests, `nats kv get` among them, nor to publish to a stream."""
    async with denials(server, "gateway") as (gateway, denied):
        js = gateway.jetstream()
        await js.publish("$KV.JOBS.local.j", b"a record")
        for number, (subject, body) in enumerate(
            {"$JS.API.DIRECT.GET.KV_JOBS.$KV.JOBS.local.j": b"", "jobs.intake.local": b"{}"}.items()
        ):
            lock = f"$KV.GPU_LOCK.g.codec.{number}"
            assert lock.replace(str(number), "i") in FORBIDDEN["gateway"]
            await gateway.publish(subject, body, reply=lock)

            async def written(lock: str = lock) -> bool:
                with contextlib.suppress(NotFoundError):
                    return bool((await js.get_msg("KV_GPU_LOCK", subject=lock)).data)
                return False

            await eventually(written, f"{subject} was not answered")
        assert not denied


@pytest.mark.parametrize("worker", ["tokenizer", "codec"])
async def test_workers_learn_from_gateways_who_listens(server: NatsServer, worker: Role) -> None:
    async with denials(server, worker) as (nc, refused), denials(server, "gateway") as (gateway, denied):
        listeners = Listeners()
        await listeners.open(nc)
        await nc.flush()
        report = Listening(job_id="j", gateway="g", listeners=1, buffered=3.0)
        await gateway.publish(listen_subject("j"), msgspec.json.encode(report))
        async with asyncio.timeout(10):
            while listeners.dry_in("j") is None:
                await asyncio.sleep(0.01)
        assert (refused, denied) == ([], [])


@pytest.mark.parametrize("role", ["gateway", "tokenizer", "codec"])
async def test_songs_with_listeners_may_be_queued_by_every_service(server: NatsServer, role: Role) -> None:
    async with denials(server, role) as (nc, denied):
        await nc.jetstream().publish(decode_subject(f"of-{role}", "high"), b"{}")
        assert not denied


async def test_a_worker_deletes_the_stale_lease_of_the_other_role(server: NatsServer, tmp_path: Path) -> None:
    client = await nats.connect(server.url)

    async def acquire_after_death(role: Role, other: str) -> None:
        """Get the device although a dead worker of the other role holds it."""
        gpu = f"{role}-gpu"
        record = LeaseRecord(ticket=0, state="held", role=other, owner="dead", since=1.0)
        await client.jetstream().publish(f"$KV.GPU_LOCK.{gpu}.{other}.dead", msgspec.json.encode(record))
        settings = Settings(nats_url=server.url_of(role), data_dir=tmp_path, lease_ttl=2)
        lease = Lease(settings, gpu=gpu, role=role, instance="alive")
        await lease.start()
        async with asyncio.timeout(30):
            held = await lease.acquire()
        await held.release()
        await lease.close()

    await asyncio.gather(acquire_after_death("tokenizer", "codec"), acquire_after_death("codec", "tokenizer"))
    await client.close()


async def test_the_user_of_the_system_account_asks_for_the_health_of_the_server_alone(server: NatsServer) -> None:
    denied: list[str] = []

    async def note(error: Exception) -> None:
        denied.append(str(error).lower())

    url = f"nats://system:secret-operator@127.0.0.1:{server.port}"
    client = await nats.connect(url, error_cb=note, inbox_prefix=b"_INBOX_system")
    answer = await client.request("$SYS.REQ.SERVER.PING.HEALTHZ", b"", timeout=5)
    assert json.loads(answer.data)["data"]["status"] == "ok"
    forbidden = ("$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.CLAIMS.UPDATE", "$JS.API.INFO")
    for subject in forbidden:
        await client.publish(subject, b"{}")
    await client.subscribe("$SYS.>")
    await _wait_for_denials(denied, len(forbidden) + 1)
    await client.close()


async def test_a_client_asks_for_a_song_reads_its_record_and_follows_it(settings: Settings) -> None:
    async with running_gateway(settings, settings.data_dir) as gateway:
        url = as_role(settings, "client").nats_url
        client = await nats.connect(url, inbox_prefix=b"_INBOX_client")
        events = await client.subscribe(f"events.{TENANT}.>")
        answer = json.loads((await client.request(f"submit.{TENANT}", json.dumps(SONG).encode(), timeout=10)).data)
        assert (await events.next_msg(timeout=10)).subject == f"events.{TENANT}.{answer['job_id']}.queued"
        record = record_subject(TENANT, answer["job_id"])
        assert json.loads((await client.request(record, b"", timeout=10)).data)["status"] == "queued"
        await client.close()
        assert isinstance(await gateway.job(answer["job_id"]), Job)
