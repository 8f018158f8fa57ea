"""The player with songs that are being made, in a real browser, on a real gateway; the test makes the songs grow."""

import asyncio
import re
from collections.abc import AsyncIterator
from signal import SIGKILL

import pytest
from playwright.async_api import Browser, Route, expect

from deploy.local.servers.embedded import NatsServer, S3Server
from shared.jobs.events import end_event
from tests.browser.listening import SECONDS, Listening
from tests.browser.visitor import open_page, until
from tests.integration.gateway_fixtures import RunningGateway, fresh_settings, running_gateway

STREAM = "**/generate/*/stream*"
# For each tenth of the waveform: how much of it is painted, in per cent.
PAINTED = """canvas => {
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const tenths = Array(10).fill(0);
  for (let n = 3; n < data.length; n += 4)
    if (data[n]) tenths[Math.min(9, Math.floor((((n - 3) / 4) % width) / width * 10))] += 1000 / (width * height);
  return tenths;
}"""


@pytest.fixture(scope="module")
async def gateway(
    nats_server: NatsServer, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("live")
    async with running_gateway(await fresh_settings(nats_server, s3_server, folder), folder) as gateway:
        yield gateway


@pytest.fixture
async def listening(browser: Browser, gateway: RunningGateway) -> AsyncIterator[Listening]:
    """A visitor of a gateway without workers, and without songs."""
    if gateway.process.returncode is not None:
        await gateway.start()
    for song in (await gateway.http.get("/generate")).json()["songs"]:
        for query in ("", "?forget=true"):
            await gateway.http.delete(f"/generate/{song['job_id']}{query}")
    visitor = await open_page(browser, gateway.base)
    yield Listening(gateway, visitor)
    await visitor.page.close()


async def test_a_song_is_played_while_it_grows_and_nothing_interrupts_it(listening: Listening) -> None:
    """Play is offered with the first audio. The page shows how much can be heard, and at the end all of it."""
    song = await listening.song("Growing")
    row = listening.visitor.song("Growing")
    await expect(row.locator(".state")).to_have_text("Waiting")
    await expect(row.get_by_role("button", name="Play when ready: Growing")).to_be_visible()
    await song.window()
    await expect(row.locator(".facts")).to_contain_text("0:04 can be heard")
    await expect(row.locator("summary")).to_be_hidden()  # the downloads
    await listening.play("Growing")
    await expect(listening.page.locator(".clock")).to_have_text(re.compile(r"^0:0\d / 0:04 of up to 0:20$"))
    spoken = re.compile(r"^0:0\d of 0:04 that can be heard so far, up to 0:20 when the song is complete$")
    await expect(listening.position).to_have_attribute("aria-valuetext", spoken)
    await expect(listening.position).to_have_attribute("aria-valuemax", "20")
    await song.window()
    await expect(listening.page.locator("#length")).to_have_text("0:08")
    await song.finish(48_000)
    await expect(row.locator(".facts")).to_contain_text("0:09 · FLAC")
    await expect(row.locator("summary")).to_be_visible()
    await expect(listening.page.locator("#whole")).to_have_text("")
    await expect(listening.position).to_have_attribute("aria-valuemax", "9")
    await expect(listening.player.get_by_role("button", name="Pause")).to_be_visible()
    assert await listening.interruptions() == []
    assert await listening.source() == "stream"
    await listening.until("audio.ended")
    await expect(listening.at).to_have_text("0:09")
    await expect(listening.player.get_by_role("button", name="Play")).to_be_visible()
    assert await listening.interruptions() == ["pause", "ended"]
    await listening.button("Play", "Growing").click()
    await expect(listening.at).to_have_text("0:01")
    assert await listening.source() == "result"
    assert listening.visitor.complaints == []


async def test_the_waveform_grows_and_shows_what_is_still_to_come(listening: Listening) -> None:
    """What can be heard is drawn from its peaks over its share of the width; the rest is all but empty."""
    song = await listening.song("Growing")
    wave = listening.page.locator("#wave")

    async def drawn(tenths: int) -> None:
        async def found() -> bool:
            painted = await wave.evaluate(PAINTED)
            there, to_come = painted[:tenths], painted[tenths + 1 :]
            return all(share > 20 for share in there) and all(0 < share < 3 for share in to_come)  # a flat bar has 5

        await until(found)

    await song.window()
    await listening.play("Growing")
    await drawn(2)
    await song.window()
    await drawn(4)
    await song.finish(48_000)
    await drawn(10)


async def test_a_listener_waits_for_more_of_the_song(listening: Listening) -> None:
    """At the end of what there is the player says what it waits for, and goes on by itself."""
    song = await listening.song("Slow")
    await song.window(24)
    await listening.play("Slow")
    await expect(listening.remark).to_have_text("Waiting for more of the song…")
    await expect(listening.player.get_by_role("button", name="Pause")).to_be_visible()
    await song.window()
    await listening.until("audio.currentTime > 3")
    await expect(listening.remark).to_have_text("")
    assert await listening.interruptions() == []


async def test_a_song_that_cannot_be_heard_yet_begins_by_itself(listening: Listening) -> None:
    """A listener who waits counts as one: where models take turns, the first window is decoded for listeners alone."""
    song = await listening.song("Early")
    await listening.button("Play when ready", "Early").click()
    await expect(listening.remark).to_have_text("Waiting for the first sound of the song…")
    await expect(listening.page.locator(".clock")).to_have_text("0:00 / 0:00 of up to 0:20")
    await song.window()
    await listening.until("audio.currentTime > 0.5")
    await expect(listening.remark).to_have_text("")


async def test_an_accessibility_checker_finds_no_fault_in_a_song_that_grows(listening: Listening) -> None:
    """Checked while the player waits for more of a song, in light and dark mode and on a phone."""
    song = await listening.song("Slow")
    await song.window(24)
    await listening.play("Slow")
    await expect(listening.remark).to_have_text("Waiting for more of the song…")
    await listening.visitor.require_accessible()


async def test_seeking_stays_within_what_can_be_heard(listening: Listening) -> None:
    """Two seconds before the end of what there is, so that there is something to hear."""
    song = await listening.song("Growing")
    await song.window(2 * SECONDS)
    await listening.play("Growing")
    await listening.player.get_by_role("button", name="Pause").click()
    box = await listening.position.bounding_box()
    assert box is not None
    await listening.position.click(position={"x": box["width"] * 0.15, "y": 10})
    await expect(listening.at).to_have_text("0:03")
    await listening.position.click(position={"x": box["width"] * 0.9, "y": 10})
    await expect(listening.at).to_have_text("0:06")
    await listening.position.press("Home")
    await expect(listening.at).to_have_text("0:00")
    await song.window()
    await expect(listening.page.locator("#length")).to_have_text("0:12")
    await listening.position.press("End")
    await expect(listening.at).to_have_text("0:10")
    await listening.player.get_by_role("button", name="Play").click()
    await song.window()
    await listening.until("audio.currentTime > 11")
    assert await listening.source() == "stream"


async def test_a_failed_song_plays_to_the_end_of_what_there_is(listening: Listening) -> None:
    """Then the player says so and goes on with the next song of the list."""
    earlier = await listening.song("Earlier")
    await earlier.finish(20 * 48_000)
    song = await listening.song("Unlucky")
    await song.window()
    await listening.play("Unlucky")
    await song.move("failed", error="the codec broke")
    await listening.gateway.publish(end_event(await song.job()))
    ended = "“Unlucky” failed: there is no more of it."
    await expect(listening.remark).to_have_text(ended)
    await expect(listening.page.locator("#playing")).to_have_text("Unlucky")
    assert await listening.interruptions() == []
    await expect(listening.page.locator("#playing")).to_have_text("Earlier")
    await expect(listening.remark).to_have_text(ended)
    await listening.until("audio.currentTime > 0.2")
    await expect(listening.button("Pause", "Earlier")).to_be_visible()
    await expect(listening.button("Play", "Unlucky")).to_be_hidden()


async def test_a_lost_connection_is_taken_up_again_where_the_song_sounded(listening: Listening) -> None:
    """The gateway dies while the song plays: the player says so, and goes on when there is a gateway again."""
    song = await listening.song("Enduring")
    await song.window()
    await listening.play("Enduring")
    await listening.gateway.stop(SIGKILL)
    await song.window()
    await expect(listening.remark).to_have_text("The connection is lost. Trying again…")
    await expect(listening.player.get_by_role("button", name="Pause")).to_be_visible()
    await listening.gateway.start()
    await listening.until("audio.currentTime > 5")
    await expect(listening.remark).to_have_text("")
    await song.finish(48_000)
    await listening.until("audio.ended")
    await expect(listening.at).to_have_text("0:09")
    assert [what for what in await listening.interruptions() if "back" in what] == []


async def test_a_pause_is_kept_while_the_connection_is_lost(listening: Listening) -> None:
    song = await listening.song("Paused")
    await song.window(24)
    await listening.play("Paused")
    await listening.gateway.stop(SIGKILL)
    await expect(listening.remark).to_have_text("The connection is lost. Trying again…")
    await listening.player.get_by_role("button", name="Pause").click()
    await expect(listening.remark).to_have_text("")
    await listening.gateway.start()
    await song.window()
    await expect(listening.page.locator("#length")).to_have_text("0:06")
    assert await listening.page.locator("#audio").evaluate("it => it.paused")
    await listening.player.get_by_role("button", name="Play").click()
    await listening.until("audio.currentTime > 3")


async def test_a_stream_that_ends_too_early_is_taken_up_again(listening: Listening) -> None:
    """A proxy may end a stream, and a browser give up. The song goes on in a stream that begins where it sounded."""
    song = await listening.song("Short")
    await song.window()
    await song.window()
    sources: list[str] = []

    async def answer(route: Route) -> None:
        sources.append(route.request.url.rpartition("/")[2])
        if len(sources) == 1:
            await route.fulfill(body=song.stream[: len(song.stream) // 4], content_type="audio/flac")
        elif len(sources) <= 3:
            await route.abort()
        else:
            await route.continue_()

    await listening.page.route(STREAM, answer)
    await listening.play("Short")
    await listening.until("audio.currentTime > 3")
    assert [source.partition("=")[0] for source in sources] == ["stream"] + ["stream?from"] * 3
    assert 1 < float(sources[-1].partition("=")[2]) < 3
    assert sources[1:] == [sources[-1]] * 3  # each attempt at the same place
    await listening.position.press("Home")  # which is before the beginning of this stream
    await expect(listening.at).to_have_text("0:00")
    await listening.until("audio.currentTime > 0.5 && audio.currentTime < 3")
    assert await listening.source() == "stream"


async def test_a_slow_answer_after_a_stream_that_ended_too_early_is_waited_for(listening: Listening) -> None:
    """The player looks at what sounds twice a second, and the position has moved since it looked last."""
    song = await listening.song("Short")
    await song.window()
    await song.window()
    streams: list[str] = []

    async def answer(route: Route) -> None:
        streams.append(route.request.url)
        if len(streams) == 1:
            await route.fulfill(body=song.stream[: len(song.stream) // 4], content_type="audio/flac")
        else:
            await route.continue_()

    async def answer_late(route: Route) -> None:
        await asyncio.sleep(1.5)
        await route.continue_()

    await listening.page.route(STREAM, answer)
    await listening.page.route("**/status", answer_late)
    await listening.play("Short")
    await listening.until("audio.currentTime > 3")
