"""MCP without what it needs, and errors as an agent reads them."""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from heartmula_client import ClientError
from heartmula_client.cli.commands import cli
from heartmula_client.mcp import SongServer, SongService
from heartmula_client.mcp.refusals import in_words
from services.gateway.auth.api_keys import Caller
from services.gateway.errors import ApiError
from services.gateway.mcp import server as mcp_server
from services.gateway.mcp.endpoint import McpEndpoint

META = {
    "protocolVersion": "2026-07-28",
    "clientInfo": {"name": "test", "version": "1"},
    "clientCapabilities": {},
}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the package mcp."""
    for name in list(sys.modules):
        if name.split(".")[0] == "mcp" or name.startswith(("heartmula_client.mcp", "services.gateway.mcp.server")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mcp", None)


@pytest.mark.usefixtures("missing")
async def test_a_gateway_without_the_packages_says_how_to_get_them() -> None:
    endpoint = McpEndpoint(None)  # type: ignore[arg-type]  # no part of it is used
    with pytest.raises(ApiError, match=r"services/client\[mcp\]") as refused:
        await endpoint.answer_to(Caller("local"), "http://localhost")
    assert refused.value.status == 404


@pytest.mark.usefixtures("missing")
def test_the_command_without_the_package_says_how_to_get_it() -> None:
    result = CliRunner().invoke(cli, ["mcp"])
    assert (result.exit_code, "pip install 'mcp>=2.3,<3'" in result.output) == (2, True)


def test_the_command_offers_no_json_on_the_output_that_carries_messages() -> None:
    assert "--json" not in CliRunner().invoke(cli, ["mcp", "--help"]).output


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ClientError("seed: must be text", field="seed"), "seed: must be text"),
        (ClientError("must be less", field="continue_from.at_ms", title="Wrong"), "Wrong. at_ms: must be less"),
        (ClientError("full", retry_after=15), "full. Try again in 15 s."),
        (ClientError("a key is needed", status=401), "a key is needed. The key belongs into HEARTMULA_API_KEY"),
    ],
)
def test_errors_name_the_argument_and_what_to_do(error: ClientError, words: str) -> None:
    assert in_words(error).startswith(words)


@pytest.mark.parametrize("version", ["2025-11-25", "2026-07-28"])
async def test_a_client_that_does_not_read_is_given_up(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "SEND_SECONDS", 0.05)
    server, ready, held = mcp_server.McpServer(None), asyncio.Event(), asyncio.Event()  # type: ignore[arg-type]
    running = asyncio.create_task(server.run(ready))
    await ready.wait()
    meta = {f"io.modelcontextprotocol/{name}": value for name, value in META.items()}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}
    messages = [{"type": "http.request", "body": json.dumps(call).encode(), "more_body": False}]
    names = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    names |= {"mcp-protocol-version": version, "mcp-method": "tools/list"}
    headers = [(name.encode(), value.encode()) for name, value in names.items()]
    scope: Any = {"type": "http", "method": "POST", "path": "/mcp", "headers": headers, "query_string": b""}
    sent = []

    async def receive() -> Any:
        if not messages:
            await held.wait()
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message["type"])
        await held.wait()

    await server.answer(Caller("local"), "http://localhost", scope, receive, send)
    assert sent == ["http.response.start"]
    running.cancel()


def no_service() -> SongService:
    raise AssertionError


@pytest.mark.parametrize("page", ["docs/mcp.md", "docs/skill/SKILL.md"])
async def test_the_documentation_names_tools_and_arguments_that_exist(page: str) -> None:
    tools = {tool.name: tool for tool in await SongServer(no_service).list_tools()}
    arguments = {name for tool in tools.values() for name in tool.input_schema["properties"]}
    answers = {name for tool in tools.values() for name in (tool.output_schema or {})["properties"]}
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", text))
    assert named <= set(tools) | arguments | answers
    if page == "docs/mcp.md":
        assert re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:adds|ends|nothing)", text, re.MULTILINE) == list(tools)


async def test_hints_say_what_a_call_changes() -> None:
    hints = {tool.name: tool.annotations for tool in await SongServer(no_service).list_tools()}
    assert {name for name, hint in hints.items() if hint and hint.read_only_hint} == {
        *("watch_song", "show_song", "list_songs", "show_recording"),
    }
    assert {name for name, hint in hints.items() if hint and hint.destructive_hint} == {"cancel_song"}
    assert {name for name, hint in hints.items() if hint and not hint.idempotent_hint} == {"write_song", "extend_song"}
