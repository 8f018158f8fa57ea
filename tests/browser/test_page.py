"""The web page in a real browser, on a real stack."""

import re
from datetime import datetime, timedelta
from pathlib import Path

import soundfile
from playwright.async_api import Browser, expect

from services.gateway.auth.api_keys import digest_of_key
from shared.settings import Settings
from tests.browser.conftest import RunningSystem
from tests.browser.visitor import Visitor, open_page, until
from tests.compatibility.stored import WORKING
from tests.integration.gateway_fixtures import running_gateway

LYRICS = "[Verse]\nThe river takes the evening home"
expect.set_options(timeout=20_000)  # a busy machine is not a fault


async def finished(visitor: Visitor, name: str) -> None:
    """Wait until a song can be played."""
    await expect(visitor.song(name).locator(".state")).to_have_text("Finished")


async def test_a_song_is_requested_followed_played_and_downloaded(system: RunningSystem, tmp_path: Path) -> None:
    """From the form to the downloaded file. Nothing is fetched from other hosts, and the browser reports no error."""
    visitor = await system.visit()
    page = visitor.page
    await expect(page.locator("#empty")).to_contain_text("No songs yet")
    await visitor.ask_for(LYRICS, 10, "The River", tags=("strings", "calm"))
    row = visitor.song("The River")
    bar = row.get_by_role("progressbar", name="Progress of The River")
    await expect(bar).to_be_visible()

    async def under_way() -> bool:
        return 0 < float(await bar.get_attribute("value") or 0) < 100

    await until(under_way)
    await finished(visitor, "The River")
    await expect(row.locator(".facts")).to_contain_text("0:10 · FLAC")
    await expect(row.locator(".facts")).to_contain_text("pop, piano, english, strings, calm")
    await expect(bar).to_be_hidden()

    await row.get_by_role("button", name="Play: The River").click()
    await expect(page.locator("#at")).to_have_text("0:01")
    await expect(page.locator("#length")).to_have_text("0:10")
    await expect(row.get_by_role("button", name="Pause: The River")).to_be_visible()
    position = page.get_by_role("slider", name="Position")
    box = await position.bounding_box()
    assert box is not None
    await position.click(position={"x": box["width"] * 0.7, "y": 10})
    await expect(page.locator("#at")).to_have_text("0:07")
    await position.press("Home")
    await expect(page.locator("#at")).to_have_text("0:00")
    await page.get_by_role("region", name="Player").get_by_role("button", name="Pause").click()
    await expect(row.get_by_role("button", name="Play: The River")).to_be_visible()

    await row.get_by_label("Download: The River").click()
    async with page.expect_download() as download:
        await row.get_by_role("link", name="WAV").click()
    file = tmp_path / "song"
    await (await download.value).save_as(file)
    assert soundfile.info(file).format == "WAV"
    assert (await download.value).suggested_filename == "The River.wav"
    assert visitor.foreign_requests == []
    assert visitor.complaints == []


async def test_a_song_is_cancelled_deleted_and_requested_again(system: RunningSystem) -> None:
    """Cancel, Use again, Delete (pressed twice), and the search."""
    visitor = await system.visit()
    page = visitor.page
    await visitor.ask_for(LYRICS, 70, "Too long")
    row = visitor.song("Too long")
    await row.get_by_role("button", name="Cancel").click()
    await expect(row.locator(".state")).to_have_text("Cancelled")
    await row.get_by_role("button", name="Use again").click()
    await expect(page.get_by_label("Title", exact=True)).to_have_value("Too long")
    await expect(page.get_by_label("Seed")).not_to_have_value("")
    await page.get_by_label("Seed").fill("")
    await visitor.ask_for("la la la", 5, "")
    await finished(visitor, "la la la")
    await page.get_by_label("Search the songs").fill("too l")
    await expect(visitor.song("la la la")).to_be_hidden()
    await page.get_by_label("Search the songs").fill("no such thing")
    await expect(page.locator("#empty")).to_have_text("No song matches.")
    await page.get_by_label("Search the songs").fill("")
    await row.get_by_role("button", name="Delete").click()
    await expect(row).to_be_visible()
    await row.get_by_role("button", name="Delete").click()
    await expect(row).to_have_count(0)
    await page.reload()
    await expect(visitor.song("la la la")).to_be_visible()
    await expect(row).to_have_count(0)

    # A song without words, for later: the words stay in the form, and are not sent.
    later = datetime.now().astimezone().replace(second=0, microsecond=0) + timedelta(days=1)
    await page.get_by_label("Without words").check()
    await page.locator("#advanced > summary").click()
    await page.get_by_label("Not before").fill(later.strftime("%Y-%m-%dT%H:%M"))
    await visitor.ask_for("[Intro]\nla la la\n[Outro]", 5, "Tomorrow")
    row = visitor.song("Tomorrow")
    await expect(row.locator(".state")).to_have_text("Waiting")
    await expect(row.locator(".facts")).to_contain_text("not before")
    await expect(page.get_by_label("Not before")).to_have_value("")  # the next song is not for later
    songs = (await system.gateway.http.get("/generate")).json()["songs"]
    assert datetime.fromisoformat(songs[0]["not_before"]) == later
    assert (songs[0]["request"]["lyrics"], songs[0]["request"]["instrumental"]) == ("[Intro]\n[Outro]", True)
    await visitor.require_accessible()
    await page.get_by_label("Not before").fill(later.strftime("2999-%m-%dT%H:%M"))
    await page.get_by_role("button", name="Make the song").click()
    await expect(page.locator("#not_before-error")).to_contain_text("at most 6 days ahead")
    await page.reload()
    await expect(page.get_by_label("Without words")).to_be_checked()
    await expect(page.get_by_label("Lyrics", exact=True)).to_have_value("[Intro]\nla la la\n[Outro]")
    await row.get_by_role("button", name="Use again").click()
    tag = page.get_by_role("button", name="Remove instrumental")  # which the service has added
    await expect(tag).to_be_visible()
    await page.get_by_label("Without words").uncheck()
    await expect(tag).to_have_count(0)
    (refused,) = visitor.complaints
    assert "422" in refused


async def test_a_reload_and_a_second_tab_show_the_same_song(system: RunningSystem) -> None:
    """A song continues while no page follows it, and another tab of the same browser shows it by itself."""
    context = await system.browser.new_context()
    first, second = await system.visit(context), await system.visit(context)
    await first.ask_for(LYRICS, 20, "Shared")
    await expect(second.song("Shared")).to_be_visible()
    await first.page.reload()
    await expect(first.song("Shared").get_by_role("progressbar")).to_be_visible()
    await second.song("Shared").get_by_role("button", name="Cancel").click()
    await expect(first.song("Shared").locator(".state")).to_have_text("Cancelled")
    assert first.complaints == second.complaints == []


async def test_what_was_typed_survives_a_reload(system: RunningSystem) -> None:
    visitor = await system.visit(await system.browser.new_context())
    page = visitor.page
    await page.locator("#lyrics").fill("[Verse]\nnot yet done")
    await page.locator("#tag-entry").fill("waltz")
    await page.locator("#tag-entry").press("Enter")
    await page.reload()
    await expect(page.locator("#lyrics")).to_have_value("[Verse]\nnot yet done")
    await expect(page.get_by_role("button", name="Remove waltz")).to_be_visible()
    assert visitor.complaints == []


async def test_the_page_survives_a_restart_of_the_server(system: RunningSystem) -> None:
    """While the gateway is away the page says so; when it is back the page continues and shows the song's end."""
    visitor = await system.visit()
    await visitor.ask_for(LYRICS, 30, "Patient")
    await expect(visitor.song("Patient").locator(".state")).to_have_text("Writing")
    await system.gateway.stop()
    banner = visitor.page.locator("#banner")
    await expect(banner).to_contain_text("The server does not answer")
    await visitor.page.get_by_role("button", name="Make the song").click()
    await expect(visitor.page.locator("#form-error")).to_contain_text("The server does not answer")
    await system.gateway.start()
    await expect(banner).to_be_hidden()
    await finished(visitor, "Patient")


async def test_bad_input_is_reported_beside_its_field(system: RunningSystem) -> None:
    """A refusal is shown beside the field that caused it, and the form keeps its values."""
    visitor = await system.visit()
    page = visitor.page
    await visitor.ask_for("la " * 20_001)
    await expect(page.locator("#lyrics-error")).to_be_visible()
    await expect(page.get_by_label("Lyrics", exact=True)).to_be_focused()
    await page.get_by_label("Lyrics", exact=True).fill(LYRICS)
    await page.get_by_text("More settings").click()
    await page.get_by_label("Temperature").fill("99")
    await page.get_by_role("button", name="Make the song").click()
    await expect(page.locator("#temperature-error")).to_be_visible()
    await expect(page.locator("#lyrics-error")).to_be_hidden()
    await expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    await expect(page.get_by_label("Lyrics", exact=True)).to_have_value(LYRICS)


async def test_sections_and_tags_by_keyboard(system: RunningSystem) -> None:
    """Sections are inserted at the cursor; tags are added and removed without a mouse."""
    visitor = await system.visit()
    page = visitor.page
    lyrics = page.get_by_label("Lyrics", exact=True)
    await lyrics.fill("one")
    await page.get_by_role("button", name="Insert [Bridge]").press("Enter")
    await expect(lyrics).to_be_focused()
    await page.keyboard.type("two")
    await expect(lyrics).to_have_value("one\n[Bridge]\ntwo")
    chosen = page.get_by_role("list", name="Chosen tags")
    await page.get_by_label("Style", exact=True).press("Backspace")
    await expect(chosen.get_by_role("button")).to_have_text(["pop ✕", "piano ✕"])
    await page.get_by_label("Style", exact=True).fill("Kazoo, pop")
    await page.keyboard.press("Enter")
    await expect(chosen.get_by_role("button")).to_have_text(["pop ✕", "piano ✕", "kazoo ✕"])
    suggestion = page.get_by_role("button", name="jazz", exact=True)
    await suggestion.press("Space")
    await expect(suggestion).to_have_attribute("aria-pressed", "true")


async def test_the_device_is_shown(system: RunningSystem) -> None:
    """The page shows memory, models, turn, phase and queue while a song is made, and names a missing worker."""
    visitor = await system.visit()
    await expect(visitor.page.locator("#system-word")).to_have_text("Ready")
    await visitor.ask_for(LYRICS, 60, "Busy")
    await visitor.page.locator("#system summary").click()
    panel = visitor.page.locator("#system-panel")
    await expect(panel).to_contain_text("Held by the tokenizer, phase 1: songs are written.")
    await expect(panel).to_contain_text("heartmula and the cache of 1 song")
    await expect(panel).to_contain_text("Queue for tokens: 1 song.")
    await expect(panel).to_contain_text("Both models stay on the device: language model 40 MiB (float32)")
    await expect(panel).to_contain_text("are left for songs")
    await expect(panel.get_by_role("meter")).to_be_visible()
    await system.gateway.heartbeat("codec", "cuda", plan=WORKING.plan, notes=["no C compiler was found"])
    await expect(panel).to_contain_text(
        "codec 2.9 GiB (bfloat16) and 0.9 GiB to work, CUDA 1.0 GiB, kept back 0.5 GiB."
    )
    await expect(panel).to_contain_text("are left for songs: 12 of one minute, 7 of two or 5 of three.")
    await expect(panel).to_contain_text("codec: No C compiler was found.")
    for process in system.flow.processes:
        process.kill()
    await expect(visitor.page.locator("#system")).to_have_attribute("data-state", "degraded")
    # Of which device it is said first depends on whose heartbeat ends first.
    await expect(visitor.page.locator("#system-word")).to_contain_text(re.compile(r"No (\w+ )?worker (is running|on )"))


async def test_an_accessibility_checker_finds_no_fault(system: RunningSystem) -> None:
    """Every control has a name; axe finds no fault in light and dark mode and on a phone, with songs and the player."""
    visitor = await system.visit()
    page = visitor.page
    await visitor.ask_for(LYRICS, 5, "Done")
    await finished(visitor, "Done")
    await visitor.song("Done").get_by_role("button", name="Play").click()
    await visitor.ask_for(LYRICS, 70, "Going")
    await expect(visitor.song("Going").get_by_role("progressbar")).to_be_visible()
    await page.locator("#system summary").click()
    await page.get_by_text("More settings").click()
    await visitor.require_accessible()


async def test_the_page_asks_for_a_key_and_keeps_it(browser: Browser, settings: Settings, tmp_path: Path) -> None:
    """Where a key is needed the page asks for it, reports a wrong one, and keeps a right one over a reload."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[tenant]]\nname = "alice"\nkeys = ["{digest_of_key("key-of-alice")}"]\n')
    async with running_gateway(settings, tmp_path, api_keys=keys) as gateway:
        page = (await open_page(browser, gateway.base, enter=False)).page
        await page.goto(gateway.base)
        await expect(page.get_by_role("heading", name="A new song")).to_be_hidden()
        await page.get_by_label("API key").fill("guessed")
        await page.get_by_role("button", name="Enter").click()
        await expect(page.locator("#key-error")).to_have_text("This key is not known.")
        await page.get_by_label("API key").fill("key-of-alice")
        await page.get_by_role("button", name="Enter").click()
        await expect(page.locator("#empty")).to_contain_text("No songs yet")
        await page.get_by_role("button", name="Make the song").click()
        await expect(page.locator("#songs > li")).to_have_count(1)
        await page.reload()
        await expect(page.locator("#songs > li")).to_have_count(1)
        await expect(page.get_by_label("API key")).to_be_hidden()
