"""A song decoded while it is made: the samples of the whole song, however it was fed and wherever it was put away."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest

from services.codec_worker.engines.base import CodecEngine, DecodeState
from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.engines.trivial import TrivialCodec
from shared.errors import ObjectError
from shared.model.checkpoint import Checkpoint
from tests.unit.native_engines import DEMO, TINY, one_thread

__all__ = ["one_thread"]

SEED = 7
CODES = np.random.default_rng(0).integers(0, 64, (8, 1400), dtype=np.int16)


def on_device(checkpoint: Checkpoint, steps: int) -> NativeCodec:
    engine = NativeCodec(checkpoint, "cpu", "float32", steps=steps)
    engine.load()
    engine.to_device()
    return engine


@pytest.fixture(scope="module")
def tiny() -> NativeCodec:
    return on_device(TINY, 2)


@pytest.fixture(scope="module")
def demo() -> NativeCodec:
    return on_device(DEMO, 1)


def whole(engine: CodecEngine, codes: np.ndarray) -> np.ndarray:
    """The song's audio ``[samples, 2]``, decoded at once."""
    return joined(step.audio for step in engine.decode(codes, seed=SEED))


def joined(stretches: Iterable[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 2), np.float32), *(audio for audio in stretches if audio is not None)])


class Listener:
    """Feeds a song bit by bit. Its engines know of each other only what the last of them packed."""

    def __init__(self, *engines: CodecEngine) -> None:
        self._engines = list(engines)
        self._packed = DecodeState(seed=SEED).pack()
        self.audio = np.zeros((0, 2), np.float32)

    def feed(self, codes: np.ndarray, *, ended: bool = False) -> int:
        """Give the song so far; returns the number of samples that came."""
        engine = self._engines[0]
        self._engines.append(self._engines.pop(0))
        state, before = DecodeState.unpack(self._packed), len(self.audio)
        assert state.samples == before
        for step in engine.advance(state, codes, ended=ended):
            self.audio = joined([self.audio, step.audio])
            if step.state is not None:
                self._packed = step.state.pack()
        return len(self.audio) - before


@pytest.mark.parametrize("frames", [1, 51, 52, 53, 371, 372, 373, 692, 693, 1012, 1013])
def test_a_song_fed_bit_by_bit_is_the_whole_song(tiny: NativeCodec, frames: int) -> None:
    listener = Listener(tiny)
    for cut in (0, 1, 52, 371, 372, 373, 500, 691, 692, 693, 1000, 1012, 1013):
        if cut <= frames:
            listener.feed(CODES[:, :cut])
    listener.feed(CODES[:, :frames], ended=True)
    assert np.array_equal(listener.audio, whole(tiny, CODES[:, :frames]))


def test_it_does_not_matter_when_it_was_fed_nor_by_which_process(demo: NativeCodec) -> None:
    other, song = on_device(DEMO, 1), CODES[:, :700]
    expected = whole(demo, song)
    for cuts in ([400], [371, 692, 693]):
        listener = Listener(demo, other)
        for cut in cuts:
            listener.feed(song[:, :cut])
        listener.feed(song, ended=True)
        assert np.array_equal(listener.audio, expected)


def test_audio_comes_as_soon_as_a_window_is_whole_and_not_before(tiny: NativeCodec) -> None:
    listener = Listener(tiny)
    hop, overlap = 320 * 48, 52 * 48  # samples at 600 Hz
    fed = {cut: listener.feed(CODES[:, :cut]) for cut in (0, 371, 372, 400, 691, 692, 700)}
    assert fed == {0: 0, 371: 0, 372: hop, 400: 0, 691: 0, 692: hop, 700: 0}
    assert listener.feed(CODES[:, :700], ended=True) == 60 * 48
    exact = Listener(tiny)
    assert exact.feed(CODES[:, :372]) == hop
    assert exact.feed(CODES[:, :372], ended=True) == overlap, "the song ended with the window"


def test_steps_are_counted_a_call_and_the_state_comes_with_a_windows_last(tiny: NativeCodec) -> None:
    steps = list(tiny.advance(DecodeState(seed=SEED), CODES[:, :800], ended=False))
    a_window = 2 + 12
    assert [(step.done, step.total) for step in steps] == [(n + 1, 2 * a_window) for n in range(2 * a_window)]
    assert [step.done for step in steps if step.state is not None] == [a_window, 2 * a_window]
    states = [step.state for step in tiny.decode(CODES[:, :800], seed=SEED) if step.state is not None]
    assert [state.window for state in states] == [1, 2], "nothing follows the last"


def test_a_window_that_broke_off_is_made_again(tiny: NativeCodec) -> None:
    audio, state = [], DecodeState(seed=SEED)
    for step in tiny.advance(state, CODES[:, :800], ended=True):
        audio.append(step.audio)
        state = step.state or state
        if step.done == 14 + 5:  # in the second window, three stretches of which have sounded
            break
    kept = joined(audio)[: state.samples]
    assert len(kept) < len(joined(audio))
    rest = [step.audio for step in tiny.advance(state, CODES[:, :800], ended=True)]
    assert np.array_equal(joined([kept, *rest]), whole(tiny, CODES[:, :800]))


def state_after(engine: NativeCodec, frames: int) -> DecodeState:
    states = [step.state for step in engine.advance(DecodeState(seed=SEED), CODES[:, :frames], ended=False)]
    assert states[-1] is not None
    return states[-1]


def test_a_state_goes_on_with_its_own_song_and_codec_only(tiny: NativeCodec, demo: NativeCodec) -> None:
    state = state_after(tiny, 400)
    changed = CODES[:, :800].copy()
    changed[3, 371] += 1
    for codes in (changed, CODES[:, :371]):
        with pytest.raises(ValueError, match="do not begin with"):
            tiny.advance(state, codes, ended=True)
    changed[3, 371], changed[3, 372] = CODES[3, 371], CODES[3, 372] + 1  # nothing has taken that one yet
    tiny.advance(state, changed, ended=True)
    with pytest.raises(ValueError, match="not of this codec"):
        demo.advance(state, CODES[:, :800], ended=True)


def test_a_damaged_state_is_refused(tiny: NativeCodec) -> None:
    packed = state_after(tiny, 400).pack()
    for damaged in (packed[:-1], packed[:-1] + bytes([packed[-1] ^ 1]), packed.replace(b'"7"', b'"8"'), b"", b"{}" * 9):
        with pytest.raises(ObjectError, match="damaged"):
            DecodeState.unpack(damaged)


def test_what_is_packed_comes_back_to_the_last_bit(tiny: NativeCodec) -> None:
    state = state_after(tiny, 400)
    again = DecodeState.unpack(state.pack())
    for field in dataclasses.fields(state):
        assert np.array_equal(getattr(again, field.name), getattr(state, field.name))
    assert (again.context.shape, again.overlap.shape) == ((104, 256), (2, 52 * 48))


@pytest.mark.parametrize("frames", [1, 24, 25, 26, 60])
def test_the_engine_without_a_model_can_do_it_too(frames: int) -> None:
    engine = TrivialCodec(0)
    listener = Listener(engine, TrivialCodec(0))
    for cut in range(frames):
        listener.feed(CODES[:, :cut])
    assert len(listener.audio) == (frames - 1) // 25 * 25 * 640
    listener.feed(CODES[:, :frames], ended=True)
    assert np.array_equal(listener.audio, whole(engine, CODES[:, :frames]))
