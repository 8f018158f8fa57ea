"""Lengths in frames, samples, milliseconds and seconds, against exact fractions."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from shared.frames import (
    FRAME_MS,
    frames_covering,
    frames_nearest,
    frames_within,
    milliseconds_of,
    samples_of,
    seconds_of,
)

FRAME = Fraction(2, 25)  # seconds
FRAMES = st.integers(0, 45_000)  # an hour
RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 192_000]) | st.integers(1, 400_000)


def test_a_song_that_floating_point_cuts_short_is_whole() -> None:
    assert int(201 / 12.5 * 48000) == 771_839
    assert samples_of(201, 48000) == 771_840


@given(FRAMES, RATES)
def test_samples_are_exact_for_every_length_and_rate(frames: int, rate: int) -> None:
    assert samples_of(frames, rate) == math.floor(frames * FRAME * rate)


@given(FRAMES, FRAMES, st.integers(1, 16_000).map(lambda n: 25 * n))
def test_where_a_frame_has_whole_samples_parts_add_up(one: int, other: int, rate: int) -> None:
    """A frame has whole samples at every rate that codecs use."""
    assert samples_of(one, rate) + samples_of(other, rate) == samples_of(one + other, rate)


@given(FRAMES, st.integers(0, FRAME_MS - 1))
def test_a_time_holds_the_frames_that_have_ended_in_it(frames: int, more: int) -> None:
    assert milliseconds_of(frames) == frames * FRAME * 1000
    assert frames_within(milliseconds_of(frames) + more) == frames


@given(FRAMES)
def test_seconds_as_people_write_them_are_the_nearest_frames(frames: int) -> None:
    assert frames_nearest(frames * 0.08) == frames
    assert frames_nearest(frames * 0.08 + 0.039) == frames


@given(st.integers(0, 2_000_000_000), RATES)
def test_seconds_are_the_nearest_millisecond(samples: int, rate: int) -> None:
    assert abs(Fraction(str(seconds_of(samples, rate))) - Fraction(samples, rate)) <= Fraction(1, 2000)


@given(FRAMES, st.integers(1, 16_000).map(lambda n: 25 * n))
def test_a_song_lasts_as_long_as_its_frames(frames: int, rate: int) -> None:
    assert seconds_of(samples_of(frames, rate), rate) == milliseconds_of(frames) / 1000


@given(st.integers(0, 3_600_000))
def test_frames_cover_a_time_and_one_frame_less_does_not(milliseconds: int) -> None:
    frames = frames_covering(milliseconds)
    assert milliseconds_of(frames) >= milliseconds > milliseconds_of(frames - 1)
