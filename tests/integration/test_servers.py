"""Embedded servers: where they keep their files, and how acknowledged writes survive SIGKILL."""

import asyncio
import io
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import nats
import nats.errors
import pytest
import urllib3
from minio import Minio
from minio.error import S3Error

from deploy.local.servers import embedded as servers
from deploy.local.servers.base import binary
from deploy.local.servers.embedded import ROLES, NatsServer, PortInUse, S3Server, free_port
from shared.errors import HeartMulaError

PASSWORDS = dict.fromkeys(ROLES, "password")


def client(server: S3Server, access: str = "", secret: str = "") -> Minio:
    return Minio(
        server.url.removeprefix("http://"),
        access or server.access_key,
        secret or server.secret_key,
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=10, retries=False),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder whose name has characters that need quoting."""
    return tmp_path / 'so, a "data" folder\'s name'


def sockets(server: S3Server) -> list[str]:
    # Not its tenth port, which only metrics use: another run may have left a socket with that number.
    ports = [str(port) for port in (*range(server.port, server.port + 9), server.port + 10_008)]
    return [path.name for path in Path("/tmp").glob("seaweedfs-*.sock") if path.stem.rpartition("-")[2] in ports]


async def test_a_message_survives_a_killed_nats_server(folder: Path) -> None:
    async with servers.nats_server(folder, free_port(), PASSWORDS) as server:
        nc = await nats.connect(server.url)
        await nc.jetstream().add_stream(name="SONGS", subjects=["songs"])
        for i in range(20):
            await nc.jetstream().publish("songs", b"%d" % i)
        await nc.close()

        first = server.pid
        server.kill()
        assert await server.wait() == -signal.SIGKILL
        await server.start()
        assert server.pid != first

        nc = await nats.connect(server.url)
        assert (await nc.jetstream().stream_info("SONGS")).state.messages == 20
        await nc.close()
    assert not server.process.running


async def test_nats_refuses_connections_without_the_password(folder: Path) -> None:
    async with servers.nats_server(folder, free_port(), PASSWORDS) as server:
        for wrong in (f"nats://127.0.0.1:{server.port}", server.url.replace("password", "passwort")):
            with pytest.raises(nats.errors.Error):
                await nats.connect(wrong, allow_reconnect=False)


async def test_nats_listens_on_the_loopback_interface_and_syncs_always(folder: Path) -> None:
    server = NatsServer(folder, free_port(), PASSWORDS, monitor_port=free_port())
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.monitor_port}/varz"
        varz = (await asyncio.to_thread(urllib3.request, "GET", url)).json()
        assert varz["host"] == "127.0.0.1"
        assert varz["jetstream"]["config"]["sync_always"] is True
    finally:
        await server.stop()


async def test_an_object_survives_a_killed_s3_server(folder: Path) -> None:
    async with servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as server:
        client(server).make_bucket("songs")
        for i in range(20):
            client(server).put_object("songs", f"{i}.flac", io.BytesIO(b"%d" % i * 50_000), -1, part_size=5 << 20)

        server.kill()
        assert sockets(server) == []
        await server.start()

        for i in range(20):
            with client(server).get_object("songs", f"{i}.flac") as response:
                assert response.read() == b"%d" % i * 50_000


async def test_objects_stay_when_port_and_credentials_change(folder: Path) -> None:
    async with servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as server:
        client(server).make_bucket("songs")
        client(server).put_object("songs", "a", io.BytesIO(b"la la la"), 8)
    async with servers.s3_server(folder, free_port(S3Server.ports), "other", "othersecret") as server:
        client(server).put_object("songs", "b", io.BytesIO(b"la"), 2)
        with client(server).get_object("songs", "a") as response:
            assert response.read() == b"la la la"
        with pytest.raises(S3Error, match="InvalidAccessKeyId"):
            client(server, "key", "secretsecret").list_buckets()


async def test_s3_refuses_requests_without_the_secret_on_every_port(folder: Path) -> None:
    async with servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as server:
        client(server).make_bucket("songs")
        client(server).put_object("songs", "a", io.BytesIO(b"la la la"), 8)
        with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
            client(server, "key", "wrong").list_buckets()
        http = urllib3.PoolManager(timeout=5, retries=False)
        for port in (server.port + offset for offset in S3Server.ports):
            for path in ("songs/a", "buckets/songs/a"):
                try:
                    response = http.request("GET", f"http://127.0.0.1:{port}/{path}")
                except urllib3.exceptions.HTTPError:
                    continue  # no server listens there, or it speaks gRPC
                assert b"la la la" not in response.data, f"port {port} serves {path} without credentials"


async def test_the_servers_write_only_below_their_folder(folder: Path) -> None:
    async with (
        servers.nats_server(folder, free_port(), PASSWORDS),
        servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as s3,
    ):
        client(s3).make_bucket("songs")
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "nats", "s3"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sockets(s3) == []


async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "nats").write_text("a file where the store should be")
    server = NatsServer(tmp_path, free_port(), PASSWORDS)
    with pytest.raises(HeartMulaError, match=r"nats ended with exit code 1; its log ends:\n(.|\n)*storage directory"):
        await server.start()
    assert not server.process.running


async def test_a_server_that_is_killed_while_it_starts_is_started_again(folder: Path) -> None:
    server = S3Server(folder, free_port(S3Server.ports), "key", "secretsecret")
    starting = asyncio.create_task(server.start())
    while not server.running:
        await asyncio.sleep(0.001)
    first = server.pid
    os.killpg(first, signal.SIGKILL)
    await starting
    try:
        assert server.pid != first
        assert client(server).list_buckets() == []
    finally:
        await server.stop()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Path]:
    """Make SeaweedFS exit with a code a number of times; the returned file has a line for each start."""

    def make(code: int, times: int) -> Path:
        notes, script, weed = tmp_path / "starts", tmp_path / "weed", binary("weed")
        script.write_text(
            f'#!/bin/sh\necho started >> {notes}\n[ $(wc -l < {notes}) -gt {times} ] || exit {code}\nexec {weed} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setattr("deploy.local.servers.seaweedfs.binary", lambda name: str(script))
        return notes

    return make


async def test_a_start_that_panics_is_retried(folder: Path, broken: Callable[[int, int], Path]) -> None:
    notes = broken(2, 1)
    async with servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as server:
        assert client(server).list_buckets() == []
    assert notes.read_text() == "started\n" * 2


@pytest.mark.parametrize(("code", "attempts"), [(2, 3), (255, 1)])
async def test_a_start_that_fails_with_an_error_or_too_often_is_not_retried(
    folder: Path, broken: Callable[[int, int], Path], code: int, attempts: int
) -> None:
    notes = broken(code, 99)
    server = S3Server(folder, free_port(S3Server.ports), "key", "secretsecret")
    with pytest.raises(servers.StartFailed, match=f"s3 ended with exit code {code}"):
        await server.start()
    assert notes.read_text() == "started\n" * attempts


@pytest.mark.parametrize("turn", ["first", "second"])
async def test_servers_that_a_test_has_killed_run_again_for_the_next_test(
    nats_server: NatsServer, s3_server: S3Server, turn: str
) -> None:
    await (await nats.connect(nats_server.url, allow_reconnect=False)).close()
    client(s3_server).list_buckets()
    nats_server.kill()
    s3_server.kill()


async def test_a_second_server_on_the_port_leaves_the_first_alone(tmp_path: Path) -> None:
    async with servers.nats_server(tmp_path / "a", free_port(), PASSWORDS) as first:
        with pytest.raises(PortInUse):
            await NatsServer(tmp_path / "b", first.port, PASSWORDS).start()
        await (await nats.connect(first.url)).close()


async def test_the_servers_do_not_inherit_the_users_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the user's own")
    async with servers.s3_server(folder, free_port(S3Server.ports), "key", "secretsecret") as server:
        assert b"AWS_SESSION_TOKEN" not in Path(f"/proc/{server.pid}/environ").read_bytes()
        # Secrets of the stack itself are in no command line, which everyone may read.
        assert b"secretsecret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert os.getpgid(server.pid) == server.pid
