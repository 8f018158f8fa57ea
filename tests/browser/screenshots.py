"""``make screenshots``: the page's main states, on a real stack with the trivial engine, into docs/images."""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.async_api import Browser

from deploy.local.servers.embedded import ROLES, S3Server, free_port, nats_server, s3_server
from shared.settings import Settings
from tests.browser.onlooker import Onlooker, onlooker, open_browser
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import House, open_house

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


async def keep(person: Onlooker, name: str) -> None:
    """Save what is seen."""
    await person.page.mouse.move(0, 0)
    await asyncio.sleep(0.6)  # let transitions come to rest
    await person.page.screenshot(path=IMAGES / f"{name}.png")
    print(f"docs/images/{name}.png", f"{(IMAGES / f'{name}.png').stat().st_size / 1000:.0f} KB", flush=True)


async def scenes(browser: Browser, house: House, flow: Flow) -> None:
    """From an empty house to a busy one, and its gateway gone."""
    person = await onlooker(browser, house.base, **DESKTOP)
    await person.page.locator("#house[data-state=degraded]").wait_for()
    await keep(person, "no-worker")

    for role in ("tokenizer", "codec"):
        await flow.worker(role)
    for song in ENDED:
        await flow.ended(await house.submit(lyrics=RIVER, **song))
    for song in WAITING:
        await house.submit(lyrics=RIVER, **song)

    failed = await house.submit(title="Thunder over Lisbon", tags="rock,drums", lyrics=RIVER)
    reason = "the device ran out of memory. A shorter song may fit."
    await house.become(failed, "generating", "failed", error=reason)

    row = person.song("Night Train to Bergen")
    await row.get_by_role("button", name="Play").click()
    await person.page.get_by_label("Lyrics", exact=True).fill(RIVER)
    await person.page.get_by_label("Lyrics", exact=True).blur()
    await person.page.locator("progress:visible").first.wait_for()
    await person.page.locator("#at", has_text="0:06").wait_for()
    await keep(person, "desktop")

    await person.page.emulate_media(color_scheme="dark")
    await person.page.locator("#house summary").click()
    await keep(person, "device")

    phone = await onlooker(browser, house.base, **PHONE)
    await phone.page.get_by_role("heading", name="Songs").scroll_into_view_if_needed()
    await phone.song("Paper Lanterns").get_by_role("button", name="Play").click()
    await phone.page.locator("#library-title").evaluate("it => it.scrollIntoView()")
    await keep(phone, "phone")

    await house.stop()
    await person.page.locator("#banner:not([hidden])").wait_for()
    await person.page.emulate_media(color_scheme="light")
    await person.page.locator("#house summary").click()
    await keep(person, "offline")


async def main() -> int:
    """Open everything, and take the pictures."""
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
                batch=2,
            )
            async with open_flow(settings) as flow, open_house(settings, folder) as house:
                await scenes(browser, house, flow)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
