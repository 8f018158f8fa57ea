"""External servers that are missing or refuse us are reported at once, in words, and without the password."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.local.servers.embedded import ROLES, NatsServer, S3Server, free_port
from deploy.setup import reach_store, set_up
from shared.errors import Rejected
from shared.settings import Settings
from tests.integration.certificates import Authority, TlsNatsServer, TlsS3Server
from tests.integration.flow import PATIENCE, environment
from tests.integration.gateway_fixtures import running_gateway

ROOT = Path(__file__).parents[2]
ANSWER = "no answer yet"
REFUSED = "connection refused, nothing listens there"
UNRESOLVED = "the host's name cannot be resolved"
UNTRUSTED = (
    "its certificate is not trusted (unable to get local issuer certificate): set SSL_CERT_FILE to a file with the "
    "certificate of the authority that signed it"
)


@pytest.fixture(autouse=True)
def no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the file of authorities that the machine's own environment may name."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture
def silent() -> Iterator[int]:
    """Port of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
async def tls_servers(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> AsyncIterator[tuple[TlsNatsServer, TlsS3Server]]:
    """Both servers, speaking TLS with certificates of an authority that only tests know."""
    folder = tmp_path_factory.mktemp("tls")
    broker = TlsNatsServer(folder, free_port(), dict.fromkeys(ROLES, "secret"), authority)
    store = TlsS3Server(folder, free_port(S3Server.ports), authority)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(authority.file))
        await broker.start()
        await store.start()
    yield broker, store
    store.kill()  # in order it takes ten seconds
    await store.stop()
    await broker.stop()


class ReportedLines:
    """Lines that are reported while a program waits for a server."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.one = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.one.set()


async def first_line(wait: Callable[[ReportedLines], Coroutine[Any, Any, None]]) -> str:
    said = ReportedLines()
    waiting = asyncio.create_task(wait(said))
    async with asyncio.timeout(PATIENCE):
        await said.one.wait()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert len(said.lines) == 1
    return said.lines[0]


@pytest.mark.parametrize(
    ("host", "cause"),
    [("127.0.0.1:{free}", REFUSED), ("nats.invalid:4222", UNRESOLVED), ("127.0.0.1:{silent}", ANSWER)],
)
async def test_a_missing_nats_server_is_reported_in_one_line(silent: int, host: str, cause: str) -> None:
    at = host.format(free=free_port(), silent=silent)
    settings = Settings(nats_url=f"nats://me:swordfish@{at}")
    line = await first_line(lambda said: set_up(settings, say=said))
    assert line == f"waiting: no connection to NATS at nats://{at} (HEARTMULA_NATS_URL): {cause}"


@pytest.mark.parametrize(
    ("host", "cause"), [("127.0.0.1:{free}", REFUSED), ("s3.invalid:9000", UNRESOLVED), ("127.0.0.1:{silent}", ANSWER)]
)
async def test_a_missing_store_is_reported_in_one_line(silent: int, host: str, cause: str) -> None:
    at = host.format(free=free_port(), silent=silent)
    settings = Settings(s3_endpoint=f"http://{at}", s3_access_key="me", s3_secret_key="swordfish")
    line = await first_line(lambda said: reach_store(settings, say=said))
    assert line == f"waiting: no connection to the object store at http://{at} (HEARTMULA_S3_ENDPOINT): {cause}"


async def test_a_nats_server_that_refuses_our_password_ends_the_start(
    nats_server: NatsServer, tls_servers: tuple[TlsNatsServer, TlsS3Server]
) -> None:
    for url, cause in (
        (nats_server.url.replace("secret", "swordfish"), "wrong user or password"),
        (tls_servers[0].url, UNTRUSTED),
    ):
        with pytest.raises(Rejected) as raised:
            await set_up(Settings(nats_url=url))
        shown = url.replace("operator:swordfish@", "").replace("operator:secret@", "")
        assert str(raised.value) == f"no connection to NATS at {shown} (HEARTMULA_NATS_URL): {cause}"


async def test_a_store_that_refuses_our_credentials_ends_the_start(
    settings: Settings, tls_servers: tuple[TlsNatsServer, TlsS3Server]
) -> None:
    for changed, words in (
        (replace(settings, s3_access_key="stranger"), "HEARTMULA_S3_ACCESS_KEY"),
        (replace(settings, s3_secret_key="swordfish"), "HEARTMULA_S3_SECRET_KEY"),
        (replace(settings, s3_endpoint=tls_servers[1].url), UNTRUSTED),
    ):
        with pytest.raises(Rejected, match=r"the object store at .*HEARTMULA_S3_ENDPOINT") as raised:
            await reach_store(changed)
        assert words in str(raised.value)
        assert "swordfish" not in str(raised.value)


async def test_a_server_that_speaks_no_tls_is_named(settings: Settings) -> None:
    secure = replace(settings, s3_endpoint=settings.s3_endpoint.replace("http:", "https:"))
    line = await first_line(lambda said: reach_store(secure, say=said))
    assert line.endswith("(HEARTMULA_S3_ENDPOINT): it does not speak TLS there")


async def test_a_file_of_authorities_that_is_not_there_is_named(
    tls_servers: tuple[TlsNatsServer, TlsS3Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(Rejected, match=r"SSL_CERT_FILE=/nowhere/ca\.pem is not there"):
        await set_up(Settings(nats_url=tls_servers[0].url))


class Program:
    """A program of this project, and its output."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        self._module, self._env = module, env
        self.lines: list[str] = []

    async def __aenter__(self) -> "Program":
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module),
            cwd=ROOT,
            env=self._env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.rest()

    async def until(self, text: str) -> str:
        """Wait for the next line that contains the text."""
        assert self.process.stdout
        async with asyncio.timeout(PATIENCE):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line.rstrip())
                if text in line:
                    return self.lines[-1]
        raise AssertionError(f"no {text!r} in {self.lines}")

    async def rest(self) -> int:
        """Read all output up to the end; returns the exit code."""
        assert self.process.stdout
        async with asyncio.timeout(PATIENCE):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            return await self.process.wait()


def stack_environment(settings: Settings) -> dict[str, str]:
    return environment(replace(settings, port=free_port(), data_dir=settings.data_dir / "stack"), "operator")


async def test_the_stack_says_which_servers_it_waits_for_and_nothing_else(settings: Settings, silent: int) -> None:
    broker = f"nats://me:swordfish@127.0.0.1:{free_port()}"
    away = replace(settings, nats_url=broker, s3_endpoint=f"http://127.0.0.1:{silent}", s3_secret_key="swordfish")
    async with Program("deploy.local", stack_environment(away)) as stack:
        await stack.until(f"(HEARTMULA_NATS_URL): {REFUSED}")
        await stack.until(f"(HEARTMULA_S3_ENDPOINT): {ANSWER}")
        stack.process.terminate()
        assert await stack.rest() == 0
    assert len(stack.lines) == 2, stack.lines
    assert not any("swordfish" in line for line in stack.lines)


async def test_the_stack_ends_when_waiting_does_not_help(settings: Settings, nats_server: NatsServer) -> None:
    wrong = replace(settings, nats_url=nats_server.url.replace("secret", "swordfish"))
    async with Program("deploy.local", stack_environment(wrong)) as stack:
        assert await stack.rest() == 1
    at = f"nats://127.0.0.1:{nats_server.port}"
    assert stack.lines == [f"error: no connection to NATS at {at} (HEARTMULA_NATS_URL): wrong user or password"]


async def test_a_service_started_by_hand_says_the_same(
    settings: Settings, tls_servers: tuple[TlsNatsServer, TlsS3Server]
) -> None:
    _, store = tls_servers
    nowhere = replace(settings, nats_url=f"nats://me:swordfish@127.0.0.1:{free_port()}")
    async with Program("services.gateway", environment(nowhere, "gateway")) as gateway:
        line = await gateway.until("(HEARTMULA_NATS_URL)")
        assert line.endswith(f"(HEARTMULA_NATS_URL): {REFUSED}")
    strange = replace(settings, s3_endpoint=store.url)
    await set_up(settings)
    async with Program("services.gateway", environment(strange, "gateway")) as gateway:
        assert await gateway.rest() == 1
    assert gateway.lines == [
        f"error: no connection to the object store at {store.url} (HEARTMULA_S3_ENDPOINT): {UNTRUSTED}"
    ]


async def test_everything_works_over_tls_and_no_library_logs_anything(
    settings: Settings,
    tls_servers: tuple[TlsNatsServer, TlsS3Server],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    broker, store = tls_servers
    secure = replace(settings, nats_url=broker.url, s3_endpoint=store.url)
    async with Program("deploy.setup", environment(secure, "bootstrap")) as setup:
        assert (await setup.rest(), setup.lines) == (0, [])
    async with running_gateway(secure, secure.data_dir) as gateway:
        await gateway.complete(await gateway.submit())
        await broker.stop()
        await broker.start()
        job_id = await gateway.submit()
        await gateway.complete(job_id)
        assert (await gateway.http.get(f"/generate/{job_id}/result")).status_code == 200
    said = gateway.log.read_text()
    assert "connected again" in said
    for word in ("eof_received", "never retrieved", "Retrying", "Traceback"):
        assert word not in said
