"""A song decoded while it is made: the samples of the whole song, however it was fed and wherever it was put away."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from services.codec_worker.engines.base import CodecEngine, DecodeState
from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.engines.trivial import TrivialCodec
from services.codec_worker.song_file import SongFile
from services.codec_worker.song_stream import Piece, SavedDecode, SongStream
from shared.audio.files import AudioWriter
from shared.audio.flac import stream_header
from shared.audio.forms import plain
from shared.audio.peaks import Peaks
from shared.audio.tags import SongTags
from shared.errors import ObjectError
from shared.model.codec_windows import CodecWindows
from shared.schema.job import AudioPart
from shared.schema.request import AudioFormat
from tests.unit.native_engines import DEMO, TINY, one_thread, ready_codec

__all__ = ["one_thread"]

SEED = 7
TAGS = SongTags(title="A song", tags="piano", lyrics="la", seed=SEED)
CODES = np.random.default_rng(0).integers(0, 64, (8, 1400), dtype=np.int16)


@pytest.fixture(scope="module")
def tiny() -> NativeCodec:
    return ready_codec(TINY, 2)


@pytest.fixture(scope="module")
def demo() -> NativeCodec:
    return ready_codec(DEMO, 1)


_WHOLE: dict[tuple[str, bytes], np.ndarray] = {}


def whole(engine: CodecEngine, codes: np.ndarray) -> np.ndarray:
    """The song's audio ``[samples, 2]``, decoded at once; remembered, because it takes seconds."""
    song = engine.identity, codes.tobytes()
    if song not in _WHOLE:
        _WHOLE[song] = joined(step.audio for step in engine.decode(codes, seed=SEED))
    return _WHOLE[song]


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
    other, song = ready_codec(DEMO, 1), CODES[:, :700]
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


@pytest.mark.parametrize("frames", [1, 25, 49, 50, 51, 60, 90, 91, 130, 131])
@pytest.mark.parametrize("hop", [40, 50])
def test_the_engine_without_a_model_has_windows_too(frames: int, hop: int) -> None:
    windows = CodecWindows(50, hop)
    engine = TrivialCodec(0, windows=windows)
    listener = Listener(engine, TrivialCodec(0, windows=windows))
    for cut in range(frames):
        listener.feed(CODES[:, :cut])
        assert len(listener.audio) == windows.final(cut) * hop * 640
    listener.feed(CODES[:, :frames], ended=True)
    song = whole(engine, CODES[:, :frames])
    assert np.array_equal(listener.audio, song)
    assert len(song) == frames * 640


def test_steps_of_the_engine_without_a_model_are_counted_as_those_of_the_other() -> None:
    engine = TrivialCodec(0, windows=CodecWindows(100, 80))
    steps = list(engine.decode(CODES[:, :255], seed=SEED))  # 80 + 80 + 95 frames, at most 25 a step
    assert [(step.done, step.total) for step in steps] == [(n + 1, 12) for n in range(12)]
    assert [step.window_left for step in steps] == [3, 2, 1, 0] * 3
    assert [step.done for step in steps if step.state is not None] == [4, 8]
    state = steps[3].state
    assert state is not None
    changed = CODES.copy()
    changed[0, 99] += 1
    with pytest.raises(ValueError, match="do not begin with"):
        engine.advance(state, changed, ended=True)


def test_how_much_a_window_still_takes_is_known(tiny: NativeCodec) -> None:
    left = [step.window_left for step in tiny.decode(CODES[:, :800], seed=SEED)]
    a_window = list(range(13, -1, -1))  # two Euler steps, twelve stretches of waveform
    assert left[:28] == a_window * 2
    assert left[28:] == list(range(len(left) - 29, -1, -1))


@dataclasses.dataclass(frozen=True)
class Made:
    """A song in pieces, and how many of them earlier turns stored."""

    pieces: list[Piece]
    stored: int


@functools.cache
def made(engine: NativeCodec, frames: int, cuts: tuple[int, ...]) -> Made:
    """A song of which each process decodes what is final, stores it, and leaves the rest to another."""
    packed, pieces, stored = begun(engine).pack(), list[Piece](), 0
    for cut in cuts:
        saved = SavedDecode.unpack(packed)
        stream, window, ended = SongStream(saved, engine.sample_rate), list[np.ndarray | None](), cut == frames
        for step in engine.advance(saved.state, CODES[:, :cut], ended=ended):
            window.append(step.audio)
            if step.state is not None:
                pieces.append(stream.add(joined(window)))
                packed = stream.save(step.state)
                window.clear()
        if ended:
            pieces.append(stream.add(joined(window), last=True))
        else:
            stored = len(pieces)
    return Made(pieces, stored)


def begun(engine: NativeCodec) -> SavedDecode:
    return SavedDecode(
        engine=engine.identity,
        state=DecodeState(seed=SEED),
        header=stream_header(engine.sample_rate, TAGS),
        rest=np.zeros((0, 2), np.int16),
        peaks=Peaks(engine.sample_rate),
    )


@pytest.mark.parametrize(
    ("name", "frames", "cuts", "formats"),
    [
        ("tiny", 1013, (1013,), ("flac", "wav", "ogg")),  # MP3 knows no such sample rate
        ("tiny", 1013, (372, 1013), ("flac", "wav", "ogg")),
        ("tiny", 1013, (400, 692, 699, 1013), ("flac", "wav", "ogg")),
        ("demo", 700, (400, 692, 700), ("flac", "wav", "ogg", "mp3")),
    ],
)
def test_the_files_of_a_song_that_was_decoded_bit_by_bit_are_those_of_the_whole_song(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    name: str,
    frames: int,
    cuts: tuple[int, ...],
    formats: tuple[AudioFormat, ...],
) -> None:
    engine: NativeCodec = request.getfixturevalue(name)
    song, header, rate = made(engine, frames, cuts), begun(engine).header, engine.sample_rate
    for audio_format in formats:
        with AudioWriter(tmp_path / "whole", plain(audio_format), rate, TAGS) as writer:
            writer.write(whole(engine, CODES[:, :frames]))
        with SongFile(tmp_path, "song", audio_format, header, rate, TAGS) as file:
            for index, piece in enumerate(song.pieces):
                if index < song.stored:
                    part = AudioPart(key="k", size=len(piece.frames), samples=len(piece.pcm))
                    file.add_part(part, piece.frames)
                else:
                    file.add(piece)
            file.finish()
        assert file.path.read_bytes() == (tmp_path / "whole").read_bytes(), audio_format


def test_other_settings_and_other_weights_are_another_engine(tiny: NativeCodec, demo: NativeCodec) -> None:
    others = [NativeCodec(TINY, "cpu", "float32", steps=3), NativeCodec(TINY, "cpu", "float32", steps=2, guidance=1.0)]
    assert len({engine.identity for engine in (tiny, demo, *others)}) == 4
    assert NativeCodec(TINY, "cpu", "bfloat16", steps=2).identity == tiny.identity, "cards differ in what they can"


def test_weights_that_were_trained_further_are_another_engine(tmp_path: Path, tiny: NativeCodec) -> None:
    folder = tmp_path / TINY.codec_path.name
    shutil.copytree(TINY.codec_path, folder)
    checkpoint = msgspec.structs.replace(TINY, codec_path=folder)
    assert NativeCodec(checkpoint, "cpu", "float32", steps=2).identity == tiny.identity
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert NativeCodec(checkpoint, "cpu", "float32", steps=2).identity != tiny.identity
