"""Recordings on the page: uploading one, going on from it, and what is said on the way."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from playwright.async_api import Browser, expect

from shared.schema.job import Parent
from shared.settings import Settings
from shared.storage.keys import prefixes
from shared.storage.token_file import TokenMeta, pack
from tests.browser.conftest import RunningSystem
from tests.browser.test_versions import field, order
from tests.browser.visitor import open_page
from tests.integration.gateway_fixtures import RunningGateway, running_gateway
from tests.unit.recordings import file_of, music

LYRICS = "[Verse]\nThe river takes the evening home"
WAV = file_of("wav", music(10, 8000), 8000)
# Drops a file of so many bytes on the form, as a hand does that comes from outside of it.
DROP = """([bytes, name]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name));
  for (const type of ["dragenter", "dragover", "drop"])
    document.querySelector("#lyrics").dispatchEvent(
      new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""
expect.set_options(timeout=20_000)  # a busy machine is not a fault


async def test_a_song_goes_on_from_a_recording_that_is_uploaded_on_the_page(
    system: RunningSystem, tmp_path: Path
) -> None:
    visitor = await system.visit()
    page, wave = visitor.page, visitor.page.get_by_role("slider", name="Position")
    (tmp_path / "Humming.wav").write_bytes(WAV)
    async with page.expect_file_chooser() as choosing:
        await page.get_by_role("button", name="Use a recording").press("Enter")
    await (await choosing.value).set_files(tmp_path / "Humming.wav")

    await expect(page.locator("#origin-name")).to_have_text("Begins as Humming")
    await expect(field(visitor, "kept up to")).to_have_value("0:10")
    await expect(field(visitor, "kept up to")).to_be_focused()
    await expect(visitor.song("Humming").locator(".state")).to_have_text("Ready")
    await expect(visitor.song("Humming").locator(".facts")).to_have_text("Recording · 0:10 · stereo")
    await expect(page.locator("#fit")).to_contain_text("fit.")
    await visitor.song("Humming").get_by_role("button", name="Play: Humming").press("Enter")
    await expect(page.locator("#at")).to_have_text("0:01")
    await page.get_by_role("region", name="Player").get_by_role("button", name="Pause").press("Enter")
    await wave.press("Home")
    await wave.press("ArrowRight")
    await wave.press("Enter")
    await expect(field(visitor, "kept up to")).to_have_value("0:04.96")  # whole frames of 80 ms
    await visitor.ask_for(LYRICS, 20, "The River")

    row = visitor.song("The River")
    await expect(row.locator(".origin")).to_have_text("Goes on from Humming at 0:04.96")
    await expect(row.locator(".state")).to_have_text("Finished")
    assert await order(visitor) == [("Humming", "1"), ("The River", "2")]
    (recording,) = (await system.gateway.http.get("/recordings")).json()["recordings"]
    (song,) = (await system.gateway.http.get("/generate")).json()["songs"]
    assert (await system.gateway.job(song["job_id"])).parent == Parent(
        recording_id=recording["recording_id"], frames=62, least_frames=187
    )
    await row.get_by_role("button", name="Humming", exact=True).click()
    await expect(visitor.song("Humming").get_by_role("heading")).to_be_focused()
    await visitor.require_accessible()
    # Chromium says so when what fits is asked for while the recording is still being encoded.
    assert [words for words in visitor.complaints if "409 (Conflict)" not in words] == []

    await visitor.song("Humming").get_by_role("button", name="Delete").click()
    await visitor.song("Humming").get_by_role("button", name="Delete").click()
    gone = f"Goes on from recording {recording['recording_id']}, which is gone, at 0:04.96"
    await expect(row.locator(".origin")).to_have_text(gone)
    assert (await system.gateway.http.get("/recordings")).json()["recordings"] == []


@pytest.fixture
async def gateway(settings: Settings, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(settings, tmp_path) as found:
        yield found


async def test_a_dropped_file_is_followed_and_errors_are_put_into_words(
    browser: Browser, gateway: RunningGateway
) -> None:
    """No worker is there: the test does its work."""
    visitor = await open_page(browser, gateway.base)
    page, row = visitor.page, visitor.song("Humming")
    await page.evaluate(DROP, [list(WAV), "Humming.wav"])
    await expect(row.locator(".state")).to_have_text("Waiting")
    await expect(page.locator("#fit")).to_contain_text("is still being encoded")
    (recording,) = (await gateway.http.get("/recordings")).json()["recordings"]
    name = recording["recording_id"]
    await gateway.move_to(name, "generating", saved_frames=50)
    await expect(row.locator(".facts")).to_have_text("Recording · 0:10 · stereo · 40 %")
    await expect(row.get_by_role("progressbar")).to_have_js_property("value", 40)
    await expect(row.get_by_role("button", name="Go on: Humming")).to_be_hidden()
    await gateway.move_to(name, "failed", error="the disk is full")
    await expect(row.locator(".error")).to_have_text("The disk is full. Delete it, or upload it again.")

    error = page.locator("#recording-error")  # beside the control
    await page.evaluate(DROP, [list(b"[Verse] la la la"), "lyrics.mp3"])
    await expect(error).to_have_text(re.compile("FLAC"))
    await expect(page.locator("#sending")).to_be_hidden()
    await page.evaluate(DROP, [list(file_of("wav", music(0.5, 8000), 8000)), "short.wav"])
    await expect(error).to_have_text(re.compile("It plays for 0.50 s"))
    await page.evaluate(DROP, [list(WAV), "Humming.wav"])
    await expect(error).to_be_hidden()
    await expect(row.locator(".state")).to_have_text("Waiting")
    await expect(row.locator(".error")).to_be_hidden()
    assert len((await gateway.http.get("/recordings")).json()["recordings"]) == 1
    await page.locator("#fit", has_text="is still being encoded").wait_for()
    folder, codes = prefixes(await gateway.job(name))[0], np.zeros((8, 125), np.int16)
    key = f"{folder}tokens.safetensors"
    await gateway.store.put(key, pack(codes, TokenMeta(job_id=name, model="m", seed=0)))
    await gateway.move_to(name, "generating", "completed", tokens_key=key, frames=125)
    await expect(row.locator(".state")).to_have_text("Ready")
    await expect(page.locator("#fit")).to_contain_text("fit.")  # measured again
