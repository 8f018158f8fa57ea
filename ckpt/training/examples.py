"""Random songs to learn from: tags, lyrics, and the codes that the composer makes of them."""

from dataclasses import dataclass

import numpy as np

from ckpt.training import composer
from ckpt.training.music import GENRES, LONGEST_LINE, MOODS, SECTIONS, TEMPI, TIMBRES, Style

_TAGS = {"genre": tuple(GENRES), "tempo": tuple(TEMPI), "instrument": TIMBRES, "mood": MOODS}


@dataclass(frozen=True)
class Example:
    """A song with the tags and lyrics that asked for it."""

    tags: dict[str, str]  # what is asked for, in the order of the prompt: a genre, a tempo, an instrument, a mood
    entries: list[str | int]  # section names, and syllables a line
    style: Style
    codes: np.ndarray  # int16 [8, T]


def draw_tags(rng: np.random.Generator, count: int | None = None) -> dict[str, str]:
    """Draw tags of `count` of the four kinds; without a count, of any number of kinds."""
    kinds = rng.permutation(list(_TAGS))[: rng.integers(len(_TAGS) + 1) if count is None else count]
    return {str(kind): str(rng.choice(_TAGS[str(kind)])) for kind in kinds}


def draw_entries(rng: np.random.Generator, count: int) -> list[str | int]:
    """Draw `count` entries of lyrics: section marks with lines after them, or lines alone."""
    marked = rng.random() < 0.8
    entries: list[str | int] = []
    while len(entries) < count:
        if marked:
            entries.append(str(rng.choice(SECTIONS, p=(0.1, 0.35, 0.35, 0.1, 0.05, 0.05))))
        middle = rng.integers(2, 11)  # lines of a stanza are alike
        for _ in range(rng.integers(0 if marked else 1, 7)):
            spread = rng.integers(-2, 3) if rng.random() < 0.8 else rng.integers(-8, 9)
            entries.append(int(np.clip(middle + spread, 1, LONGEST_LINE)))
    return entries[:count]


def draw(rng: np.random.Generator, tags: dict[str, str], entries: list[str | int]) -> Example:
    """Draw tags and lyrics, and compose a song for them."""
    style = composer.style_of(tags, rng)
    return Example(tags, entries, style, composer.compose(style, entries, rng))
