"""Composition of songs by rule: harmony by a walk over degrees, melody by weighted steps, all else by the genre."""

from collections.abc import Iterable

import numpy as np

from ckpt.training import codes
from ckpt.training.music import GENRES, KEYS, MOODS, PHRASES, SECTIONS, TIMBRES, Part, Style, parts

_DEGREES = {  # semitones above the tonic, and whether the chord is minor
    "happy": ((0, 0), (2, 1), (4, 1), (5, 0), (7, 0), (9, 1)),
    "sad": ((0, 1), (3, 0), (5, 1), (7, 0), (8, 0), (10, 0)),
}
_NEXT = {  # how likely each degree follows each, a digit for it
    "happy": ("021434", "000150", "000303", "420051", "500203", "030520"),
    "sad": ("014341", "203020", "400410", "601020", "214300", "320020"),
}
_CLOSING = {"happy": (3, 0, 0, 2, 3, 1), "sad": (4, 0, 2, 3, 1, 0)}  # the last bar of a line
_SCALES = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 11)}  # major, and harmonic minor


def _choose(rng: np.random.Generator, weights: "np.ndarray | tuple[float, ...]") -> int:
    p = np.asarray(weights, float)
    return int(rng.choice(len(p), p=p / p.sum()))


def style_of(tags: dict[str, str], rng: np.random.Generator) -> Style:
    """Chosen by the tags "genre", "tempo", "instrument" and "mood"; what is not named is random, the tempo
    as suits the genre."""
    names = tuple(GENRES)
    genre = names.index(tags["genre"]) if "genre" in tags else _choose(rng, (4, 2, 2, 2, 2, 2, 2, 1))
    grammar = GENRES[names[genre]]
    tempo = ("slow", "medium", "fast").index(tags["tempo"]) if "tempo" in tags else _choose(rng, grammar.tempi)
    timbre = tags.get("instrument") or TIMBRES[rng.integers(len(TIMBRES))]
    mood = tags.get("mood") or MOODS[_choose(rng, (2, 1))]
    keys = [number for number, (_, of) in enumerate(KEYS) if of == mood]
    return Style(tempo, genre, TIMBRES.index(timbre), int(rng.choice(keys)))


def onsets(part: Part, slots: int) -> list[int]:
    """The slots of a part at which a syllable begins: spread as evenly as whole eighths allow (Toussaint 2005), with
    the last quarter left to breathe."""
    length = part.bars * slots - 2
    if part.kind == "line":
        return [syllable * length // part.syllables for syllable in range(part.syllables)]
    if part.kind == "instrumental" and SECTIONS[part.section] == "solo":
        return list(range(length))
    return [0] if part.kind == "end" else []


def compose(style: Style, entries: list[str | int], rng: np.random.Generator) -> np.ndarray:
    """Compose a song as codes, int16 ``[8, T]``. The entries are section names, and the syllables of each line."""
    song = _Song(style, rng)
    for part in parts(entries):
        song.play(part)
    return codes.pack({stream: np.concatenate(fields) for stream, fields in song.fields.items()})


def _since(strokes: Iterable[int], frames: int) -> np.ndarray:
    """Frames since the last stroke, for each frame; −1 before the first stroke."""
    age = np.full(frames, -1)
    for stroke in strokes:
        age[stroke:] = np.arange(frames - stroke)
    return age


class _Song:
    """A song that is composed part by part. `fields` holds the arguments of `codes.pack`."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style, self.genre, self.rng = style, style.grammar, rng
        self.tonic, self.mood = KEYS[style.key]
        self.at = np.array(style.slot_frames())  # where in a bar its slots begin
        self.fields: dict[str, list[np.ndarray]] = {stream: [] for stream in codes.STREAMS}
        self.degree, self.pitch, self.frames = 0, 0, 0

    def play(self, part: Part) -> None:
        slots, bar = self.genre.slots, np.arange(self.style.bar)
        begins, pitches = onsets(part, slots), []
        for number in range(part.bars):
            self.degree = self._harmony(part, number)
            for here in begins:
                if here // slots == number:
                    self.pitch = self._melody(part, here % slots, last=here == begins[-1])
                    pitches.append(self.pitch)
            phrase = PHRASES.index((part.kind, part.syllables, number))
            self._write("place", part.entry, part.section)
            self._write("phrase", phrase, self.style.genre)
            self._write("beat", codes.beat(self.style.tempo, self.genre.beats, 0) + bar)
            self._write("wheels", (self.frames + bar) % codes.CLOCK, self.style.timbre)
            self._accompany(part)
            self.frames += len(bar)
        starts = np.concatenate([number * len(bar) + self.at for number in range(part.bars)])
        age = _since(starts[begins], part.bars * len(bar))
        if part.kind != "end":
            age[starts[-1] :] = -1  # the last eighth is for breath
        pitch = np.array([0, *pitches])[np.cumsum(age == 0)] - codes.MELODY[0]
        tone = pitch * codes.MELODY_AGES + np.minimum(age, codes.MELODY_AGES - 1)
        self._write("melody", np.where(age < 0, codes.SILENT_MELODY, tone))

    def _write(self, stream: str, *fields: int | np.ndarray) -> None:
        """Write one value for all frames of a bar, or one for each."""
        every = np.zeros(self.style.bar if stream != "melody" else np.shape(fields[0]), int)
        self.fields[stream].append(np.stack([every + field for field in fields], axis=1))

    def _harmony(self, part: Part, bar: int) -> int:
        if part.kind == "end" or (part.kind != "line" and bar == 0) or self.frames == 0:
            return 0
        if part.kind == "line" and bar == part.bars - 1:
            weights = np.array(_CLOSING[self.mood], float)
            weights[self.degree] /= 4
        else:
            weights = np.array([*_NEXT[self.mood][self.degree]], float)
        return _choose(self.rng, weights)

    @property
    def chord(self) -> tuple[int, int]:
        """Root of the present chord as a pitch class, and whether the chord is minor."""
        above, minor = _DEGREES[self.mood][self.degree]
        return (self.tonic + above) % 12, minor

    def _melody(self, part: Part, slot: int, *, last: bool) -> int:
        root, minor = self.chord
        pitches = np.array(codes.MELODY)
        chordal = np.isin((pitches - root) % 12, (0, 4 - minor, 7))
        weights = np.isin((pitches - self.tonic) % 12, _SCALES[self.mood]) * 1.0
        if part.kind == "end":
            weights = ((pitches - self.tonic) % 12 == 0) * 1.0
        elif last:
            weights = chordal * 1.0
        elif slot % 4 == 0:
            weights = 4.0 * chordal + 0.3 * weights
        else:
            weights += chordal
        middle = 71 if SECTIONS[part.section] in ("chorus", "solo") else 65
        near = self.pitch or middle
        weights *= np.exp(-(((pitches - near) / 3.5) ** 2) / 2 - ((pitches - middle) / 6.0) ** 2 / 2)
        weights[pitches == near] *= 0.4
        return int(pitches[_choose(self.rng, weights)])

    def _accompany(self, part: Part) -> None:
        """Write chord, bass and drums of a bar."""
        section, genre, at, frames = SECTIONS[part.section], self.genre, self.at, self.style.bar
        root, minor = self.chord
        slot = np.searchsorted(at, np.arange(frames), side="right") - 1
        if genre.chords or part.kind == "end":
            full = section in ("chorus", "solo") or part.kind == "end"
            age = _since(at[list((0,) if part.kind == "end" else genre.chords)], frames)
            state = 1 + codes.BLOCK_AGES * full + np.array((0, 1, 2, 2, 3))[age.clip(0, 4)]
            self._write("chord", root, minor, np.where(age < 0, 0, state))
        else:
            tone = np.array((0, 2, 1, 2))[slot % 4]
            self._write("chord", root, minor, 1 + 2 * codes.BLOCK_AGES + 2 * tone + (_since(at, frames) > 0))
        bass = {0: 0} if part.kind == "end" or section == "bridge" else genre.bass
        bass = {} if section in ("intro", "outro") and part.kind != "end" else bass
        age = _since(at[list(bass)], frames)
        above = np.array([bass.get(n, 0) - (minor if bass.get(n) == 4 else 0) for n in range(genre.slots)])
        note = root + above[slot[np.arange(frames) - age.clip(0)]]
        tone = note * codes.BASS_AGES + np.minimum(age, codes.BASS_AGES - 1)
        self._write("bass", np.where(age < 0, codes.SILENT_BASS, tone))
        drums = []
        for struck, ages in zip(self._drums(part), codes.DRUM_AGES, strict=True):
            age = _since(at[list(struck)], frames) + 1
            drums.append(np.where(age < ages, age, 0))
        self._write("drums", *drums, self.style.key)

    def _drums(self, part: Part) -> tuple[tuple[int, ...], ...]:
        """The slots of this bar at which kick, snare and hat are struck."""
        section, genre = SECTIONS[part.section], self.genre
        if part.kind == "end":
            return genre.kick[:1], (), genre.hat[:1]
        if section in ("intro", "outro"):
            return (), (), ()
        if part.kind == "break" and genre.kick:
            return genre.kick[:1], (4, 5, 6, 7), ()
        if section == "bridge":
            return genre.kick[:1], (), genre.hat[:1]
        verse = tuple(slot for slot in genre.hat if slot % 2 == 0)
        return genre.kick, genre.snare, genre.hat if section in ("chorus", "solo") else verse
