"""NATS clients can make the gateway answer into their own inboxes, and publish nowhere else."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from deploy.local.servers import nats as local_nats
from deploy.local.servers.embedded import ROLES, NatsServer, S3Server, free_port
from services.gateway.auth.api_keys import digest_of_key
from shared.nats.subjects import INTAKE, TENANT, TOK, intake_subject, record_subject, submit_subject
from tests.integration.flow import connect_client
from tests.integration.gateway_fixtures import SONG, RunningGateway, eventually, fresh_settings, running_gateway

ROLES_CONF = Path(local_nats.__file__).parents[2] / "nats" / "roles.conf"
ELSEWHERE = (
    f"$KV.JOBS.{TENANT}.victim",
    "$KV.JOBS.bob.victim",
    "$KV.GPU_LOCK.g.codec.i",
    f"events.{TENANT}.x.progress",
    "events.bob.x.completed",
    "jobs.tok.high.x",
    "ctl.cancel.x",
    "dead.webhook.x",
    f"submit.{TENANT}",
    f"intake.{TENANT}",
    f"jobs.intake.{TENANT}",
    "$JS.API.STREAM.PURGE.KV_JOBS",
    "$JS.ACK.KV_JOBS.hooks.1.1.1.1.0",
    "_INBOX_gateway.x",
    "_INBOX_tokenizer.x",
    "_INBOX_codec.x",
    "_INBOX_bootstrap.x",
    "_INBOX_operator.x",
    "_INBOX_bob.x",
    "_INBOX",
    "_INBOX_",
    "_INBOXES.x",
    "_inbox.x",
)


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("nats-clients")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def refused(gateway: RunningGateway) -> float:
    """How many requests the gateway has left unanswered because of their reply subject."""
    figures = (await gateway.http.get("/metrics")).text
    return float(re.findall(r"^heartmula_nats_replies_refused_total (\S+)", figures, re.MULTILINE)[0])


async def attack(gateway: RunningGateway, sender: Client, subject: str, data: bytes) -> list[str]:
    """Send requests with reply subjects that are no inbox; returns the subjects on which an answer came."""
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        if message.data != data:  # the attack itself, which is heard where it is sent
            heard.append(message.subject)

    listening = [await gateway.nc.subscribe(elsewhere, cb=hear) for elsewhere in ELSEWHERE]
    await gateway.nc.flush()
    before = await refused(gateway)
    # The server itself refuses to pass on what names an acknowledgement.
    asked = [reply for reply in ELSEWHERE if not reply.startswith("$JS.ACK")]
    for reply in asked:
        await sender.publish(subject, data, reply=reply)

    async def settled() -> bool:
        return bool(heard) or await refused(gateway) == before + len(asked)

    await eventually(settled, "the gateway neither answered nor refused")
    await gateway.nc.flush()
    for subscription in listening:
        await subscription.unsubscribe()
    return heard


@pytest.mark.parametrize("body", [b"{", json.dumps(SONG).encode()])
async def test_a_client_is_answered_in_inboxes_alone(gateway: RunningGateway, body: bytes) -> None:
    async with connect_client(gateway.settings) as client:
        before = (await gateway.js.stream_info(TOK)).state.messages
        assert await attack(gateway, client, submit_subject(TENANT), body) == []
        assert await attack(gateway, client, intake_subject(TENANT), body) == []
        assert await attack(gateway, client, record_subject(TENANT, "a-song"), b"") == []
        for stream, subject in (("KV_JOBS", "$KV.JOBS.*.victim"), ("KV_GPU_LOCK", "$KV.GPU_LOCK.>"), ("EVENTS", ">")):
            with pytest.raises(NotFoundError):
                await gateway.js.get_msg(stream, subject=subject)
        # What cannot be answered is not made: its sender would ask again and again.
        assert (await gateway.js.stream_info(TOK)).state.messages == before
        assert (await gateway.js.stream_info(INTAKE)).state.last_seq == 0
        assert (await gateway.http.get("/health")).status_code == 200


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS", "PING.heartmula", "INFO.heartmula", "STATS.heartmula"])
async def test_the_service_shows_itself_in_inboxes_alone(gateway: RunningGateway, verb: str) -> None:
    assert await attack(gateway, gateway.nc, f"$SRV.{verb}", b"") == []
    answer = json.loads((await gateway.nc.request(f"$SRV.{verb}", b"", timeout=10)).data)
    assert answer["name"] == "heartmula"


async def test_a_client_asks_as_its_library_does(gateway: RunningGateway) -> None:
    async with connect_client(gateway.settings) as client:
        answer = await ask(client, submit_subject(TENANT), SONG)
        old_style = await client.request(submit_subject(TENANT), json.dumps(SONG).encode(), timeout=10, old_style=True)
        ack = await client.jetstream().publish(submit_subject(TENANT), json.dumps(SONG).encode())
        assert [json.loads(old_style.data)["seq"], ack.seq] == [answer["seq"] + 1, answer["seq"] + 2]


async def test_a_client_reads_the_records_of_its_tenant(gateway: RunningGateway) -> None:
    async with connect_client(gateway.settings) as client:
        job_id = (await ask(client, submit_subject(TENANT), SONG))["job_id"]
        record = await ask(client, record_subject(TENANT, job_id))
        assert (record["job_id"], record["status"], record["request"]["tags"]) == (job_id, "queued", SONG["tags"])
    for tenant, name, code, number in (
        (TENANT, "missing", 404, 20010),
        (TENANT, "a_b", 404, 20010),
        ("bob", job_id, 401, 20008),
    ):
        error = (await ask(gateway.nc, record_subject(tenant, name)))["error"]
        assert (error["code"], error["err_code"]) == (code, number)
    for literally in ("*", ">"):  # a publisher's wildcard is a name like any other to the server
        assert (await ask(gateway.nc, f"record.{TENANT}.{literally}"))["error"]["code"] == 404


@pytest.mark.parametrize(
    ("reply", "headers"),
    [
        (b"_INBOX_client.x", b"NATS/1.0"),
        (b"_INBOX_client.x", b"\r\n\r\n"),
        (b"_INBOX_client.x", b"NATS/1.0 \xff\xff\xff\r\n\r\n"),
        (b"_INBOX_client.x", b"NATS/1.0 200 \xff\r\n\r\n"),
        (b"_INBOX_client.x", b"NATS/1.0\r\n: none\r\nA\r\nB: \xff\r\n\r\n"),
        (b"_INBOX_client.\xff", b""),
    ],
)
async def test_a_message_that_nats_py_cannot_read_does_not_make_the_gateway_deaf(
    gateway: RunningGateway, reply: bytes, headers: bytes
) -> None:
    async with connect_client(gateway.settings) as client:
        sizes = b"%d %d" % (len(headers), len(headers) + 1)
        command = b"HPUB" if headers else b"PUB"
        line = b"%s %s %s %s" % (command, submit_subject(TENANT).encode(), reply, sizes if headers else b"1")
        await client._send_command(line + b"\r\n" + headers + b"{\r\n")
        await client.flush()
        assert "job_id" in await ask(client, submit_subject(TENANT), SONG)
        assert (await gateway.http.get("/readyz")).status_code == 200
        assert "connection lost" not in gateway.log.read_text()


async def ask(client: Client, subject: str, body: object = None) -> dict[str, Any]:
    data = b"" if body is None else json.dumps(body).encode()
    found: dict[str, Any] = json.loads((await client.request(subject, data, timeout=10)).data)
    return found


def configure(folder: Path, monkeypatch: pytest.MonkeyPatch, roles: str, accounts: str = "") -> NatsServer:
    """Start a server with other roles, or with accounts."""
    config = (ROLES_CONF.parent / "nats.conf").read_text()
    assert config.count("\naccounts {\n") == 1
    (folder / "nats.conf").write_text(config.replace("\naccounts {\n", f"\naccounts {{\n{accounts}"))
    (folder / "roles.conf").write_text(roles)
    monkeypatch.setattr(local_nats, "_NATS_CONFIG", folder / "nats.conf")
    return NatsServer(folder / "server", free_port(), dict.fromkeys(ROLES, "secret"))


@asynccontextmanager
async def running_gateway_on(
    server: NatsServer, s3_server: S3Server, folder: Path, **changes: Any
) -> AsyncIterator[RunningGateway]:
    await server.start()
    try:
        settings = await fresh_settings(server, s3_server, folder)
        async with running_gateway(settings, folder, **changes) as gateway:
            yield gateway
    finally:
        await server.stop()


async def test_a_tenants_own_user_asks_follows_and_reads(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user for the tenant alice, made as docs/operations.md says, and a setting that allows one more inbox."""
    roles = ROLES_CONF.read_text()
    (block,) = re.findall(r"    \{ user: client, .*?\n    \} \}\n", roles, re.DOTALL)
    alices = block.replace("$NATS_CLIENT_PASSWORD", "secret").replace("client", "alice").replace("local", "alice")
    roles = roles.replace(block, block + alices)
    roles = roles.replace('"_INBOX_client.>"', '"_INBOX_client.>", "_INBOX_alice.>", "_ANSWERS.>"', 1)
    server = configure(tmp_path, monkeypatch, roles)
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[tenant]]\nname = "alice"\nkeys = ["{digest_of_key("key")}"]\n')
    more = "_ANSWERS, _INBOX_codec"
    async with running_gateway_on(server, s3_server, tmp_path, api_keys=keys, reply_prefixes=more) as gateway:
        url = server.url.replace("//operator:", "//alice:")
        alice = await nats.connect(url, inbox_prefix=b"_INBOX_alice")
        events = await alice.subscribe("events.alice.>")
        job_id = (await ask(alice, submit_subject("alice"), SONG))["job_id"]
        assert (await events.next_msg(timeout=10)).subject == f"events.alice.{job_id}.queued"
        assert (await ask(alice, record_subject("alice", job_id)))["status"] == "queued"
        answer = await gateway.http.get(f"/generate/{job_id}", headers={"Authorization": "Bearer key"})
        assert answer.json()["request"]["tags"] == SONG["tags"]
        # Answers go where the setting says too, and never to a service, whatever it says.
        heard = await gateway.nc.subscribe("_ANSWERS.>")
        never = await gateway.nc.subscribe("_INBOX_codec.>")
        await gateway.nc.flush()
        await alice.publish(submit_subject("alice"), b"{", reply="_INBOX_codec.x")
        await alice.publish(submit_subject("alice"), b"{", reply="_ANSWERS.x")
        assert json.loads((await heard.next_msg(timeout=10)).data)["error"]["code"] == 400
        assert await refused(gateway) == 1
        assert never.pending_msgs == 0
        await alice.close()


async def test_a_client_of_another_account_is_answered_through_the_import(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (users,) = re.findall(r"users: \[.*\n  \]\n", ROLES_CONF.read_text(), re.DOTALL)
    accounts = (
        f'OURS {{ jetstream: enabled, {users} exports: [{{ service: "submit.*" }}] }}\n'
        "THEIRS { users: [{ user: visitor, password: secret }]\n"
        f'imports: [{{ service: {{ account: OURS, subject: "submit.{TENANT}" }} }}] }}\n'
    )
    server = configure(tmp_path, monkeypatch, "", accounts)
    async with running_gateway_on(server, s3_server, tmp_path) as gateway:
        visitor = await nats.connect(server.url.replace("//operator:", "//visitor:"))
        job_id = (await ask(visitor, submit_subject(TENANT), SONG))["job_id"]
        assert (await gateway.job(job_id)).status == "queued"
        await visitor.close()
