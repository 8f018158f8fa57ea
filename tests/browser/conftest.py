"""Fixtures: one Chromium for the session, and the whole system with the trivial engine in both workers."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from playwright.async_api import Browser, BrowserContext

from shared.settings import Settings
from tests.browser.visitor import CHROMIUM, Visitor, open_browser, open_page
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import RunningGateway, running_gateway


@dataclass
class RunningSystem:
    """The gateway and both workers, and browsers that visit them."""

    gateway: RunningGateway
    flow: Flow
    browser: Browser

    async def visit(self, browser: Browser | BrowserContext | None = None) -> Visitor:
        """Open a browser with the page."""
        return await open_page(browser or self.browser, self.gateway.base)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A real browser. Tests are skipped without Chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    async with open_browser() as found:
        yield found


@pytest.fixture
async def system(browser: Browser, settings: Settings, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    """A system with a worker of each role; songs are written at 50 frames a second."""
    settings = replace(settings, trivial_step_ms=20)
    async with (
        open_flow(settings, "tokenizer", "codec") as flow,
        running_gateway(settings, tmp_path) as gateway,
    ):
        yield RunningSystem(gateway, flow, browser)
