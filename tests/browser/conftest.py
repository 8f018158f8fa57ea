"""One chromium for the session, and a whole house to look at: gateway, both workers with the trivial engine."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from playwright.async_api import Browser, BrowserContext

from shared.settings import Settings
from tests.browser.onlooker import CHROMIUM, Onlooker, onlooker, open_browser
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import House, open_house


@dataclass
class Stage:
    """A house and its visitors."""

    house: House
    flow: Flow
    browser: Browser

    async def visit(self, browser: Browser | BrowserContext | None = None) -> Onlooker:
        """A person with the page open."""
        return await onlooker(browser or self.browser, self.house.base)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A real browser, or a reason why not."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    async with open_browser() as found:
        yield found


@pytest.fixture
async def stage(browser: Browser, settings: Settings, tmp_path: Path) -> AsyncIterator[Stage]:
    """A house with a worker of each role; a song is written at 50 frames a second."""
    settings = replace(settings, trivial_step_ms=20)
    async with (
        open_flow(settings, "tokenizer", "codec") as flow,
        open_house(settings, tmp_path) as house,
    ):
        yield Stage(house, flow, browser)
