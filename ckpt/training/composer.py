"""Composes songs by rule: harmony by a walk over degrees, melody by weighted steps, everything else by the genre."""

import numpy as np

from ckpt.training import codes
from ckpt.training.music import GENRES, KEYS, MOODS, PHRASES, SECTIONS, TIMBRES, Part, Style, parts

_DEGREES = {  # semitones above the tonic, and whether the chord is minor
    "happy": ((0, 0), (2, 1), (4, 1), (5, 0), (7, 0), (9, 1)),
    "sad": ((0, 1), (3, 0), (5, 1), (7, 0), (8, 0), (10, 0)),
}
_NEXT = {  # how likely each degree follows each
    "happy": (
        (0, 2, 1, 4, 3, 4),
        (0, 0, 0, 1, 5, 0),
        (0, 0, 0, 3, 0, 3),
        (4, 2, 0, 0, 5, 1),
        (5, 0, 0, 2, 0, 3),
        (0, 3, 0, 5, 2, 0),
    ),
    "sad": (
        (0, 1, 4, 3, 4, 1),
        (2, 0, 3, 0, 2, 0),
        (4, 0, 0, 4, 1, 0),
        (6, 0, 1, 0, 2, 0),
        (2, 1, 4, 3, 0, 0),
        (3, 2, 0, 0, 2, 0),
    ),
}
_CLOSING = {"happy": (3, 0, 0, 2, 3, 1), "sad": (4, 0, 2, 3, 1, 0)}  # the last bar of a line
_SCALES = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 11)}  # major, and harmonic minor


def _choose(rng: np.random.Generator, weights: "np.ndarray | tuple[float, ...]") -> int:
    p = np.asarray(weights, float)
    return int(rng.choice(len(p), p=p / p.sum()))


def style_of(tags: dict[str, str], rng: np.random.Generator) -> Style:
    """Chosen by the tags "genre", "tempo", "instrument" and "mood"; what is not named suits the genre."""
    names = tuple(GENRES)
    genre = names.index(tags["genre"]) if "genre" in tags else _choose(rng, (4, 2, 2, 2, 2, 2, 2, 1))
    grammar = GENRES[names[genre]]
    tempo = ("slow", "medium", "fast").index(tags["tempo"]) if "tempo" in tags else _choose(rng, grammar.tempi)
    timbre = tags.get("instrument") or grammar.timbres[rng.integers(len(grammar.timbres))]
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
    """A song as codes, int16 ``[8, T]``. The entries are section names, and the syllables of each line."""
    song = _Song(style, rng)
    for part in parts(entries):
        song.play(part)
    return codes.pack({name: np.array(values) for name, values in song.fields.items()})


class _Song:
    """Grows bar by bar. `fields` holds what `codes.pack` takes."""

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style, self.genre, self.rng = style, style.grammar, rng
        self.tonic, self.mood = KEYS[style.key]
        self.fields: dict[str, list[tuple[int, ...]]] = {name: [] for name in codes.STREAMS}
        self.degree, self.pitch, self.frames = 0, 0, 0

    def play(self, part: Part) -> None:
        slots = self.genre.slots
        begins = set(onsets(part, slots))
        ends = part.bars * slots - (1 if part.kind != "end" else 0)
        tone = None  # of the melody: its pitch and the frame at which it began
        for bar in range(part.bars):
            self.degree = self._harmony(part, bar)
            phrase = PHRASES.index((part.kind, part.syllables, bar))
            at = self.style.slot_frames()
            starts = [frame + self.frames for frame in [*at, self.style.bar]]
            for slot in range(slots):
                here = bar * slots + slot
                if here in begins:
                    last = here == max(begins)
                    self.pitch = self._melody(part, slot, last=last)
                    tone = (self.pitch, starts[slot])
                elif here >= ends:
                    tone = None
                for frame in range(starts[slot], starts[slot + 1]):
                    self._write("melody", *self._tone(tone, frame))
            self._accompany(part)
            for frame in range(self.style.bar):
                self._write("place", part.entry, part.section)
                self._write("phrase", phrase, self.style.genre)
                self._write("beat", codes.beat(self.style.tempo, self.genre.beats, frame))
                self._write("wheels", (self.frames + frame) % codes.CLOCK, self.style.timbre)
            self.frames += self.style.bar

    def _write(self, stream: str, *fields: int) -> None:
        self.fields[stream].append(fields)

    @staticmethod
    def _tone(tone: tuple[int, int] | None, frame: int) -> tuple[int]:
        if tone is None:
            return (codes.SILENT_MELODY,)
        age = min(frame - tone[1], codes.MELODY_AGES - 1)
        return ((tone[0] - codes.MELODY[0]) * codes.MELODY_AGES + age,)

    def _harmony(self, part: Part, bar: int) -> int:
        if part.kind == "end" or (part.kind != "line" and bar == 0) or self.frames == 0:
            return 0
        if part.kind == "line" and bar == part.bars - 1:
            weights = np.array(_CLOSING[self.mood], float)
            weights[self.degree] /= 4
        else:
            weights = np.array(_NEXT[self.mood][self.degree], float)
        return _choose(self.rng, weights)

    @property
    def chord(self) -> tuple[int, int]:
        """Its root as a pitch class, and whether it is minor."""
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
        """A bar of chord, bass and drums."""
        section, genre = SECTIONS[part.section], self.genre
        full = section in ("chorus", "solo") or part.kind == "end"
        thin = section in ("intro", "outro") and part.kind != "end"
        at = self.style.slot_frames()
        slot_at = {frame: slot for slot, frame in enumerate(at)}
        strikes = (0,) if part.kind == "end" else genre.chords
        bass = {} if thin else {0: 0} if part.kind == "end" or section == "bridge" else genre.bass
        kick, snare, hat = self._drums(part)
        root, minor = self.chord
        chord = bass_tone = None
        ages = [0, 0, 0]
        for frame in range(self.style.bar):
            slot = slot_at.get(frame)
            if not genre.chords and part.kind != "end":
                tone = (0, 2, 1, 2)[max(i for i, f in enumerate(at) if f <= frame) % 4]
                state = 1 + 2 * codes.BLOCK_AGES + 2 * tone + (slot is None)
            else:
                chord = frame if slot in strikes else chord
                state = 0
                if chord is not None:
                    age = frame - chord
                    state = 1 + (codes.BLOCK_AGES if full else 0) + (0, 1, 2, 2, 3)[min(age, 4)]
            self._write("chord", root, minor, state)
            if slot in bass:
                bass_tone = (codes.BASS[0] + root + bass[slot] - (minor if bass[slot] == 4 else 0), frame)
            field = codes.SILENT_BASS
            if bass_tone is not None:
                age = min(frame - bass_tone[1], codes.BASS_AGES - 1)
                field = (bass_tone[0] - codes.BASS[0]) * codes.BASS_AGES + age
            self._write("bass", field)
            for drum, struck in enumerate((kick, snare, hat)):
                older = ages[drum] + 1 if 0 < ages[drum] < codes.DRUM_AGES[drum] - 1 else 0
                ages[drum] = 1 if slot in struck else older
            self._write("drums", *ages, self.style.key)

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
