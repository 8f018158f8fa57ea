"""Songs that go on from one another, on the page: asking for one, its branching point, and the tree in the list."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, FloatRect, Locator, expect

from shared.schema.job import Parent
from shared.settings import Settings
from tests.browser.conftest import RunningSystem
from tests.browser.visitor import Visitor, open_page
from tests.integration.gateway_fixtures import RunningGateway, running_gateway

LYRICS = "[Verse]\nThe river takes the evening home"
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
# Whether a column of the waveform, of `at` of its width, has the colour of text from top to bottom.
FLAG = """(canvas, at) => {
  const column = document.createElement("canvas");
  [column.width, column.height] = [2, canvas.height];
  const paint = column.getContext("2d", {willReadFrequently: true});
  paint.drawImage(canvas, 1 - Math.round(at * canvas.width), 0);
  paint.fillStyle = getComputedStyle(canvas).getPropertyValue("--ink");
  paint.fillRect(1, 0, 1, canvas.height);
  const colours = (x) => String(paint.getImageData(x, 0, 1, canvas.height).data);
  return colours(0) === colours(1);
}"""
expect.set_options(timeout=20_000)  # a busy machine is not a fault


async def go_on(gateway: RunningGateway, job_id: str, at_ms: int, **values: Any) -> str:
    """Ask for a version of a song; returns its id."""
    return await gateway.submit(lyrics=LYRICS, continue_from={"job_id": job_id, "at_ms": at_ms}, **values)


def field(visitor: Visitor, name: str) -> Locator:
    """A field of the form."""
    return visitor.page.get_by_label(name, exact=True)


async def box(row: Locator) -> FloatRect:
    """Where a row is on the page."""
    found = await row.bounding_box()
    assert found is not None
    return found


async def order(visitor: Visitor) -> list[tuple[str, str]]:
    """The songs in the list from top to bottom, and their levels in trees."""
    rows = await visitor.page.locator("#songs > li:visible").all()
    return [(await row.locator("h3").inner_text(), await row.get_attribute("aria-level") or "") for row in rows]


async def test_a_version_is_made_from_a_moment_of_the_waveform_and_played_from_there(system: RunningSystem) -> None:
    """All of it by keyboard: the moment, the form, and the branching point of what comes of it."""
    visitor = await system.visit()
    page, wave = visitor.page, visitor.page.get_by_role("slider", name="Position")
    await visitor.ask_for(LYRICS, 10, "The River", tags=("strings",))
    await expect(visitor.song("The River").locator(".state")).to_have_text("Finished")
    await visitor.song("The River").get_by_role("button", name="Play: The River").press("Enter")
    await expect(page.locator("#at")).to_have_text("0:01")
    await page.get_by_role("region", name="Player").get_by_role("button", name="Pause").press("Enter")
    await field(visitor, "Lyrics").fill("something else")
    await wave.press("Home")
    await wave.press("ArrowRight")
    await wave.press("Enter")

    await expect(page.get_by_role("heading", name="A new version")).to_be_visible()
    await expect(page.locator("#origin-name")).to_have_text("Begins as The River")
    await expect(field(visitor, "kept up to")).to_have_value("0:04.96")  # whole frames of 80 ms
    await expect(field(visitor, "Lyrics")).to_have_value(LYRICS)
    await expect(field(visitor, "Lyrics")).to_be_focused()
    chosen = page.get_by_role("list", name="Chosen tags").get_by_role("button")
    await expect(chosen).to_have_text(["pop ✕", "piano ✕", "english ✕", "strings ✕"])
    await expect(field(visitor, "Seed")).to_have_value("")  # the old one would give the same song again
    await visitor.ask_for(f"{LYRICS}\n[Chorus]\nla", 15, "The other end")

    row = visitor.song("The other end")
    await expect(row.locator(".origin")).to_have_text("Goes on from The River at 0:04.96")
    await expect(row.locator(".state")).to_have_text("Finished")
    assert await order(visitor) == [("The River", "1"), ("The other end", "2")]
    parent, version = reversed((await system.gateway.http.get("/generate")).json()["songs"])
    assert (await system.gateway.job(version["job_id"])).parent == Parent(
        job_id=parent["job_id"], frames=62, least_frames=187
    )

    for _ in range(2):  # when it is opened, and when it was open and is at its beginning
        await row.get_by_role("button", name="Play from 0:05: The other end").press("Enter")
        await expect(page.locator("#at")).not_to_have_text("0:00")
        await row.get_by_role("button", name="Pause: The other end").press("Enter")
        words = await wave.get_attribute("aria-valuetext") or ""
        assert re.fullmatch(r"0:(0[5-9]|1[0-4]) of 0:15, new from 0:05 on", words), words
        assert await wave.evaluate(FLAG, 4.96 / 15)
        assert not await wave.evaluate(FLAG, 0.1)
        await wave.press("Home")
        await expect(page.locator("#at")).to_have_text("0:00")
    assert visitor.complaints == []


@pytest.fixture
async def gateway(settings: Settings, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(settings, tmp_path) as found:
        yield found


async def test_a_tree_is_shown_whole_below_its_first_song(browser: Browser, gateway: RunningGateway) -> None:
    """A song with a new version is at the top, however old; the rest of its tree comes with it."""
    first, _ = await gateway.made(50, title="First")
    second = await go_on(gateway, first, 2400, title="Second")
    for number in range(20):  # fill a page of the list
        await gateway.submit(title=f"Other {number}")
    await go_on(gateway, first, 1600, title="Third")
    visitor = await open_page(browser, gateway.base)
    await expect(visitor.song("Second")).to_be_visible()  # which is on the second page, as the first is
    found = await order(visitor)
    assert found[:3] == [("First", "1"), ("Third", "2"), ("Second", "2")]
    assert [level for _, level in found[3:]] == ["1"] * (len(found) - 3)
    inset = [(await box(visitor.song(name)))["x"] for name in ("First", "Second", "Third")]
    assert inset[0] < inset[1] == inset[2]
    await visitor.song("Second").get_by_role("button", name="First", exact=True).click()
    await expect(visitor.song("First").get_by_role("heading")).to_be_focused()
    await gateway.http.delete(f"/generate/{second}")
    await visitor.page.reload()
    await expect(visitor.song("Second").locator(".state")).to_have_text("Cancelled")


async def test_a_parent_that_is_gone_is_shown_by_its_id(browser: Browser, gateway: RunningGateway) -> None:
    first, _ = await gateway.made(50, title="First")
    await go_on(gateway, first, 1600, title="Second")
    visitor = await open_page(browser, gateway.base)
    origin = visitor.song("Second").locator(".origin")
    await expect(origin).to_have_text("Goes on from First at 0:01.6")
    await visitor.song("First").get_by_role("button", name="Delete").click()
    await visitor.song("First").get_by_role("button", name="Delete").click()
    await expect(origin).to_have_text(f"Goes on from {first}, which is gone, at 0:01.6")
    assert await order(visitor) == [("Second", "1")]
    await visitor.page.reload()
    await expect(origin).to_have_text(f"Goes on from {first}, which is gone, at 0:01.6")


async def test_the_form_keeps_what_a_version_begins_as_and_says_what_is_wrong_with_it(
    browser: Browser, gateway: RunningGateway
) -> None:
    first, _ = await gateway.made(125, title="First", max_duration_ms=10_000)
    visitor = await open_page(browser, gateway.base)
    page, moment = visitor.page, field(visitor, "kept up to")
    await visitor.song("First").get_by_role("button", name="Go on: First").click()
    await expect(moment).to_have_value("0:04")  # its end, as `made` has it
    await page.get_by_text("More settings").click()
    await field(visitor, "New seconds, at least").fill("2.4")
    await field(visitor, "Longest length").fill("5")
    await moment.fill("0:09.99")
    await expect(page.locator("#fit")).to_have_text("The song keeps 0:09.92: make it longer than that.")
    await page.reload()
    await expect(moment).to_have_value("0:09.99")
    await field(visitor, "Longest length").fill("20")
    await expect(page.locator("#fit")).to_contain_text("fit.")
    await moment.fill("soon")
    await page.get_by_role("button", name="Make the song").click()
    await expect(page.locator("#continue_from-error")).to_have_text("Give a moment such as 1:04.")
    await expect(moment).to_be_focused()
    await moment.fill("0")
    await page.get_by_role("button", name="Make the song").click()
    await expect(page.locator("#continue_from-error")).to_have_text("Keep some of it, or begin anew.")
    await moment.fill("9s")
    await field(visitor, "Title").fill("Second")
    await page.get_by_role("button", name="Make the song").click()
    await expect(visitor.song("Second").locator(".origin")).to_have_text("Goes on from First at 0:08.96")
    newest = (await gateway.http.get("/generate?limit=1")).json()["songs"][0]
    assert (newest["request"]["min_new_ms"], newest["request"]["max_duration_ms"]) == (2400, 20_000)

    await page.get_by_role("button", name="Begin anew").click()
    await expect(page.get_by_role("heading", name="A new song")).to_be_visible()
    await expect(moment).to_be_hidden()
    await field(visitor, "Title").fill("Third")
    await page.get_by_role("button", name="Make the song").click()
    await expect(visitor.song("Third").locator(".origin")).to_be_hidden()

    await visitor.song("Second").get_by_role("button", name="Use again").click()
    await expect(moment).to_have_value("0:08.96")
    await expect(field(visitor, "New seconds, at least")).to_have_value("2.4")
    await gateway.http.delete(f"/generate/{first}?forget=true")
    await page.get_by_role("button", name="Make the song").click()
    await expect(page.locator("#continue_from-error")).to_contain_text("No song has this id")


async def test_versions_work_on_a_phone_and_for_a_screen_reader(browser: Browser, gateway: RunningGateway) -> None:
    """A touch in the waveform chooses the moment; nothing is cut off, without a name or hard to read."""
    version, _ = await gateway.made(50, title="Version 0 of a song with a title that is long and has no end")
    for number in range(1, 7):
        version, _ = await gateway.made(
            100, title=f"Version {number}", lyrics=LYRICS, continue_from={"job_id": version, "at_ms": 2400}
        )
    visitor = await open_page(browser, gateway.base, **PHONE)
    page = visitor.page
    row = visitor.song("Version 6")
    inset = [(await box(visitor.song(f"Version {number}")))["x"] for number in (3, 4, 5, 6)]
    assert inset[0] < inset[1] == inset[2] == inset[3]  # deeper ones would leave too little room
    await row.get_by_role("button", name="Play: Version 6").tap()
    await page.locator("#wave").tap(position={"x": 2, "y": 10})
    await page.get_by_role("button", name="Go on from here").tap()
    await expect(field(visitor, "kept up to")).to_be_in_viewport()
    await expect(field(visitor, "kept up to")).to_have_value(re.compile(r"0:0\d"))
    await visitor.require_accessible()
