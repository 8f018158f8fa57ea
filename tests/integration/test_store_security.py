"""Another user of this machine can do nothing with the embedded object store."""

import asyncio
import io
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import urllib3
from minio import Minio

from deploy.local.servers.embedded import S3Server, free_port, s3_server
from deploy.local.servers.seaweedfs_security import write_security

HTTP_PORTS, GRPC_PORTS = (0, 2, 4, 6, 8), (1, 3, 5, 7, 10_008)  # above the S3 port; + 9 is only set aside
SONG = b"la la la"
NOBODY = 65534

# Runs as root up to `become`, so that it needs no right to read the interpreter or the checkout.
PROLOGUE = f"""
import encodings.idna, glob, http.client, json, os, pathlib, socket, ssl, subprocess, sys
weed = os.open(sys.argv[1], os.O_RDONLY)
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
os.chdir("/")
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def client(server: S3Server) -> Minio:
    return Minio(
        server.url.removeprefix("http://"),
        server.access_key,
        server.secret_key,
        secure=False,
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=10, retries=False),
    )


async def as_stranger(code: str, *arguments: str, said: str = "", seconds: float = 20) -> str:
    """Run Python code as the user `nobody`, who may also run `weed`; returns standard output."""
    weed = Path(sys.executable).with_name("weed")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(code), str(weed), *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def weed_shell(server: S3Server) -> list[str]:
    """Arguments of SeaweedFS's own shell for this server."""
    at = f"127.0.0.1:{server.port + 2}.{server.port + 3}", f"127.0.0.1:{server.port + 6}.{server.port + 7}"
    return ["shell", f"-master={at[0]}", f"-filer={at[1]}"]


def ask_shell(server: S3Server, command: str) -> str:
    """Run SeaweedFS's shell as the stack's own user, who may read the server's folder; returns its output."""
    weed = Path(sys.executable).with_name("weed")
    return subprocess.run(
        [str(weed), *weed_shell(server)],
        input=command + "\n",
        cwd=server.data_dir / "s3",
        capture_output=True,
        text=True,
        timeout=20,
    ).stdout


@pytest.fixture(scope="module")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[S3Server]:
    """A store with one song, started by a user whose umask lets all users read and write new files."""
    folder = tmp_path_factory.mktemp("guarded-s3")
    server = S3Server(folder, free_port(S3Server.ports), "key", "secretsecret")
    mask = os.umask(0)
    try:
        await server.start()
    finally:
        os.umask(mask)
    client(server).make_bucket("songs")
    client(server).put_object("songs", "a", io.BytesIO(SONG), len(SONG))
    yield server
    await server.stop()


async def test_another_user_makes_no_s3_user_and_lists_nothing(store: S3Server) -> None:
    said = await as_stranger(
        """

        try:
            subprocess.run(
                [f"/proc/self/fd/{weed}", *sys.argv[2:]], pass_fds=[weed], stderr=subprocess.STDOUT, timeout=3,
                env={"HOME": "/nonexistent"},
            )
        except subprocess.TimeoutExpired:
            print("it waits for ever")
        """,
        *weed_shell(store),
        said="s3.configure -user evil -access_key evil -secret_key evilevil -actions Admin -apply\n"
        "fs.ls /buckets/songs\n",
    )
    assert said == "it waits for ever\n"
    assert "evil" not in ask_shell(store, "s3.configure")


async def test_another_users_connections_are_refused_on_every_grpc_port(store: S3Server) -> None:
    """gRPC without a certificate: in plain text the server says nothing, in TLS it asks for one."""
    said = await as_stranger(
        """
        PREFACE = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
        def answer(port, tls):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                try:
                    with (context.wrap_socket(plain) if tls else plain) as connection:
                        connection.sendall(PREFACE)
                        data = connection.recv(9)
                        return "settings" if data[3:4] == bytes([4]) else "nothing"
                except ssl.SSLError as error:
                    return error.reason
                except ConnectionError:
                    return "nothing"
        ports = [int(port) for port in sys.argv[2:]]
        print(json.dumps([[answer(port, tls) for tls in (False, True)] for port in ports]))
        """,
        *(str(store.port + offset) for offset in GRPC_PORTS),
    )
    assert json.loads(said) == [["nothing", "TLSV13_ALERT_CERTIFICATE_REQUIRED"]] * len(GRPC_PORTS)


async def test_another_user_reads_writes_and_deletes_nothing_by_http(store: S3Server) -> None:
    meta = await asyncio.to_thread(ask_shell, store, "fs.meta.cat /buckets/songs/a")
    found = re.search(r'"fileId":\s*"([^"]+)"', meta)
    assert found, meta
    volume = found[1].partition(",")[0]
    said = await as_stranger(
        """
        song, new, *ports = sys.argv[2:]
        paths = [f"/{song}", f"/{new}", "/songs/a", "/buckets/songs/a", "/songs/new", "/buckets/songs/new"]
        paths += ["/dir/assign", "/vol/grow?count=1", "/col/delete?collection=songs", "/submit", "/admin/assign_volume"]
        answers = []
        for port in ports:
            for method in ("GET", "PUT", "POST", "DELETE"):
                for path in paths:
                    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
                    body = b"junk" if method in ("PUT", "POST") else None
                    connection.request(method, path, body)
                    response = connection.getresponse()
                    answers.append([response.status, f"{method} {port} {path}", response.read().decode("latin-1")])
                    connection.close()
        print(json.dumps(answers))
        """,
        found[1],
        f"{volume},ffff00000001",
        *(str(store.port + offset) for offset in HTTP_PORTS),
    )
    done = [(status, what) for status, what, body in json.loads(said) if status < 400 or SONG.decode() in body]
    assert done == []
    with client(store).get_object("songs", "a") as response:
        assert response.read() == SONG


async def test_another_user_opens_neither_the_sockets_nor_the_folder(store: S3Server) -> None:
    said = await as_stranger(
        """
        folder, *ports = sys.argv[2:]
        found = [path for port in ports for path in glob.glob(f"/tmp/seaweedfs-*-{port}.sock")]
        opened = []
        for path in found:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(path)
                    opened.append(path)
                except PermissionError:
                    pass
        try:
            list(pathlib.Path(folder).rglob("*"))
            opened += [str(path) for path in pathlib.Path(folder).iterdir()]
        except PermissionError:
            pass
        print(json.dumps([len(found), opened]))
        """,
        str(store.data_dir),
        *(str(store.port + offset) for offset in (*HTTP_PORTS, *GRPC_PORTS)),
    )
    found, opened = json.loads(said)
    assert found >= 5
    assert opened == []


class Unguarded(S3Server):
    """A store as an older version started it: without certificates and signatures."""

    def _prepare(self) -> None:
        (self.data_dir / "s3").mkdir(mode=0o700, exist_ok=True)


async def test_objects_of_an_older_version_are_read_and_written_with_certificates(tmp_path: Path) -> None:
    big = bytes(range(256)) * 80_000
    port = free_port(S3Server.ports)
    older = Unguarded(tmp_path, port, "key", "secretsecret")
    await older.start()
    client(older).make_bucket("songs")
    client(older).put_object("songs", "big", io.BytesIO(big), -1, part_size=5 << 20)
    await older.stop()
    async with s3_server(tmp_path, port, "key", "secretsecret") as server:
        with client(server).get_object("songs", "big") as response:
            assert response.read() == big
        with client(server).get_object("songs", "big", offset=7_000_000, length=512) as response:
            assert response.read() == big[7_000_000:7_000_512]
        client(server).put_object("songs", "new", io.BytesIO(big), -1, part_size=5 << 20)
        assert [found.object_name for found in client(server).list_objects("songs")] == ["big", "new"]
        client(server).remove_object("songs", "big")


def test_certificates_and_keys_are_private_and_made_anew_by_every_start(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        write_security(tmp_path)
        files = sorted(tmp_path.iterdir())
        assert [path.name for path in files] == ["grpc.crt", "grpc.key", "security.toml"]
        assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 3
        found.append([path.read_bytes() for path in files])
    assert all(one != other for one, other in zip(*found, strict=True))
