"""``make screenshots``: the page's main states, on a real stack with the trivial engine, into docs/images."""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, FilePayload

from deploy.local.servers.embedded import ROLES, S3Server, free_port, nats_server, s3_server
from shared.settings import Settings
from tests.browser.visitor import Visitor, open_browser, open_page
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import RunningGateway, running_gateway
from tests.unit.recordings import file_of, music

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 1000}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}
RIVER = """[Intro]
[Verse]
The river takes the evening home
and leaves the lights behind
[Chorus]
Stay, stay, until the water sleeps
[Verse]
A boat goes by without a sound
[Outro]"""
ENDED: list[dict[str, Any]] = [
    {"title": "Paper Lanterns", "tags": "folk,guitar,female vocals", "max_duration_ms": 25_000},
    {"title": "Night Train to Bergen", "tags": "electronic,synthesizer,fast", "max_duration_ms": 40_000},
]
WAITING: list[dict[str, Any]] = [
    {"title": "Slow Morning", "tags": "jazz,piano,calm", "max_duration_ms": 30_000},
    {"title": "The River", "tags": "pop,strings,dreamy", "max_duration_ms": 60_000, "variants": 2},
]


async def keep(visitor: Visitor, name: str) -> None:
    """Save a picture of the page."""
    await visitor.page.mouse.move(0, 0)
    await asyncio.sleep(0.6)  # let transitions come to rest
    await visitor.page.screenshot(path=IMAGES / f"{name}.png")
    print(f"docs/images/{name}.png", f"{(IMAGES / f'{name}.png').stat().st_size / 1000:.0f} KB", flush=True)


async def scenes(browser: Browser, gateway: RunningGateway, flow: Flow) -> None:
    """Take pictures of an empty system, of a busy one, and of the page without its gateway."""
    visitor = await open_page(browser, gateway.base, **DESKTOP)
    await visitor.page.locator("#system[data-state=degraded]").wait_for()
    await keep(visitor, "no-worker")

    for role in ("tokenizer", "codec"):
        await flow.worker(role)
    for song in ENDED:
        await flow.ended(await gateway.submit(lyrics=RIVER, **song))
    for song in WAITING:
        await gateway.submit(lyrics=RIVER, **song)

    failed = await gateway.submit(title="Thunder over Lisbon", tags="rock,drums", lyrics=RIVER)
    reason = "the device ran out of memory. A shorter song may fit."
    await gateway.move_to(failed, "generating", "failed", error=reason)

    row = visitor.song("Night Train to Bergen")
    await row.get_by_role("button", name="Play").click()
    await visitor.page.get_by_label("Lyrics", exact=True).fill(RIVER)
    await visitor.page.get_by_label("Lyrics", exact=True).blur()
    await visitor.page.locator("progress:visible").first.wait_for()
    await visitor.page.locator("#at", has_text="0:06").wait_for()
    await keep(visitor, "desktop")

    await visitor.page.emulate_media(color_scheme="dark")
    await visitor.page.locator("#system summary").click()
    await keep(visitor, "device")

    phone = await open_page(browser, gateway.base, **PHONE)
    await phone.page.get_by_role("heading", name="Songs").scroll_into_view_if_needed()
    await phone.song("Paper Lanterns").get_by_role("button", name="Play").click()
    await phone.page.locator("#library-title").evaluate("it => it.scrollIntoView()")
    await keep(phone, "phone")

    await visitor.page.emulate_media(color_scheme="light")
    await visitor.page.locator("#system summary").click()
    await gateway.submit(title="First Light", tags="ambient,strings,slow", lyrics=RIVER, max_duration_ms=60_000)
    await visitor.song("First Light").get_by_role("button", name="Play when ready").click()
    await visitor.page.locator("#at", has_text="0:06").wait_for(timeout=120_000)
    await keep(visitor, "live")

    await versions(await open_page(browser, gateway.base, **DESKTOP), gateway, flow)
    await recordings(await open_page(browser, gateway.base, **PHONE), gateway, flow)

    await gateway.stop()
    await visitor.page.locator("#banner:not([hidden])").wait_for()
    await keep(visitor, "offline")


async def versions(visitor: Visitor, gateway: RunningGateway, flow: Flow) -> None:
    """Take a picture of a song with its versions, while one more is asked for."""
    first = await gateway.submit(lyrics=RIVER, title="Harbour Lights", tags="jazz,piano", max_duration_ms=20_000)
    for title, parent_at in (("Harbour Lights, with strings", 8_000), ("Harbour Lights, longer", 20_000)):
        await flow.ended(first)
        origin = {"job_id": first, "at_ms": parent_at}
        asked = {"lyrics": RIVER, "tags": "jazz,strings", "title": title, "max_duration_ms": 35_000}
        last = await gateway.submit(**asked, continue_from=origin)
    await flow.ended(last)
    await visitor.song(title).get_by_role("button", name="Play from").click()
    await visitor.page.locator("#at", has_text="0:26").wait_for()
    await visitor.page.get_by_role("button", name="Go on from here").click()
    await visitor.page.locator("#fit:not(:empty)").wait_for()
    await keep(visitor, "versions")


async def recordings(visitor: Visitor, gateway: RunningGateway, flow: Flow) -> None:
    """Take a picture of a recording that was uploaded on a phone, with a song that goes on from it."""
    wave = file_of("wav", music(24, 8000), 8000)
    upload = FilePayload(name="Humming in the kitchen.wav", mimeType="audio/wav", buffer=wave)
    await visitor.page.set_input_files("#file", upload)
    row = visitor.song("Humming in the kitchen")
    await row.locator(".state", has_text="Ready").wait_for()
    (recording,) = (await gateway.http.get("/recordings")).json()["recordings"]
    origin = {"recording_id": recording["recording_id"], "at_ms": 12_000}
    asked = {"lyrics": RIVER, "title": "Kitchen Song", "tags": "folk,guitar", "max_duration_ms": 40_000}
    await flow.ended(await gateway.submit(**asked, continue_from=origin))
    await visitor.song("Kitchen Song").locator(".state", has_text="Finished").wait_for()
    await row.get_by_role("button", name="Play").click()
    await visitor.page.locator("#at", has_text="0:06").wait_for()
    await visitor.page.locator("#library-title").evaluate("it => it.scrollIntoView()")
    await keep(visitor, "recordings")


async def main() -> int:
    """Start the system and take the pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            nats_server(folder, free_port(), dict.fromkeys(ROLES, "secret")) as broker,
            s3_server(folder, free_port(S3Server.ports), "picture", "secretsecret") as store,
            open_browser() as browser,
        ):
            settings = Settings(
                nats_url=broker.url,
                s3_endpoint=store.url,
                s3_access_key="picture",
                s3_secret_key="secretsecret",
                data_dir=folder,
                engine="trivial",
                trivial_step_ms=25,
                trivial_window=(50, 25),
                batch=2,
            )
            async with open_flow(settings) as flow, running_gateway(settings, folder) as gateway:
                await scenes(browser, gateway, flow)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
