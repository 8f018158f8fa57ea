"""A song that is heard while it is made, on a whole system: gateway, both workers, and a real browser."""

from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

from playwright.async_api import Browser, expect

from shared.settings import Settings
from tests.browser.conftest import RunningSystem
from tests.browser.listening import WATCH
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import running_gateway

SECONDS = 20


async def test_a_song_is_heard_before_it_is_complete_and_survives_a_restart(
    browser: Browser, settings: Settings, tmp_path: Path
) -> None:
    """It plays while it is written, goes on after its gateway was killed and started again, and to its end."""
    settings = replace(settings, trivial_step_ms=60, trivial_window=(50, 25))  # 15 s in all, the first second after 3
    async with (
        open_flow(settings, "tokenizer", "codec") as flow,
        running_gateway(settings, tmp_path) as gateway,
    ):
        visitor = await RunningSystem(gateway, flow, browser).visit()
        page = visitor.page
        await visitor.ask_for("la la", SECONDS, "Live")
        row = visitor.song("Live")
        await row.get_by_role("button", name="Play when ready: Live").click()
        await page.wait_for_function("() => document.querySelector('#audio').currentTime > 0.2", timeout=60_000)
        await expect(row.locator(".state")).to_have_text("Writing")
        await expect(page.locator("#whole")).to_have_text("of up to 0:20")
        await page.evaluate(WATCH)
        await gateway.stop(SIGKILL)
        await gateway.start()
        await expect(row.locator(".state")).to_have_text("Finished", timeout=60_000)
        await expect(page.locator("#length")).to_have_text("0:20")
        await page.locator("#audio").evaluate("it => { it.playbackRate = 4 }")  # to save time
        await expect(page.locator("#at")).to_have_text("0:20", timeout=60_000)
        await expect(page.get_by_role("region", name="Player").get_by_role("button", name="Play")).to_be_visible()
        assert [what for what in await page.evaluate("interruptions") if what.startswith("back")] == []
        await page.close()
