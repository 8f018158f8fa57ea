"""Codec windows: every sample once and in order, for songs of every length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.codec_worker.model import Splicer, WindowPlan

RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000)

LENGTHS = (
    st.integers(1, 4000)
    | st.integers(0, 12).map(lambda n: 104 + 320 * n)
    | st.integers(1, 12).map(lambda n: 52 + 320 * n)
)


@given(LENGTHS)
def test_the_windows_cover_the_song_and_none_is_idle(frames: int) -> None:
    plan = WindowPlan(frames, 48000)
    assert (plan.window, plan.hop, plan.overlap, plan.context) == (372, 320, 52, 104)
    assert (plan.window_samples, plan.overlap_samples) == (1_428_480, 199_680)
    covered = (plan.count - 1) * plan.hop + plan.window
    assert covered >= frames
    assert plan.count == 1 or covered - plan.hop < frames


@given(LENGTHS)
def test_each_window_holds_the_codes_of_its_place(frames: int) -> None:
    plan = WindowPlan(frames, 48000)
    codes = np.arange(frames)[None].repeat(8, axis=0)
    for index in range(plan.count):
        cut = plan.cut(codes, index)
        assert cut.shape == (8, plan.window)
        assert np.array_equal(cut[0], (index * plan.hop + np.arange(plan.window)) % frames)


@pytest.mark.parametrize("rate", RATES)
def test_no_length_loses_a_sample(rate: int) -> None:
    """Checked for all songs of up to an hour, the longest that is allowed; a frame is exactly 2 / 25 of a second."""
    a_frame, rest = divmod(2 * rate, 25)
    assert rest == 0
    wrong = [frames for frames in range(1, 45_001) if WindowPlan(frames, rate).samples != frames * a_frame]
    assert wrong == []


@given(LENGTHS, st.sampled_from(RATES), st.sampled_from([93, 372]))
def test_windows_of_codes_latents_and_samples_agree(frames: int, rate: int, window: int) -> None:
    plan = WindowPlan(frames, rate, window)
    a_frame = 2 * rate // 25
    assert (plan.window_samples, plan.overlap_samples) == (plan.window * a_frame, plan.overlap * a_frame)
    for index in range(plan.count):
        left = frames - index * plan.hop  # codes, from the start of the window
        assert plan.needed(index) == 2 * min(plan.window, left)


@given(
    st.integers(1, 500) | st.integers(0, 4).map(lambda n: 26 + 80 * n),
    st.sampled_from([600, 1000]),
    st.integers(50, 9000),
)
def test_windows_of_one_signal_join_to_that_signal(frames: int, rate: int, length_of_pieces: int) -> None:
    plan = WindowPlan(frames, rate, 93)
    length = plan.count * plan.window_samples
    signal = np.stack([np.arange(length), -np.arange(length)]).astype(np.float32)
    hop = plan.window_samples - plan.overlap_samples
    splicer = Splicer(plan)
    stretches: list[list[np.ndarray]] = []
    for n in range(plan.count):
        samples = plan.window_samples * plan.needed(n) // (2 * plan.window)
        window = signal[:, n * hop : n * hop + samples]
        pieces = [window[:, at : at + length_of_pieces] for at in range(0, samples, length_of_pieces)]
        stretches.append([splicer.add(piece) for piece in pieces])
        assert all(len(stretch) <= length_of_pieces for stretch in stretches[-1])
    joined = np.concatenate([stretch for window in stretches for stretch in window])
    assert joined.shape == (plan.samples, 2)
    np.testing.assert_allclose(joined.T, signal[:, : plan.samples], rtol=1e-6)
    # All but the last window hand out a whole hop as soon as they are decoded.
    assert all(sum(map(len, window)) == hop for window in stretches[:-1])


def test_neighbours_are_cross_faded_from_one_to_the_other() -> None:
    plan = WindowPlan(160, 600, 93)
    splicer = Splicer(plan)
    one, two = (np.full((2, plan.window_samples), level, np.float32) for level in (1.0, 3.0))
    joined = np.concatenate([splicer.add(one), splicer.add(two)])[:, 0]
    start = plan.window_samples - plan.overlap_samples
    fade = joined[start : start + plan.overlap_samples]
    assert (joined[:start] == 1).all()
    assert (fade[0], fade[-1]) == (1, 3)
    assert (np.diff(fade) > 0).all()
