"""Songs that go on from another one: the kept part sounds as it did there, wherever they part and however they are fed.

The waveform decoder looks one frame ahead, so that the last frame before the join may sound another way.
"""

from collections.abc import Callable

import numpy as np
import pytest

from services.codec_worker.engines.base import NOTHING_KEPT, CodecEngine, DecodeState, KeptWindows
from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.engines.trivial import TrivialCodec
from services.tokenizer_worker.engines.base import Song
from shared.frames import samples_of
from shared.jobs.continuing import kept_tokens
from shared.model.codec_windows import CodecWindows
from shared.model.prompt import Prompter
from shared.schema.job import Job, Parent
from shared.schema.request import GenerateRequest
from shared.storage.token_file import EarlierWindow
from tests.unit.native_engines import DEMO, TINY, generate, one_thread, ready, ready_codec

__all__ = ["one_thread"]

WINDOWS = CodecWindows()
AHEAD = 1  # frame, that the waveform decoder looks ahead


@pytest.fixture(scope="module")
def tiny() -> NativeCodec:
    return ready_codec(TINY, 2)


_AUDIO: dict[tuple[str, int, bytes, str], np.ndarray] = {}


class SongOf:
    """A song, and what a worker knows of it: its record, its codes and what lies beside them."""

    def __init__(self, codes: np.ndarray, job: Job, kept: KeptWindows = NOTHING_KEPT) -> None:
        self.codes, self.job, self.kept = codes, job, kept

    @classmethod
    def first(cls, frames: int, seed: int) -> "SongOf":
        """A song of random codes that goes on from no other."""
        return cls(random_codes(frames, seed), job_of(seed))

    def continued(self, at: int, frames: int, seed: int) -> "SongOf":
        """Another song, of so many `frames`, that begins with this one's up to `at`."""
        found = kept_tokens(self.job, self.codes, self.kept.earlier, at, WINDOWS)
        codes = np.concatenate((found.codes, random_codes(frames - at, seed)), axis=1)
        parent = Parent(job_id="parent", frames=at, least_frames=at, seeds=found.seeds)
        return SongOf(codes, job_of(seed, parent), KeptWindows(seeds=found.seeds, earlier=found.earlier))

    def audio(self, engine: CodecEngine) -> np.ndarray:
        """Its audio, float32 ``[samples, 2]``; remembered, because it takes seconds."""
        song = engine.identity, self.job.request.seed or 0, self.codes.tobytes(), self.kept.digest
        if song not in _AUDIO:
            steps = engine.advance(DecodeState(seed=song[1]), self.codes, ended=True, kept=self.kept)
            _AUDIO[song] = np.concatenate([step.audio for step in steps if step.audio is not None])
        return _AUDIO[song]


def random_codes(frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (8, frames), dtype=np.int16)


def job_of(seed: int, parent: Parent | None = None) -> Job:
    request = GenerateRequest(lyrics="la", seed=seed)
    return Job(job_id="song", tenant="local", request=request, created_at=0, parent=parent)


def assert_begins_alike(engine: CodecEngine, song: SongOf, other: SongOf, frames: int, ahead: int = AHEAD) -> None:
    """Check that two songs part at `frames`: before that they sound alike bit for bit, and then differ at once."""
    rate = engine.sample_rate
    same, parted = samples_of(frames - ahead, rate), samples_of(frames, rate)
    one, two = song.audio(engine), other.audio(engine)
    assert np.array_equal(one[:same], two[:same])
    heard = min(200, len(one) - parted, len(two) - parted)
    assert heard > 0
    differ = one[parted : parted + heard] != two[parted : parted + heard]
    assert np.mean(differ) > 0.9


# In the first window; where it overlaps with the second; with a window's last code; in the second window; at the end.
@pytest.mark.parametrize("at", [2, 186, 335, 371, 372, 532, 691, 699])
def test_the_kept_part_sounds_as_in_the_song_that_is_continued(tiny: NativeCodec, at: int) -> None:
    parent = SongOf.first(700, seed=1)
    assert_begins_alike(tiny, parent, parent.continued(at, 760, seed=2), at)


@pytest.mark.parametrize("frames", [20, 300, 372, 400, 692])
def test_a_song_goes_on_from_the_end_of_another(tiny: NativeCodec, frames: int) -> None:
    """Bit for bit, except for what its last window and the next one share now: that is cross-faded from here on."""
    parent = SongOf.first(frames, seed=1)
    one, two = parent.audio(tiny), parent.continued(frames, frames + 60, seed=2).audio(tiny)
    windows = WINDOWS.final(frames + 60)
    same = min(frames, windows * WINDOWS.hop) if windows else frames
    last, end = (samples_of(at, tiny.sample_rate) for at in (same - AHEAD, frames))
    assert np.array_equal(one[:last], two[:last])
    assert snr(two[:end], one) >= 30


# The second join lies before the first, behind it in the same window, and in later ones.
@pytest.mark.parametrize("second", [100, 300, 500, 900])
def test_a_song_goes_on_from_one_that_went_on_itself(tiny: NativeCodec, second: int) -> None:
    child = SongOf.first(700, seed=1).continued(200, 1000, seed=2)
    assert_begins_alike(tiny, child, child.continued(second, 1000, seed=3), second)


def snr(audio: np.ndarray, wanted: np.ndarray) -> float:
    """Signal-to-noise ratio in dB."""
    wanted = wanted.astype(np.float64)
    return float(10 * np.log10(np.square(wanted).sum() / (np.square(audio - wanted).sum() + 1e-20)))


def fed(engine: CodecEngine, song: SongOf, cuts: list[int]) -> np.ndarray:
    """A song's audio where it is fed bit by bit, and every call knows what the one before it packed and no more."""
    packed, audio = DecodeState(seed=song.job.request.seed or 0).pack(), []
    for cut in cuts:
        ended = cut == song.codes.shape[1]
        state = DecodeState.unpack(packed)
        for step in engine.advance(state, song.codes[:, :cut], ended=ended, kept=song.kept):
            audio += [step.audio] if step.audio is not None else []
            packed = step.state.pack() if step.state is not None else packed
    return np.concatenate(audio)


@pytest.mark.parametrize("at", [100, 500])
@pytest.mark.parametrize("cuts", [[0, 372, 800], [371, 372, 691, 692, 800], [700, 800]])
def test_it_does_not_matter_how_a_continued_song_is_fed(tiny: NativeCodec, at: int, cuts: list[int]) -> None:
    song = SongOf.first(700, seed=1).continued(at, 800, seed=2)
    assert np.array_equal(fed(tiny, song, cuts), song.audio(tiny))
    assert np.array_equal(fed(TrivialCodec(0), song, cuts), song.audio(TrivialCodec(0)))


@pytest.mark.parametrize("make", [lambda: TrivialCodec(0), lambda: ready_codec(TINY, 1)], ids=["trivial", "native"])
def test_a_state_goes_on_with_what_was_kept_and_nothing_else(make: Callable[[], CodecEngine]) -> None:
    engine = make()
    song = SongOf.first(700, seed=1).continued(500, 800, seed=2)
    state = next(
        step.state
        for step in engine.advance(DecodeState(seed=2), song.codes, ended=False, kept=song.kept)
        if step.state is not None
    )
    state = DecodeState.unpack(state.pack())
    list(engine.advance(state, song.codes, ended=True, kept=song.kept))
    (window,) = song.kept.earlier
    other = EarlierWindow(window=1, frames=501, seed=window.seed, codes=window.codes)
    for kept in (
        NOTHING_KEPT,
        KeptWindows(seeds=song.kept.seeds),
        KeptWindows(seeds=(3,), earlier=song.kept.earlier),
        KeptWindows(seeds=song.kept.seeds, earlier=(other,)),
    ):
        with pytest.raises(ValueError, match="do not begin with those"):
            list(engine.advance(state, song.codes, ended=True, kept=kept))


def test_windows_of_another_codec_are_refused(tiny: NativeCodec) -> None:
    found = EarlierWindow(window=0, frames=20, seed=1, codes=np.zeros((8, 50), np.int16))
    with pytest.raises(ValueError, match="not in windows of 372 codes"):
        tiny.advance(DecodeState(seed=1), random_codes(60, 1), ended=True, kept=KeptWindows(earlier=(found,)))


def test_steps_are_counted_for_every_song_that_parts_in_a_window(tiny: NativeCodec) -> None:
    song = SongOf.first(700, seed=1).continued(100, 700, seed=2).continued(200, 800, seed=3)
    steps = list(tiny.advance(DecodeState(seed=3), song.codes, ended=False, kept=song.kept))
    assert [(step.done, step.total) for step in steps] == [(n + 1, 3 * 2 + 12 + 2 + 12) for n in range(32)]
    assert [step.window_left for step in steps] == [*range(17, -1, -1), *range(13, -1, -1)]
    overlapping = SongOf.first(700, seed=1).continued(372, 700, seed=2)  # the window before determines all that is kept
    assert next(tiny.advance(DecodeState(seed=2), overlapping.codes, ended=False, kept=overlapping.kept)).total == 28


@pytest.mark.parametrize("at", [10, 320, 340, 400, 670])
def test_the_trivial_codec_keeps_what_it_can(at: int) -> None:
    parent = SongOf.first(700, seed=1)
    child = parent.continued(at, 760, seed=2)
    grandchild = child.continued(at + 20, 760, seed=3)
    assert_begins_alike(TrivialCodec(0), parent, child, at, ahead=0)
    assert_begins_alike(TrivialCodec(0), child, grandchild, at + 20, ahead=0)


@pytest.mark.parametrize("at", [10, 320, 340, 400, 670])
def test_the_trivial_codec_keeps_no_more_of_the_oldest_song_than_the_next_one_left(at: int) -> None:
    child = SongOf.first(700, seed=1).continued(at, 760, seed=2)
    grandchild, parted = child.continued(at - 8, 760, seed=3), samples_of(at - 8, TrivialCodec.sample_rate)
    alone = SongOf(grandchild.codes, job_of(3))
    codec = TrivialCodec(0)
    assert np.array_equal(grandchild.audio(codec)[:parted], child.audio(codec)[:parted])
    assert np.array_equal(grandchild.audio(codec)[parted:], alone.audio(codec)[parted:])


def test_a_song_of_the_demo_goes_on_at_30_db_or_more_and_without_a_click() -> None:
    """Its own noise would do here; what is taken over must not make a click of it."""
    codec, language = ready_codec(DEMO, 3), ready(DEMO)
    prompt = Prompter(DEMO).encode("piano,drums", "[Verse]\nover the hills and far away\n[Chorus]\nthe river runs")
    at, size = 50, 75

    def made(seed: int, before: np.ndarray) -> np.ndarray:
        song = Song(prompt=prompt, max_frames=size, temperature=1.0, topk=50, cfg_scale=1.5, seed=seed)
        return np.concatenate((before, generate(language, song, before)), axis=1)

    parent = SongOf(made(3, np.zeros((8, 0), np.int16)), job_of(3))
    found = kept_tokens(parent.job, parent.codes, (), at, WINDOWS)
    codes = made(11, found.codes)
    assert not np.array_equal(codes, parent.codes)
    child = SongOf(codes, job_of(11), KeptWindows(seeds=found.seeds, earlier=found.earlier))
    join, audio = samples_of(at, codec.sample_rate), child.audio(codec)
    assert snr(audio[:join], parent.audio(codec)[:join]) >= 30
    alone = SongOf(codes, job_of(11)).audio(codec)  # decoded in one piece
    near = slice(join - 240, join + 240)
    step, wanted = (np.abs(np.diff(found[near], axis=0)).max() for found in (audio, alone))
    assert step < 1.2 * wanted
