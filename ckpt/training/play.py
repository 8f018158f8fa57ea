"""Playing of a checkpoint by the services' own engines, with their default values, on the CPU in fp32."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.model.flow_matching import STEPS
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.model.checkpoint import open_checkpoint
from shared.model.prompt import Prompter

TOGETHER = 8  # songs in a batch


class Player:
    """Both engines of a checkpoint, loaded."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.prompter = Prompter(self.checkpoint)
        self.rate = self.checkpoint.codec.sample_rate
        self._engine = NativeEngine(self.checkpoint, "cpu", "float32", TOGETHER)
        self._codec = NativeCodec(self.checkpoint, "cpu", "float32", steps=steps)
        for network in (self._engine, self._codec):
            network.load()
            network.to_device()

    def write(
        self, asked: Sequence[tuple[str, str]], seed: int, longest: int, after: Sequence[np.ndarray] = (), new: int = 0
    ) -> list[np.ndarray]:
        """Make the codes of each song from its tags and lyrics, int16 ``[8, T]``, with at most `longest` frames.

        With `after` each goes on from such frames, which are counted, and does not end within `new` more.
        """
        frames: list[list[np.ndarray]] = [list(kept.T) for kept in after] or [[] for _ in asked]
        waiting, playing = list(enumerate(asked)), 0
        while waiting or playing:
            while waiting and playing < TOGETHER:
                number, (tags, lyrics) = waiting.pop(0)
                kept = np.stack(frames[number], axis=1) if frames[number] else None
                least = len(frames[number]) + new if new else 0
                prompt = self.prompter.encode(tags, lyrics)
                song = Song(prompt=prompt, max_frames=longest, min_frames=least, seed=seed + number)
                self._engine.admit(str(number), song, kept)
                playing += 1
            for name, frame in self._engine.step().items():
                if frame is None:
                    playing -= 1
                else:
                    frames[int(name)].append(frame)
        return [np.stack(song, axis=1) if song else np.zeros((8, 0), np.int16) for song in frames]

    def sound(self, song: np.ndarray) -> np.ndarray:
        """Decode codes to stereo audio, float32 ``[2, samples]``."""
        pieces = [step.audio for step in self._codec.decode(song, seed=1) if step.audio is not None]
        return np.concatenate(pieces).T
