"""The interface of a token engine: tensors in, frames out. An engine knows nothing of NATS, S3 or HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.errors import SongError
from shared.model.prompt import Prompt

PARKED_SECONDS = 900.0  # for which a paused song's caches are kept


@dataclass(frozen=True, kw_only=True)
class Song:
    """A song as an engine sees it."""

    prompt: Prompt
    max_frames: int  # 80 ms each, at least 1
    min_frames: int = 0  # the model cannot end the song before: no code from `audio_eos_id` on is drawn until then
    temperature: float = 1.0  # 0 is greedy
    topk: int = 50
    cfg_scale: float = 1.5  # 1 runs one row instead of two
    seed: int = 0  # same song, same engine, same frames

    @property
    def rows(self) -> int:
        """Rows that the song takes: a conditional one and, with guidance, an unconditional one."""
        return 1 if self.cfg_scale == 1 else 2


class TokenEngine(Protocol):
    """An engine that makes frames for up to `slots` songs at once. Its methods block: call them in their own thread.

    Order of calls: `load` once; then turns of `to_device`, any number of `admit` / `step` / `drop` / `park`, `to_host`.
    """

    slots: int

    @property
    def notes(self) -> Sequence[str]:
        """What it does without on this machine, a line for people each, as "no C compiler: …"; mostly none."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""

    def song_bytes(self, song: Song) -> int:
        """Bytes that a song's caches will take on the device."""

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError` when the checkpoint does not fit the layout."""

    def to_device(self) -> None:
        """Move the weights to the device."""

    def to_host(self) -> None:
        """Drop every song and cache, move the weights to host memory, give the device's memory back.

        What `park` kept in host memory stays.
        """

    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Take a song into the batch: allocate its caches and prefill its prompt.

        With `frames`, int16 ``[8, T]`` made earlier (by this engine or an equal one), the song continues after them
        as if it had never been interrupted; if it was parked here with exactly these frames, its caches are copied back
        instead of prefilled. So are those of another song, in the batch or parked, that began with an equal prompt and
        equal frames: of variants only the first is prefilled.

        Raises `DeviceFull` when the batch as it is leaves no room; then the song is not in it and nothing else has
        changed. Raises `ValueError` when there is no free slot or the id is taken, and as `check_frames`.
        """

    def step(self) -> dict[str, np.ndarray | None]:
        """Make the next frame of every song in the batch.

        Returns, a song, its frame as int16 ``[8]``, or None when the song has ended (by an end token or at
        `max_frames`); an ended song has left the batch. A song whose frame is still being made is not in it. After
        `DeviceFull` every song is as it was before.
        """

    def drop(self, song_id: str) -> None:
        """Take a song out of the batch and free its caches. Unknown ids are ignored."""

    def park(self, song_id: str, frames: np.ndarray) -> None:
        """Take a song out of the batch that is to come back with `frames`, all that it has, int16 ``[8, T]``.

        As `drop`; but its caches may be kept in host memory, as far as there is room, for `PARKED_SECONDS`. Whatever is
        raised, the song has left the batch.
        """

    def expire(self) -> None:
        """Free the caches of parked songs that did not come back in time."""


def check_frames(frames: np.ndarray, codebooks: int, codes: int) -> None:
    """Check that `frames` are int16 ``[codebooks, T]`` of codes below `codes`.

    Raises `ValueError` for another shape, and `SongError` for other codes: frames that a song keeps may be of a song or
    recording that another checkpoint made.
    """
    if frames.dtype != np.int16 or frames.ndim != 2 or len(frames) != codebooks:
        raise ValueError(f"frames to continue from are {frames.dtype} {list(frames.shape)}, not int16 [{codebooks}, T]")
    if ((frames < 0) | (frames >= codes)).any():
        raise SongError(
            f"the frames that it keeps hold codes from {frames.min()} to {frames.max()}, and this model knows 0 to "
            f"{codes - 1}: another model made them, so go on from a song or recording of this one"
        )
