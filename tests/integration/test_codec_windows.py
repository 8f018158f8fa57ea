"""Songs that the codec decodes window by window while they are made: stopped, killed, replaced, fed twice."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared.audio.flac import stream_header
from shared.audio.tags import SongTags
from shared.device.lease import Lease
from shared.jobs.continuing import kept_tokens
from shared.jobs.store import change
from shared.model.codec_windows import CodecWindows
from shared.nats.streams import purge_job
from shared.nats.subjects import DEC, TENANT, cancel_subject, decode_subject, listen_subject
from shared.schema.event import Audio, Progress, Stage
from shared.schema.listening import Listening
from shared.schema.request import AudioFormat
from shared.settings import Settings
from shared.storage.keys import converted_key, peaks_key, state_key
from tests.integration.flow import PATIENCE, Flow, as_role, open_flow
from tests.integration.song_being_made import SongBeingMade, samples

HOP, LENGTH = 40, 50  # frames; a hop is 6.25 FLAC blocks
FRAMES = 190  # five windows, the last of which is short


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, trivial_window=(LENGTH, HOP))


def header(song: SongBeingMade) -> bytes:
    return stream_header(8000, SongTags.of(song.job.request))


def never_back(progress: list[float]) -> bool:
    """Whether progress grows. The record counts whole FLAC blocks, which is a little less than what is decoded."""
    return all(later > earlier - 0.3 for earlier, later in pairwise(progress))


async def assert_whole(flow: Flow, song: SongBeingMade, folder: Path, settings: Settings | None = None) -> None:
    """Check that a song is complete, byte for byte what one decode of all tokens makes, and that no more is left."""
    job = await flow.ended(song.job_id)
    assert (job.status, job.error, job.decode) == ("completed", None, None), job
    await flow.until_empty(DEC)
    key, audio_format = str(job.audio_key), job.request.format
    assert await flow.store.get(key) == song.expected(settings or flow.settings, folder, audio_format)
    kept = {key, peaks_key(key), str(job.tokens_key)}
    if audio_format != "flac":  # listeners of the stream go on in it
        kept.add(converted_key(key, "flac"))
        assert await flow.store.get(converted_key(key, "flac")) == song.expected(flow.settings, folder, "flac")
    assert set(await song.objects()) == {name.rpartition("/")[2] for name in kept}


async def test_a_song_is_heard_while_it_is_made_and_is_the_same_song(settings: Settings, tmp_path: Path) -> None:
    formats: tuple[AudioFormat, ...] = ("flac", "wav", "mp3", "ogg")
    async with open_flow(settings, "codec") as flow:
        for audio_format in formats:
            song = await SongBeingMade.begin(flow, FRAMES, audio_format)
            stream = b""
            for frames, windows in ((LENGTH, 1), (135, 3)):
                await song.make(frames)
                job = await song.parts(windows)
                assert job.status == "generating", "its tokens are still being made"
                assert job.decode is not None
                assert job.decode.samples == windows * HOP * 640 // 4096 * 4096, "whole blocks"
                await flow.until_empty(DEC)
                assert (await song.stream()).startswith(stream), "what was heard has changed"
                stream = await song.stream()
                names = [name for name in await song.objects() if name.endswith((".state", ".peaks.json"))]
                assert len(names) == 2, "only what the next window needs"
            assert job.attempts == 1, "the tokenizer's"
            await song.end()
            await assert_whole(flow, song, tmp_path)
            done = await song.record()
            flac = await flow.store.get(converted_key(str(done.audio_key), "flac"))
            assert flac[len(header(song)) :].startswith(stream[len(header(song)) :])
            assert stream.startswith(header(song))
            assert flac[42 : len(header(song))] == header(song)[42:], "they differ in STREAMINFO alone"
            events = [event.data for event in await flow.events(song.job_id)]
            heard = [event.playable_seconds for event in events if isinstance(event, Audio)]
            assert heard == sorted(heard)
            assert len(heard) == 4


async def test_nothing_is_told_of_a_song_that_is_being_made_but_what_can_be_heard(settings: Settings) -> None:
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(135)
        await song.parts(3)
        await flow.until_empty(DEC)
        assert {type(event.data) for event in await flow.events(song.job_id)} == {Audio}
        await song.end()
        await flow.ended(song.job_id)
        await flow.until_event(song.job_id, "completed")
        events = [event.data for event in await flow.events(song.job_id)]
        progress = [event.progress for event in events if not isinstance(event, Audio)]
        assert never_back(progress)
        assert progress[0] > 80 + 19 * 0.6, "three of five windows were there before"
        assert progress[-1] == 100
        steps = [(event.done, event.total) for event in events if isinstance(event, Progress)]
        assert steps[-1][0] == steps[-1][1]
        assert min(done for done, _ in steps) > 1, "steps of earlier turns count"


async def test_a_short_song_has_no_parts(settings: Settings, tmp_path: Path) -> None:
    async with open_flow(settings, "codec") as flow:
        for frames in (1, LENGTH):
            song = await SongBeingMade.begin(flow, frames, "wav")
            await song.end()
            job = await flow.ended(song.job_id)
            await flow.until_empty(DEC)
            await flow.until_event(song.job_id, "completed")
            assert not [event for event in await flow.events(song.job_id) if isinstance(event.data, Audio)]
            assert await flow.store.get(str(job.audio_key)) == song.expected(settings, tmp_path, "wav")
            assert len(await song.objects()) == 3, "its audio, peaks and tokens"


async def test_a_song_that_ends_with_a_windows_last_code(settings: Settings, tmp_path: Path) -> None:
    """Its last window was decoded before its end was known; only the overlap was still to come."""
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, LENGTH + 2 * HOP)
        await song.make(LENGTH + 2 * HOP)
        await song.parts(3)
        await song.end()
        await assert_whole(flow, song, tmp_path)


@pytest.mark.parametrize("ended", [False, True])
async def test_a_killed_worker_costs_the_window_in_work_and_no_other(
    settings: Settings, tmp_path: Path, ended: bool
) -> None:
    async with open_flow(replace(settings, trivial_window_ms=700), "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await (song.end() if ended else song.make(FRAMES - 1))
        job = await song.parts(2)
        flow.processes[0].kill()
        stream, before = await song.stream(), await song.record()
        flow.settings = settings
        await flow.worker("codec")
        if not ended:
            await song.parts(4)
            await flow.until_empty(DEC)
            after = await song.record()
            assert before.decode is not None
            assert after.decode is not None
            assert after.decode.parts[: len(before.decode.parts)] == before.decode.parts
            assert (await song.stream()).startswith(stream)
            await song.end()
        await assert_whole(flow, song, tmp_path, settings)
        flac = await flow.store.get(str((await song.record()).audio_key))
        assert flac[len(header(song)) :].startswith(stream[len(header(song)) :]), "what was heard has changed"
        assert job.job_id == song.job_id
        heard = [e.data.playable_seconds for e in await flow.events(song.job_id) if isinstance(e.data, Audio)]
        # A worker that is killed between a window's record and its event never sends it; the next event says as much.
        assert heard == sorted(set(heard)), "a window was made twice"
        assert len(heard) in (3, 4)


async def test_a_worker_that_shuts_down_gives_up_a_window_that_takes_long(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, trivial_window=(410, 400))  # 16 steps
    async with open_flow(replace(settings, trivial_step_ms=100), "codec") as flow:
        song = await SongBeingMade.begin(flow, 1300)
        await song.end()
        await song.parts(1)
        assert await flow.stop(flow.processes[0]) == 0
        before = (await song.record()).decode
        assert before is not None
        assert (before.attempts, len(before.parts) in (1, 2)) == (0, True)
        flow.settings = replace(settings, trivial_step_ms=600)
        slow = await flow.worker("codec")
        while [event.data.stage for event in await flow.events(song.job_id) if isinstance(event.data, Stage)].count(
            "decoding"
        ) < 2:
            await asyncio.sleep(0.05)
        assert await flow.stop(slow) == 0
        after = (await song.record()).decode
        assert after is not None
        assert (after.parts, after.attempts) == (before.parts, 0), "it was decoded to the end of its window"
        flow.settings = settings
        await flow.worker("codec")
        await assert_whole(flow, song, tmp_path)


async def test_a_decoding_song_makes_way_at_a_window_and_goes_on_from_there(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, sequential_offload=True, turn_seconds=1.0)
    async with open_flow(replace(settings, trivial_window_ms=250)) as flow:
        song = await SongBeingMade.begin(flow, 800)  # 20 windows
        await song.end()
        await flow.worker("codec")
        await song.parts(1)
        flow.settings = settings
        await flow.worker("tokenizer")
        other = await flow.submit(1)
        await flow.until(other, lambda job: job.status in ("decoding", "completed"))
        assert (await song.record()).status == "decoding", "the other song had to wait for this one"
        assert (await flow.ended(other)).status == "completed"
        await assert_whole(flow, song, tmp_path)
        events = [event.data for event in await flow.events(song.job_id)]
        assert "paused" in [event.stage for event in events if isinstance(event, Stage)]
        assert len([event for event in events if isinstance(event, Audio)]) == 19, "a window was made twice"
        assert never_back([event.progress for event in events if not isinstance(event, Audio)])


@pytest.mark.parametrize("at", [30, 110])  # in the first window, and in the third
async def test_a_song_that_goes_on_from_another_one_sounds_like_it_up_to_there(
    settings: Settings, tmp_path: Path, at: int
) -> None:
    """Also where its worker is killed between two windows."""
    async with open_flow(settings, "codec") as flow:
        parent = await SongBeingMade.begin(flow, FRAMES, seed=7)
        await parent.end()
        done = await flow.ended(parent.job_id)
        kept = kept_tokens(done, parent.codes, (), at, CodecWindows(LENGTH, HOP))
        song = await SongBeingMade.begin(flow, FRAMES, seed=8, kept=kept)
        await song.make(LENGTH)
        first = (await song.parts(1)).edition
        flow.processes[0].kill()
        await flow.worker("codec")
        await song.make(FRAMES - 1)
        assert (await song.parts(4)).edition == first, "it was begun again"
        await song.end()
        await assert_whole(flow, song, tmp_path)
        one, two = [samples(await flow.store.get(str((await made.record()).audio_key))) for made in (parent, song)]
        assert np.array_equal(one[: at * 640], two[: at * 640])
        assert np.mean(one[at * 640 :] != two[at * 640 :]) > 0.9


async def test_an_earlier_versions_record_and_message_are_decoded(settings: Settings, tmp_path: Path) -> None:
    """The record is `decoding` with the codec's fencing token where the tokenizer's is now, and attempts of its own."""
    async with open_flow(settings) as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.save(FRAMES, ended=True)
        record = msgspec.json.decode(msgspec.json.encode(song.job))
        for name in ("decode", "saved_frames"):
            del record[name]
        record |= {"status": "decoding", "fence": 3, "attempts": 2, "tokens_key": song.key, "frames": FRAMES}
        await flow.js.publish(f"$KV.JOBS.{TENANT}.{song.job_id}", msgspec.json.encode(record))
        order = {"schema": 1, "job_id": song.job_id, "tenant": TENANT, "tokens_key": song.key}
        order |= {"first_frame": 0, "frames": FRAMES, "last": True}
        await flow.js.publish(decode_subject(song.job_id), msgspec.json.encode(order))
        await flow.worker("codec")
        await assert_whole(flow, song, tmp_path)


async def test_a_song_in_both_lanes_and_queued_again_and_again_is_decoded_once(
    settings: Settings, tmp_path: Path
) -> None:
    async with open_flow(replace(settings, trivial_window_ms=200), "codec", "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(LENGTH)
        for frames in (LENGTH, LENGTH, 95, 135, FRAMES - 1):
            await song.make(frames)
            await song.queue(listened=True)
            await asyncio.sleep(0.1)
        await song.parts(4)
        await flow.until_empty(DEC)
        assert len([event for event in await flow.events(song.job_id) if isinstance(event.data, Audio)]) == 4
        job = await song.record()
        assert job.decode is not None
        assert job.decode.attempts <= 1
        await song.end()
        await song.queue(listened=True)
        await assert_whole(flow, song, tmp_path)


async def test_a_song_that_is_cancelled_between_its_windows_leaves_nothing(settings: Settings) -> None:
    async with open_flow(replace(settings, trivial_window_ms=500), "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(FRAMES - 1)
        await song.parts(2)
        await flow.jobs.update(song.job_id, TENANT, lambda job: change(job, status="cancelled"))
        await purge_job(flow.js, song.job_id)
        await flow.js._nc.publish(cancel_subject(song.job_id), b"")
        after = await SongBeingMade.begin(flow, 10)
        await after.end()
        assert (await flow.ended(after.job_id)).status == "completed"
        await flow.until_empty(DEC)
        assert await flow.stop(flow.processes[0]) == 0
        assert await song.objects() == []
        assert (await song.record()).status == "cancelled"


async def begun_again(flow: Flow, song: SongBeingMade, settings: Settings, tmp_path: Path, windows: int) -> None:
    """Check that a song's decoding begins again, after so many windows, and that nothing of the first time is left."""
    before = await song.record()
    if flow.processes[-1].returncode is not None:
        await flow.worker("codec")
    await song.end()
    await assert_whole(flow, song, tmp_path, settings)
    assert (await song.record()).remade == before.remade
    heard = [event.data for event in await flow.events(song.job_id) if isinstance(event.data, Audio)]
    assert [event.playable_seconds for event in heard][windows] == heard[0].playable_seconds, "it went on"


async def test_a_song_for_another_engine_begins_again(settings: Settings, tmp_path: Path) -> None:
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(100)
        await song.parts(2)
        assert await flow.stop(flow.processes[0]) == 0
        flow.settings = settings = replace(settings, trivial_window=(LENGTH + 2, HOP))
        await begun_again(flow, song, settings, tmp_path, 2)


async def test_songs_that_cannot_go_on_begin_again(settings: Settings, tmp_path: Path) -> None:
    async with open_flow(settings, "codec") as flow:
        songs: dict[str, SongBeingMade] = {}
        for harm in ("other tokens", "damaged state", "no state"):
            songs[harm] = song = await SongBeingMade.begin(flow, FRAMES)
            await song.make(100)
            await song.parts(2)
        assert await flow.stop(flow.processes[0]) == 0
        for harm, song in songs.items():
            job = await song.record()
            assert job.decode is not None
            state = state_key(job.decode.parts[-1].key)
            if harm == "other tokens":
                song.codes[0, 3] += 1
            elif harm == "damaged state":
                data = bytearray(await flow.store.get(state))
                data[-1] ^= 1
                await flow.store.put(state, bytes(data))
            else:
                await flow.store.delete_one(state)
        for song in songs.values():
            await begun_again(flow, song, settings, tmp_path, 2)


async def test_a_song_whose_part_is_damaged_begins_again(settings: Settings, tmp_path: Path) -> None:
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(100)
        job = await song.parts(2)
        assert job.decode is not None
        data = bytearray(await song.stream())[: job.decode.parts[0].size]
        data[len(data) // 2] ^= 255
        await flow.store.put(job.decode.parts[0].key, bytes(data))
        await song.end()
        await assert_whole(flow, song, tmp_path)


@pytest.mark.parametrize("harm", ["gone", "damaged"])
async def test_windows_whose_tokens_cannot_be_read_are_nobodys_fault(
    settings: Settings, tmp_path: Path, harm: str
) -> None:
    async with open_flow(settings) as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(100)
        if harm == "damaged":
            await flow.store.put(song.key, b"damaged")
        else:
            await flow.store.delete_one(song.key)
        await flow.worker("codec")
        for _ in range(6):  # more often than a song may kill its worker
            await song.queue()
            await flow.until_empty(DEC)
        job = await song.record()
        assert (job.status, job.remade, job.failures, job.error) == ("generating", 0, 0, None)
        assert job.decode is not None
        assert (job.decode.attempts, job.decode.failures) == (0, 0)
        await song.end()
        await assert_whole(flow, song, tmp_path)


async def test_a_song_whose_tokens_are_being_made_again_waits_for_them(settings: Settings, tmp_path: Path) -> None:
    """They were lost, and are fewer now than those that were decoded: what is heard goes on when they are there."""
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(100)
        await song.parts(2)
        await flow.until_empty(DEC)
        before = await song.record()
        await song.make(60)
        await flow.until_empty(DEC)
        after = await song.record()
        assert before.decode is not None
        assert after.decode is not None
        assert (after.decode.parts, after.decode.attempts) == (before.decode.parts, 0)
        await song.end()
        await assert_whole(flow, song, tmp_path)
        assert len([event for event in await flow.events(song.job_id) if isinstance(event.data, Audio)]) == 4


async def test_a_song_that_its_tokenizer_could_not_hand_on_is_completed(settings: Settings, tmp_path: Path) -> None:
    """The tokenizer stored all tokens and died."""
    async with open_flow(settings) as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(100)
        await song.save(FRAMES, ended=True)
        await flow.worker("codec")
        await assert_whole(flow, song, tmp_path)
        assert (await song.record()).frames == FRAMES


async def listen(flow: Flow, song: SongBeingMade) -> None:
    """Say as a gateway does that somebody listens."""
    report = Listening(job_id=song.job_id, gateway="g", listeners=1, buffered=0.0)
    await flow.js._nc.publish(listen_subject(song.job_id), msgspec.json.encode(report))
    await flow.js._nc.flush()


@pytest.mark.parametrize("case", ["models stay", "listened to", "nobody listens"])
async def test_windows_that_came_up_meanwhile_are_decoded_where_they_are_wanted(settings: Settings, case: str) -> None:
    settings = replace(settings, sequential_offload=case != "models stay", trivial_window_ms=700)
    async with open_flow(settings, "codec") as flow:
        song = await SongBeingMade.begin(flow, FRAMES)
        await song.make(LENGTH)
        await flow.until(song.job_id, lambda job: job.decode is not None)
        await song.make(100, queue=False)
        if case == "listened to":
            await listen(flow, song)
        await song.parts(1 if case == "nobody listens" else 2)
        await flow.until_empty(DEC)
        job = await song.record()
        assert job.decode is not None
        assert len(job.decode.parts) == (1 if case == "nobody listens" else 2)


@pytest.mark.parametrize("all_listened", [False, True])
async def test_a_song_whose_listener_waits_does_not_wait_for_whole_songs(
    settings: Settings, all_listened: bool
) -> None:
    async with open_flow(replace(settings, trivial_window_ms=200), "codec") as flow:
        first = await SongBeingMade.begin(flow, 1)
        await first.end()
        await flow.ended(first.job_id)  # from now on the worker hears of listeners
        songs = [await SongBeingMade.begin(flow, 1200) for _ in range(3)]  # 30 windows each
        for song in songs:
            await song.end(queue=False)
            if all_listened:
                await listen(flow, song)
            await song.queue(listened=all_listened)
        await songs[0].parts(1)
        live = await SongBeingMade.begin(flow, FRAMES)
        await live.make(LENGTH, queue=False)
        await listen(flow, live)
        await live.queue(listened=True)
        await live.parts(1)
        records = [await song.record() for song in songs]
        assert {job.status for job in records} == {"decoding"}, "it waited for a whole song"
        parts = [len(job.decode.parts) if job.decode is not None else 0 for job in records]
        assert sum(parts) < 15, "it waited for a whole song"
        if all_listened:
            assert min(parts) > 0, "they did not take turns"


async def test_a_turn_ends_for_a_listener_whose_song_needs_tokens(settings: Settings) -> None:
    """The test is the tokenizer that waits for the device. A slice is longer than the songs take."""
    settings = replace(settings, sequential_offload=True, turn_seconds=3600, gpu_id="card", trivial_window_ms=300)
    lease = Lease(as_role(settings, "tokenizer"), gpu="card", role="tokenizer", instance="test")
    async with open_flow(settings, "codec") as flow:
        await lease.start()
        try:
            heard, unheard = (
                await SongBeingMade.begin(flow, FRAMES),
                await SongBeingMade.begin(flow, 2000),
            )  # 50 windows
            await heard.make(LENGTH, listened=True)
            await heard.parts(1)
            await flow.until_empty(DEC)
            await unheard.end()
            await unheard.parts(1)
            acquiring = asyncio.create_task(lease.acquire())
            await unheard.parts(4)
            assert not acquiring.done(), "the turn was cut without a listener"
            async with asyncio.timeout(PATIENCE):
                while not acquiring.done():
                    await listen(flow, heard)
                    await asyncio.sleep(0.3)
            job = await unheard.record()
            assert job.decode is not None
            assert (job.status, job.decode.attempts, len(job.decode.parts) < 48) == ("decoding", 0, True)
            await (await acquiring).release()
            await flow.ended(unheard.job_id)
        finally:
            await lease.close()
