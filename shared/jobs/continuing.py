"""What a song takes over from the one that it goes on from."""

from dataclasses import dataclass

import numpy as np

from shared.model.codec_windows import CodecWindows, noise_seed
from shared.schema.job import Job
from shared.storage.token_file import EarlierWindow


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptTokens:
    """The first frames of a song, for one that goes on from there."""

    codes: np.ndarray  # int16 [8, frames]
    seeds: tuple[int, ...]  # of the codec's noise, for each of its windows that these frames fill
    earlier: tuple[EarlierWindow, ...]  # in which songs part, the one after those at last; the oldest song first


def window_seed(job: Job, window: int) -> int:
    """The seed of the codec's noise in a window of a song."""
    return noise_seed(job.parent.seeds if job.parent else (), window, job.request.seed or 0)


def kept_tokens(
    parent: Job, codes: np.ndarray, earlier: tuple[EarlierWindow, ...], frames: int, windows: CodecWindows | None
) -> KeptTokens:
    """What a song takes over that goes on after so many `frames` of its `parent`, from 1 to all.

    `codes` are all of the parent's, int16 ``[8, T]``, and `earlier` what lies beside them. Without `windows` the codec
    decodes songs as wholes, and nothing but the codes is taken over.
    """
    kept = np.ascontiguousarray(codes[:, :frames])
    if windows is None:
        return KeptTokens(codes=kept, seeds=(), earlier=())
    whole = windows.final(frames)
    positions = np.arange(whole * windows.hop, whole * windows.hop + windows.length) % codes.shape[1]
    parting = EarlierWindow(
        window=whole, frames=frames, seed=window_seed(parent, whole), codes=np.ascontiguousarray(codes[:, positions])
    )
    before = tuple(found for found in earlier if found.window <= whole)  # others are beyond what is kept
    return KeptTokens(
        codes=kept, seeds=tuple(window_seed(parent, window) for window in range(whole)), earlier=(*before, parting)
    )
