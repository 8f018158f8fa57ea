"""Engines without a model, for testing the flow of jobs: a frame becomes a beep of 80 ms, and its checksum a frame."""

import time
import zlib
from functools import lru_cache
from itertools import pairwise

import numpy as np

from services.codec_worker.encoder.chunks import FRAMES, chunk_count, frame_count
from services.codec_worker.encoder.chunks import samples_of as resampled
from services.codec_worker.engines.base import (
    NOTHING_KEPT,
    DecodeState,
    DecodeStep,
    DecodeSteps,
    EncodeStep,
    EncodeSteps,
    KeptWindows,
)
from services.codec_worker.engines.decode_state import digest
from shared.frames import samples_of
from shared.model.codec_windows import CodecWindows
from shared.model.sizes import TrivialSizes

FRAMES_A_STEP = 25
_WINDOWS = CodecWindows()  # those of HeartCodec
_CODES = 64  # that there are; the trivial codec makes two octaves and a half of them


class TrivialCodec:
    """Makes beeps whose pitch follows codebook 0 and whose loudness follows codebook 1, at a settable pace.

    Their phase follows from the seed, where the codec's noise would. It has windows as HeartCodec has them: when the
    codes of one are there, all but its overlap with the next sound. A step makes two seconds of audio and takes
    `step_ms`; where `window_ms` is set, a window takes that, however long it is. Moving to the device or back takes
    `swap_ms`.
    """

    notes: tuple[str, ...] = ()
    sample_rate = 8000
    weight_bytes = TrivialSizes.CODEC
    work_bytes = TrivialSizes.CODEC_WORK

    def __init__(self, step_ms: int, *, windows: CodecWindows = _WINDOWS, window_ms: int = 0, swap_ms: int = 0) -> None:
        self._windows = windows
        self._step, self._window, self._swap = step_ms / 1000, window_ms / 1000, swap_ms / 1000

    @property
    def identity(self) -> str:
        """The windows."""
        return f"trivial, windows {self._windows.length}/{self._windows.hop}"

    def load(self) -> None:
        """Read nothing: there are no weights."""

    def to_device(self) -> None:
        """Move nothing: there are no weights. It takes its time."""
        time.sleep(self._swap)

    def to_host(self) -> None:
        """Move nothing, likewise."""
        time.sleep(self._swap)

    def decode(self, codes: np.ndarray, *, seed: int) -> DecodeSteps:
        """Make beeps, two seconds of audio a step."""
        return self.advance(DecodeState(seed=seed), codes, ended=True)

    def advance(
        self, state: DecodeState, codes: np.ndarray, *, ended: bool, kept: KeptWindows = NOTHING_KEPT
    ) -> DecodeSteps:
        """Make beeps, two seconds of audio a step, window by window.

        Raises `ValueError` for codes that do not continue those that `state` comes from.
        """
        if not state.continues(codes, kept):
            raise ValueError("these codes do not begin with those that were decoded before")
        return self._decode(state, codes, ended, kept)

    def _decode(self, state: DecodeState, codes: np.ndarray, ended: bool, kept: KeptWindows) -> DecodeSteps:
        stretches = self._stretches(state.window, codes.shape[1], ended)
        done, total = 0, sum(len(cuts) - 1 for _, cuts in stretches)
        for window, cuts in stretches:
            for start, stop in pairwise(cuts):
                time.sleep(self._window / (len(cuts) - 1) if self._window else self._step)
                done += 1
                last_of_window = stop == cuts[-1]
                after = self._after(state.seed, window, codes, ended, kept) if last_of_window else None
                left = sum(cut > stop for cut in cuts)
                phases = self._phases(state.seed, range(start, stop), kept)
                yield DecodeStep(done, total, self._beeps(codes[:, start:stop], phases), after, left)

    def _stretches(self, first: int, frames: int, ended: bool) -> list[tuple[int, list[int]]]:
        """The windows that can be made from the one of index `first` on, each with the frames at which steps begin."""
        length, hop = self._windows.length, self._windows.hop
        count = max(1, -(-(frames - (length - hop)) // hop)) if ended else self._windows.final(frames)
        found = []
        for window in range(first, max(count, first + 1) if ended else count):
            start = window * hop
            stop = frames if ended and window >= count - 1 else start + hop
            if start < stop:
                found.append((window, [*range(start, stop, FRAMES_A_STEP), stop]))
        return found

    def _after(self, seed: int, window: int, codes: np.ndarray, ended: bool, kept: KeptWindows) -> DecodeState | None:
        """The state after a window; None where the song ends with it."""
        end = window * self._windows.hop + self._windows.length
        if ended and end >= codes.shape[1]:
            return None
        samples = samples_of((window + 1) * self._windows.hop, self.sample_rate)
        return DecodeState(
            seed=seed,
            window=window + 1,
            samples=samples,
            taken=end,
            codes=digest(codes[:, :end]),
            kept=kept.digest,
        )

    def _phases(self, seed: int, frames: range, kept: KeptWindows) -> np.ndarray:
        """Phases of the beeps of a song's `frames`, in radians, float64 ``[frames]``."""
        hop, earlier = self._windows.hop, kept.earlier
        # A later song may have kept less than the one before it had of that one's own.
        ends = [min(later.frames for later in earlier[number:]) for number in range(len(earlier))]

        def seed_at(frame: int) -> int:
            songs = zip(earlier, ends, strict=True)
            before = (found.seed for found, end in songs if found.window * hop <= frame < end)
            return next(before, kept.seed(frame // hop, seed))

        return np.array([_phase(seed_at(frame)) for frame in frames])

    def _beeps(self, codes: np.ndarray, phases: np.ndarray) -> np.ndarray:
        """Beeps of int16 ``[8, T]`` codes, float32 ``[samples, 2]``."""
        samples = samples_of(1, self.sample_rate)
        time_axis = np.arange(samples, dtype=np.float32) / self.sample_rate
        swell = np.sin(np.pi * np.arange(samples) / samples)  # no clicks between beeps
        pitch, loudness = 220 * 2 ** (codes[0] / 24), 0.05 + 0.25 * codes[1] / 64  # [frames] Hz, of 1
        waves = np.sin(2 * np.pi * pitch[:, None] * time_axis + phases[:, None])  # [frames, samples]
        tone = (loudness[:, None] * swell * waves).reshape(-1, 1)  # [samples, 1]
        return np.repeat(tone, 2, axis=1).astype(np.float32)


@lru_cache(maxsize=1024)
def _phase(seed: int) -> float:
    return float(np.random.SeedSequence(seed).generate_state(1)[0]) / 2**32 * 2 * np.pi


class TrivialEncoder:
    """Makes codes of the checksums of frames. A step is a chunk and takes `step_ms`; a move takes `swap_ms`."""

    identity = "trivial encoder"
    weight_bytes = TrivialSizes.ENCODER
    work_bytes = TrivialSizes.CODEC_WORK

    def __init__(self, step_ms: int, *, swap_ms: int = 0) -> None:
        self._step, self._swap = step_ms / 1000, swap_ms / 1000

    def load(self) -> None:
        """Read nothing: there are no weights."""

    def to_device(self) -> None:
        """Move nothing: there are no weights. It takes its time."""
        time.sleep(self._swap)

    def to_host(self) -> None:
        """Move nothing, likewise."""
        time.sleep(self._swap)

    def encode(self, audio: np.ndarray, sample_rate: int, *, first: int = 0) -> EncodeSteps:
        """Make codes, a chunk a step. Raises `ValueError` for a chunk that there is not."""
        samples = resampled(audio.shape[1], sample_rate)
        chunks, frames = chunk_count(samples), frame_count(samples)
        if not 0 <= first < chunks:
            raise ValueError(f"a recording of {chunks} chunks has no chunk {first}")
        return self._encode(audio, sample_rate, range(first, chunks), frames)

    def _encode(self, audio: np.ndarray, sample_rate: int, chunks: range, frames: int) -> EncodeSteps:
        for done, chunk in enumerate(chunks, 1):
            time.sleep(self._step)
            within = range(chunk * FRAMES, min((chunk + 1) * FRAMES, frames))
            codes = [
                _codes(audio[:, frame * 2 * sample_rate // 25 : (frame + 1) * 2 * sample_rate // 25])
                for frame in within
            ]
            yield EncodeStep(done, len(chunks), np.stack(codes, axis=1))


def _codes(frame: np.ndarray) -> np.ndarray:
    """Eight codes of a frame, float32 ``[channels, samples]``."""
    checksum = zlib.crc32(np.ascontiguousarray(frame).tobytes())
    return np.random.default_rng(checksum).integers(0, _CODES, 8).astype(np.int16)
