"""Pages of other origins in a real browser: what they can do to a service that asks for no key."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import Browser, expect

from deploy.local.servers.embedded import free_port
from shared.settings import Settings
from tests.browser.visitor import open_browser, open_page
from tests.integration.gateway_fixtures import running_gateway

ATTACK = """async ([base, id]) => {
  const body = JSON.stringify({lyrics: "la", tags: "pop", webhook_url: "https://evil.example/"});
  const json = {"Content-Type": "application/json"};
  const done = (promise) => promise.then((answer) => answer.type, () => "failed");
  const first = (target) => new Promise((resolve) => {
    for (const name of ["open", "error"]) target.addEventListener(name, () => resolve(name), {once: true});
  });
  const post = {method: "POST", mode: "no-cors"};
  return {
    untyped: await done(fetch(base + "/generate", {...post, body: new Blob([body])})),
    text: await done(fetch(base + "/generate", {...post, body})),
    fit: await done(fetch(base + "/api/fit", {...post, body: new Blob([body])})),
    json: await done(fetch(base + "/generate", {method: "POST", headers: json, body})),
    cancel: await done(fetch(base + "/generate/" + id, {method: "DELETE"})),
    list: await done(fetch(base + "/generate")),
    socket: await first(new WebSocket(base.replace("http", "ws") + `/generate/${id}/events`)),
    events: await first(new EventSource(base + `/generate/${id}/events`)),
  };
}"""
OUTCOMES = dict.fromkeys(("untyped", "text", "fit", "json", "cancel", "list"), "failed")  # no answer may be read
OUTCOMES |= {"socket": "error", "events": "error"}
FORM = """base => {
  const form = document.body.appendChild(document.createElement("form"));
  Object.assign(form, {method: "post", enctype: "text/plain", action: base + "/generate"});
  const field = form.appendChild(document.createElement("input"));
  field.name = '{"lyrics": "la", "title": "';
  field.value = '"}';
  form.submit();
}"""
REBOUND = "--host-resolver-rules=MAP evil.example 127.0.0.1"


@asynccontextmanager
async def site() -> AsyncIterator[int]:
    """Port of a web server with an empty page."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<br>")
        writer.close()

    port = free_port()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        yield port


async def test_a_page_of_another_origin_can_neither_make_nor_follow_a_song(
    browser: Browser, settings: Settings, tmp_path: Path
) -> None:
    async with site() as port, running_gateway(settings, tmp_path) as gateway, open_browser(REBOUND) as other:
        job_id = await gateway.submit()
        for origin in (f"http://127.0.0.1:{port}", f"http://evil.example:{port}"):
            page = await other.new_page()
            await page.goto(origin)
            assert await page.evaluate(ATTACK, [gateway.base, job_id]) == OUTCOMES
            async with page.expect_navigation() as form:
                await page.evaluate(FORM, gateway.base)
            assert (await form.value).status == 403
            assert (await gateway.job(job_id)).status == "queued"
            assert [song["job_id"] for song in (await gateway.http.get("/generate")).json()["songs"]] == [job_id]
            await page.goto(origin)
            await page.evaluate("base => { location.href = base }", gateway.base)  # as a link does
            await expect(page.get_by_role("heading", name="A new song")).to_be_visible()
            await expect(page.locator("#songs > li")).to_have_count(1)
            await page.close()


async def test_a_foreign_name_that_resolves_to_this_machine_shows_no_page(
    browser: Browser, settings: Settings, tmp_path: Path
) -> None:
    """For the browser the page of a rebound name has the service's origin, so no request of it may be answered."""
    async with running_gateway(settings, tmp_path) as gateway, open_browser(REBOUND) as other:
        page = await other.new_page()
        for path in ("/", "/generate"):
            answer = await page.goto(f"http://evil.example:{gateway.settings.port}{path}")
            assert answer is not None
            assert answer.status == 421
        for name in ("localhost", "songs.localhost"):
            visitor = await open_page(other, f"http://{name}:{gateway.settings.port}")
            assert visitor.complaints == []
