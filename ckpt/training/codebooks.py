"""The codec's codebooks, in closed form: what each code contributes to the sound, compressed stream by stream."""

import numpy as np
import torch
from torch import Tensor

from ckpt.training import codes
from ckpt.training.music import TIMBRES
from ckpt.training.synthesizer import TABLES

WIDTH = 192
_RANKS = {"melody": 72, "chord": 54, "bass": 23}
_DRUM_STATES = sum(ages - 1 for ages in codes.DRUM_AGES)
assert sum(_RANKS.values()) + codes.CLOCK + len(TIMBRES) + _DRUM_STATES == WIDTH


def codebooks() -> Tensor:
    """fp32 ``[8, CODES, WIDTH]``; every stream has entries of its own, so that their sum loses nothing.

    The gains of melody, chord and bass are reduced by a singular value decomposition to as many entries as are given to
    them; clock, timbre and drums are one-hot. The streams that do not sound are 0.
    """
    books = np.zeros((len(codes.STREAMS), codes.CODES, WIDTH), np.float32)
    number = {stream: index for index, stream in enumerate(codes.STREAMS)}
    first = 0
    for stream, rank in _RANKS.items():
        table = TABLES[stream].reshape(len(TABLES[stream]), -1)
        left, values, _ = np.linalg.svd(table, full_matrices=False)
        rows = left[:, :rank] * values[:rank] ** 0.5  # the root: faint details are to be seen, too
        books[number[stream], : len(rows), first : first + rank] = rows / rows.std(0).max()
        first += rank
    for code in range(int(np.prod(codes.STREAMS["wheels"]))):
        clock, timbre = np.unravel_index(code, codes.STREAMS["wheels"])
        books[number["wheels"], code, [first + clock, first + codes.CLOCK + timbre]] = 1
    first += codes.CLOCK + len(TIMBRES)
    for code in range(int(np.prod(codes.STREAMS["drums"]))):
        place = first
        for age, ages in zip(np.unravel_index(code, codes.STREAMS["drums"])[:-1], codes.DRUM_AGES, strict=True):
            if age:
                books[number["drums"], code, place + age - 1] = 1
            place += ages - 1
    return torch.from_numpy(books)
