"""`make bench-stream` runs and prints its fields; the simulated player and the aim are right. Speed is not tested."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from tests.bench.listening import BLOCK, Heard, frame_bounds, play
from tests.bench.sides import ROOT
from tests.bench.stream import CARD, aim, load
from tests.bench.test_bench import smoke

RATE = 8000
BLOCK_S = BLOCK / RATE


@pytest.fixture(scope="module")
def song() -> bytes:
    """A FLAC of 200 whole blocks and a part of one: numbers of frames with one byte and with two."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=(200 * BLOCK + 100, 2)).astype(np.float32)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 2, "PCM_16", format="FLAC") as written:
        for start in range(0, len(noise), RATE):
            written.write(noise[start : start + RATE])
    return file.getvalue()


def heard(song: bytes, *arrivals: tuple[float, int]) -> Heard:
    return Heard(bytearray(song), list(arrivals))


def test_every_frame_of_a_flac_is_found(song: bytes) -> None:
    bounds = frame_bounds(song)
    assert len(bounds) == 202
    assert bounds[-1] == len(song)
    assert all(song[at : at + 2] == b"\xff\xf8" for at in bounds[:-1])
    with pytest.raises(ValueError, match="no FLAC file"):
        frame_bounds(b"RIFF")


def test_a_player_counts_the_silences_after_its_first_sound(song: bytes) -> None:
    bounds = frame_bounds(song)
    fluent = play(heard(song, (10.0, bounds[0]), (12.0, bounds[10]), (12 + 9 * BLOCK_S, len(song))))
    assert fluent.first_sound == 12
    assert fluent.underruns == []
    gaps = play(heard(song, (12.0, bounds[10]), (13 + 10 * BLOCK_S, bounds[20]), (15 + 20 * BLOCK_S, len(song))))
    assert gaps.underruns == pytest.approx([1, 2])
    in_time = play(heard(song, (12.0, bounds[10]), (13 + 10 * BLOCK_S, bounds[20]), (13 + 19 * BLOCK_S, len(song))))
    assert in_time.underruns == pytest.approx([1])
    assert play(heard(song, (12.0, bounds[10] - 1), (12 + 9.5 * BLOCK_S, len(song)))).underruns == pytest.approx(
        [0.5 * BLOCK_S]
    )


def test_the_aim_is_a_window_of_frames_a_window_for_each_listener_and_the_moves_between() -> None:
    resident, offloaded = (replace(CARD, sequential_offload=offload) for offload in (False, True))
    assert aim(resident, 1, 15) == pytest.approx(372 * 0.015 + 1)
    assert aim(resident, 8, 15) == pytest.approx(372 * 0.015 + 8)
    assert aim(offloaded, 8, 15) == pytest.approx(372 * 0.015 + 8 + 3 * 0.75)
    assert load(offloaded, 8) == pytest.approx((320 * 0.015 + 8 + 3) / 25.6)


def test_the_bench_of_streams_runs() -> None:
    _, (stream,) = smoke("tests.bench.stream", "offloaded")
    assert {
        "first_sound_s_worst",
        "whole_file_s",
        "underruns",
        "moves",
        "aim_s",
        "of_aim",
        "of_aim_at_pace",
    } <= stream.keys()
    assert (stream["listeners"], stream["models"]) == (2, "offloaded")
    assert stream["song_s"] == 8
    assert stream["moves"]["heartcodec"] > 0


@pytest.mark.slow
def test_the_bench_of_streams_compares_checkouts() -> None:
    _, (songs,) = smoke("tests.bench.stream", "songs", "--base", str(ROOT))
    assert {"songs_per_s", "base_songs_per_s", "ratio", "interval", "slower"} <= songs.keys()
