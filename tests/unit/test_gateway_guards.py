"""Marks of routes, and names that the gateway accepts as its own."""

from pathlib import Path
from typing import cast

import pytest
from litestar import Litestar, WebSocket, get, post, websocket
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import WebSocketDisconnect
from litestar.testing import TestClient

from services.gateway.api.guards import PUBLIC, PageRules, need_key
from services.gateway.auth.api_keys import ApiKeys, digest_of_key
from services.gateway.auth.authenticate import Authenticator
from services.gateway.auth.origins import is_own
from services.gateway.errors import ApiError, answer_error
from services.gateway.monitoring.health import Health
from services.gateway.submission.outage import Outage
from shared.nats.connection import Connection
from shared.settings import Settings

KEYS = f'[[tenant]]\nname = "alice"\nkeys = ["{digest_of_key("key")}"]\n'


def authenticator(keys: Path | None = None) -> Authenticator:
    return Authenticator(ApiKeys(keys))


def test_a_route_without_a_mark_is_closed(tmp_path: Path) -> None:
    """This holds for every path and every kind of route."""
    (tmp_path / "keys.toml").write_text(KEYS)
    closed = authenticator(tmp_path / "keys.toml")

    @get("/", sync_to_thread=False)
    def unmarked() -> str:
        return "songs"

    @post("/health/more", sync_to_thread=False)
    def beside() -> str:
        return "songs"

    @websocket("/socket")
    async def socket(socket: WebSocket) -> None:  # type: ignore[type-arg]
        await socket.accept()

    @get("/open", opt=PUBLIC, sync_to_thread=False)
    def marked() -> str:
        return "weather"

    app = Litestar(
        [unmarked, beside, socket, marked],
        guards=[PageRules(Settings(), closed).guard, need_key],
        state=State({"authenticator": closed, "outage": Outage(cast("Connection", None), cast("Health", None))}),
        exception_handlers={Exception: answer_error},
        openapi_config=None,
    )
    with TestClient(app) as client:
        assert client.get("/").status_code == 401
        assert client.post("/health/more").status_code == 401
        assert client.get("/", headers={"Authorization": "Bearer key"}).text == "songs"
        assert client.get("/open").text == "weather"
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/socket"):
            pass


def test_a_websocket_without_a_mark_is_closed_to_pages_of_other_origins() -> None:
    opened = authenticator()

    @websocket("/socket")
    async def socket(socket: WebSocket) -> None:  # type: ignore[type-arg]
        await socket.accept()
        await socket.close()

    rules = PageRules(Settings(), opened)
    app = Litestar(
        [socket], guards=[rules.guard, need_key], state=State({"authenticator": opened}), openapi_config=None
    )
    with TestClient(app, base_url="http://songs.localhost") as client:
        with client.websocket_connect("/socket", headers={"Origin": "http://songs.localhost"}):
            pass
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/socket", headers={"Origin": "http://evil.example"}),
        ):
            pass


def refused(rules: PageRules, *headers: tuple[str, str], method: str = "GET", path: str = "/") -> int:
    """The status that a request is refused with, or 0."""
    found = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": "http", "method": method, "path": path, "headers": found}
    try:
        rules.check(ASGIConnection(scope), {})  # type: ignore[arg-type]
    except ApiError as refusal:
        return refusal.status
    return 0


def test_the_name_that_the_gateway_listens_on_is_its_own() -> None:
    rules = PageRules(Settings(host="Box.lan", allowed_hosts="a.example,b.example"), authenticator())
    for name in ("box.lan", "BOX.LAN:8000", "a.example", "b.example:80", "127.0.0.1", "localhost"):
        assert refused(rules, ("host", name)) == 0
    for name in ("lan", "c.example", "a.example,b.example", "", "x.box.lan"):
        assert refused(rules, ("host", name)) == 421
    assert refused(rules, ("host", "localhost"), ("host", "evil.example")) == 421
    assert refused(rules) == 0


def test_an_own_origin_has_the_host_and_port_of_the_host_header() -> None:
    assert is_own("http://127.0.0.1:8000", "127.0.0.1:8000")
    assert is_own("https://songs.example", "songs.example")
    assert is_own("https://songs.example", "songs.example:443")
    assert is_own("http://[::1]:8000", "[::1]:8000")
    for origin, host in (
        ("https://songs.example", "songs.example:80"),
        ("http://127.0.0.1:8001", "127.0.0.1:8000"),
        ("http://127.0.0.1", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::2]:8000"),
        ("null", "null"),
        ("", ""),
        ("file://", ""),
        ("chrome-extension://songs", "songs"),
        ("http://songs.example/", "songs.example"),
        ("http://a@songs.example", "songs.example"),
    ):
        assert not is_own(origin, host), (origin, host)


@pytest.mark.parametrize("value", ["https://songs.example", "songs.example:80", "a,,b", "*", "münchen.example", "a b"])
def test_a_wrong_list_of_names_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(Exception, match="HEARTMULA_ALLOWED_HOSTS must be names"):
        Settings.load({"HEARTMULA_ALLOWED_HOSTS": value})


def test_names_are_compared_in_lower_case() -> None:
    assert Settings.load({"HEARTMULA_ALLOWED_HOSTS": " A.example., b"}).allowed_hosts == "a.example,b"
