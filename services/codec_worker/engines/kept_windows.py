"""What the codec takes over for a song that goes on from another one, so that the kept part sounds as it did there."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from shared.model.codec_windows import noise_seed
from shared.storage.token_file import EarlierWindow


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptWindows:
    """The windows that a song shares, or begins, with earlier songs. As made by ``KeptWindows()``: there are none."""

    seeds: tuple[int, ...] = ()  # of the noise of the song's first windows, which the kept frames fill
    earlier: tuple[EarlierWindow, ...] = ()  # windows in which songs part, the oldest song of each first

    def seed(self, window: int, own: int) -> int:
        """The seed of a window's noise; `own` is the song's."""
        return noise_seed(self.seeds, window, own)

    def parting(self, window: int) -> Sequence[EarlierWindow]:
        """A window as the earlier songs have it that part in it, the oldest first. None where no songs do."""
        return [found for found in self.earlier if found.window == window]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it; empty where there is nothing."""
        if not self.seeds and not self.earlier:
            return ""
        found = hashlib.sha256(repr(self.seeds).encode())
        for item in self.earlier:
            found.update(repr((item.window, item.frames, item.seed)).encode() + item.codes.tobytes())
        return found.hexdigest()


NOTHING_KEPT = KeptWindows()
