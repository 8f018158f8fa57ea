"""Windows of the codec as far as other stages know them: how many codes make audio final."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.schema.job import Job
from shared.settings import Settings


@dataclass(frozen=True)
class CodecWindows:
    """Lengths in codes (frames of 80 ms). Window n has the codes from ``n · hop`` to ``n · hop + length``."""

    length: int = 372
    hop: int = 320

    def final(self, frames: int) -> int:
        """Number of windows of which all codes are there, of a song that goes on."""
        return max(0, (frames - self.length) // self.hop + 1)


def noise_seed(seeds: Sequence[int], window: int, own: int) -> int:
    """The seed of the noise in a window of a song: its `own`, but for the first windows where there are `seeds`."""
    return seeds[window] if window < len(seeds) else own


def can_be_decoded(job: Job, windows: CodecWindows | None) -> bool:
    """Whether a song's record tells of tokens that could be decoded now; `windows` as `windows_of` returns them."""
    if job.status != "generating":
        return job.status == "decoding"
    return windows is not None and windows.final(job.saved_frames or 0) > job.decoded_windows


def windows_of(settings: Settings) -> CodecWindows | None:
    """The windows of the engine that the settings name; None where it waits for the song's end."""
    if settings.engine == "heartlib":
        return None
    return CodecWindows(*settings.trivial_window) if settings.engine == "trivial" else CodecWindows()
