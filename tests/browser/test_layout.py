"""Stability of the layout: nothing on the page moves while it loads, even over a slow connection."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route
from playwright.async_api import Error as PlaywrightError

from deploy.local.servers.embedded import NatsServer, S3Server
from tests.browser.visitor import open_page
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway

PHONE: dict[str, Any] = {"viewport": {"width": 412, "height": 823}, "device_scale_factor": 1.75, "is_mobile": True}
SMALL: dict[str, Any] = {"viewport": {"width": 340, "height": 640}, "is_mobile": True}
DESKTOP: dict[str, Any] = {"viewport": {"width": 1350, "height": 940}}
MOST = 0.02  # 0.1 is the largest layout shift that counts as good
# All layout shifts, with what moved. Those that the browser puts down to a key or a click count too: there was none, it
# takes the first sight of a phone's screen for one.
WATCH = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries())
    window.shifts.push([entry.value, entry.sources.map((source) => {
      const it = source.node;
      const name = it?.id || it?.className || it?.nodeName || "gone";
      const { previousRect: from, currentRect: to } = source;
      return `${name}: ${from.x},${from.y} ${from.width}x${from.height} to ${to.x},${to.y} ${to.width}x${to.height}`;
    })]);
}).observe({ type: "layout-shift", buffered: true });
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint').length > 0"
A_FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("layout")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


async def answer_late(route: Route) -> None:
    """Delay each answer until the browser has shown what it has, as over the slowest of connections."""
    page = route.request.frame.page
    if route.request.resource_type not in ("document", "stylesheet"):
        with contextlib.suppress(PlaywrightError):  # the page is closed
            await page.wait_for_function(PAINTED)
            await page.evaluate(A_FRAME)
    await route.continue_()


async def shifts(page: Page) -> tuple[float, str]:
    """The sum of all layout shifts so far, and the elements that moved."""
    found = await page.evaluate("window.shifts")
    lines = [f"{value:.4f}\n  " + "\n  ".join(sources) for value, sources in found]
    return sum(value for value, _ in found), "\n".join(lines)


@pytest.mark.parametrize(
    ("screen", "songs"), [(SMALL, 0), (PHONE, 8), (DESKTOP, 8)], ids=["small and no songs", "phone", "desktop"]
)
async def test_the_page_does_not_move_while_it_loads(
    browser: Browser, gateway: RunningGateway, screen: dict[str, Any], songs: int
) -> None:
    """Checked with songs, without, and with a sentence about missing workers."""
    there = (await gateway.http.get("/generate")).json()["songs"]
    for number in range(len(there), songs):
        job_id = await gateway.submit(title=f"Song {number}", tags="pop,piano,female vocals")
        await gateway.complete(job_id)
    visitor = await open_page(browser, gateway.base, enter=False, **screen)
    await visitor.page.add_init_script(WATCH)
    await visitor.page.route("**/*", answer_late)
    await visitor.open()
    await visitor.page.locator("#system[data-state=degraded]").wait_for()
    await visitor.page.locator("#fit:not(:empty)").wait_for()
    await visitor.page.evaluate(A_FRAME)
    total, what = await shifts(visitor.page)
    print(f"layout shift {total:.4f}\n{what}")
    await visitor.page.close()
    assert total < MOST, what
