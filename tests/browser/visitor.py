"""A visitor of the web page: Chromium, and all errors that it reported."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMELESS = re.compile(
    r"^\s*- (button|link|textbox|searchbox|slider|spinbutton|combobox|progressbar|meter)(?! \")", re.MULTILINE
)


SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


class Visitor:
    """A browser that has the page open."""

    def __init__(self, page: Page, base: str) -> None:
        self.page, self.base = page, base
        self.complaints: list[str] = []
        self.foreign_requests: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.foreign_requests.append(request.url)

    async def open(self) -> "Visitor":
        """Open the page; returns when its list of songs is loaded."""
        await self.page.goto(self.base)
        looked = self.page.locator("#empty:not([hidden]):not(:text('Looking')), #songs > li")
        await looked.first.wait_for(state="attached")
        return self

    async def ask_for(self, lyrics: str, seconds: int = 5, title: str = "", tags: tuple[str, ...] = ()) -> None:
        """Fill in the form and send it."""
        page = self.page
        await page.get_by_label("Lyrics", exact=True).fill(lyrics)
        await page.get_by_label("Longest length").fill(str(seconds))
        await page.get_by_label("Title", exact=True).fill(title)
        for tag in tags:
            await page.get_by_label("Style", exact=True).fill(tag)
            await page.keyboard.press("Enter")
        await page.get_by_role("button", name="Make the song").click()

    def song(self, name: str) -> Locator:
        """Row of a song on the page."""
        return self.page.get_by_role("listitem").filter(has=self.page.get_by_role("heading", name=name, exact=True))

    async def nameless(self) -> list[str]:
        """Controls that have no name for a screen reader."""
        found = await self.page.locator("body").aria_snapshot()
        return [line.strip() for line in found.splitlines() if NAMELESS.match(line)]

    async def require_accessible(self) -> None:
        """Check the page as it is, light and dark, on a desktop and a phone: its controls, by axe, and its width."""
        assert await self.nameless() == []
        for scheme in SCHEMES:
            await self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            for width in (1280, 390):
                await self.page.set_viewport_size({"width": width, "height": 844})
                found = await Axe().run(self.page)
                assert found.violations_count == 0, f"{scheme} {width}: {found.generate_report()}"
                wide = await self.page.locator("html").evaluate("it => it.scrollWidth")
                assert wide <= width, f"the page is {wide} wide on a screen of {width}"


@asynccontextmanager
async def open_browser(*options: str) -> AsyncIterator[Browser]:
    """Start Chromium without a window, with options of its command line."""
    async with async_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses its sandbox to root
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*sandbox, *options])
        try:
            yield browser
        finally:
            await browser.close()


async def open_page(browser: Browser | BrowserContext, base: str, *, enter: bool = True, **context: Any) -> Visitor:
    """Open a window (given a browser) or a tab (given a context), and the page in it, unless `enter` is false."""
    page = await browser.new_page(**context)
    visitor = Visitor(page, base)
    return await visitor.open() if enter else visitor


async def until(question: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds, where no locator can wait for it."""
    async with asyncio.timeout(60):
        while not await question():
            await asyncio.sleep(0.05)
