"""Real servers for every test that needs them: one NATS and one S3 server a session, emptied before each use."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import nats
import pytest

from deploy.local.servers.embedded import ROLES, NatsServer, S3Server, Server, free_port
from shared.settings import Settings

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is not a fault
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def servers() -> list[Server]:
    """Servers of the session that a test has needed so far."""
    return []


@pytest.fixture(scope="session")
async def nats_server(tmp_path_factory: pytest.TempPathFactory, servers: list[Server]) -> AsyncIterator[NatsServer]:
    """The session's nats-server. If a test leaves it dead, it is started again before the next."""
    server = NatsServer(tmp_path_factory.mktemp("nats"), free_port(), dict.fromkeys(ROLES, "secret"))
    await server.start()
    servers.append(server)
    yield server
    await server.stop()
    # The services lack no right that they use: a denied one shows nowhere else but as an answer that does not come.
    logs = [path.read_text() for path in (server.data_dir / "logs").glob("nats.*")]  # one may have been set aside
    denied = [line for log in logs for line in log.splitlines() if "Violation" in line]
    assert logs
    assert not denied, denied[:5]


@pytest.fixture(scope="session")
async def s3_server(tmp_path_factory: pytest.TempPathFactory, servers: list[Server]) -> AsyncIterator[S3Server]:
    """The session's S3 server. If a test leaves it dead, it is started again before the next."""
    server = S3Server(tmp_path_factory.mktemp("s3"), free_port(S3Server.ports), "tester", "secretsecret")
    await server.start()
    servers.append(server)
    yield server
    await server.stop()


@pytest.fixture
async def revived(servers: list[Server]) -> AsyncIterator[None]:
    """Restart the session's servers that are dead after a test, or were before it."""
    for server in servers:
        await server.start_unless_running()
    yield
    for server in servers:  # now too: fixtures of the next module come before its tests
        await server.start_unless_running()


@pytest.fixture(autouse=True)
def revive(request: pytest.FixtureRequest) -> None:
    """Apply `revived` to every test that uses one of the servers."""
    if not {"nats_server", "s3_server"}.isdisjoint(request.fixturenames):
        request.getfixturevalue("revived")


@pytest.fixture
async def nats_settings(nats_server: NatsServer, tmp_path: Path) -> Settings:
    """Settings for a test that needs NATS alone. All streams of earlier tests are removed."""
    client = await nats.connect(nats_server.url)
    js = client.jetstream()
    for stream in await js.streams_info():
        await js.delete_stream(str(stream.config.name))
    await client.close()
    return Settings(nats_url=nats_server.url, data_dir=tmp_path, lease_ttl=2, engine="trivial", batch=1)


@pytest.fixture
async def settings(nats_settings: Settings, s3_server: S3Server, tmp_path: Path) -> Settings:
    """Settings for a test that needs both servers. Each test has a bucket of its own."""
    return replace(
        nats_settings,
        s3_endpoint=s3_server.url,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
        s3_bucket="".join(c if c.isalnum() else "-" for c in tmp_path.name.lower())[:60].strip("-") or "test",
    )
