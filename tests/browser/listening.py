"""A listener of songs that grow: the parts of the player, and songs that a test makes grow, with their peaks."""

from dataclasses import dataclass
from typing import Any

from playwright.async_api import Locator, expect

from shared.audio.flac import BLOCK
from shared.audio.peaks import CONTENT_TYPE, peaks_of
from shared.schema.job import AudioPart
from shared.storage.keys import part_key, part_peaks_key
from tests.browser.visitor import Visitor
from tests.integration.gateway_fixtures import RunningGateway
from tests.integration.growing_song import GrowingSong

expect.set_options(timeout=20_000)  # a busy machine is not a fault
SECONDS = 47  # blocks, 4.01 s
# Everything that may interrupt a listener, and how the position moves.
WATCH = """() => {
  const audio = document.querySelector("#audio");
  window.interruptions = [];
  for (const name of ["pause", "ended", "emptied", "error"])
    audio.addEventListener(name, () => interruptions.push(name));
  let last = 0;
  audio.addEventListener("timeupdate", () => {
    if (audio.currentTime < last) interruptions.push(`back to ${audio.currentTime}`);
    last = audio.currentTime;
  });
}"""


class LiveSong(GrowingSong):
    """A song that grows with its peaks."""

    async def window(self, blocks: int = SECONDS) -> AudioPart:
        """Decode a window, as `GrowingSong.window`; a codec worker stores the peaks before the record too."""
        decode = (await self.job()).decode
        key = part_key(self.job_id, self.fence, len(decode.parts) if decode else 0)
        peaks = peaks_of([self.pcm, self._more(blocks * BLOCK)], self.rate)
        await self.store.put(part_peaks_key(key), peaks, CONTENT_TYPE)
        return await super().window(blocks)


@dataclass
class Listening:
    """A visitor of a gateway, and the parts of the player."""

    gateway: RunningGateway
    visitor: Visitor

    def __post_init__(self) -> None:
        page = self.visitor.page
        self.page, self.at, self.remark = page, page.locator("#at"), page.locator("#remark")
        self.player = page.get_by_role("region", name="Player")
        self.position = page.get_by_role("slider", name="Position")

    async def song(self, title: str, **values: Any) -> LiveSong:
        """Submit a song of at most 20 seconds."""
        job_id = await self.gateway.submit(**{"title": title, "max_duration_ms": 20_000} | values)
        return LiveSong(self.gateway.js, self.gateway.store, job_id)

    def button(self, name: str, song: str) -> Locator:
        """A button in the row of a song."""
        return self.visitor.song(song).get_by_role("button", name=f"{name}: {song}")

    async def play(self, song: str) -> None:
        """Play a song once that is offered; returns when it sounds."""
        await self.button("Play", song).click()
        await self.until("audio.currentTime > 0.2")
        await self.page.evaluate(WATCH)

    async def until(self, condition: str) -> None:
        """Wait until a condition about the `audio` element holds."""
        await self.page.wait_for_function(
            f"() => {{ const audio = document.querySelector('#audio'); return {condition}; }}", timeout=60_000
        )

    async def source(self) -> str:
        """What the player plays: the last part of the address."""
        return str(await self.page.locator("#audio").get_attribute("src")).rpartition("/")[2]

    async def interruptions(self) -> list[str]:
        """What has interrupted the listener."""
        found: list[str] = await self.page.evaluate("window.interruptions")
        return found
